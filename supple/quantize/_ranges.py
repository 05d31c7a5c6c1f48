"""One scale for all inputs of a layer, from what calibration data has there."""

from __future__ import annotations

from functools import partial

from torch import nn

from supple.calibrate import statistics
from supple.formats import QuantSpec
from supple.observers import RangeObserver
from supple.quantize.base import Input
from supple.transforms import Given

__all__ = ["fixed_ranges"]


def fixed_ranges(
    model: nn.Module,
    given: Given,
    spec: QuantSpec,
    layers: str = "*",
    *,
    observer: str = "minmax",
    decay: float = 0.99,
) -> dict[str, Input]:
    """Gives how the inputs of layers are rounded with a scale that holds for all of them.

    Args:
        model: The model.
        given: Calibration batches.
        spec: How inputs are quantized, by `"tensor"`.
        layers: Shell-style pattern of the layers' paths.
        observer: How a range is found, see `supple.observers.RangeObserver`.
        decay: Of running averages.

    Returns:
        Name of a weight to the spec and the scale, and zero point, of its layer's input.
    """
    watch = {"range": partial(RangeObserver, spec, observer, decay)}
    seen = statistics(model, given.batches, ["range"], layers, observers=watch)
    return {name: (spec, one["range"]) for name, one in seen.items()}
