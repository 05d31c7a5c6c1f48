"""Ensembles of sub-networks with a common trunk, as configs of a space of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from supple.errors import SettingError
from supple.space import Config, Site, Space

__all__ = ["SPLIT", "best_of", "ensembles", "members_of"]

FloatArray = NDArray[np.float64]

SPLIT = "split"
"""The site that says how many of the first layers all members share."""


def ensembles(space: Space, members: int = 2) -> Space:
    """Gives the space of ensembles of several sub-networks that begin alike.

    Sites of `space` count as layers, in their order. An ensemble shares the first of them,
    `split` many, and each member decides the others for itself.

    Args:
        space: The sub-networks there are; its sites must not depend on one another.
        members: Sub-networks in an ensemble, at least 1.

    Returns:
        A space with the site `split` and, for each member, the sites of `space` with the
        member's number before their names: those of member 0 always exist, those of the others
        from the split on.

    Raises:
        SettingError: There are no sites, they depend on one another, or `members` is below 1.

    Example:
        >>> layers = Space([Site(name, "operator", (0, 1, 2), 2) for name in ("a", "b")])
        >>> space = ensembles(layers)
        >>> space.size()  # 3**4 that share nothing, 3 * 3**2 that share the first layer
        108
        >>> space.config({"split": 1, "0.a": 2, "0.b": 0, "1.b": 1})
        Config({'0.a': 2, '0.b': 0, '1.b': 1, 'split': 1})
    """
    dependent = [site.name for site in space.sites if site.inside]
    if dependent or not space.sites or members < 1:
        raise SettingError(
            "ensembles need at least one member, and sites that do not depend on one another, "
            f"such as operators, got {members} and {', '.join(dependent) or len(space.sites)}; "
            "make the network elastic along fewer axes"
        )
    shared = tuple(range(len(space.sites)))
    sites = [Site(SPLIT, SPLIT, shared, 0)]
    for member in range(members):
        for layer, site in enumerate(space.sites):
            inside = ((SPLIT, frozenset(shared[: layer + 1])),) if member else ()
            name = f"{member}.{site.name}"
            sites.append(Site(name, site.axis, site.choices, site.full, inside))
    return Space(sites)


def members_of(space: Space, ensemble: Mapping[str, int]) -> list[Config]:
    """Gives the sub-networks of an ensemble.

    Args:
        space: The sub-networks there are.
        ensemble: A config of `ensembles(space, members)`.

    Returns:
        Canonical configs of `space`, one for each member.

    Example:
        >>> layers = Space([Site(name, "operator", (0, 1, 2), 2) for name in ("a", "b")])
        >>> [dict(m) for m in members_of(layers, {"split": 1, "0.a": 2, "0.b": 0, "1.b": 1})]
        [{'a': 2, 'b': 0}, {'a': 2, 'b': 1}]
    """
    numbers = {int(name.partition(".")[0]) for name in ensemble if name != SPLIT}
    return [
        space.config(
            {name: ensemble.get(f"{k}.{name}", ensemble[f"0.{name}"]) for name in space.names}
        )
        for k in sorted(numbers)
    ]


def best_of(
    space: Space,
    scores: Mapping[str, Sequence[float] | FloatArray],
    keep: Mapping[str, int],
) -> Space:
    """Gives a space in which only the best choices of sites are left.

    Args:
        space: The choices there are.
        scores: Site name to the score of each of its choices, in their order, more being
            better; the larger choice stays of two with the same.
        keep: Site name to how many choices stay, at least 1.

    Returns:
        The space without the others.

    Raises:
        SettingError: A site does not exist, or has another number of choices than of scores.

    Example:
        >>> space = Space([Site("layer", "operator", (0, 1, 2), 2)])
        >>> best_of(space, {"layer": (0.5, 0.1, 0.3)}, {"layer": 2}).site("layer").choices
        (0, 2)
    """
    dropped = {}
    for name, values in scores.items():
        choices = space.site(name).choices
        if len(values) != len(choices):
            raise SettingError(
                f"site {name!r} has {len(choices)} choices, got {len(values)} scores"
            )
        worst = np.argsort(np.asarray(values), kind="stable")
        dropped[name] = [choices[i] for i in worst[: max(0, len(choices) - keep[name])]]
    return space.without(dropped)
