"""Operator rules learned from PyTorch itself.

An operator's meta kernel computes the shape of its outputs. Run once with a fresh symbol for
every input dimension, it shows where each output dimension comes from and which input
dimensions it forced to be equal. What is learned is cached by operator and argument pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._pytree import tree_flatten, tree_unflatten

from supple.graph.dims import pin, unify
from supple.graph.record import Call, Ref, quiet
from supple.graph.rules import Dims, Propagation, fixed, pinned_rule

__all__ = ["LearnedRule", "learn", "learned_rule"]

Place = tuple[int, int]  # position among the tensor arguments, dimension


@dataclass(frozen=True)
class LearnedRule:
    """What a meta kernel revealed.

    Attributes:
        outputs: For each output tensor and dimension, the input dimension that it is; None for
            one that is computed.
        equal: Input dimensions that must be the same.
        fixed: Input dimensions whose size the kernel insists on, or computes sizes from.
    """

    outputs: tuple[tuple[Place | None, ...], ...]
    equal: tuple[tuple[Place, Place], ...]
    fixed: tuple[Place, ...]


_CACHE: dict[Any, LearnedRule | None] = {}


def learned_rule(p: Propagation, call: Call) -> list[Dims]:
    """Apply the rule that `learn` finds; without a usable one, everything is pinned."""
    rule = learn(call)
    name = call.name.removeprefix("aten::")
    if rule is None or len(rule.outputs) != len(call.outputs):
        p.unknown[call.name] = "its meta kernel does not tell what becomes of symbolic sizes"
        return pinned_rule(p, call, f"the operator {name} has no rule")
    inputs = [p.of(ref) for ref in call.inputs]
    for (i, a), (j, b) in rule.equal:
        unify(inputs[i][a], inputs[j][b], name)
    for i, a in rule.fixed:
        pin(inputs[i][a], f"the operator {name} computes with its size")
    result: list[Dims] = []
    for ref, places in zip(call.outputs, rule.outputs, strict=True):
        row: Dims = []
        for size, place in zip(ref.shape, places, strict=True):
            known = place is not None and inputs[place[0]][place[1]].size == size
            row.append(
                inputs[place[0]][place[1]]  # type: ignore[index]
                if known
                else fixed(size, f"computed by the operator {name}")
            )
        result.append(row)
    return result


def learn(call: Call) -> LearnedRule | None:
    """The rule of the operator in `call`, from its meta kernel; None if it takes no symbols."""
    flat, spec = tree_flatten((call.args, call.kwargs))
    key = (call.op, spec, tuple(_pattern(value) for value in flat))
    if key not in _CACHE:
        try:
            with quiet("torch._subclasses", "torch.fx"):
                _CACHE[key] = _run_meta_kernel(call.op, flat, spec)
        except Exception:  # a meta kernel may raise anything; the caller pins what it touches
            _CACHE[key] = None
    return _CACHE[key]


def _pattern(value: Any) -> Any:
    if isinstance(value, Ref):
        return tuple(n == 1 for n in value.shape), value.dtype
    return repr(value)


def _run_meta_kernel(op: Any, flat: list[Any], spec: Any) -> LearnedRule:
    environment = ShapeEnv(duck_shape=False, specialize_zero_one=True)
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    symbols: dict[Any, Place] = {}
    arguments: list[Any] = []
    position = 0
    for value in flat:
        if not isinstance(value, Ref):
            arguments.append(value)
            continue
        tensor = _symbolic(mode, value, position)
        for dim, size in enumerate(tensor.shape):
            if isinstance(size, torch.SymInt):
                symbols[size.node.expr] = (position, dim)
        arguments.append(tensor)
        position += 1
    args, kwargs = tree_unflatten(arguments, spec)
    with mode:
        output = op(*args, **kwargs)
    equal, insisted = _equalities(environment, symbols)
    shapes = [t.shape for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
    computed = {place for shape in shapes for n in shape for place in _parts(n, symbols)}
    outputs = tuple(
        tuple(_place(environment, symbols, size) for size in tensor.shape)
        for tensor in tree_flatten(output)[0]
        if isinstance(tensor, Tensor)
    )
    return LearnedRule(outputs, equal, (*insisted, *sorted(computed)))


def _symbolic(mode: FakeTensorMode, ref: Ref, position: int) -> Tensor:
    dynamic = [DimDynamic.DYNAMIC if n > 1 else DimDynamic.STATIC for n in ref.shape]
    return mode.from_tensor(
        torch.empty(ref.shape, dtype=ref.dtype, device="meta"),
        symbolic_context=StatelessSymbolicContext(dynamic_sizes=dynamic),
        source=ConstantSource(f"a{position}"),
    )


def _equalities(
    environment: ShapeEnv, symbols: dict[Any, Place]
) -> tuple[tuple[tuple[Place, Place], ...], tuple[Place, ...]]:
    equal: list[tuple[Place, Place]] = []
    insisted: list[Place] = []
    for symbol, place in symbols.items():
        found = environment._find(symbol)
        if found == symbol:
            continue
        if found in symbols:
            equal.append((place, symbols[found]))
        else:
            insisted.append(place)
            insisted.extend(symbols[s] for s in found.free_symbols if s in symbols)
    return tuple(equal), tuple(insisted)


def _parts(size: Any, symbols: dict[Any, Place]) -> list[Place]:
    """The input dimensions that an output size is computed from, if it is not just one."""
    if not isinstance(size, torch.SymInt) or isinstance(size.node.expr, sympy.Symbol):
        return []
    return [symbols[s] for s in size.node.expr.free_symbols if s in symbols]


def _place(environment: ShapeEnv, symbols: dict[Any, Place], size: Any) -> Place | None:
    if not isinstance(size, torch.SymInt):
        return None
    expression = environment.simplify(size.node.expr)
    return symbols.get(expression) if isinstance(expression, sympy.Symbol) else None
