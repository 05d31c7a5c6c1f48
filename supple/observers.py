"""Ranges of numbers that are to be quantized: of a tensor at hand, or of values as they come.

A function of `RANGES` gives the least and the most of numbers that share a scale, outliers left
out or not; `QuantSpec.scales` takes one. `RangeObserver` watches activations over many batches,
as an observer of `supple.calibrate.statistics` or by itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from supple.errors import SettingError, nearest
from supple.formats import NumberFormat, QuantSpec, Range

__all__ = [
    "RANGES",
    "RangeObserver",
    "gaussian",
    "least_error",
    "mean_abs",
    "minmax",
    "percentile",
    "rms",
    "twice_mean",
]

_SAMPLES = 4096
"""Values of a batch that are kept by observers that have to see values again."""
_GOLDEN = (5**0.5 - 1) / 2


def minmax(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Gives the least and the largest number.

    Args:
        values: (..., n).
        spec: What they are quantized to.

    Returns:
        Two tensors of shape (...).
    """
    return values.amin(-1), values.amax(-1)


def percentile(
    values: Tensor, spec: QuantSpec, *, share: float = 0.999
) -> tuple[Tensor, Tensor]:
    """Gives the numbers that a share of all is not below, and not above.

    Args:
        values: (..., n).
        spec: What they are quantized to.
        share: Above 0.5, up to 1; of few numbers the outermost count.

    Returns:
        Two tensors of shape (...).

    Example:
        >>> least, most = percentile(torch.arange(101.0), QuantSpec("int8"), share=0.9)
        >>> least.item(), most.item()
        (10.0, 90.0)
    """
    if not 0.5 < share <= 1:
        raise SettingError(f"share must be above 0.5 and up to 1, got {share}")
    ordered, last = values.sort(-1).values, values.shape[-1] - 1
    outside = round((1 - share) * last)
    return ordered[..., outside], ordered[..., last - outside]


def rms(values: Tensor, spec: QuantSpec, *, factor: float = 3.0) -> tuple[Tensor, Tensor]:
    """Gives a range of so many root mean squares around zero, within least and most.

    Args:
        values: (..., n).
        spec: What they are quantized to.
        factor: How many, above 0.

    Returns:
        Two tensors of shape (...).
    """
    return _within(values, factor * values.square().mean(-1).sqrt())


