"""What may vary in a network: configs, sites and the space of all configs.

A `Site` is one place of a network that has ordered choices; a `Config` assigns a choice to
each site; a `Space` is the product of its sites, less what cannot exist together (the width
of a block that is skipped is not a choice any more). This module knows nothing of networks:
it needs NumPy, and torch only to accept a `torch.Generator`.

Configs are *canonical*: a site that does not exist in a config is absent from it, so two
configs describe the same sub-network exactly if they are equal. Inner loops work on encoded
configs: one row of choice indices per config, where an absent site holds the index of its
full choice.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from supple.errors import SettingError, nearest

__all__ = ["Config", "Fixed", "Randomness", "Site", "Space", "numpy_generator"]

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]
Randomness = torch.Generator | np.random.Generator | int

_SHOWN_IN_REPR = 4
_SHOWN_EXACTLY = 10**9
_MOST_LISTED = 10**7


def numpy_generator(generator: Randomness) -> np.random.Generator:
    """Returns a NumPy generator for any source of randomness that Supple accepts.

    Args:
        generator: A NumPy generator (returned as it is, so its state advances), a
            `torch.Generator` (advanced by one draw, which seeds the result), or a seed, an
            integer of at least 0 (the same seed gives the same stream each time).

    Returns:
        A NumPy generator.

    Raises:
        SettingError: `generator` is none of these.

    Example:
        >>> int(numpy_generator(3).integers(100)) == int(numpy_generator(3).integers(100))
        True
    """
    if isinstance(generator, np.random.Generator):
        return generator
    if isinstance(generator, torch.Generator):
        drawn = torch.randint(2**62, (1,), generator=generator, device=generator.device)
        return np.random.default_rng(int(drawn.item()))
    if isinstance(generator, int | np.integer) and generator >= 0:
        return np.random.default_rng(int(generator))
    raise SettingError(
        f"generator must be a torch.Generator, a numpy.random.Generator or a seed >= 0, "
        f"got {generator!r}"
    )


class Config(Mapping[str, int]):
    """An immutable assignment of a choice to each site, sorted by site name.

    Args:
        choices: Site name to choice. Names are text, choices integers.

    Raises:
        SettingError: A name is not text or a choice is not an integer.

    Example:
        >>> a = Config({"fc1": 8, "conv": 4})
        >>> a
        Config({'conv': 4, 'fc1': 8})
        >>> a == Config.from_json(a.to_json()) == Config({"conv": 4, "fc1": 8})
        True
    """

    __slots__ = ("_choices", "_hash")
    _choices: dict[str, int]
    _hash: int

    def __init__(self, choices: Mapping[str, int]) -> None:
        pairs = [(_site_name(name), _choice(name, value)) for name, value in choices.items()]
        self._fill(sorted(pairs))

    def _fill(self, pairs: list[tuple[str, int]]) -> None:
        object.__setattr__(self, "_choices", dict(pairs))
        object.__setattr__(self, "_hash", hash(tuple(pairs)))

    @classmethod
    def _of(cls, pairs: list[tuple[str, int]]) -> Config:
        """Builds a config from pairs that are known to be sorted and of the right types."""
        config = cls.__new__(cls)
        config._fill(pairs)
        return config

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a Config is immutable, so {name!r} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"a Config is immutable, so {name!r} cannot be deleted")

    def __getitem__(self, name: str) -> int:
        return self._choices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Config):
            return self._hash == other._hash and self._choices == other._choices
        return NotImplemented

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, int]]]:
        return Config, (dict(self._choices),)

    def __repr__(self) -> str:
        shown = [f"{name!r}: {value}" for name, value in list(self.items())[:_SHOWN_IN_REPR]]
        if len(self) > _SHOWN_IN_REPR:
            shown.append(f"... {len(self) - _SHOWN_IN_REPR} more")
        return f"Config({{{', '.join(shown)}}})"

    @property
    def digest(self) -> str:
        """The first 12 hexadecimal digits of the SHA-256 of the JSON text: a file name."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:12]

    def to_json(self) -> str:
        """Returns the config as JSON text; equal configs give equal texts."""
        return json.dumps(self._choices, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Reads a config from the text that `to_json` gives.

        Raises:
            SettingError: `text` is not a JSON object of integers.
        """
        try:
            read = json.loads(text)
        except json.JSONDecodeError as error:
            raise SettingError(
                f"a config must be a JSON object, got {text!r}: {error}"
            ) from error
        if not isinstance(read, dict):
            raise SettingError(f"a config must be a JSON object of integers, got {text!r}")
        return cls(read)


def _site_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise SettingError(f"the name of a site must be text, got {name!r}")
    return name


def _choice(name: str, value: object) -> int:
    if isinstance(value, bool | np.bool_):
        raise SettingError(f"the choice of site {name!r} must be an integer, got {value!r}")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise SettingError(
            f"the choice of site {name!r} must be an integer, got {value!r}"
        ) from None


@dataclass(frozen=True)
class Site:
    """One place of a network with ordered choices.

    Args:
        name: Unique within its space.
        axis: What varies: `width`, `heads`, `depth`, `resolution` or any other word.
        choices: The sizes on offer, ascending, without repeats.
        full: The choice of the network as it was given; one of `choices`.
        inside: Conditions, all of which must hold for this site to exist: for each
            `(site, values)`, that site exists and its choice is among `values`.

    Raises:
        SettingError: The choices are empty, unsorted or repeat, or `full` is not one of them.

    Example:
        >>> Site("block1.width", "width", (8, 16), 16, (("block1.depth", frozenset({1})),)).full
        16
    """

    name: str
    axis: str
    choices: tuple[int, ...]
    full: int
    inside: tuple[tuple[str, frozenset[int]], ...] = ()

    def __post_init__(self) -> None:
        _site_name(self.name)
        if not isinstance(self.axis, str) or not self.axis:
            raise SettingError(
                f"the axis of site {self.name!r} must be text, got {self.axis!r}"
            )
        choices = tuple(_choice(self.name, value) for value in self.choices)
        if not choices or list(choices) != sorted(set(choices)):
            raise SettingError(
                f"the choices of site {self.name!r} must be ascending and distinct, at least "
                f"one, got {self.choices}"
            )
        if self.full not in choices:
            raise SettingError(
                f"the full choice of site {self.name!r} must be one of {choices}, got "
                f"{self.full}"
            )
        inside = tuple((_site_name(name), frozenset(values)) for name, values in self.inside)
        object.__setattr__(self, "choices", choices)
        object.__setattr__(self, "full", int(self.full))
        object.__setattr__(self, "inside", inside)


@dataclass(frozen=True)
class Fixed:
    """A place of a network that cannot vary.

    Args:
        name: Where it is.
        reason: Why it is fixed, a sentence for the user.
    """

    name: str
    reason: str


class Space:
    """All configs of a network: the product of its sites, less what cannot exist together.

    Args:
        sites: The sites; their order is the order of the columns of encoded configs.
        fixed: What was found but cannot vary, with the reasons.

    Raises:
        SettingError: Two sites share a name, a condition names a site that is not there, or
            the conditions go round in a circle.

    Example:
        >>> space = Space([
        ...     Site("depth", "depth", (0, 1), 1),
        ...     Site("width", "width", (8, 16), 16, (("depth", frozenset({1})),)),
        ... ])
        >>> space.size()
        3
        >>> space.config(depth=0)
        Config({'depth': 0})
        >>> space.encode(space.smallest()).tolist()
        [0, 1]
    """

    sites: tuple[Site, ...]
    fixed: tuple[Fixed, ...]

    def __init__(self, sites: Iterable[Site], fixed: Iterable[Fixed] = ()) -> None:
        self.sites = tuple(sites)
        self.fixed = tuple(fixed)
        self._check_names()
        self._column = {site.name: i for i, site in enumerate(self.sites)}
        self._index = [{value: i for i, value in enumerate(s.choices)} for s in self.sites]
        self._topological = self._order_by_conditions()

    # ---------------------------------------------------------------- facts about the space

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the sites, in the order of the columns."""
        return tuple(site.name for site in self.sites)

    @cached_property
    def counts(self) -> IntArray:
        """How many choices each site has, shape (sites,)."""
        return np.array([len(site.choices) for site in self.sites], dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """A fingerprint of the sites and their conditions: 12 hexadecimal digits."""
        described = json.dumps(_sites_as_json(self.sites), sort_keys=True)
        return hashlib.sha256(described.encode()).hexdigest()[:12]

    def column(self, name: str) -> int:
        """Returns the column of a site in encoded configs.

        Raises:
            SettingError: There is no such site; the message names the nearest.
        """
        if name not in self._column:
            raise SettingError(self._unknown(name))
        return self._column[name]

    def site(self, name: str) -> Site:
        """Returns the site of this name.

        Raises:
            SettingError: There is no such site; the message names the nearest.
        """
        return self.sites[self.column(name)]

    def size(self) -> int:
        """Returns the exact number of canonical configs."""
        return self._size

    def largest(self) -> Config:
        """Returns the config of the full network: every site at its full choice."""
        return self._decoded(self._full_row)

    def smallest(self) -> Config:
        """Returns the config with the first choice at every site."""
        return self.decode(np.zeros(len(self.sites), dtype=np.int64))

    def __len__(self) -> int:
        return len(self.sites)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Space):
            return (self.sites, self.fixed) == (other.sites, other.fixed)
        return NotImplemented

    def __hash__(self) -> int:
        return hash((self.sites, self.fixed))

    def __repr__(self) -> str:
        return f"Space({len(self.sites)} sites, {_amount(self.size())} configs)"

    def __str__(self) -> str:
        rows = [("site", "axis", "choices", "exists if")]
        rows += [(s.name, s.axis, _listed(s), _conditions(s)) for s in self.sites]
        lines = [f"{_amount(self.size())} configs over {len(self.sites)} sites"]
        lines += _aligned(rows) if self.sites else []
        if self.fixed:
            lines += ["", f"{len(self.fixed)} fixed"]
            lines += _aligned([(f.name, f.reason) for f in self.fixed])
        return "\n".join(lines)

    # ------------------------------------------------------------------------- configs

    def config(self, choices: Mapping[str, int] | None = None, /, **more: int) -> Config:
        """Returns the canonical config for some choices; sites left out take the full one.

        Args:
            choices: Site name to choice.
            **more: The same as keywords, for names that are identifiers.

        Raises:
            SettingError: A site or a choice does not exist; the message names the nearest.
        """
        row = self._full_row.copy()
        for name, value in {**(choices or {}), **more}.items():
            column = self.column(name)
            row[column] = self._choice_index(column, value)
        return self._decoded(row)

    def canonical(self, config: Mapping[str, int]) -> Config:
        """Returns the config without the sites that do not exist in it.

        Raises:
            SettingError: A site or a choice does not exist.
        """
        return self.config(config)

    def contains(self, config: Mapping[str, int]) -> bool:
        """Says whether a config is a canonical member of this space."""
        for name, value in config.items():
            column = self._column.get(name)
            if column is None or value not in self._index[column]:
                return False
        return dict(self.config(config)) == dict(config)

    def __contains__(self, config: object) -> bool:
        return isinstance(config, Mapping) and self.contains(config)

    # ------------------------------------------------------------------------ encoding

    def encode(self, config: Mapping[str, int]) -> IntArray:
        """Returns the index of the choice at each site, shape (sites,).

        A site that does not exist in the config holds the index of its full choice.

        Raises:
            SettingError: A site or a choice does not exist.
        """
        row: IntArray = self.encode_many([config])[0]
        return row

    def decode(self, vector: Sequence[int] | NDArray[Any]) -> Config:
        """Returns the canonical config of one row of choice indices, shape (sites,).

        Raises:
            SettingError: The row has another length or an index is out of range.
        """
        return self.decode_many(np.asarray(vector)[None])[0]

    def encode_many(self, configs: Iterable[Mapping[str, int]]) -> IntArray:
        """Returns the encoded canonical configs, shape (configs, sites).

        Raises:
            SettingError: A site or a choice does not exist.
        """
        rows = [self._indices(config) for config in configs]
        encoded = np.array(rows, dtype=np.int64).reshape(len(rows), len(self.sites))
        return self._canonicalise(encoded)

    def decode_many(self, encoded: NDArray[Any]) -> list[Config]:
        """Returns the canonical configs of encoded rows, shape (configs, sites).

        Raises:
            SettingError: The shape does not fit or an index is out of range.
        """
        checked = self._checked(encoded)
        return self._decoded_many(checked)

    def canonical_many(self, encoded: NDArray[Any]) -> IntArray:
        """Sets every site that does not exist to its full choice, row by row.

        Args:
            encoded: Choice indices, shape (configs, sites).

        Returns:
            A new array of the same shape. Two rows are equal exactly if they are the same
            sub-network.

        Raises:
            SettingError: The shape does not fit or an index is out of range.
        """
        return self._canonicalise(self._checked(encoded).copy(order="K"))

    def present(self, encoded: NDArray[Any]) -> BoolArray:
        """Says which sites exist in each encoded config, shape (configs, sites).

        Raises:
            SettingError: The shape does not fit or an index is out of range.
        """
        return self._present(self._checked(encoded))

    def choices_of(self, encoded: NDArray[Any]) -> IntArray:
        """Returns the choices themselves instead of their indices, shape (configs, sites).

        Raises:
            SettingError: The shape does not fit or an index is out of range.
        """
        checked = self._checked(encoded)
        columns = [
            np.array(site.choices, dtype=np.int64)[checked[:, i]]
            for i, site in enumerate(self.sites)
        ]
        return np.stack(columns, axis=1) if columns else checked.copy()

    def one_hot(self, configs: Iterable[Mapping[str, int]] | NDArray[Any]) -> FloatArray:
        """Returns configs as features for a predictor.

        Args:
            configs: Configs, or encoded configs of shape (configs, sites).

        Returns:
            Shape (configs, choices of all sites): 1 at the choice taken, and zeros
            throughout at a site that does not exist.
        """
        rows = configs if isinstance(configs, np.ndarray) else self.encode_many(configs)
        checked = self._checked(rows)
        present = self.present(checked)
        features = np.zeros((len(checked), int(self.counts.sum())))
        offsets = np.concatenate([[0], np.cumsum(self.counts)[:-1]]).astype(np.int64)
        which, site = np.nonzero(present)
        features[which, (checked + offsets)[which, site]] = 1.0
        return features

    # ---------------------------------------------------------------- random and nearby

    def random(self, generator: Randomness) -> Config:
        """Returns a config whose sites are drawn independently and uniformly.

        Args:
            generator: A `torch.Generator`, a NumPy generator, or a seed.
        """
        return self._decoded(self.random_many(1, generator)[0])

    def leaning_many(self, n: int, generator: Randomness) -> IntArray:
        """Draws configs that lean to one side: small, middling or large all over.

        Uniform draws are all middling in cost, as sums of many draws are. Here each config has
        a place of its own between smallest and largest, uniform in (0, 1), and each of its
        choices a binomial one around that place.

        Args:
            n: How many.
            generator: A `torch.Generator`, a NumPy generator, or a seed.

        Returns:
            Encoded canonical configs, shape (n, sites).

        Example:
            >>> space = Space([Site(f"s{i}", "width", (1, 2, 3), 3) for i in range(20)])
            >>> spread = space.leaning_many(100, 0).sum(axis=1).std()
            >>> bool(spread > 2 * space.random_many(100, 0).sum(axis=1).std())
            True
        """
        random = numpy_generator(generator)
        most = np.array(self.counts) - 1
        rows = [random.binomial(most, random.random()) for _ in range(n)]
        return self.canonical_many(np.array(rows, dtype=np.int64).reshape(n, len(self.sites)))

    def random_many(self, n: int, generator: Randomness) -> IntArray:
        """Returns encoded canonical configs, drawn as in `random`, shape (n, sites).

        Raises:
            SettingError: `n` is negative.
        """
        if n < 0:
            raise SettingError(f"the number of random configs must be at least 0, got {n}")
        return self._canonicalise(self._uniform(n, numpy_generator(generator)))

    def every(self) -> IntArray:
        """Returns all canonical configs, encoded, shape (`size()`, sites), for small spaces.

        Raises:
            SettingError: The space holds more than ten million configs.
        """
        if self.size() > _MOST_LISTED:
            raise SettingError(
                f"only spaces of at most {_MOST_LISTED:,} configs can be listed, this one has "
                f"{_amount(self.size())}; draw some with random_many"
            )
        rows = self._full_row[None]
        for column in self._topological:
            here = self._existing(rows).get(column, np.ones(len(rows), dtype=bool))
            times = np.where(here, self.counts[column], 1)
            index = np.arange(times.sum()) - np.repeat(np.cumsum(times) - times, times)
            rows, here = np.repeat(rows, times, axis=0), np.repeat(here, times)
            rows[here, column] = index[here]
        return rows

    def mutate(
        self, config: Mapping[str, int], generator: Randomness, probability: float = 0.1
    ) -> Config:
        """Returns a config where each site moved to another choice with some probability.

        A site that did not exist before (its block was skipped) and does now takes a random
        choice.

        Args:
            config: Where to start.
            generator: A `torch.Generator`, a NumPy generator, or a seed.
            probability: Of each site to move, in [0, 1]. Sites move independently.

        Raises:
            SettingError: `probability` is out of range, or the config is not of this space.
        """
        if not 0.0 <= probability <= 1.0:
            raise SettingError(f"probability must be in [0, 1], got {probability}")
        random = numpy_generator(generator)
        row = self.encode(config)[None]
        genes = np.where(self.present(row), row, self._uniform(1, random))[0]
        moves = random.random(len(genes)) < probability
        steps = random.integers(1, np.maximum(self.counts, 2))
        return self._decoded(np.where(moves, (genes + steps) % self.counts, genes))

    def crossover(
        self, a: Mapping[str, int], b: Mapping[str, int], generator: Randomness
    ) -> Config:
        """Returns a config that takes each site from one of two parents, at random.

        A site that exists in one parent only is taken from that one.

        Args:
            a: One parent.
            b: The other.
            generator: A `torch.Generator`, a NumPy generator, or a seed.

        Raises:
            SettingError: A parent is not of this space.
        """
        parents = self.encode_many([a, b])
        here = self.present(parents)
        first = numpy_generator(generator).random(len(self.sites)) < 0.5
        first = np.where(here[0] == here[1], first, here[0])
        return self._decoded(np.where(first, parents[0], parents[1]))

    def neighbours(self, config: Mapping[str, int]) -> list[Config]:
        """Returns the configs one step away: one site at the next or the previous choice.

        Sites that come to exist by that step take their full choice.

        Returns:
            Distinct canonical configs, in the order of the sites, without `config` itself.

        Raises:
            SettingError: The config is not of this space.
        """
        row = self.encode(config)
        here = self.present(row[None])[0]
        moved = []
        for column in np.flatnonzero(here):
            for index in (row[column] - 1, row[column] + 1):
                if 0 <= index < self.counts[column]:
                    other = row.copy()
                    other[column] = index
                    moved.append(other)
        rows = np.array(moved, dtype=np.int64).reshape(len(moved), len(self.sites))
        return self._decoded_many(rows)

    def subspace(self, restrictions: Mapping[str, int | Iterable[int]]) -> Space:
        """Returns a space with fewer choices at some sites.

        Args:
            restrictions: Site name to the choices that stay, or to the only one. A site with
                one choice left stays a site, so that the configs of the subspace are configs
                of this space too. Where the full choice goes, the largest that stays is full.

        Raises:
            SettingError: A site or a choice does not exist, or no choice is left.
        """
        sites = list(self.sites)
        for name, kept in restrictions.items():
            column = self.column(name)
            wanted = list(kept) if isinstance(kept, Iterable) else [kept]
            indices = sorted({self._choice_index(column, value) for value in wanted})
            choices = tuple(sites[column].choices[i] for i in indices)
            if not choices:
                raise SettingError(f"site {name!r} needs at least one choice, got none")
            old = sites[column]
            full = old.full if old.full in choices else choices[-1]
            sites[column] = Site(old.name, old.axis, choices, full, old.inside)
        return Space(sites, self.fixed)

    def without(self, dropped: Mapping[str, int | Iterable[int]]) -> Space:
        """Returns a space that lacks some choices of some sites.

        Args:
            dropped: Site name to the choices that go, or to the only one. What is said of
                `subspace` holds for the others.

        Raises:
            SettingError: A site or a choice does not exist, or no choice is left.

        Example:
            >>> space = Space([Site("layer", "operator", (0, 1, 2), 2)])
            >>> space.without({"layer": (0, 2)}).site("layer").choices
            (1,)
        """
        left = {}
        for name, choices in dropped.items():
            column = self.column(name)
            gone = list(choices) if isinstance(choices, Iterable) else [choices]
            indices = {self._choice_index(column, value) for value in gone}
            offered = self.sites[column].choices
            left[name] = [c for i, c in enumerate(offered) if i not in indices]
        return self.subspace(left)

    # ---------------------------------------------------------------------------- files

    def to_json(self) -> str:
        """Returns the space as JSON text."""
        fixed = [{"name": f.name, "reason": f.reason} for f in self.fixed]
        return json.dumps({"sites": _sites_as_json(self.sites), "fixed": fixed})

    @classmethod
    def from_json(cls, text: str) -> Space:
        """Reads a space from the text that `to_json` gives.

        Raises:
            SettingError: `text` does not describe a space.
        """
        try:
            read = json.loads(text)
            fixed = [Fixed(f["name"], f["reason"]) for f in read["fixed"]]
            return cls([_site_from_json(entry) for entry in read["sites"]], fixed)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise SettingError(
                f"this JSON text does not describe a space: {error!r}"
            ) from error

    # -------------------------------------------------------------------------- internals

    def _check_names(self) -> None:
        repeated = [n for n, times in Counter(s.name for s in self.sites).items() if times > 1]
        if repeated:
            raise SettingError(f"each site needs its own name, got {repeated[0]!r} twice")
        names = {site.name for site in self.sites}
        for site in self.sites:
            for parent, _ in site.inside:
                if parent not in names:
                    raise SettingError(
                        f"site {site.name!r} exists only inside {parent!r}, which is no site "
                        f"of this space{nearest(parent, sorted(names))}"
                    )

    @cached_property
    def _parents(self) -> list[set[int]]:
        return [{self._column[name] for name, _ in site.inside} for site in self.sites]

    @cached_property
    def _children(self) -> list[set[int]]:
        children: list[set[int]] = [set() for _ in self.sites]
        for column, parents in enumerate(self._parents):
            for parent in parents:
                children[parent].add(column)
        return children

    def _order_by_conditions(self) -> list[int]:
        """Returns the columns such that each comes after the sites it depends on."""
        waiting = [len(parents) for parents in self._parents]
        order = [column for column, left in enumerate(waiting) if not left]
        for column in order:  # grows while it is read
            for child in sorted(self._children[column]):
                waiting[child] -= 1
                if not waiting[child]:
                    order.append(child)
        if len(order) < len(self.sites):
            stuck = next(self.sites[c].name for c, left in enumerate(waiting) if left)
            raise SettingError(f"the conditions of site {stuck!r} go round in a circle")
        return order

    @cached_property
    def _full_row(self) -> IntArray:
        return np.array(
            [index[site.full] for index, site in zip(self._index, self.sites, strict=True)],
            dtype=np.int64,
        )

    @cached_property
    def _allowed(self) -> list[list[tuple[int, BoolArray]]]:
        """Per site, its conditions as (parent's column, table over the parent's indices)."""
        return [
            [(self._column[name], self._allows(name, values)) for name, values in site.inside]
            for site in self.sites
        ]

    def _allows(self, name: str, values: frozenset[int]) -> BoolArray:
        return np.array([value in values for value in self.site(name).choices], dtype=bool)

    @cached_property
    def _by_name(self) -> list[int]:
        return sorted(range(len(self.sites)), key=lambda column: self.sites[column].name)

    def _unknown(self, name: str) -> str:
        for place in self.fixed:
            if place.name == name:
                return f"{name!r} is fixed: {place.reason}"
        return f"there is no site {name!r}{nearest(str(name), list(self.names))}"

    def _choice_index(self, column: int, value: int) -> int:
        site = self.sites[column]
        number = _choice(site.name, value)
        index = self._index[column].get(number)
        if index is None:
            close = min(site.choices, key=lambda choice: abs(choice - number))
            raise SettingError(
                f"site {site.name!r} has no choice {number}; the nearest of {_listed(site)} is "
                f"{close}"
            )
        return index

    def _checked(self, encoded: NDArray[Any]) -> IntArray:
        array = np.asarray(encoded)
        if array.ndim != 2 or array.shape[1] != len(self.sites):
            raise SettingError(
                f"encoded configs must have shape (configs, {len(self.sites)}), got "
                f"{array.shape}"
            )
        if array.size and not np.issubdtype(array.dtype, np.integer):
            raise SettingError(f"encoded configs must be integers, got {array.dtype}")
        if array.size and (array.min() < 0 or bool((array.max(axis=0) >= self.counts).any())):
            raise SettingError("encoded configs hold an index outside the choices of its site")
        return array.astype(np.int64, copy=False)

    def _indices(self, config: Mapping[str, int]) -> list[int]:
        """Returns the choice indices of one config, not yet canonical."""
        row: list[int] = self._full_row.tolist()
        for name, value in config.items():
            column = self.column(name)
            index = self._index[column].get(value)
            row[column] = self._choice_index(column, value) if index is None else index
        return row

    def _existing(self, encoded: IntArray) -> dict[int, BoolArray]:
        """Returns, for each site with conditions, in which rows it exists."""
        exists: dict[int, BoolArray] = {}
        for column in self._topological:
            for parent, table in self._allowed[column]:
                held = table[encoded[:, parent]]
                if parent in exists:
                    held &= exists[parent]
                exists[column] = exists[column] & held if column in exists else held
        return exists

    def _present(self, encoded: IntArray) -> BoolArray:
        present = np.ones(encoded.shape, dtype=bool)
        for column, exists in self._existing(encoded).items():
            present[:, column] = exists
        return present

    def _canonicalise(self, encoded: IntArray) -> IntArray:
        """Sets the sites that do not exist to their full choice, in place."""
        for column, exists in self._existing(encoded).items():
            np.copyto(encoded[:, column], self._full_row[column], where=~exists)
        return encoded

    def _uniform(self, n: int, random: np.random.Generator) -> IntArray:
        """Draws every site uniformly; sites with the same number of choices in one call."""
        # Stored site by site: the draws, and costs that work by column, run along memory.
        drawn = np.empty((len(self.sites), n), dtype=np.int64)
        for count in np.unique(self.counts):
            rows = np.flatnonzero(self.counts == count)
            # Narrow integers are drawn several from one random word.
            dtype = np.uint8 if count <= 256 else np.int64
            drawn[rows] = random.integers(count, size=(len(rows), n), dtype=dtype)
        return drawn.T

    def _decoded(self, row: IntArray) -> Config:
        return self._decoded_many(row[None])[0]

    def _decoded_many(self, encoded: IntArray) -> list[Config]:
        columns = self._by_name
        pairs = [
            [(self.sites[column].name, value) for value in self.sites[column].choices]
            for column in columns
        ]
        present = self._present(encoded)[:, columns].tolist()
        return [
            Config._of([p[i] for p, i, here in zip(pairs, row, exists, strict=True) if here])
            for row, exists in zip(encoded[:, columns].tolist(), present, strict=True)
        ]

    @cached_property
    def _size(self) -> int:
        """Counts canonical configs by dynamic programming over the conditions.

        Sites are visited parents first. A state is the set of sites, still to come, that
        earlier choices have ruled out; its value is the number of ways to reach it. Sites
        that no condition touches just multiply.
        """
        total = 1
        states: dict[frozenset[int], int] = {frozenset(): 1}
        for column in self._counting_order():
            grown: Counter[frozenset[int]] = Counter()
            for ruled_out, ways in states.items():
                for killed, times in self._outcomes(column, column in ruled_out):
                    grown[(ruled_out | killed) - {column}] += ways * times
            states = dict(grown)
        for column, site in enumerate(self.sites):
            if not self._parents[column] and not self._children[column]:
                total *= len(site.choices)
        return total * sum(states.values())

    def _outcomes(self, column: int, ruled_out: bool) -> list[tuple[frozenset[int], int]]:
        """Returns (children ruled out, number of choices that do so) for one site."""
        children = self._children[column]
        if ruled_out:
            return [(frozenset(children), 1)]
        kills: Counter[frozenset[int]] = Counter()
        for index in range(len(self.sites[column].choices)):
            killed = frozenset(
                child
                for child in children
                for parent, table in self._allowed[child]
                if parent == column and not table[index]
            )
            kills[killed] += 1
        return list(kills.items())

    def _counting_order(self) -> list[int]:
        """Orders the sites with conditions so that few stay half decided at any time."""
        left = {c for c in range(len(self.sites)) if self._parents[c] or self._children[c]}
        order: list[int] = []
        touched: set[int] = set()
        ready = {column for column in left if not self._parents[column]}
        while ready:
            best = min(ready, key=lambda c: (self._opens(c, touched), c))
            order.append(best)
            ready.remove(best)
            left.remove(best)
            touched = (touched | self._children[best]) - {best}
            ready |= {c for c in self._children[best] if not self._parents[c] & left}
        return order

    def _opens(self, column: int, touched: set[int]) -> int:
        return len(self._children[column] - touched) - (column in touched)


def _sites_as_json(sites: Sequence[Site]) -> list[dict[str, Any]]:
    return [
        {
            "name": site.name,
            "axis": site.axis,
            "choices": list(site.choices),
            "full": site.full,
            "inside": [[name, sorted(values)] for name, values in site.inside],
        }
        for site in sites
    ]


def _site_from_json(entry: Mapping[str, Any]) -> Site:
    inside = tuple((name, frozenset(values)) for name, values in entry["inside"])
    return Site(entry["name"], entry["axis"], tuple(entry["choices"]), entry["full"], inside)


def _amount(number: int) -> str:
    if number <= _SHOWN_EXACTLY:
        return f"{number:,}"
    digits = str(number)
    return f"{digits[0]}.{digits[1]}e{len(digits) - 1}"


def _listed(site: Site) -> str:
    return " ".join(f"{value}*" if value == site.full else str(value) for value in site.choices)


def _conditions(site: Site) -> str:
    parts = [f"{name} in {sorted(values)}" for name, values in site.inside]
    return " and ".join(parts)


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = [[c.ljust(w) for c, w in zip(row, widths, strict=True)] for row in rows]
    return ["  " + "  ".join(cells).rstrip() for cells in padded]
