"""What searches have in common that score sizes without any training."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from supple import proxies
from supple.errors import SettingError
from supple.search._genetic import Genetic
from supple.technique import key_of

__all__ = ["ZeroCostSearch"]


@dataclass(frozen=True, kw_only=True)
class ZeroCostSearch(Genetic):
    """Base: a genetic algorithm, and a proxy for `evaluate=`. The default proxy is the size.

    Args:
        population: Configs per generation, at least 2. The first ones are random.
        parents: The best of all so far, from which the next generation descends, at least 1.
        mutation_probability: Of each site to be drawn anew in half of the children, in [0, 1].
    """

    def score(self, module: nn.Module, batch: Any) -> float:
        """Scores a network at the size that is active, the more the better.

        Args:
            module: The network; it need not be trained.
            batch: What it is run on.

        Returns:
            The proxy.
        """
        return proxies.params(module, batch)

    def evaluate(self, batches: Iterable[Any]) -> Callable[[nn.Module], dict[str, float]]:
        """Gives what `supple.pareto` takes as `evaluate`: the mean score over batches.

        Args:
            batches: Some batches; they are kept.

        Returns:
            A function of a module; the score is called after the technique.

        Raises:
            SettingError: There are no batches.
        """
        kept = list(batches)
        if not kept:
            raise SettingError("batches must hold at least one batch, got none")
        name = key_of(type(self)).rpartition("/")[2].replace("-", "_")
        return lambda module: {name: statistics.fmean(self.score(module, b) for b in kept)}