def mean_abs(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    r"""Gives the range of LSQ's first step, $2 \cdot \text{mean}|x| / \sqrt{p}$.

    Here $p$ is the format's highest value. The range is kept within least and most.

    Args:
        values: (..., n).
        spec: What they are quantized to.

    Returns:
        Two tensors of shape (...).

    Source:
        Esser et al. 2020, "Learned Step Size Quantization", arXiv:1902.08153.
    """
    step = 2 * values.abs().mean(-1) / spec.format.most**0.5
    return _within(values, step * spec.format.ends[1])


def twice_mean(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    r"""Gives a range with steps of $2\,\text{mean}|x| / n$, of $2n$ levels.

    Args:
        values: (..., n).
        spec: What they are quantized to.

    Returns:
        Two tensors of shape (...).

    Source:
        Liu et al. 2023, "Oscillation-free Quantization for Low-bit Vision Transformers",
        arXiv:2302.02210.
    """
    reach = values.abs().mean(-1) * (spec.format.ends[1] * 2 ** (2 - spec.bits))
    return -reach, reach


def gaussian(values: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Gives the range that rounds normally distributed numbers with the least squared error.

    It is a multiple of the root mean square, and may reach beyond least and most.

    Args:
        values: (..., n), taken to have mean zero.
        spec: What they are quantized to.

    Returns:
        Two tensors of shape (...).

    Example:
        >>> _, most = gaussian(torch.ones(1, 2), QuantSpec("midrise2"))
        >>> round(most.item(), 3)
        1.494

    Source:
        Panferov et al. 2025, "QuEST: Stable Training of LLMs with 1-Bit Weights and
        Activations", arXiv:2502.05003.
    """
    reach = values.square().mean(-1).sqrt() * _normal_reach(spec.format)
    return -reach, reach


@functools.cache
def _normal_reach(form: NumberFormat) -> float:
    """The largest value that numbers of variance 1 are best mapped to, by golden section."""
    values = form.levels.double() / form.ends[1]

    def error(reach: float) -> float:
        level = values * reach
        ends = torch.cat((level[:1] - 99, (level[1:] + level[:-1]) / 2, level[-1:] + 99))
        density = torch.exp(-ends.square() / 2) / (2 * torch.pi) ** 0.5
        share, first = torch.special.ndtr(ends).diff(), -density.diff()
        second = share - (ends * density).diff()
        return float((second - 2 * level * first + level.square() * share).sum())

    low, high, golden = 0.1, 9.0, (5**0.5 - 1) / 2
    for _ in range(40):
        one, other = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, other) if error(one) < error(other) else (one, high)
    return (low + high) / 2


def least_error(
    values: Tensor,
    spec: QuantSpec,
    *,
    power: float = 2.4,
    steps: int = 80,
    shrink: float = 0.8,
) -> tuple[Tensor, Tensor]:
    """Searches how far the range is best drawn in.

    Args:
        values: (..., n).
        spec: What they are quantized to.
        power: Errors count to this power.
        steps: How many ranges are tried, evenly spaced.
        shrink: The smallest range that is tried is just above 1 - shrink of the full one.

    Returns:
        Two tensors of shape (...), beyond least and most where that makes the largest value
        exact.

    Source:
        Frantar et al. 2022, "GPTQ", arXiv:2210.17323; IST-DASLab/gptq, `quant.py`, whose grid
        and power these are.
    """
    # Scales that are held relative to all others can't be judged one by one.
    if spec.scale_format in ("e4m3", "int8", "int4", "shift4"):
        spec = dataclasses.replace(spec, scale_format="fp32")
    least, most = minmax(values, spec)
    best = torch.full_like(least, torch.inf)
    factor = torch.ones_like(least)
    # Up to where the largest value is exact: without a zero point that is beyond the range.
    widest = spec.format.ends[1] / spec.format.most if spec.symmetric else 1.0
    for tried in (1.0, *(widest * (1 - shrink * step / steps) for step in range(steps))):
        scale, zero = spec.scales_of(tried * least, tried * most)
        back = spec.rounded(values, scale[..., None], None if zero is None else zero[..., None])
        error = (back - values).abs().pow(power).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        factor = torch.where(better, tried, factor)
    return factor * least, factor * most


def _within(values: Tensor, reach: Tensor) -> tuple[Tensor, Tensor]:
    return (
        torch.maximum(values.amin(-1), -reach),
        torch.minimum(values.amax(-1), reach),
    )


RANGES: Mapping[str, Range] = {
    "minmax": minmax,
    "percentile": percentile,
    "mse": least_error,
    "rms": rms,
    "mean_abs": mean_abs,
    "twice_mean": twice_mean,
    "gaussian": gaussian,
}
"""Ways to choose a range, by name."""


class RangeObserver:
    """Watches values that come batch by batch and gives one scale for all of them.

    It suits `supple.calibrate.statistics(..., observers={"range": partial(RangeObserver,
    spec)})`; layers' statistics then have `["range"]`, a scale and a zero point.

    Args:
        spec: What the values are quantized to; a scale for the whole tensor.
        kind: `"minmax"` over everything, `"ema"`, a running average of the batches' least and
            most, or another name of `RANGES`, found on 4096 values of each batch, spread over
            it.
        decay: Weight of what was before in the running average, in [0, 1).

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> observer = RangeObserver(QuantSpec("uint8", "tensor", symmetric=False))
        >>> observer.see(torch.tensor([0.0, 4.0])), observer.see(torch.tensor([-1.1, 2.0]))
        (None, None)
        >>> scale, zero = observer.result()
        >>> round(scale.item(), 4), zero.item()
        (0.02, 55.0)
    """

    def __init__(self, spec: QuantSpec, kind: str = "minmax", decay: float = 0.99) -> None:
        if kind not in (*RANGES, "ema"):
            raise SettingError(
                f"there is no observer '{kind}'{nearest(kind, (*RANGES, 'ema'))} (observers: "
                f"{', '.join(RANGES)}, ema)"
            )
        if spec.granularity != "tensor":
            raise SettingError(
                "values that come in batches get one scale: set granularity='tensor', got "
                f"{spec.granularity!r}"
            )
        if not 0 <= decay < 1:
            raise SettingError(f"decay must be in [0, 1), got {decay}")
        self.spec, self.kind, self.decay = spec, kind, decay
        self._ends: tuple[Tensor, Tensor] | None = None
        self._kept: list[Tensor] = []

    def see(self, rows: Tensor) -> None:
        """Takes more values, of any shape."""
        flat = rows.detach().flatten().float()
        if self.kind not in ("minmax", "ema"):
            self._kept.append(_spread(flat))
            return
        least, most = flat.amin(), flat.amax()
        if self._ends is None:
            self._ends = least, most
        elif self.kind == "minmax":
            self._ends = torch.minimum(self._ends[0], least), torch.maximum(self._ends[1], most)
        else:
            self._ends = _averaged(self._ends, (least, most), self.decay)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Gives the range so far: least and most, scalars.

        Raises:
            SettingError: Nothing was seen.
        """
        if self._kept:
            return RANGES[self.kind](torch.cat(self._kept), self.spec)
        if self._ends is None:
            raise SettingError("the range of values is not known before any were seen")
        return self._ends

    def result(self) -> tuple[Tensor, Tensor | None]:
        """Gives the scale and the zero point (None where symmetric), both of shape (1, 1)."""
        least, most = self.ends()
        return self.spec.scales_of(least.reshape(1, 1), most.reshape(1, 1))

    def state_dict(self) -> dict[str, Any]:
        """Gives what was seen."""
        return {"ends": self._ends, "kept": list(self._kept)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` gave."""
        self._ends, self._kept = state["ends"], list(state["kept"])


def _spread(values: Tensor) -> Tensor:
    """Takes some of many values, spread over all of them.

    Places are steps of the golden ratio around a circle. Even steps would meet the same few
    columns over and over where their length is a multiple of a row's.
    """
    if len(values) <= _SAMPLES:
        return values.clone()
    turns = torch.arange(_SAMPLES, dtype=torch.float64, device=values.device) * _GOLDEN
    return values[(turns.frac() * len(values)).long()]


def _averaged(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], decay: float
) -> tuple[Tensor, Tensor]:
    least, most = (was.lerp(now, 1 - decay) for was, now in zip(old, new, strict=True))
    return least, most
