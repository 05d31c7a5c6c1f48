"""What every search shares: asking for configs, being told their values, and state.

A search proceeds in generations. Its class gives two functions of arrays, *what to keep of
what is known* (`select`) and *what to try next* (`propose`); everything that changes over
time lives in the `AskTell` that `start` returns. A proposal depends on the seed and on what
was told only, so a search that is rebuilt by telling it everything again goes on exactly
where it stopped, and several workers that tell each other's results walk one sequence.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supple.errors import CheckpointError, SettingError
from supple.space import Config, Randomness, Space, numpy_generator
from supple.technique import Search

__all__ = ["AskTell", "Exact", "Problem", "SearchAlgorithm", "Told"]

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
Exact = Callable[[IntArray], Any]
"""Gives a value of each encoded config of shape (configs, sites) without an evaluation."""

_BATCH = 32
_PATIENCE = 500
"""Known candidates in a row after which a search falls back to configs at random."""
_LISTED = 100_000


@dataclass(frozen=True)
class Told:
    """What is known of some configs.

    Args:
        rows: Encoded configs, shape (configs, sites).
        values: Objectives, less is better, shape (configs, objectives); not finite where an
            evaluation failed.
        violations: How far each config is beyond the constraints, shape (configs,): 0 where
            it meets them, infinite where the evaluation failed.
    """

    rows: IntArray
    values: FloatArray
    violations: FloatArray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, which: NDArray[Any] | slice) -> Told:
        """Returns what is known of some of the configs, by index, mask or slice."""
        return Told(self.rows[which], self.values[which], self.violations[which])

    def joined(self, other: Told) -> Told:
        """Returns what both know, this one first."""
        return Told(
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.values, other.values]),
            np.concatenate([self.violations, other.violations]),
        )


@dataclass(frozen=True)
class Problem:
    """What is searched, and for what.

    Args:
        space: The configs.
        objectives: Names of the values, all to be minimised.
        exact: For some of the objectives, by name, what gives them without an evaluation: the
            same numbers that `tell` will be given.
        violation: What gives how far configs are beyond the constraints, as `tell` will be
            told; None where only evaluations tell.
    """

    space: Space
    objectives: tuple[str, ...]
    exact: Mapping[str, Exact] = field(default_factory=dict)
    violation: Exact | None = None

    def __post_init__(self) -> None:
        if not self.objectives or len(set(self.objectives)) < len(self.objectives):
            raise SettingError(f"objectives must be distinct and some, got {self.objectives}")
        unknown = [name for name in self.exact if name not in self.objectives]
        if unknown:
            raise SettingError(
                f"exact values are of objectives, {list(self.objectives)}, got {unknown[0]!r}"
            )


@dataclass(frozen=True, kw_only=True)
class SearchAlgorithm(Search):
    """Base of searches over a `Space`: one seeded stream of candidates per generation.

    The defaults learn nothing: candidates are drawn at random.
    """

    def start(
        self,
        space: Space,
        objectives: Sequence[str],
        generator: Randomness,
        *,
        exact: Mapping[str, Exact] | None = None,
        violation: Exact | None = None,
    ) -> AskTell:
        """Begins a search.

        Args:
            space: What to search.
            objectives: Names of the values that `tell` will be given, all to be minimised.
            generator: A `torch.Generator`, a NumPy generator, or a seed.
            exact: For some of the objectives, by name, what gives them for encoded configs
                without an evaluation, such as `lambda rows: net.costs(rows)["macs"]`. Searches
                that predict make use of it.
            violation: What gives violations of constraints for encoded configs; None where
                only evaluations tell.

        Returns:
            The search in progress.

        Raises:
            SettingError: There is no objective, two have the same name, or an exact value is
                of none.
        """
        seed = int(numpy_generator(generator).integers(2**62))
        problem = Problem(space, tuple(objectives), dict(exact or {}), violation)
        return AskTell(self, problem, seed)

    @property
    def generation(self) -> int:
        """How many told configs make a generation; 0 for a search that never learns."""
        return 0

    def select(self, pool: Told) -> Told:
        """Chooses what of the pool is kept for proposing the next generation.

        Args:
            pool: What was kept of the last generation, followed by the new one.

        Returns:
            Some of the pool.
        """
        return pool

    def propose(self, space: Space, parents: Told, random: np.random.Generator) -> IntArray:
        """Proposes candidates, which may repeat or be known already.

        Args:
            space: What is searched.
            parents: What `select` kept; empty in the first generation.
            random: Source of all randomness.

        Returns:
            Encoded canonical configs, shape (candidates, sites), at least one.
        """
        return space.random_many(_BATCH, random)

    def propose_for(
        self, problem: Problem, parents: Told, random: np.random.Generator
    ) -> IntArray:
        """Does what `propose` does, for searches that use what is known without evaluations.

        Args:
            problem: What is searched, and for what.
            parents: What `select` kept; empty in the first generation.
            random: Source of all randomness.

        Returns:
            Encoded canonical configs, shape (candidates, sites), at least one.
        """
        return self.propose(problem.space, parents, random)


class AskTell:
    """A search in progress.

    Args:
        algorithm: What selects and proposes.
        problem: What is searched, and for what.
        seed: At least 0.
    """

    def __init__(self, algorithm: SearchAlgorithm, problem: Problem, seed: int) -> None:
        self.algorithm = algorithm
        self.problem = problem
        self.space = problem.space
        self.objectives = problem.objectives
        self.seed = seed
        self._reset()

    def _reset(self) -> None:
        nothing = Told(
            np.zeros((0, len(self.space.sites)), dtype=np.int64),
            np.zeros((0, len(self.objectives))),
            np.zeros(0),
        )
        self.told = nothing
        self._parents = nothing
        self._waiting = nothing
        self._generation = 0
        self._known: set[bytes] = set()
        self._pending: set[bytes] = set()
        self._stream = self._proposals()

    def ask(self, n: int = 1) -> list[Config]:
        """Proposes configs that were neither told nor asked before.

        Args:
            n: How many.

        Returns:
            Distinct canonical configs; fewer than `n` only if the space is exhausted.

        Raises:
            SettingError: `n` is negative.
        """
        return self.space.decode_many(self.ask_rows(n))

    def ask_rows(self, n: int = 1) -> IntArray:
        """Does the same as `ask` for inner loops: encoded configs, shape (n, sites)."""
        if n < 0:
            raise SettingError(f"the number of configs to ask for must be at least 0, got {n}")
        rows = list(itertools.islice(self._new(), n))
        return np.array(rows, dtype=np.int64).reshape(len(rows), len(self.space.sites))

    def tell(
        self,
        configs: Sequence[Mapping[str, int]] | NDArray[Any],
        values: NDArray[Any] | Sequence[Sequence[float]],
        violations: NDArray[Any] | Sequence[float] | None = None,
    ) -> None:
        """Takes the values of configs, also of such that were never asked for.

        A config that was told before is ignored: the first value stands.

        Args:
            configs: Configs, or encoded configs of shape (configs, sites).
            values: Less is better, shape (configs, objectives). A row that is not finite
                stands for a failed evaluation, which every other config beats.
            violations: How far each config is beyond the constraints, at least 0, shape
                (configs,); None if all meet them. Configs that meet them beat the others.

        Raises:
            SettingError: A shape does not fit, or a config is not of the space.
        """
        new = self._unknown(self._as_told(configs, values, violations))
        self.told = self.told.joined(new)
        self._waiting = self._waiting.joined(new)
        size = self.algorithm.generation
        while size and len(self._waiting) >= size:
            pool = self._parents.joined(self._waiting.take(slice(None, size)))
            self._parents = self.algorithm.select(pool)
            self._waiting = self._waiting.take(slice(size, None))
            self._generation += 1
            self._stream = self._proposals()

    def state_dict(self) -> dict[str, Any]:
        """Returns everything needed to go on later, as plain lists, numbers and text."""
        return {
            "space": self.space.digest,
            "objectives": list(self.objectives),
            "seed": self.seed,
            "rows": self.told.rows.tolist(),
            "values": self.told.values.tolist(),
            "violations": self.told.violations.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from what `state_dict` gave; what was asked and never told is asked again.

        Raises:
            CheckpointError: The state is of another space or other objectives.
        """
        if (state["space"], tuple(state["objectives"])) != (self.space.digest, self.objectives):
            raise CheckpointError(
                f"this search state is of another space or of other objectives: it has "
                f"{state['objectives']}, the search has {list(self.objectives)}"
            )
        self.seed = state["seed"]
        self._reset()
        if state["rows"]:
            self.tell(np.array(state["rows"]), state["values"], state["violations"])

    # ------------------------------------------------------------------------- internals

    def _new(self) -> Iterator[IntArray]:
        """Yields unknown rows and marks them as pending."""
        for row in self._stream:
            key = row.tobytes()
            if key not in self._known and key not in self._pending:
                self._pending.add(key)
                yield row

    def _proposals(self) -> Iterator[IntArray]:
        """Yields what this generation proposes, never the same row twice.

        Seed and what was told before the generation began decide all of it, so a search that
        is rebuilt in the middle of a generation walks the same rows again.
        """
        before = self.told.rows[: self._generation * self.algorithm.generation]
        seen = {row.tobytes() for row in before}
        refused = 0
        for row in self._candidates():
            refused = 0 if _is_first(row, seen) else refused + 1
            if not refused:
                yield row
            elif refused == _PATIENCE:
                break
        yield from (row for row in self._anything_new() if _is_first(row, seen))

    def _candidates(self) -> Iterator[IntArray]:
        for step in itertools.count():
            random = np.random.default_rng([self.seed, self._generation, step])
            rows = self.algorithm.propose_for(self.problem, self._parents, random)
            yield from np.ascontiguousarray(rows)

    def _anything_new(self) -> Iterator[IntArray]:
        """Yields random rows, and all rows of a small space, when proposals ran dry."""
        random = np.random.default_rng([self.seed, self._generation, 2**32])
        if self.space.size() > _LISTED:
            for _ in range(_PATIENCE):
                yield from np.ascontiguousarray(self.space.random_many(_BATCH, random))
        else:
            yield from random.permutation(self.space.every())

    def _as_told(self, configs: Any, values: Any, violations: Any) -> Told:
        if isinstance(configs, np.ndarray):
            rows = self.space.canonical_many(configs)
        else:
            rows = self.space.encode_many(configs)
        numbers = np.asarray(values, dtype=np.float64).reshape(-1, len(self.objectives))
        if violations is None:
            violations = np.zeros(len(numbers))
        beyond = np.asarray(violations, dtype=np.float64)
        if len(numbers) != len(rows) or beyond.shape != (len(rows),) or (beyond < 0).any():
            raise SettingError(
                f"tell takes values of shape ({len(rows)}, {len(self.objectives)}) and "
                f"violations of shape ({len(rows)},) that are at least 0, got "
                f"{np.shape(values)} and {beyond.shape}"
            )
        failed = ~np.isfinite(numbers).all(axis=1) | np.isnan(beyond)
        return Told(np.ascontiguousarray(rows), numbers, np.where(failed, np.inf, beyond))

    def _unknown(self, told: Told) -> Told:
        kept = []
        for index, row in enumerate(told.rows):
            key = row.tobytes()
            if key not in self._known:
                self._known.add(key)
                kept.append(index)
            self._pending.discard(key)
        return told.take(np.array(kept, dtype=np.int64))


def _is_first(row: IntArray, seen: set[bytes]) -> bool:
    """Says whether a row comes for the first time, and remembers it."""
    before = len(seen)
    seen.add(row.tobytes())
    return len(seen) > before
