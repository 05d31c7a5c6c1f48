"""Scales of keys that pass rotary positions: found in a recorded run, and proved by trying.

Rotary positions turn pairs of channels of queries and keys. A factor that both channels of a
pair share passes the turn, so the weights that make keys can take it, and those that make
queries its inverse. Which weights these are is told by the recording; which channels are pairs
is told by trying the layouts that are in use: the outputs must not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from supple.graph.record import Call, Recording, output_tensors, record
from supple.transforms import evaluating

__all__ = ["RotaryKeys", "rotary_keys", "scale_pairs"]

_PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::matmul", "aten::linear", "aten::bmm"))
_TOLERANCE = 1e-3


@dataclass(frozen=True, eq=False)
class RotaryKeys:
    """The weights behind the queries and keys of an attention, and which channels are pairs.

    Args:
        query: Path of the linear layer that makes queries.
        key: Path of the one that makes keys.
        channels: Of a head.
        partner: For each channel of a head the other one of its pair.
    """

    query: str
    key: str
    channels: int
    partner: Tensor


def rotary_keys(
    model: nn.Module,
    sizes: Mapping[str, int],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> dict[str, RotaryKeys]:
    """Finds attention whose keys can be scaled by pairs of channels.

    Args:
        model: The network; it is as before afterwards.
        sizes: Path of a module that attends to the channels of a head.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        Path of a module to its weights and pairs. Those are left out of which queries and keys
        don't come from a linear layer each, or of which no layout of pairs leaves the outputs
        as they were: where keys are normalised, for example.
    """
    makers = _makers(record(model, args, kwargs), model)
    named = dict(kwargs or {})
    found: dict[str, RotaryKeys] = {}
    with evaluating(model), torch.no_grad():
        before = output_tensors(model(*args, **named))[0]
        for path, channels in sizes.items():
            if path not in makers:
                continue
            for partner in _layouts(channels):
                keys = RotaryKeys(*makers[path], channels, partner)
                if _fits(model, keys) and _passes(model, keys, before, args, named):
                    found[path] = keys
                    break
    return found


@torch.no_grad()
def scale_pairs(model: nn.Module, keys: RotaryKeys, factor: Tensor) -> None:
    """Multiplies keys by factors, and divides queries by them.

    Args:
        model: The network; it is changed.
        keys: Where keys and queries come from.
        factor: (heads of keys, channels), above 0; of a pair both are to be the same, else the
            network computes something else.
    """
    heads = [
        _rows(model.get_submodule(path)) // keys.channels for path in (keys.query, keys.key)
    ]
    queries = factor.repeat_interleave(heads[0] // heads[1], 0)
    for path, scale in ((keys.key, factor), (keys.query, 1 / queries)):
        layer: Any = model.get_submodule(path)
        each = scale.reshape(-1).to(layer.weight.device)
        layer.weight.copy_(layer.weight.double() * each[:, None])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias.double() * each)


def _layouts(channels: int) -> Iterator[Tensor]:
    """Yields the partners of channels: halves side by side, or neighbours."""
    if channels % 2 == 0:
        places = torch.arange(channels)
        yield (places + channels // 2) % channels
        yield places ^ 1


def _fits(model: nn.Module, keys: RotaryKeys) -> bool:
    query, key = (model.get_submodule(path) for path in (keys.query, keys.key))
    if not isinstance(query, nn.Linear) or not isinstance(key, nn.Linear):
        return False
    rows = _rows(query), _rows(key)
    return all(one % keys.channels == 0 for one in rows) and rows[0] % rows[1] == 0


def _rows(layer: nn.Module) -> int:
    assert isinstance(layer, nn.Linear)
    return layer.weight.shape[0]


def _passes(
    model: nn.Module,
    keys: RotaryKeys,
    before: Tensor,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> bool:
    """Tries factors that differ by pair; weights are as before afterwards, bit by bit."""
    layers = [model.get_submodule(path) for path in (keys.query, keys.key)]
    kept = [(one, one.detach().clone()) for layer in layers for one in layer.parameters()]
    heads = _rows(layers[1]) // keys.channels
    drawn = torch.rand(heads, keys.channels, generator=torch.Generator().manual_seed(0))
    factor = 0.5 + drawn + drawn[:, keys.partner]
    try:
        scale_pairs(model, keys, factor.double())
        after = output_tensors(model(*args, **kwargs))[0]
    finally:
        for one, value in kept:
            one.copy_(value)
    return bool((after - before).abs().max() <= _TOLERANCE * before.abs().max())


def _makers(recording: Recording, model: nn.Module) -> dict[str, tuple[str, str]]:
    """Gives for each module that attends the layers that queries and keys come from."""
    made = {ref.id: call for call in recording.calls for ref in call.outputs}
    weights = {
        ref.storage: name.removesuffix(".weight")
        for name, ref in recording.tensors.items()
        if name.endswith(".weight") and len(ref.shape) == 2
    }
    found: dict[str, tuple[str, str]] = {}
    for call in recording.calls:
        if "scaled_dot_product" not in call.name or len(call.inputs) < 3:
            continue
        query, key = (_sources(ref.id, made, weights) for ref in call.inputs[:2])
        if len(query) == len(key) == 1 and query != key:
            found[call.module] = (query.pop(), key.pop())
    return found


def _sources(number: int, made: Mapping[int, Call], weights: Mapping[int, str]) -> set[str]:
    """Gives the layers that a tensor comes from, with no other layer between."""
    found, left, seen = set[str](), [number], {number}
    while left:
        call = made.get(left.pop())
        if call is None:
            continue
        own = {weights[ref.storage] for ref in call.inputs if ref.storage in weights}
        if call.name in _PRODUCTS and own:
            found |= own
            continue
        for ref in call.inputs:
            if ref.id not in seen:
                seen.add(ref.id)
                left.append(ref.id)
    return found
