"""Attention of which keys and values have a few bits, as a cache would hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from supple.errors import SettingError
from supple.formats import QuantSpec, fake_quantize
from supple.layers.rotations import Rotation

__all__ = ["HeadScale", "ProductsBy", "QuantizedAttention"]


class HeadScale(Rotation):
    """Multiplies each channel of each head by a number of its own.

    Args:
        heads: Heads of keys; of queries there may be a multiple, each in its turn.
        channels: Channels of a head.

    Attributes:
        scale: The numbers, (heads, channels), above 0; 1 at first.

    Shape:
        (..., heads, tokens, channels) to the same.

    Example:
        >>> map = HeadScale(2, 1)
        >>> _ = map.scale.copy_(torch.tensor([[2.0], [4.0]]))
        >>> map(torch.ones(2, 1, 1)).flatten().tolist()
        [2.0, 4.0]
        >>> map.inverse_t(torch.ones(4, 1, 1)).flatten().tolist()
        [0.5, 0.5, 0.25, 0.25]
    """

    def __init__(self, heads: int, channels: int) -> None:
        super().__init__()
        if heads < 1 or channels < 1:
            raise SettingError(f"sizes must be at least 1, got {heads} and {channels}")
        self.heads, self.channels = heads, channels
        self.register_buffer("scale", torch.ones(heads, channels))
        self.scale: Tensor

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {"heads": self.heads, "channels": self.channels}

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies."""
        return x * self._for(x)

    def inverse(self, x: Tensor) -> Tensor:
        """Divides."""
        return x / self._for(x)

    def inverse_t(self, weight: Tensor) -> Tensor:
        """Divides: what queries are mapped by."""
        return self.inverse(weight)

    def _for(self, x: Tensor) -> Tensor:
        times = x.shape[-3] // self.heads
        return self.scale.to(x.dtype).repeat_interleave(times, 0)[:, None]


class QuantizedAttention(nn.Module):
    r"""Rounds the keys and values that a module's attention sees.

    Whatever the module calls `torch.nn.functional.scaled_dot_product_attention` with is
    rounded, each token of each head by itself, so what a cache holds can be rounded when it is
    put there: rounding again changes nothing. Before, keys may be mapped by an invertible map
    $P$, and queries by $P^{-T}$, so that all products are what they were; values may be mapped,
    too, and the output back.

    Args:
        layer: The module, which calls that function.
        spec: How keys and values are rounded, or what `QuantSpec.settings` gave; None: not at
            all.
        key_map: What keys are mapped by, or None.
        value_map: What values are mapped by, or None.
        queries: How queries are rounded, each token of each head by itself, or None.

    Shape:
        That of the module.

    Example:
        >>> from supple.layers.attention import SoftmaxAttention
        >>> attention = SoftmaxAttention(1)
        >>> rounded = QuantizedAttention(attention, QuantSpec("int2", "token"))
        >>> x, y = torch.ones(1, 1, 2), torch.tensor([[[1.5, 0.3]]])
        >>> attention(x, y, y).tolist(), rounded(x, y, y).tolist()
        ([[[1.5, 0.30000001192092896]]], [[[1.0, 0.0]]])
    """

    def __init__(
        self,
        layer: nn.Module,
        spec: QuantSpec | Mapping[str, Any] | None,
        *,
        key_map: Rotation | None = None,
        value_map: Rotation | None = None,
        queries: QuantSpec | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.spec, self.queries = _spec(spec), _spec(queries)
        self.key_map, self.value_map = key_map, value_map

    def settings(self) -> dict[str, Any]:
        """Gives the constructor's arguments."""
        return {
            "layer": self.layer,
            "spec": None if self.spec is None else self.spec.settings(),
            "key_map": self.key_map,
            "value_map": self.value_map,
            "queries": None if self.queries is None else self.queries.settings(),
        }

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Gives what the module gives with rounded keys and values."""
        with ProductsBy(self.product):
            return self.layer(*args, **kwargs)

    def product(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attends to rounded keys and values; is called in place of PyTorch's function."""
        if self.key_map is not None:
            query, key = self.key_map.inverse_t(query), self.key_map(key)
        if self.value_map is not None:
            value = self.value_map(value)
        mixed = F.scaled_dot_product_attention(
            _rounded(query, self.queries),
            self.rounded(key),
            self.rounded(value),
            *args,
            **kwargs,
        )
        return mixed if self.value_map is None else self.value_map.inverse(mixed)

    def rounded(self, x: Tensor) -> Tensor:
        """Rounds keys or values; the gradient passes unchanged."""
        return _rounded(x, self.spec)


def _spec(given: QuantSpec | Mapping[str, Any] | None) -> QuantSpec | None:
    return QuantSpec(**given) if isinstance(given, Mapping) else given


def _rounded(x: Tensor, spec: QuantSpec | None) -> Tensor:
    if spec is None:
        return x
    found = fake_quantize(x.detach(), spec)
    return x + (found - x).detach() if x.requires_grad else found


class ProductsBy(TorchFunctionMode):
    """Has attention computed by another function than PyTorch's fused one.

    Args:
        product: Is called with what `scaled_dot_product_attention` would have been.
    """

    def __init__(self, product: Callable[..., Tensor]) -> None:
        super().__init__()
        self._product = product

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Calls a function of PyTorch's, or the other one."""
        if func is F.scaled_dot_product_attention:
            func = self._product
        return func(*args, **(kwargs or {}))
