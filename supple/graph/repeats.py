"""Residual modules that are called several times, as often as an integer of the model says.

ALBERT runs one block over and over. How often is found by trying: an integer that equals the
number of calls is made smaller, and if the model then runs with that many calls and is
otherwise the same, it is the integer that counts them. No name of an attribute is known here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from supple.errors import UnsupportedModelError
from supple.graph.blocks import obstacle, uses
from supple.graph.integers import AttributeKey
from supple.graph.record import ModuleCall, Recording, record
from supple.graph.rules import Propagation

__all__ = ["Repeat", "find_repeats"]


@dataclass(frozen=True)
class Repeat:
    """A residual module that is called several times in a row.

    Attributes:
        path: Path of the module.
        count: How many times the full model calls it.
        attribute: The integer that says so.
    """

    path: str
    count: int
    attribute: AttributeKey


def find_repeats(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    recording: Recording,
    p: Propagation,
    taken: Callable[[AttributeKey], bool],
) -> tuple[list[Repeat], dict[str, str]]:
    """The modules whose number of calls can change, and for others that repeat, why not.

    Args:
        model: The model, which is left as it was.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        recording: Its run.
        p: What was propagated through that run.
        taken: Whether an integer gives a size, and so counts nothing else.
    """
    found: list[Repeat] = []
    fixed: dict[str, str] = {}
    calls: dict[str, list[ModuleCall]] = {}
    for call in recording.modules:
        calls.setdefault(call.path, []).append(call)
    last = uses(recording)
    for path, own in calls.items():
        inside = any(
            path.startswith(f"{other}.") for other in (*(r.path for r in found), *fixed)
        )
        if inside or not path or not _in_a_row(own):
            continue
        if any(obstacle([call], recording, p, last) for call in own):
            continue
        keys = [k for k, n in _integers(model) if n == len(own) and not taken(k)]
        key = next((k for k in keys if _counts(model, args, kwargs, recording, own, k)), None)
        if key is not None:
            found.append(Repeat(path, len(own), key))
        else:
            fixed[path] = f"it is called {len(own)} times, which no integer of the model says"
    return found, fixed


def _in_a_row(calls: list[ModuleCall]) -> bool:
    """Whether every call but the first takes what the one before it gave."""
    if len(calls) < 2:
        return False
    return all(
        a.last <= b.first and a.outputs and a.outputs[0].id in {ref.id for ref in b.inputs}
        for a, b in pairwise(calls)
    )


def _counts(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None,
    recording: Recording,
    calls: list[ModuleCall],
    key: AttributeKey,
) -> bool:
    """Whether every smaller value of the integer leaves out the last calls and no more."""
    for fewer in range(1, len(calls)):
        try:
            with _set(model, key, fewer):
                trial = record(model, args, kwargs)
        except UnsupportedModelError:
            return False
        first, last = calls[fewer].first, calls[-1].last
        left = Counter(
            call.path for call in recording.modules if not first <= call.first < last
        )
        operators = Counter(c.name for c in recording.calls[:first])
        operators.update(c.name for c in recording.calls[last:])
        seen = Counter(call.path for call in trial.modules)
        if seen != left or Counter(c.name for c in trial.calls) != operators:
            return False
    return True


def _integers(model: nn.Module) -> Iterator[tuple[AttributeKey, int]]:
    """Integers of modules and of the plain objects that they hold, each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if type(value) is int:
                yield AttributeKey(path, (name,)), value
            elif _plain(value) and id(value) not in seen:
                seen.add(id(value))
                for attribute, held in vars(value).items():
                    if type(held) is int:
                        yield AttributeKey(path, (name, attribute)), held


def _plain(value: Any) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, Tensor, type))
        and not callable(value)
    )


@contextmanager
def _set(model: nn.Module, key: AttributeKey, value: int) -> Iterator[None]:
    holder: Any = vars(model.get_submodule(key.module))
    for name in key.chain[:-1]:
        holder = vars(holder[name])
    name = key.chain[-1]
    before = holder[name]
    holder[name] = value
    try:
        yield
    finally:
        holder[name] = before
