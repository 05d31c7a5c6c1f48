"""Rounding column by column, where the columns to come make up for the error: GPTQ.

`sweep` is the loop, for whatever rounds columns; `gptq` rounds to the values of a `QuantSpec`:

    found = gptq(matrix, statistics.gram, QuantSpec("int4", "group", 128, scale_format="fp16"))

What rounds otherwise gives `sweep` a function of its own: vectors of neighbouring columns
(`width`), or groups of columns with different bits (`group` and `begin`, which is shown a group
with the values that it has once its turn comes).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from supple.errors import SettingError
from supple.formats import Quantized, QuantSpec, Range, quantize

__all__ = ["Order", "gptq", "inverse_factor", "output_error", "sweep"]

Order = Literal["none", "activation"]
_RELATIVE = ("e4m3", "int8", "int4", "shift4")
"""Scales held relative to a factor of the whole row or tensor can't be found group by group."""


@torch.no_grad()
def sweep(
    matrix: Tensor,
    hessian: Tensor,
    round_columns: Callable[[Tensor, Tensor], Tensor],
    *,
    width: int = 1,
    group: int | None = None,
    begin: Callable[[Tensor, int], None] | None = None,
    damp: float = 0.01,
    block: int = 128,
    order: Order | Tensor = "none",
) -> Tensor:
    r"""Rounds columns in turn; those to come are changed such that outputs change least.

    With $U$ the upper Cholesky factor of $(H + \lambda I)^{-1}$ and $e_j$ the error of column
    $j$, the columns $k$ behind it change by $-e_j\,U_{jk} / U_{jj}$. Columns that are rounded
    at once, as vectors are, have their errors made up for by those behind them, exactly.
    Columns behind a block are updated once per block.

    Args:
        matrix: (out, columns), as `supple.weights.as_matrix` gives it.
        hessian: Products of inputs, (columns, columns), or (groups, columns, columns) for a
            convolution of several groups; of any scale (`LayerStatistics.gram` will do).
        round_columns: Is given columns as they are now, (out, width), and which they are,
            (width,); gives them rounded.
        width: Columns that are rounded at once; the last ones may be fewer.
        group: Columns of a group, a multiple of `width`, for `begin`.
        begin: Is called with the columns of a group, (out, group), and the first one's number,
            before its first column is rounded. With an order all groups begin at the start.
        damp: Share of the mean of the Hessian's diagonal that is added to it: $\lambda$.
        block: At most so many columns (or one `width`) make a block.
        order: `"none"`, left to right; `"activation"`, the largest diagonal first; or columns'
            numbers in the order in which they are rounded, (columns,).

    Returns:
        (out, columns), float32: what `round_columns` gave.

    Raises:
        SettingError: Shapes don't fit, the Hessian is not finite or `damp` too small for it.

    Example:
        >>> hessian = torch.tensor([[4.0, 2.0], [2.0, 2.0]])
        >>> sweep(torch.tensor([[0.4, 0.4]]), hessian, lambda x, _: x.round(), damp=0.0)
        tensor([[0., 1.]])

    Source:
        Frantar et al. 2022, "GPTQ: Accurate Post-Training Quantization for Generative
        Pre-trained Transformers", arXiv:2210.17323; IST-DASLab/gptq, `gptq.py`. There weights
        of inputs that are always zero become zero; here they are rounded as they are. Scales of
        a group see what columns of their own block changed, too.
    """
    _check(matrix, hessian, width, group, block)
    columns = matrix.shape[1]
    places = _places(hessian, order)
    moved = isinstance(order, Tensor) or order != "none"
    hessian = hessian.reshape(-1, columns, columns)
    if moved:
        hessian = hessian[:, places][:, :, places]
    upper = inverse_factor(hessian, damp).float()
    flat = matrix.float()[:, places]  # a copy
    work = flat.view(len(upper), -1, columns)
    if begin is not None and moved:
        for first in range(0, columns, group or columns):
            begin(matrix.float()[:, first : first + (group or columns)], first)
    for start, stop in _blocks(columns, block, width, None if moved else group):
        errors = torch.zeros_like(work[:, :, start:stop])
        for first in range(start, stop, width):
            if begin is not None and not moved and first % (group or columns) == 0:
                begin(flat[:, first : first + (group or columns)], first)
            last = min(first + width, stop)
            new = round_columns(flat[:, first:last], places[first:last])
            for column, rounded in zip(range(first, last), new.unbind(1), strict=True):
                own = work[:, :, column]
                error = (own - rounded.view_as(own)) / upper[:, column, column, None]
                behind = slice(column + 1, stop)
                work[:, :, behind] -= error[:, :, None] * upper[:, column, None, behind]
                errors[:, :, column - start] = error
            flat[:, first:last] = new
        work[:, :, stop:] -= errors @ upper[:, start:stop, stop:]
    result = torch.empty_like(flat)
    result[:, places] = flat
    return result


