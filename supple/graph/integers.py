"""Integers that remember where they came from.

While a model is recorded, every integer stored on a module (`num_heads`, `normalized_shape`,
`groups`) and every size read from a tensor is a `TracedInt`: an `int` that also carries the
expression that produced it. When such a number reaches a tensor operation (`x.view(b, t, heads,
width // heads)`) the expression says how the code computes that size, so that a sub-network can
be given the attribute values that make it come out right, and a size that the code writes as a
literal is known to be fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["AttributeKey", "Attributes", "Expression", "TracedInt", "leaves"]


@dataclass(frozen=True)
class AttributeKey:
    """An integer stored on a module, or on a plain object that a module holds.

    Attributes:
        module: Path of the module in the model.
        chain: Attribute names from the module to the integer (`("config", "num_heads")`).
        index: Position in the tuple or list stored there; None for a bare integer.
    """

    module: str
    chain: tuple[str, ...]
    index: int | None = None

    def __str__(self) -> str:
        dotted = ".".join(filter(None, (self.module, *self.chain)))
        return dotted if self.index is None else f"{dotted}[{self.index}]"


@dataclass(frozen=True)
class Size:
    """A size read from a tensor: dimension `dim` of the tensor numbered `tensor`."""

    tensor: int
    dim: int


@dataclass(frozen=True)
class Operation:
    """An arithmetic step on integers."""

    symbol: str
    left: Expression
    right: Expression


Expression = AttributeKey | Size | Operation | int

ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "+": int.__add__,
    "-": int.__sub__,
    "*": int.__mul__,
    "//": int.__floordiv__,
    "%": int.__mod__,
}


def leaves(expression: Expression) -> Iterator[AttributeKey | Size]:
    """The attributes and tensor sizes that an expression is computed from."""
    if isinstance(expression, Operation):
        yield from leaves(expression.left)
        yield from leaves(expression.right)
    elif not isinstance(expression, int):
        yield expression


def expression_of(value: int) -> Expression:
    """How `value` was computed; a plain integer is a literal."""
    return value.expression if isinstance(value, TracedInt) else value


class TracedInt(int):
    """An integer with the expression that produced it.

    Example:
        >>> heads = TracedInt(4, AttributeKey("attention", ("num_heads",)))
        >>> 48 // heads
        12
        >>> (48 // heads).expression.symbol
        '//'
    """

    expression: Expression
    #: Called with both expressions when the code finds a traced integer equal to another one.
    on_equal: Callable[[Expression, Expression], None] | None = None

    def __new__(cls, value: int, expression: Expression) -> TracedInt:
        traced = super().__new__(cls, value)
        traced.expression = expression
        return traced

    def __deepcopy__(self, memo: Any) -> TracedInt:
        return self

    def __copy__(self) -> TracedInt:
        return self

    def __reduce__(self) -> tuple[type[int], tuple[int]]:
        return int, (int(self),)

    def __eq__(self, other: object) -> bool:
        equal = int.__eq__(self, other)
        if equal is True and self > 1 and TracedInt.on_equal:
            TracedInt.on_equal(self.expression, expression_of(other))  # type: ignore[arg-type]
        return equal

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return NotImplemented if equal is NotImplemented else not equal

    __hash__ = int.__hash__


def _arithmetic(symbol: str, reflected: bool) -> Callable[[TracedInt, Any], Any]:
    compute = ARITHMETIC[symbol]

    def method(self: TracedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        left, right = (other, self) if reflected else (self, other)
        operation = Operation(symbol, expression_of(left), expression_of(right))
        return TracedInt(compute(int(left), int(right)), operation)

    return method


for _name, _symbol in {
    "add": "+",
    "sub": "-",
    "mul": "*",
    "floordiv": "//",
    "mod": "%",
}.items():
    setattr(TracedInt, f"__{_name}__", _arithmetic(_symbol, reflected=False))
    setattr(TracedInt, f"__r{_name}__", _arithmetic(_symbol, reflected=True))


class Attributes:
    """Replaces the integers stored on a model's modules by traced ones, and puts them back.

    Integers, and tuples and lists of integers, are found in the `__dict__` of every module and
    of the plain objects that modules hold (a `config`). An object that several modules share
    counts once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved: list[tuple[dict[str, Any], str, Any]] = []
        self._owners: list[tuple[dict[str, Any], str, tuple[str, ...]]] = []
        seen: set[int] = set()
        for path, module in model.named_modules():
            self._owners.append((vars(module), path, ()))
            for name, value in vars(module).items():
                if _is_plain_holder(value) and id(value) not in seen:
                    seen.add(id(value))
                    self._owners.append((vars(value), path, (name,)))

    def __enter__(self) -> Attributes:
        for holder, path, chain in self._owners:
            for name, value in list(holder.items()):
                traced = _traced(value, path, (*chain, name))
                if traced is not None:
                    self._saved.append((holder, name, value))
                    holder[name] = traced
        return self

    def __exit__(self, *error: object) -> None:
        for holder, name, value in reversed(self._saved):
            holder[name] = value
        self._saved.clear()
        for holder, _, _ in self._owners:  # what the forward itself remembered
            for name, value in list(holder.items()):
                if isinstance(value, TracedInt):
                    holder[name] = int(value)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Have the integers as they are stored, for the duration of the block."""
        traced = [(holder, name, holder[name]) for holder, name, _ in self._saved]
        for holder, name, value in self._saved:
            holder[name] = value
        try:
            yield
        finally:
            for holder, name, value in traced:
                holder[name] = value


def _is_plain_holder(value: object) -> bool:
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, (nn.Module, torch.Tensor, type))
        and not callable(value)
        and not type(value).__module__.startswith(("torch", "builtins", "collections"))
    )


def _traced(value: object, path: str, chain: tuple[str, ...]) -> object | None:
    if type(value) is int:
        return TracedInt(value, AttributeKey(path, chain))
    if type(value) in (tuple, list, torch.Size) and value:
        items = list(value)  # type: ignore[call-overload]
        if all(type(item) is int for item in items):
            traced = [TracedInt(v, AttributeKey(path, chain, i)) for i, v in enumerate(items)]
            return type(value)(traced)  # type: ignore[call-arg]
    return None
