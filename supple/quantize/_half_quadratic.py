"""Zero points that make a robust error small, without data."""

from __future__ import annotations

import torch
from torch import Tensor

from supple.formats import Quantized, QuantSpec, quantize

__all__ = ["half_quadratic"]


@torch.no_grad()
def half_quadratic(
    weight: Tensor,
    spec: QuantSpec,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    kappa: float = 1.01,
    iterations: int = 20,
) -> Quantized:
    r"""Rounds a weight with zero points that make $\sum |W - \hat W|^p$ small, $p < 1$.

    Few large errors then count for less than many small ones. In turn the error is shrunk by
    the proximal operator of the norm, and each zero point is set to the mean that the shrunk
    error asks for; the scales stay those of least and most. It ends where the mean error no
    longer falls.

    Zero points begin whole, so that weights near zero stay there, which matters where they
    meet large inputs. Where beginning between whole numbers makes the error of a group smaller
    by a tenth, that is taken.

    Args:
        weight: (out, in), as `supple.weights.as_matrix` gives it.
        spec: With zero points, and room for fractions in them (`zero_format`).
        power: $p$, above 0 and up to 1.
        beta: Strength of the pull towards the weight at the start.
        kappa: Factor by which it grows.
        iterations: At most so many updates.

    Returns:
        The quantized weight.

    Source:
        Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models";
        mobiusml/hqq, `optimize.py`, whose constants these are.
    Differs:
        The authors' code begins with whole zero points at 4 bits, and between them at others.
    """
    scale, zero = spec.scales(weight)
    assert zero is not None
    whole, between = (
        _refined(weight, spec, scale, start, power, beta, kappa, iterations)
        for start in (zero.round(), zero)
    )
    errors = [_error(weight, spec, scale, start) for start in (whole, between)]
    return quantize(
        weight, spec, scale, torch.where(errors[1] < 0.9 * errors[0], between, whole)
    )


def _refined(
    weight: Tensor,
    spec: QuantSpec,
    scale: Tensor,
    zero: Tensor,
    power: float,
    beta: float,
    kappa: float,
    iterations: int,
) -> Tensor:
    """Moves zero points from where they begin."""
    best, least = zero, torch.inf
    for _ in range(iterations):
        found = quantize(weight, spec, scale, zero)
        error = weight - found.dequantize()
        now = float(error.abs().mean())
        if now >= least:
            break
        best, least = zero, now
        shrunk = error.abs() - error.abs().clamp_min(1e-12) ** (power - 1) / beta
        target = weight - error.sign() * shrunk.clamp_min(0)
        codes = spec.format.decode(found.codes)
        wanted = codes - target / spec.spread(scale, weight.shape)
        zero = torch.cat([block.mean(-1) for block in spec.blocks(wanted)], 1)
        zero = spec.stored_zero(zero)
        beta *= kappa
    return best


def _error(weight: Tensor, spec: QuantSpec, scale: Tensor, zero: Tensor) -> Tensor:
    """The root mean square of each group's errors, shaped like the scales."""
    error = weight - quantize(weight, spec, scale, zero).dequantize()
    return torch.cat([block.square().mean(-1).sqrt() for block in spec.blocks(error)], 1)
