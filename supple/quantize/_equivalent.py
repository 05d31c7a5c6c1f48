"""Factors of the channels that layers see, with which a network computes the same.

Channels of a layer's input are divided by `scale` and its weights multiplied by it. What comes
before takes the division where it can (`supple.graph.feeds`); else a layer does it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from supple.errors import SettingError
from supple.graph.feeds import Feed
from supple.layers.scaled_input import ScaledInput
from supple.rebuild import replace
from supple.weights import as_matrix, from_matrix, groups_of

__all__ = ["by_channel", "by_column", "matrix_of", "paths_of", "put", "scaled", "within"]


@torch.no_grad()
def scaled(model: nn.Module, feed: Feed, scale: Tensor) -> nn.Module:
    """Divides what layers see by factors, and multiplies their weights by these.

    Where the feed has a producer it takes the division, and only values change. Else a
    `ScaledInput` is put around each of the layers, whose path then ends in `.layer`: `paths_of`
    tells where they are.

    Args:
        model: The network; it is changed.
        feed: What the layers see.
        scale: Factors (size,), above 0; with a producer, channels of one place of it must have
            the same one: see `Feed.tied`.

    Returns:
        The network, which computes the same but for rounding.

    Raises:
        SettingError: Factors are of another shape, not above 0 and finite, or differ within a
            place of the producer; the model is left as it was.

    Example:
        >>> from supple.graph.feeds import feeds
        >>> model, x = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1)), torch.ones(1, 2)
        >>> _ = scaled(model, feeds(model, (x,))[0], torch.tensor([2.0, 4.0]))
        >>> model[0].weight.tolist()
        [0.5, 0.25]
    """
    scale = scale.detach().double()
    if scale.shape != (feed.size,) or not bool(((scale > 0) & scale.isfinite()).all()):
        raise SettingError(
            f"scale must hold {feed.size} finite numbers above 0, got shape "
            f"{tuple(scale.shape)} and least {float(scale.min()) if scale.numel() else None}"
        )
    rows = torch.zeros_like(scale)
    if feed.producer is not None:
        rows = _rows(feed, scale)
    layers = {name: model.get_submodule(_path(name)) for name in feed.consumers}
    for layer in layers.values():
        _multiply(layer, scale)
    if feed.producer is not None:
        for name, dim in feed.producer:
            tensor = model.get_parameter(name)
            shape = [1] * tensor.dim()
            shape[dim] = -1
            own = torch.ones(tensor.shape[dim], dtype=scale.dtype, device=scale.device)
            own[: len(rows)] = rows
            tensor.copy_(tensor.double() / own.reshape(shape).to(tensor.device))
        return model
    made = {_path(name): _with_scaled_input(layer, scale) for name, layer in layers.items()}
    return replace(model, made)


def by_column(layer: nn.Module, scale: Tensor) -> Tensor:
    """Gives factors of a layer's input channels for each number of its matrix.

    Args:
        layer: The layer.
        scale: (channels,).

    Returns:
        Shape (1, columns), or (out, columns) of a convolution in groups; as
        `supple.weights.as_matrix` lays a weight out.

    Example:
        >>> by_column(nn.Conv1d(2, 3, 2), torch.tensor([1.0, 5.0])).tolist()
        [[1.0, 1.0, 5.0, 5.0]]
    """
    groups = groups_of(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    outputs, columns = as_matrix(layer, weight).shape
    own = scale.reshape(groups, -1)
    spread = own.repeat_interleave(columns // own.shape[1], 1)
    return spread if groups == 1 else spread.repeat_interleave(outputs // groups, 0)


def by_channel(statistic: Tensor, size: int) -> Tensor:
    """Lays a statistic of a layer's columns out by the channels that they belong to.

    Args:
        statistic: (columns,), or of a convolution in groups (groups, columns).
        size: How many channels there are.

    Returns:
        (size, places of the kernel).

    Example:
        >>> by_channel(torch.tensor([1.0, 3.0, 2.0, 0.0]), 2).tolist()
        [[1.0, 3.0], [2.0, 0.0]]
    """
    return statistic.reshape(size, -1)


def matrix_of(layer: nn.Module) -> Tensor:
    """Gives a layer's weight as a matrix, float32: see `supple.weights.as_matrix`.

    Args:
        layer: The layer.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return as_matrix(layer, weight).detach().float()


@torch.no_grad()
def put(layer: nn.Module, matrix: Tensor) -> None:
    """Gives a layer the weight of a matrix.

    Args:
        layer: The layer; it is changed.
        matrix: As `matrix_of` gives it.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    weight.copy_(from_matrix(layer, matrix))


def within(feed: Feed, path: str) -> bool:
    """Tells whether all layers that see a tensor lie within one module.

    Args:
        feed: What the layers see.
        path: The module's path.
    """
    return all(name.startswith(f"{path}.") for name in feed.consumers)


def paths_of(model: nn.Module, layers: Iterable[nn.Module]) -> str:
    """Gives the pattern that exactly these layers of a network match.

    Args:
        model: The network.
        layers: Modules of it.

    Returns:
        Their paths, parted by commas, as `layers` of a quantizer takes them.
    """
    wanted = {id(layer) for layer in layers}
    return ", ".join(path for path, one in model.named_modules() if id(one) in wanted)


def _path(name: str) -> str:
    return name.rpartition(".")[0]


def _rows(feed: Feed, scale: Tensor) -> Tensor:
    """Gives the factors of the producer's places; 1 for those that nothing reads."""
    units = feed.units.to(scale.device, torch.int64)
    rows = torch.ones(int(units.max()) + 1, dtype=scale.dtype, device=scale.device)
    rows[units] = scale
    if not torch.equal(rows[units], scale):
        raise SettingError(
            f"channels that '{feed.producer and feed.producer[0][0]}' makes from one row need "
            "the same factor: pass feed.tied(scale)"
        )
    return rows


def _multiply(layer: nn.Module, scale: Tensor) -> None:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    matrix = as_matrix(layer, weight).double() * by_column(layer, scale)
    weight.copy_(from_matrix(layer, matrix))


def _with_scaled_input(layer: nn.Module, scale: Tensor) -> nn.Module:
    weight = layer.weight
    assert isinstance(weight, Tensor)
    made = ScaledInput(layer, len(scale), 1 if isinstance(layer, _ConvNd) else -1)
    return made.set_factor(scale.reciprocal().to(weight.dtype)).train(layer.training)
