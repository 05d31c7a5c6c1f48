"""The weights of a module as one file, and a new start for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from supple.axes.base import added
from supple.errors import CheckpointError
from supple.files import read_tensors, write_tensors
from supple.training.seeds import kept

__all__ = ["borrowed_weights", "load_weights", "renewed", "save_weights"]


def save_weights(module: nn.Module, path: Path) -> Path:
    """Writes all parameters and buffers of a module; what is shared, once.

    Args:
        module: The module.
        path: A safetensors file.

    Returns:
        The path.

    Raises:
        CheckpointError: The file can't be written.
    """
    write_tensors(path, _tensors(module))
    return path


def load_weights(module: nn.Module, path: Path) -> None:
    """Puts the tensors of a file into a module of the same shapes, in place.

    What axes have added to the module, and the file lacks, stays as it is.

    Args:
        module: The module.
        path: What `save_weights` wrote.

    Raises:
        CheckpointError: The file is damaged, or belongs to another network.
    """
    given, _ = read_tensors(path)
    own = {n: t for n, t in _tensors(module).items() if n in given or not added(n)}
    for name in sorted(own.keys() ^ given.keys()):
        raise CheckpointError(f"{path} belongs to another network: {name} is on one side only")
    for name, tensor in own.items():
        if tensor.shape != given[name].shape:
            raise CheckpointError(
                f"{path} belongs to another network: {name} has the shape "
                f"{tuple(given[name].shape)} there and {tuple(tensor.shape)} here"
            )
    _put(own, given)


@contextmanager
def borrowed_weights(module: nn.Module, path: Path) -> Iterator[None]:
    """Lets a module have the weights of a file for a while.

    Args:
        module: The module.
        path: What `save_weights` wrote.
    """
    own = _tensors(module)
    before = {name: tensor.detach().clone() for name, tensor in own.items()}
    try:
        load_weights(module, path)
        yield
    finally:
        _put(own, before)


def renewed(module: nn.Module, seed: int) -> nn.Module:
    """Draws a module's weights anew, as its parts do when they are constructed.

    Every part with a `reset_parameters` is reset, then a `transformers` model's own rule is
    applied. A parameter that belongs to neither keeps its value.

    Args:
        module: The module; changed in place.
        seed: Where the randomness starts; the global generators stay as they were.

    Returns:
        The module.
    """
    with kept(seed), torch.no_grad():
        for part in module.modules():
            reset = getattr(part, "reset_parameters", None)
            if callable(reset):
                reset()
        rule = getattr(module, "_init_weights", None)
        if callable(rule):
            module.apply(rule)
    return module


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _put(own: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(given[name])