@torch.no_grad()
def gptq(
    matrix: Tensor,
    hessian: Tensor,
    spec: QuantSpec,
    *,
    damp: float = 0.01,
    block: int = 128,
    order: Order | Tensor = "none",
    observer: Range | None = None,
    scale: Tensor | None = None,
    zero: Tensor | None = None,
) -> Quantized:
    """Rounds a matrix to a spec's values such that the layer's outputs change little.

    The scales of a group are found once its turn comes, from its columns as they are then.
    With an order, or scales held relative to a factor, they are found from the matrix before,
    and each column keeps its own group's; what is stored is in the columns' order anyway.

    Args:
        matrix: (out, columns).
        hessian: As in `sweep`.
        spec: How the matrix is quantized.
        damp: As in `sweep`.
        block: As in `sweep`.
        order: As in `sweep`.
        observer: How ranges are found; see `QuantSpec.scales`.
        scale: Scales of shape `spec.scale_shape(matrix.shape)`, where they are known before.
        zero: Zero points for these scales.

    Returns:
        The matrix, quantized.

    Raises:
        SettingError: As in `sweep` and `supple.formats.quantize`.

    Example:
        >>> spec, hessian = QuantSpec("int2"), torch.tensor([[4.0, 2.0], [2.0, 2.0]])
        >>> gptq(torch.tensor([[0.4, 1.5]]), hessian, spec, damp=0.0).dequantize()
        tensor([[0., 1.]])
    """
    if scale is None and (
        not isinstance(order, str)
        or order != "none"
        or spec.scale_format in _RELATIVE
        or spec.granularity == "tensor"
    ):
        scale, zero = spec.scales(matrix, observer)
    rounding = _Rounding(spec, matrix.shape, observer, scale, zero)
    rounded = sweep(
        matrix,
        hessian,
        rounding.columns,
        group=rounding.group,
        begin=rounding.begin if scale is None else None,
        damp=damp,
        block=block,
        order=order,
    )
    return quantize(rounded, spec, rounding.scale, rounding.zero)


class _Rounding:
    """Rounds columns with scales that are known, or found where a group begins."""

    def __init__(
        self,
        spec: QuantSpec,
        shape: torch.Size,
        observer: Range | None,
        scale: Tensor | None,
        zero: Tensor | None,
    ) -> None:
        self.spec, self.observer = spec, observer
        self.group = spec.group_size or shape[-1]
        # Within a group a row has one scale.
        self.within = QuantSpec(
            **{**spec.settings(), "granularity": "channel", "group_size": None}
        )
        if scale is None:
            scale = torch.ones(spec.scale_shape(shape))
            zero = None if spec.symmetric else torch.zeros(spec.scale_shape(shape))
        self.scale, self.zero = scale, zero

    def begin(self, columns: Tensor, first: int) -> None:
        place = first // self.group
        scale, zero = self.within.scales(columns, self.observer)
        self.scale[:, place] = scale[:, 0]
        if self.zero is not None and zero is not None:
            self.zero[:, place] = zero[:, 0]

    def columns(self, columns: Tensor, places: Tensor) -> Tensor:
        groups = places // self.group
        zero = None if self.zero is None else self.zero[:, groups]
        return self.spec.rounded(columns, self.scale[:, groups], zero)


