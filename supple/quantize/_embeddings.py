"""Tables of embeddings as codes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn

from supple.errors import SettingError
from supple.formats import quantize
from supple.layers.packed import PackedEmbedding
from supple.quantize.base import Quantizer
from supple.rebuild import replace
from supple.transforms import Given
from supple.weights import matching

__all__ = ["Embeddings"]


@dataclass(frozen=True, kw_only=True)
class Embeddings(Quantizer):
    """Rounds tables of embeddings to the nearest codes, a scale for each vector or group.

    Other layers stay as they are: run another quantizer before or after. A table that another
    layer shares, such as a language model's head, stays too, as does one that limits the norm
    of its vectors.

    Args:
        group_size: Numbers of a vector that share a scale; None for all.
        layers: Shell-style pattern of the tables' paths; see `Quantizer`.

    Raises:
        SettingError: There is no such table.

    Example:
        >>> model = nn.Sequential(nn.Embedding(100, 32), nn.Linear(32, 2))
        >>> Embeddings(bits=4).apply(model)[0]
        PackedEmbedding((100, 32), int4, channel)
    """

    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.activations is not None:
            raise SettingError(
                "tables of embeddings are given numbers of their vectors, which are not "
                f"rounded: leave activations=None, got {self.activations}"
            )

    @torch.no_grad()
    def change(self, model: nn.Module, given: Given) -> nn.Module:
        """Rounds the tables."""
        if not self.rounds_weights:
            return model
        made: dict[str, nn.Module] = {}
        for path, table in self.tables(model).items():
            codes = quantize(table.weight.float(), self.spec())
            if self.packed:
                made[path] = PackedEmbedding.from_quantized(table, codes)
            else:
                table.weight.copy_(codes.dequantize(table.weight.dtype))
        return replace(model, made) if made else model

    def tables(self, model: nn.Module) -> dict[str, nn.Embedding]:
        """Gives the tables that are rounded, by path.

        Args:
            model: The model.
        """
        found = {
            path: module
            for path, module in model.named_modules()
            if type(module) is nn.Embedding and matching(path, self.layers)
        }
        users = Counter(
            id(one)
            for _, module in model.named_modules()
            for one in module._parameters.values()
        )
        own = {
            path: table
            for path, table in found.items()
            if users[id(table.weight)] == 1 and table.max_norm is None
        }
        if not own:
            shared = ", ".join(found)
            raise SettingError(
                f"layers must match an embedding of {type(model).__name__} that no other layer "
                f"shares and that limits no norms, got {self.layers!r}"
                f"{f' (which matches {shared})' if shared else ''}"
            )
        return own
