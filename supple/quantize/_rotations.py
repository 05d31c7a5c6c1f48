"""Puts rotations before the linear layers of a network, which goes on to compute the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from supple.errors import UnsupportedModelError
from supple.layers.rotated_input import RotatedInput
from supple.layers.rotations import BlockHadamard, RandomHadamard, Rotation
from supple.rebuild import replace
from supple.weights import as_matrix, from_matrix, matrices

__all__ = ["block_hadamards", "fuse", "inner", "random_hadamards", "rotated", "rotations"]


@torch.no_grad()
def rotated(
    model: nn.Module,
    found: Mapping[str, Rotation],
    clips: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Puts a rotation before linear layers, and its counterpart into their weights.

    Args:
        model: The network; it is changed.
        found: Name of a weight, as `supple.weights.matrices` gives it, to what maps its
            layer's input.
        clips: Beyond which share of a token's largest magnitude mapped inputs are clipped, by
            the same names; by default not at all.

    Returns:
        The network, which without clipping computes the same up to rounding. A layer `path` is
        at `path.layer` then, and its weight's name is `inner(name)`.

    Raises:
        UnsupportedModelError: Several layers share one of the weights, or a layer is not
            linear; the network is as it was.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 3))
        >>> x = torch.ones(2, 8)
        >>> y = model(x)
        >>> model = rotated(model, block_hadamards(model))
        >>> torch.allclose(model(x), y, atol=1e-6), list(matrices(model))
        (True, ['0.layer.weight'])
    """
    layers = matrices(model)
    for name in found:
        _check(model, name, layers.get(name))
    for name, rotation in found.items():
        layer = layers[name]
        weight = layer.weight
        assert isinstance(weight, Tensor)
        matrix = rotation.inverse_t(as_matrix(layer, weight).double())
        weight.copy_(from_matrix(layer, matrix.to(weight.dtype)))
    made: dict[str, nn.Module] = {}
    for name, rotation in found.items():
        weight = layers[name].weight
        assert isinstance(weight, Tensor)
        share = (clips or {}).get(name)
        wrapped = RotatedInput(layers[name], rotation, clipped=share is not None)
        if share is not None:
            wrapped.clip = share.detach().float().reshape(1).clone()
        wrapped = wrapped.to(weight.device)
        made[name.rpartition(".")[0]] = wrapped.train(layers[name].training)
    return replace(model, made) if made else model


def inner(name: str) -> str:
    """Gives the name that a weight has once there is a rotation before its layer.

    Args:
        name: The name before.

    Example:
        >>> inner("blocks.0.up.weight"), inner("weight")
        ('blocks.0.up.layer.weight', 'layer.weight')
    """
    path = name.rpartition(".")[0]
    return f"{path}.layer.weight" if path else "layer.weight"


def rotations(
    model: nn.Module, make: Callable[[int], Rotation], layers: str = "*"
) -> dict[str, Rotation]:
    """Gives a rotation for each linear layer, by its number of inputs.

    Args:
        model: The network.
        make: Gives one for a number of inputs.
        layers: Pattern of the layers' paths, as in `supple.weights.matrices`.

    Returns:
        Name of a weight to its rotation. Convolutions are left out.
    """
    found = {}
    for name, layer in matrices(model, layers).items():
        if isinstance(layer, nn.Linear | Conv1D):
            found[name] = make(as_matrix(layer, layer.weight).shape[1])
    return found


def block_hadamards(
    model: nn.Module, layers: str = "*", size: int = 128
) -> dict[str, Rotation]:
    """Gives block Hadamard rotations of the largest size that divides each layer's inputs.

    Args:
        model: The network.
        layers: Pattern of the layers' paths.
        size: Largest size of a block.

    Returns:
        Name of a weight to its rotation; layers with an odd number of inputs are left out.
    """
    found = rotations(model, lambda width: BlockHadamard.fitting(width, size), layers)
    return {name: one for name, one in found.items() if one.settings()["size"] > 1}


def random_hadamards(
    model: nn.Module, generator: torch.Generator, layers: str = "*"
) -> dict[str, Rotation]:
    """Gives random Hadamard rotations of all inputs of each layer.

    Args:
        model: The network.
        generator: What draws the signs.
        layers: Pattern of the layers' paths.

    Returns:
        Name of a weight to its rotation.
    """
    return rotations(model, lambda width: RandomHadamard.drawn(width, generator), layers)


@torch.no_grad()
def fuse(rotation: Rotation, producer: nn.Module) -> None:
    """Maps a linear layer's outputs, by its weight and bias.

    A reader of these outputs then needs no map at run time, only `Rotation.inverse_t`.

    Args:
        rotation: The map, of as many channels as the layer has outputs.
        producer: An `nn.Linear` or `transformers`' `Conv1D`; it is changed.

    Raises:
        UnsupportedModelError: It is another layer.
    """
    if not isinstance(producer, nn.Linear | Conv1D):
        raise UnsupportedModelError(
            f"a rotation can be put into a linear layer, not into a {type(producer).__name__}; "
            "let it run before the layer that reads it"
        )
    matrix = as_matrix(producer, producer.weight).double()
    producer.weight.copy_(from_matrix(producer, rotation(matrix.T).T.to(producer.weight.dtype)))
    if producer.bias is not None:
        producer.bias.copy_(rotation(producer.bias.double()))


def _check(model: nn.Module, name: str, layer: nn.Module | None) -> None:
    if not isinstance(layer, nn.Linear | Conv1D):
        told = "no weight of the network" if layer is None else f"of a {type(layer).__name__}"
        raise UnsupportedModelError(
            f"'{name}' is {told}; rotations stand before linear layers, leave out others by "
            "layers="
        )
    users = [one for one in model.modules() if one._parameters.get("weight") is layer.weight]
    if len(users) > 1:
        raise UnsupportedModelError(
            f"'{name}' is the weight of {len(users)} layers, whose inputs can't all be "
            "rotated; leave it out by layers="
        )
