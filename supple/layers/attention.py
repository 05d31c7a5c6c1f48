r"""Kinds of attention without weights of their own: one can stand in another's place.

All map queries, keys and values to outputs; projections stay outside. A layer that may have any
of them is a `Choice` between its projections, which all kinds then share:

    self.attention = Choice(
        CosformerAttention(4, length=256, causal=True), SoftmaxAttention(4, causal=True)
    )
    ...
    x = x + self.out(self.attention(self.query(x), self.key(x), self.value(x)))

The axis `supple.Operator` makes the choice elastic.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError

__all__ = ["CosformerAttention", "LinearAttention", "SoftmaxAttention"]

_LEAST = 1e-6
"""Where a query is alike to no key at all, the output is close to zero and not infinite."""


class _Attention(nn.Module):
    """Splits into heads, mixes, and joins the heads.

    Args:
        num_heads: Into how many parts queries, keys and values are split.
        causal: Whether a token sees only itself and those before it.

    Raises:
        SettingError: `num_heads` is below 1.
    """

    def __init__(self, num_heads: int, *, causal: bool = False) -> None:
        super().__init__()
        if num_heads < 1:
            raise SettingError(f"num_heads must be at least 1, got {num_heads}")
        self.num_heads = num_heads
        self.causal = causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Maps (N, tokens, dim), (N, others, dim) and (N, others, out) to (N, tokens, out).

        The number of others is that of tokens where the attention is causal.
        """
        if self.causal and query.shape[1] != key.shape[1]:
            raise SettingError(
                f"causal attention needs as many keys as queries, got {key.shape[1]} and "
                f"{query.shape[1]}"
            )
        mixed = self.mix(self._heads(query), self._heads(key), self._heads(value))
        return mixed.transpose(1, 2).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return torch.unflatten(x, 2, (self.num_heads, -1)).transpose(1, 2)

    @abstractmethod
    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends in each head, all of shape (N, heads, tokens, part)."""


class SoftmaxAttention(_Attention):
    r"""Attention by $\text{softmax}(q k^T / \sqrt d)$; its cost is quadratic in the tokens.

    Args:
        num_heads: Into how many parts queries, keys and values are split.
        causal: Whether a token sees only itself and those before it.

    Raises:
        SettingError: `num_heads` is below 1.

    Example:
        >>> x = torch.ones(2, 5, 8)
        >>> SoftmaxAttention(4)(x, x, x).shape
        torch.Size([2, 5, 8])

    Source:
        Vaswani et al. 2017, "Attention Is All You Need", arXiv:1706.03762.
    """

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)


class LinearAttention(_Attention):
    r"""Attention by a product of features; its cost is linear in the tokens.

    With $\phi(x) = \text{elu}(x) + 1$ the weight of key $j$ for query $i$ is
    $\phi(q_i) \phi(k_j)^T$, divided by the sum over all keys that the query sees. So keys and
    values are summed up once, in $O(N d^2)$. Where it is causal, sums run along the tokens
    in chunks, inside which all pairs are formed: $O(N d (c + d))$ for chunks of $c$.

    Args:
        num_heads: Into how many parts queries, keys and values are split.
        causal: Whether a token sees only itself and those before it.
        chunk: Tokens per chunk where it is causal, at least 1.

    Raises:
        SettingError: `num_heads` or `chunk` is below 1.

    Example:
        >>> x = torch.ones(2, 5, 8)
        >>> LinearAttention(4, causal=True)(x, x, x).shape
        torch.Size([2, 5, 8])

    Source:
        Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with
        Linear Attention", arXiv:2006.16236.
    """

    def __init__(self, num_heads: int, *, causal: bool = False, chunk: int = 32) -> None:
        super().__init__(num_heads, causal=causal)
        if chunk < 1:
            raise SettingError(f"chunk must be at least 1 token, got {chunk}")
        self.chunk = chunk

    def features(self, x: Tensor) -> Tensor:
        """Gives what similarities are products of, shape (N, heads, tokens, features)."""
        return F.elu(x) + 1

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = self.features(query), self.features(key)
        # a column of ones adds the weights up beside the values
        value = F.pad(value, (0, 1), value=1.0)
        if self.causal:
            both = _causal(query, key, value, self.chunk)
        else:
            both = query @ (key.transpose(2, 3) @ value)
        return both[..., :-1] / both[..., -1:].clamp_min(_LEAST)


class CosformerAttention(LinearAttention):
    r"""Linear attention to what is near: features weighted by a cosine of their distance.

    The weight of key $j$ for query $i$ is
    $\text{relu}(q_i)\,\text{relu}(k_j)^T \cos(\tfrac{\pi}{2} \tfrac{i - j}{M})$, divided by the
    sum over all keys that the query sees. A cosine of a difference is a sum of two products, so
    that the cost stays linear in the tokens.

    Args:
        num_heads: Into how many parts queries, keys and values are split.
        length: The distance $M$ at which weights vanish: most tokens of an input.
        causal: Whether a token sees only itself and those before it.
        chunk: Tokens per chunk where it is causal, at least 1.

    Raises:
        SettingError: A setting is below 1, or an input has more tokens than `length`.

    Example:
        >>> x = torch.ones(2, 5, 8)
        >>> CosformerAttention(4, length=5)(x, x, x).shape
        torch.Size([2, 5, 8])

    Source:
        Qin et al. 2022, "cosFormer: Rethinking Softmax in Attention", arXiv:2202.08791;
        OpenNLPLab/cosFormer, `cosformer.py`. There $M$ is the number of tokens of the input at
        hand, so that what comes later would change what came before; and causal sums are kept
        for each token.
    """

    def __init__(
        self, num_heads: int, *, length: int, causal: bool = False, chunk: int = 32
    ) -> None:
        super().__init__(num_heads, causal=causal, chunk=chunk)
        if length < 1:
            raise SettingError(f"length must be at least 1 token, got {length}")
        self.length = length

    def features(self, x: Tensor) -> Tensor:
        tokens = x.shape[2]
        if tokens > self.length:
            raise SettingError(
                f"an input of {tokens} tokens is longer than the attention's length of "
                f"{self.length}; make it with length={tokens} or more"
            )
        places = torch.arange(tokens, device=x.device, dtype=x.dtype)[:, None]
        angles = places * (math.pi / 2 / self.length)
        x = F.relu(x)
        return torch.cat([x * angles.cos(), x * angles.sin()], dim=-1)


def _causal(query: Tensor, key: Tensor, value: Tensor, chunk: int) -> Tensor:
    """Sums values by similarity up to each token, shape (N, heads, tokens, values)."""
    tokens = query.shape[2]
    fill = (0, 0, 0, -tokens % chunk)  # keys of zeros are alike to nothing
    query, key, value = (
        torch.unflatten(F.pad(x, fill), 2, (-1, chunk)) for x in (query, key, value)
    )
    inside = (query @ key.transpose(3, 4)).tril() @ value
    sums = key.transpose(3, 4) @ value
    before = query @ (sums.cumsum(dim=2) - sums)
    return (inside + before).flatten(2, 3)[:, :, :tokens]
