"""Running statistics for one size, measured anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, MutableMapping
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from supple.errors import SettingError
from supple.space import Config
from supple.training.batches import Forward, batches_of, moved, run_model
from supple.training.norms import STATISTICS, running_statistics, tracking_norms
from supple.training.seeds import kept
from supple.training.step import Network

__all__ = ["recalibrate"]


class _Recalibrated(Network, Protocol):
    @property
    def statistics(self) -> MutableMapping[Config, dict[str, Tensor]]: ...


def recalibrate(
    net: _Recalibrated,
    config: Mapping[str, int],
    data: Any,
    *,
    batches: int | None = None,
    forward: Forward | None = None,
) -> dict[str, Tensor]:
    """Measures the running statistics of a size and keeps them with the network.

    In training, running statistics would be a mixture of all sizes and right for none. So they
    are measured for each size that is used: as the plain mean over batches of their means and
    variances, with everything but batch normalization in eval mode. `net.at(config)` in eval
    mode and `net.extract(config)` use them from then on.

    The module is left as it was, also after an exception, and so are the global random numbers;
    only the largest size's statistics are the module's own, and measuring them replaces these.

    Args:
        net: An elastic network.
        config: The size.
        data: Batches like those of training.
        batches: How many of them to use, at least 1; None for all.
        forward: `forward(model, batch)`; by default by the batch's type.

    Returns:
        Buffer name -> statistics in the size's shapes, as kept in `net.statistics`; empty where
        the network has no batch normalization with running statistics.

    Raises:
        SettingError: `batches` is below 1, `data` gives no batch, or `config` is not of the
            network's space.

    Example:
        ```python
        supple.recalibrate(net, config, loader, batches=20)
        small = net.extract(config)
        ```

    Source:
        Yu and Huang 2019, "Universally Slimmable Networks and Improved Training Techniques",
        arXiv:1903.05134.
    """
    if batches is not None and batches < 1:
        raise SettingError(f"batches must be at least 1, got {batches}")
    config = net.space.canonical(config)
    module = net.module
    if not tracking_norms(module):
        return {}
    run, device = forward or run_model, _device(module)
    with kept(), _modes(module), net.at(config), torch.no_grad():
        seen = 0
        with _measuring(module) as measured:
            for batch in islice(batches_of(data, seed=0, epoch=0), batches):
                _weigh(module, seen)
                run(module, moved(batch, device))
                seen += 1
        if not seen:
            raise SettingError("data gave no batch to measure running statistics on")
    net.statistics[config] = measured
    if config == net.space.largest():
        for name, buffer in running_statistics(module).items():
            buffer.copy_(measured.get(name, buffer))
    return measured


@contextlib.contextmanager
def _modes(module: nn.Module) -> Iterator[None]:
    """Puts everything in eval mode, and then back part by part."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in module.modules():
            part.training = False
        for part in training:
            part.training = True


@contextlib.contextmanager
def _measuring(module: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Lets the active batch normalizations measure into buffers of their own.

    The buffers hide those of the module (or the active size's) as instance attributes, which
    Python looks at first, so nothing of the network's is written to.
    """
    measured: dict[str, Tensor] = {}
    norms = tracking_norms(module)
    before = {name: dict(norm.__dict__) for name, norm in norms.items()}
    try:
        for norm in norms.values():
            _start(norm)
        yield measured
        for name, norm in norms.items():
            if _ran(norm):
                for kind in STATISTICS:
                    measured[f"{name}.{kind}" if name else kind] = norm.__dict__[kind]
    finally:
        for name, norm in norms.items():
            norm.__dict__.clear()
            norm.__dict__.update(before[name])


def _start(norm: _NormBase) -> None:
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    assert var is not None
    norm.__dict__.update(
        running_mean=torch.zeros_like(mean, memory_format=torch.contiguous_format),
        running_var=torch.ones_like(var, memory_format=torch.contiguous_format),
        num_batches_tracked=torch.zeros((), dtype=torch.long, device=mean.device),
        momentum=None,  # the plain mean over batches
        track_running_stats=True,
        training=True,
    )


def _weigh(module: nn.Module, seen: int) -> None:
    # Instance normalization has no plain mean of its own.
    for norm in tracking_norms(module).values():
        if not isinstance(norm, _BatchNorm):
            norm.__dict__["momentum"] = 1 / (seen + 1)


def _ran(norm: _NormBase) -> bool:
    """Tells whether a normalization saw a batch; in a skipped block it did not."""
    return bool(norm.__dict__["num_batches_tracked"]) or bool(
        norm.__dict__["running_mean"].any()
    )


def _device(module: nn.Module) -> torch.device:
    tensor = next(module.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device
