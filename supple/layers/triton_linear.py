"""Products by packed codes on GPUs, in Triton: the weight never lies in memory.

Each program takes some rows of the weight (outputs). It walks along them in steps, reads the
codes of a step as they lie, takes them apart in registers, scales them, and multiplies: number
by number where there are few tokens, so that codes are all that is read, and with the units for
matrices where there are more. Sums are float32; where those units are used, weights are rounded
to the type of the inputs before.

Codes of 1, 2, 3, 4, 6 or 8 bits will do, if rows begin on whole bytes. A *cell* is the fewest
bytes that hold whole codes, such as 3 for 8 codes of 3 bits; halving cells, `log2` of the codes
in one of them times, takes codes apart in their order.

Triton is optional: nothing else needs it, and this module can be imported without it. Sizes of
tiles were chosen by counting bytes and registers, not measured.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from supple.errors import SettingError, SuppleWarning, import_extra
from supple.formats import Int, QuantSpec

if importlib.util.find_spec("triton") is not None:
    import triton
    import triton.language as tl

__all__ = ["INPUTS", "product", "unsuited", "works"]

INPUTS = (torch.float16, torch.bfloat16, torch.float32)
"""Types of inputs that are multiplied."""
_BITS = (1, 2, 3, 4, 6, 8)  # cells of these take 3 bytes at most
_FEW = 4  # tokens that are multiplied number by number, each by programs of its own
_COMPILED = {"num_warps": 4, "enable_fp_fusion": True}
_ONE_GROUP = 2**30  # more columns than there are: every one of them is in group 0


def unsuited(spec: QuantSpec, columns: int) -> str | None:
    """Tells why a matrix can't be multiplied by.

    Args:
        spec: How it is quantized.
        columns: Its columns.

    Returns:
        What is in the way, in words, or None.

    Example:
        >>> unsuited(QuantSpec("int4", "group", 32), 64) is None
        True
        >>> unsuited(QuantSpec("int4"), 67)
        'rows of 67 codes of 4 bits begin within bytes'
    """
    if not isinstance(spec.format, Int) or spec.bits not in _BITS:
        return f"codes must be whole numbers of {_BITS} bits, not {spec.format.name!r}"
    if columns * spec.bits % 8:
        return f"rows of {columns} codes of {spec.bits} bits begin within bytes"
    return None


@functools.cache
def works(device: torch.device) -> bool:
    """Tells whether Triton is installed and serves a GPU; tries it once.

    Args:
        device: The GPU.

    Returns:
        Whether it does. Where Triton is installed and fails, a `SuppleWarning` says why, once.

    Example:
        >>> works(torch.device("meta"))
        False
    """
    if importlib.util.find_spec("triton") is None or device.type != "cuda":
        return False
    try:
        ones = torch.ones(1, 16, device=device)
        product(ones, ones[0].byte(), QuantSpec("uint8"), ones[:, :1])
    except Exception as error:  # what compilers, linkers and drivers raise has no common base
        reason = (str(error).strip().splitlines() or [""])[0]
        warnings.warn(
            "packed layers put their weights together, which is slower: Triton failed on "
            f"{device} with {type(error).__name__}: {reason}",
            SuppleWarning,
            stacklevel=2,
        )
        return False
    return True


def product(
    x: Tensor, codes: Tensor, spec: QuantSpec, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    """Multiplies by the transpose of a matrix of packed codes.

    Args:
        x: Inputs (tokens, columns), of a type in `INPUTS`, on the device of the rest.
        codes: What `supple.layers.packed.pack_codes` gives for the whole matrix.
        spec: How the matrix is quantized.
        scale: Scales, (rows, groups) or (1, groups), any type of floating point.
        zero: Zero points likewise, as the numbers that codes stand for; None: there are none.

    Returns:
        Shape (tokens, rows), of the inputs' type.

    Raises:
        SettingError: The matrix or the inputs don't suit.
        MissingExtraError: Triton is not installed.

    Source:
        Triton's own tutorial on matrix multiplication, for how tiles are walked; the layout of
        codes is that of `supple.layers.packed`.
    Checked:
        In Triton's interpreter and compiled for GPUs of compute capability 8.0 and 9.0, in the
        tests. Nobody ran or timed it on a GPU yet.
    """
    reason = unsuited(spec, x.shape[1])
    if x.dtype not in INPUTS:
        reason = f"inputs must be of {INPUTS}, not {x.dtype}"
    if reason is not None:
        raise SettingError(f"Triton can't multiply by these codes: {reason}")
    import_extra("triton", "triton")
    tokens, columns = x.shape
    rows = codes.numel() * 8 // spec.bits // columns
    y = x.new_empty(tokens, rows)
    kernel, tiles = _plan(tokens, x.dtype)
    grid = (-(-rows // tiles["ROWS"]), -(-tokens // tiles.get("TOKENS", 1)))
    with torch.cuda.device(x.get_device()):  # -1, none, in the interpreter
        kernel[grid](
            x.contiguous(),
            codes,
            scale.contiguous(),
            None if zero is None else zero.contiguous(),
            y,
            tokens,
            rows,
            columns,
            columns * math.gcd(spec.bits, 8) // 8,
            0 if len(scale) == 1 else scale.shape[1],
            **_layout(spec, scale.shape[1], tiles["STEP"]),
            **tiles,
            **_COMPILED,
        )
    return y


def _plan(tokens: int, dtype: torch.dtype) -> tuple[Any, dict[str, int]]:
    """The kernel for so many tokens, and its tiles."""
    if tokens <= _FEW:
        # 16 bytes of 4-bit codes for each thread and step, and many programs.
        return _few_tokens, {"ROWS": 4, "STEP": 1024}
    fits = 16 if tokens <= 16 else 32 if tokens <= 32 else 64
    step = 32 if dtype == torch.float32 else 64
    return _many_tokens, {"ROWS": 64, "STEP": step, "TOKENS": fits}


def _layout(spec: QuantSpec, groups: int, step: int) -> dict[str, int]:
    """How codes and groups lie, in constants of the kernels."""
    assert isinstance(spec.format, Int)
    size = _ONE_GROUP if groups == 1 or spec.group_size is None else spec.group_size
    shared = math.gcd(spec.bits, 8)
    return {
        "BITS": spec.bits,
        "OFFSET": spec.format.offset,
        "CELL": spec.bits // shared,
        "HALVINGS": (8 // shared).bit_length() - 1,
        "GROUP": size,
        "PART": math.gcd(size, step),  # neighbours that share a scale, wherever a step begins
    }


# ------------------------------------------------------------------------------- kernels


def _jit(function: Callable[..., Any]) -> Any:
    return function if importlib.util.find_spec("triton") is None else triton.jit(function)


@_jit
def _weights(
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    row: tl.tensor,
    step: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_cells: tl.tensor,
    row_groups: tl.tensor,
    BITS: tl.constexpr,  # noqa: N803
    OFFSET: tl.constexpr,  # noqa: N803
    CELL: tl.constexpr,  # noqa: N803
    HALVINGS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PART: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
) -> tl.tensor:
    """The weights of a step, float32, (ROWS, STEP); zeros where there are none."""
    cell = step * (STEP >> HALVINGS) + tl.arange(0, STEP >> HALVINGS)
    there = (row < rows)[:, None] & (cell < row_cells)[None, :]
    first = codes + (row.to(tl.int64)[:, None] * row_cells + cell[None, :]) * CELL
    word = tl.load(first, mask=there, other=0).to(tl.int32)
    for place in tl.static_range(1, CELL):
        word |= tl.load(first + place, mask=there, other=0).to(tl.int32) << 8 * place
    for halving in tl.static_range(HALVINGS):
        # The lower half of a word, with rubbish above it, and the upper half.
        word = tl.interleave(word, word >> (BITS << HALVINGS >> halving + 1))
    values = (word & (1 << BITS) - 1).to(tl.float32) - OFFSET
    values = tl.reshape(values, (ROWS, STEP // PART, PART))
    part = step * STEP + tl.arange(0, STEP // PART) * PART
    there = (row < rows)[:, None] & (part < columns)[None, :]
    group = row[:, None] * row_groups + part[None, :] // GROUP
    if zero is not None:
        values -= tl.load(zero + group, mask=there, other=0).to(tl.float32)[:, :, None]
    values *= tl.load(scale + group, mask=there, other=0).to(tl.float32)[:, :, None]
    return tl.reshape(values, (ROWS, STEP))


@_jit
def _few_tokens(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_cells: tl.tensor,
    row_groups: tl.tensor,
    BITS: tl.constexpr,  # noqa: N803
    OFFSET: tl.constexpr,  # noqa: N803
    CELL: tl.constexpr,  # noqa: N803
    HALVINGS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PART: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
) -> None:
    """Some outputs of one token, number by number."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64)
    total = tl.zeros((ROWS, STEP), tl.float32)
    for step in range(tl.cdiv(columns, STEP)):
        # fmt: off
        weights = _weights(
            codes, scale, zero, row, step, rows, columns, row_cells, row_groups,
            BITS, OFFSET, CELL, HALVINGS, GROUP, PART, ROWS, STEP,
        )
        # fmt: on
        column = step * STEP + tl.arange(0, STEP)
        seen = tl.load(x + token * columns + column, mask=column < columns, other=0)
        total += weights * seen[None, :].to(tl.float32)
    tl.store(y + token * rows + row, tl.sum(total, 1), mask=row < rows)


