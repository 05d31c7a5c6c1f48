"""Random search."""

from __future__ import annotations

from dataclasses import dataclass

from supple.search.base import SearchAlgorithm
from supple.technique import register

__all__ = ["RandomSearch"]


@register(title="Random search", paper="JMLR 13 (2012) 281-305")
@dataclass(frozen=True, kw_only=True)
class RandomSearch(SearchAlgorithm):
    """Tries configs of your network at random, never the same one twice.

    Each site draws one of its choices uniformly and independently of the others. It is the
    baseline that every search must beat, and hard to beat where the values are noise or few
    sites matter.

    Example:
        >>> from supple.space import Site, Space
        >>> space = Space([Site("width", "width", (2, 4, 8), 8)])
        >>> run = RandomSearch().start(space, ["loss"], 0)
        >>> sorted(config["width"] for config in run.ask(5))
        [2, 4, 8]

    Source:
        Bergstra and Bengio 2012, "Random Search for Hyper-Parameter Optimization", Journal of
        Machine Learning Research 13, 281-305.
    Differs:
        Configs that were tried are skipped; in the paper's continuous spaces none repeats.
    Checked:
        Every site's draws against the uniform distribution, and exhaustion of a small space.
    """
