"""Normalization by running statistics: which modules have it, and train mode for them only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

__all__ = ["STATISTICS", "running_statistics", "tracking_norms", "without_dropout"]

STATISTICS = ("running_mean", "running_var")


def tracking_norms(module: nn.Module) -> dict[str, _NormBase]:
    """Finds the batch (and instance) normalizations that keep running statistics.

    Args:
        module: Any network.

    Returns:
        Module name -> module, each once.
    """
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, _NormBase) and part._buffers.get("running_mean") is not None
    }


def running_statistics(module: nn.Module) -> dict[str, Tensor]:
    """Gives the running means and variances of a network's normalizations.

    Args:
        module: Any network.

    Returns:
        Name as in `state_dict` -> the buffer itself.
    """
    found: dict[str, Tensor] = {}
    for name, part in tracking_norms(module).items():
        for kind in STATISTICS:
            buffer = part._buffers[kind]
            if buffer is not None:
                found[f"{name}.{kind}" if name else kind] = buffer
    return found


@contextlib.contextmanager
def without_dropout(module: nn.Module) -> Iterator[None]:
    """Puts everything but normalization in eval mode for a while.

    Dropout in all its forms asks its module's mode, be it a layer or a call inside an
    attention, so this switches it off without knowing it. Normalizations keep their mode: in
    eval mode they would use running statistics, which a partial size does not have.

    Args:
        module: Any network.

    Yields:
        Nothing; each module's own mode is put back at the end.
    """
    changed = [
        part for part in module.modules() if part.training and not isinstance(part, _NormBase)
    ]
    for part in changed:
        part.training = False
    try:
        yield
    finally:
        for part in changed:
            part.training = True