@_jit
def _many_tokens(
    x: tl.tensor,
    codes: tl.tensor,
    scale: tl.tensor,
    zero: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    row_cells: tl.tensor,
    row_groups: tl.tensor,
    BITS: tl.constexpr,  # noqa: N803
    OFFSET: tl.constexpr,  # noqa: N803
    CELL: tl.constexpr,  # noqa: N803
    HALVINGS: tl.constexpr,  # noqa: N803
    GROUP: tl.constexpr,  # noqa: N803
    PART: tl.constexpr,  # noqa: N803
    ROWS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    TOKENS: tl.constexpr,  # noqa: N803
) -> None:
    """Some outputs of some tokens, as products of matrices."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for step in range(tl.cdiv(columns, STEP)):
        # fmt: off
        weights = _weights(
            codes, scale, zero, row, step, rows, columns, row_cells, row_groups,
            BITS, OFFSET, CELL, HALVINGS, GROUP, PART, ROWS, STEP,
        ).to(x.dtype.element_ty)
        # fmt: on
        column = step * STEP + tl.arange(0, STEP)
        there = (token < tokens)[:, None] & (column < columns)[None, :]
        seen = tl.load(x + token[:, None] * columns + column[None, :], mask=there, other=0)
        total = tl.dot(seen, tl.trans(weights), total, input_precision="ieee")
    there = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(y + token[:, None] * rows + row[None, :], total, mask=there)