@torch.no_grad()
def inverse_factor(hessian: Tensor, damp: float = 0.01) -> Tensor:
    r"""Gives the upper Cholesky factor of the inverse of a damped Hessian.

    Its squared diagonal, $U_{jj}^2$, is what an error of column $j$ is divided by where costs
    are told: those before $j$ are fixed by then, and those behind it make up for it.

    Args:
        hessian: (..., columns, columns). Inputs that are always zero count as average ones.
        damp: Share of the mean of the diagonal that is added to it.

    Returns:
        The same shape, float64.

    Raises:
        SettingError: The Hessian is not finite, or not positive definite for want of damping.

    Example:
        >>> inverse_factor(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), 0.0).square()
        tensor([[0.5000, 0.5000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    if not damp >= 0:
        raise SettingError(f"damp must be at least 0, got {damp}")
    damped = hessian.double().clone()
    diagonal = damped.diagonal(dim1=-2, dim2=-1)
    heard = diagonal > 0
    mean = (diagonal * heard).sum(-1, keepdim=True) / heard.sum(-1, keepdim=True).clamp_min(1)
    diagonal.copy_(torch.where(heard, diagonal, torch.where(mean > 0, mean, 1.0)))
    diagonal += damp * diagonal.mean(-1, keepdim=True)
    finite = bool(damped.isfinite().all())
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped, diagonal  # a wide layer's Hessian is larger than its block's weights
    if bool(failed.any()) or not finite:
        raise SettingError(
            "the Hessian of a layer's inputs must be finite and, damped, positive definite; "
            f"give more calibration data, or a damp above {damp}"
        )
    inverse = torch.cholesky_inverse(lower)
    del lower
    return torch.linalg.cholesky(inverse, upper=True)


@torch.no_grad()
def output_error(change: Tensor, hessian: Tensor) -> Tensor:
    r"""Gives how much a change of the weight changes the outputs: $\operatorname{tr} D H D^T$.

    Args:
        change: (out, columns).
        hessian: As in `sweep`.

    Returns:
        A scalar, float64: the sum over the inputs that the Hessian was gathered from.

    Example:
        >>> output_error(torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 2.0], [2.0, 2.0]]))
        tensor(4., dtype=torch.float64)
    """
    columns = change.shape[1]
    grouped = hessian.double().reshape(-1, columns, columns)
    apart = change.double().reshape(len(grouped), -1, columns)
    return ((apart @ grouped) * apart).sum()


def _places(hessian: Tensor, order: Order | Tensor) -> Tensor:
    columns = hessian.shape[-1]
    if isinstance(order, Tensor):
        if sorted(order.tolist()) != list(range(columns)):
            raise SettingError(
                f"order must hold each number from 0 to {columns - 1} once, got {order}"
            )
        return order.long().to(hessian.device)
    if order == "none":
        return torch.arange(columns, device=hessian.device)
    if order != "activation":
        raise SettingError(f"order must be none, activation or columns' numbers, got {order!r}")
    # Groups of a convolution share the order.
    diagonal = hessian.diagonal(dim1=-2, dim2=-1).reshape(-1, columns).double().sum(0)
    return diagonal.argsort(descending=True, stable=True)


def _blocks(
    columns: int, block: int, width: int, group: int | None
) -> Iterator[tuple[int, int]]:
    """Cuts the columns such that each group begins where all before it are made up for."""
    unit = group or columns
    step = block // unit * unit or max(block // width * width, width)
    span = max(unit, step)
    for begin in range(0, columns, span):
        end = min(begin + span, columns)
        for start in range(begin, end, step):
            yield start, min(start + step, end)


def _check(matrix: Tensor, hessian: Tensor, width: int, group: int | None, block: int) -> None:
    if matrix.dim() != 2 or not matrix.numel():
        raise SettingError(
            f"a matrix (out, columns) that is not empty is needed, got {tuple(matrix.shape)}"
        )
    rows, columns = matrix.shape
    fits = hessian.dim() in (2, 3) and hessian.shape[-2:] == (columns, columns)
    if not fits or rows % (len(hessian) if hessian.dim() == 3 else 1):
        raise SettingError(
            f"the Hessian of a matrix of shape {(rows, columns)} has shape "
            f"{(columns, columns)}, or groups of such first, got {tuple(hessian.shape)}"
        )
    for name, value in (("width", width), ("block", block), ("group", group)):
        if value is not None and value < 1:
            raise SettingError(f"{name} must be at least 1, got {value}")
    if group is not None and group % width and group < columns:
        raise SettingError(
            f"group must be a multiple of width, got group={group} and width={width}"
        )
