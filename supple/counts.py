"""Which integers of a `transformers` configuration say how many blocks a container has.

Code beside the modules reads them: `generate` lays out its cache by them, and Whisper's takes
the cache apart by them. What counts what is found by trying: the model is built on the meta
device with one setting less by one, and the containers that are shorter then are counted by the
integers that are less by one then. No name of a setting is known here.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from supple import rebuild
from supple.graph.integers import AttributeKey
from supple.plan import computes_kinds
from supple.uniform import Setting, quietly_built, set_setting, whole_numbers

__all__ = ["Counts", "counts_of"]


@dataclass(frozen=True)
class Counts:
    """The integers beside a model's modules that count the blocks of its containers.

    Attributes:
        containers: For each integer, the paths of the containers that it counts.
        lengths: Number of blocks of each of these containers.
    """

    containers: Mapping[AttributeKey, frozenset[str]]
    lengths: Mapping[str, int]

    def without(self, dropped: Iterable[str]) -> dict[AttributeKey, int]:
        """The integers that change, and their values, when blocks are left out.

        An integer is never less than the blocks of any container that is counted under the same
        name: T5's decoder has a configuration of its own, in which `num_layers` counts the
        decoder's blocks, but `generate` lays out the decoder's cache by the `num_layers` of the
        model's, which counts the encoder's.

        Args:
            dropped: Paths of the blocks.
        """
        full, now = self._values(self.lengths), self._values(self._left(dropped))
        return {key: value for key, value in now.items() if value != full[key]}

    def exceed(self, dropped: Iterable[str]) -> bool:
        """Whether one in the model's own configuration then says more than there are.

        Args:
            dropped: Paths of the blocks that are left out.
        """
        left = self._left(dropped)
        return any(
            value > left[path]
            for key, value in self._values(left).items()
            for path in self.containers[key]
            if not key.module
        )

    def _left(self, dropped: Iterable[str]) -> Counter[str]:
        left = Counter(self.lengths)
        left.subtract(block.rpartition(".")[0] for block in dropped)
        return left

    def _values(self, lengths: Mapping[str, int]) -> dict[AttributeKey, int]:
        most: dict[str, int] = {}
        for key, containers in self.containers.items():
            name = key.chain[-1]
            most[name] = max(most.get(name, 0), *(lengths[path] for path in containers))
        return {key: most[key.chain[-1]] for key in self.containers}


def counts_of(model: nn.Module) -> Counts:
    """Finds the integers that count blocks.

    Args:
        model: Any module; one that `transformers` does not export has none.
    """
    origin = rebuild.provenance_of(model)["base"]["origin"]
    if origin is None or "transformers" not in origin or rebuild.needs_code(origin):
        return Counts({}, {})
    lengths, integers = _lengths(model), _integers(model)
    found = {
        key: containers
        for key, containers in _counted(json.dumps(origin)).items()
        if all(integers.get(key) == lengths.get(path) for path in containers)
    }
    return Counts(found, {path: lengths[path] for paths in found.values() for path in paths})


@functools.lru_cache(maxsize=64)
def _counted(origin: str) -> dict[AttributeKey, frozenset[str]]:
    """Integers of what an origin builds, and the containers that each counts."""
    whole = quietly_built(json.loads(origin))
    if whole is None:
        return {}
    modules = dict(whole.named_modules())
    lengths, integers = _lengths(whole), _integers(whole)
    # who computes kinds from the count gives its cache a slot for every block that there was
    lengths = {p: n for p, n in lengths.items() if not computes_kinds(modules, p, n)}
    found: dict[AttributeKey, frozenset[str]] = {}
    for setting, value in whole_numbers(json.loads(origin)["config"]):
        shorter = _built_shorter(origin, setting, value) if value in lengths.values() else None
        if shorter is None:
            continue
        fewer, now = _lengths(shorter), _integers(shorter)
        counted = {path for path, n in lengths.items() if fewer.get(path) == n - 1}
        for key, full in integers.items():
            alike = {path for path in counted if lengths[path] == full}
            if alike and now.get(key) == full - 1:
                found[key] = found.get(key, frozenset()) | alike
    return found


def _built_shorter(origin: str, setting: Setting, value: int) -> nn.Module | None:
    """The model with one setting less by one."""
    changed = json.loads(origin)
    set_setting(changed["config"], setting, value - 1)
    built = quietly_built(changed)
    if built is None:  # lists of the configuration have an entry per block
        holder = changed["config"]
        for step in setting[:-1]:
            holder = holder[step]
        for items in holder.values() if isinstance(holder, dict) else ():
            if isinstance(items, list) and len(items) == value:
                items.pop()
        built = quietly_built(changed)
    return built


def _lengths(model: nn.Module) -> dict[str, int]:
    """Number of blocks of every container, by its path."""
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    }


def _integers(model: nn.Module) -> dict[AttributeKey, int]:
    """Integers of the plain objects that modules hold, each once."""
    found: dict[AttributeKey, int] = {}
    seen: set[int] = set()
    for path, name, held in _held(model):
        if id(held) not in seen:
            seen.add(id(held))
            for attribute, value in vars(held).items():
                if type(value) is int:
                    found[AttributeKey(path, (name, attribute))] = value
    return found


def _held(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            plain = hasattr(value, "__dict__") and not isinstance(
                value, (nn.Module, Tensor, type)
            )
            if plain and not callable(value):
                yield path, name, value
