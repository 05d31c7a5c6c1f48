"""An independent derivation of couplings: the whole program on symbolic sizes.

Every dimension of every parameter and running statistic, and every integer stored on a module,
is a symbol of its own while the model runs once on fake tensors. What PyTorch's shape
environment then holds (replacements and guards that are equations) is all that the program asks
of its sizes. No operator rule, dimension algebra or integer provenance of ours takes part.

The equations are compared with what the recorder found in two ways:

* `directions` gives the space of small changes of all sizes that the equations allow at full
  size. It must be the space that the recorded groups span: a coupling that is missed makes ours
  larger, one too many makes it smaller. Constants drop out (a width of `s + 48` moves with `s`)
  and a product of heads and head width moves with both.
* `violations` puts the sizes and integers of a sub-network into the equations.

Solving takes seconds where recording takes milliseconds, hence its place in the tests.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import sympy
import torch
from torch import Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils._sympy.functions import CleanDiv, FloorDiv, Mod, PythonMod

Place = tuple[str, int]  # a parameter or buffer and a dimension of it

#: Integers that say nothing about the sizes of parameters that may vary.
NO_SIZES = {
    *("padding", "stride", "dilation", "kernel_size", "padding_idx", "layer_idx"),
    *("in_channels", "out_channels", "in_features", "out_features", "num_features"),
    *("num_embeddings", "embedding_dim", "num_labels", "vocab_size", "num_channels"),
    *("image_size", "patch_size", "num_patches", "chunk_size_feed_forward", "seq_len_dim"),
    *("output_size", "depth", "length"),
}


@dataclass
class Solution:
    """What the program asks of its sizes.

    Attributes:
        symbols: The symbol of every size: of a `Place`, or of an integer `(module, attribute)`.
        full: Value of every symbol in the full model.
        equations: Expressions that must be zero and have a derivative (divisions are exact).
        guards: Equations as PyTorch states them, floor divisions included.
    """

    symbols: dict[tuple[str, int | str], sympy.Symbol] = field(default_factory=dict)
    full: dict[sympy.Symbol, int] = field(default_factory=dict)
    equations: list[sympy.Expr] = field(default_factory=list)
    guards: list[sympy.Eq] = field(default_factory=list)

    @property
    def places(self) -> list[Place]:
        """The dimensions of parameters and buffers."""
        return [key for key in self.symbols if isinstance(key[1], int)]  # type: ignore[misc]


def solve(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    constants: Sequence[str] = (),
) -> Solution:
    """Run `model` once on symbolic sizes and collect the equations.

    Args:
        model: The model, in evaluation mode.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        constants: Names of integers on modules that keep their value.
    """
    environment = ShapeEnv(duck_shape=False, specialize_zero_one=True)
    mode = FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True)
    solution = Solution()
    tensors = {name: _symbolic(mode, solution, model, name, t) for name, t in _owned(model)}
    symbolic = _symbolic_integers(mode, solution, model, NO_SIZES | set(constants))
    with _quiet(), symbolic, mode, _Strict(), torch.no_grad():
        given = tree_map(
            lambda x: (
                _from_tensor(mode, x, [False] * x.dim(), "input")
                if isinstance(x, Tensor)
                else x
            ),
            (tuple(args), dict(kwargs or {})),
        )
        functional_call(model, tensors, *given, tie_weights=True)
    _collect(environment, solution)
    return solution


class _Strict(TorchDispatchMode):
    """Where a meta kernel asks for less than the kernel it stands for, asks for the same."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.aten.constant_pad_nd.default:  # takes no symbolic widths itself
            return torch._refs.constant_pad_nd(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            self._check_channels(*args)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _check_channels(x: Tensor, weight: Tensor, *rest: Any) -> None:
        transposed, groups = rest[4], rest[6]
        channels = weight.shape[0] if transposed else weight.shape[1] * groups
        torch._check(x.shape[1] == channels)
        torch._check(weight.shape[0] % groups == 0)
        if weight.shape[0] == groups:  # depthwise: noted as an equation, one filter a channel
            return


def _owned(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _symbolic(
    mode: FakeTensorMode, solution: Solution, model: nn.Module, name: str, tensor: Tensor
) -> Tensor:
    owner = model.get_submodule(name.rpartition(".")[0])
    kernel = isinstance(owner, nn.modules.conv._ConvNd) and tensor.dim() > 2
    varies = tensor.is_floating_point()
    free = [varies and n > 1 and not (kernel and d >= 2) for d, n in enumerate(tensor.shape)]
    fake = _from_tensor(mode, tensor, free, name)
    for dim, size in enumerate(fake.shape):
        if isinstance(size, torch.SymInt):
            solution.symbols[name, dim] = size.node.expr
            solution.full[size.node.expr] = tensor.shape[dim]
    return fake


def _from_tensor(mode: FakeTensorMode, tensor: Tensor, free: list[bool], name: str) -> Tensor:
    sizes = [DimDynamic.DYNAMIC if f else DimDynamic.STATIC for f in free]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    source = ConstantSource(name.replace(".", "_"))
    return mode.from_tensor(tensor.detach(), symbolic_context=context, source=source)


@contextmanager
def _symbolic_integers(
    mode: FakeTensorMode, solution: Solution, model: nn.Module, constants: set[str]
) -> Iterator[None]:
    """Give every integer that may be a size a symbol, for the duration of the block."""
    saved: list[tuple[dict[str, Any], str, Any]] = []
    for path, module in model.named_modules():
        holder = vars(module)
        for name, value in list(holder.items()):
            if name in constants or name.startswith("_"):
                continue
            if type(value) is int and value > 1:
                saved.append((holder, name, value))
                holder[name] = _integer(mode, solution, path, name, value)
            elif name == "normalized_shape":
                saved.append((holder, name, value))
                holder[name] = tuple(
                    _integer(mode, solution, path, f"{name}[{i}]", n)
                    for i, n in enumerate(value)
                )
    try:
        yield
    finally:
        for holder, name, value in saved:
            holder[name] = value


def _integer(
    mode: FakeTensorMode, solution: Solution, path: str, name: str, value: int
) -> torch.SymInt:
    size = _from_tensor(mode, torch.empty(value), [True], f"{path}_{name}").shape[0]
    assert isinstance(size, torch.SymInt)
    solution.symbols[path, name] = size.node.expr
    solution.full[size.node.expr] = value
    return size


def _collect(environment: ShapeEnv, solution: Solution) -> None:
    found = [sympy.Eq(symbol, value) for symbol, value in environment.replacements.items()]
    found += [guard.expr for guard in environment.guards]
    for deferred in environment.deferred_runtime_asserts.values():
        found += [check.expr for check in deferred]
    for guard in dict.fromkeys(found):
        if not isinstance(guard, sympy.Eq) or not guard.free_symbols <= set(solution.full):
            continue
        solution.guards.append(guard)
        difference = exact(guard.lhs, solution.full) - exact(guard.rhs, solution.full)
        if difference.subs(solution.full) == 0 and difference.free_symbols:
            solution.equations.append(difference)


def exact(expression: sympy.Expr, full: Mapping[sympy.Symbol, int]) -> sympy.Expr:
    """The expression with floor divisions read as divisions and remainders as zero.

    A division that is not exact at the full size is read as rounded up, if that is exact.
    """
    if not expression.args:
        return expression
    parts = [exact(part, full) for part in expression.args]
    if isinstance(expression, FloorDiv | CleanDiv):
        above, below = parts
        if (above / below).subs(full).is_integer:
            return above / below
        return (above - below + 1) / below
    if isinstance(expression, Mod | PythonMod):
        return sympy.Integer(0)
    return expression.func(*parts)


def directions(solution: Solution, held: Sequence[Place] = ()) -> np.ndarray:
    """The changes of sizes that the equations allow at the full size.

    Args:
        solution: The equations.
        held: Places that are not to change.

    Returns:
        Shape (places, dimensions of the space): its columns span it.
    """
    order = {symbol: i for i, symbol in enumerate(solution.full)}
    rows = []
    for equation in solution.equations:
        row = np.zeros(len(order))
        for symbol in equation.free_symbols:
            row[order[symbol]] = float(equation.diff(symbol).subs(solution.full))
        rows.append(row / max(1e-12, np.abs(row).max()))
    for place in held:
        row = np.zeros(len(order))
        row[order[solution.symbols[place]]] = 1.0
        rows.append(row)
    allowed = _null_space(np.array(rows), len(order))
    return allowed[[order[solution.symbols[place]] for place in solution.places]]


def _null_space(rows: np.ndarray, columns: int) -> np.ndarray:
    if not len(rows):
        return np.eye(columns)
    _, values, right = np.linalg.svd(rows)
    rank = int((values > 1e-8 * values.max()).sum())
    return right[rank:].T


def violations(
    solution: Solution,
    sizes: Mapping[Place, int],
    integers: Mapping[tuple[str, str], int],
) -> list[str]:
    """Equations that do not hold at the sizes and integers of a sub-network.

    Args:
        solution: The equations.
        sizes: Size of every place.
        integers: Values of integers on modules that differ from the full model's.
    """
    values = dict(solution.full)
    for key, value in (*sizes.items(), *integers.items()):
        if key in solution.symbols:
            values[solution.symbols[key]] = value
    return [str(guard) for guard in solution.guards if not _holds(guard, values)]


def _holds(guard: sympy.Eq, values: Mapping[sympy.Symbol, int]) -> bool:
    result = guard.subs(values)
    return bool(result)


@contextmanager
def _quiet() -> Iterator[None]:
    """The shape environment logs what it specialises; that is what is asked for here."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)
