"""A visual autoregressive transformer: an image as token maps, predicted coarse to fine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.models.base import positive

__all__ = ["VAR", "Attention", "Block", "Codes", "Generated", "KeyValues", "build"]


class KeyValues:
    """Keys and values that one block has seen so far."""

    def __init__(self) -> None:
        self.tensors: tuple[Tensor, Tensor] | None = None

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds those of new tokens, (N, heads, tokens, width), and gives all of them."""
        if self.tensors is not None:
            key = torch.cat([self.tensors[0], key], dim=2)
            value = torch.cat([self.tensors[1], value], dim=2)
        self.tensors = key, value
        return key, value

    def release(self) -> None:
        """Frees their memory."""
        self.tensors = None

    @property
    def size_bytes(self) -> int:
        """Bytes held."""
        return sum(t.numel() * t.element_size() for t in self.tensors or ())


class Attention(nn.Module):
    """Multi-head self-attention over tokens, (N, tokens, dim) to the same."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValues | None) -> Tensor:
        query, key, value = (
            part(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = cache.extend(key, value)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a layer norm and with a residual.

    Only the first `tokens` positions go through; the others pass by, and are not seen.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Runs on a sequence that starts at the first position."""
        if x.shape[1] <= self.tokens:
            return self.run(x, mask)
        first, others = x[:, : self.tokens], x[:, self.tokens :]
        first = self.run(first, mask[: self.tokens, : self.tokens])
        return torch.cat([first, others], dim=1)

    def run(self, x: Tensor, mask: Tensor | None, cache: KeyValues | None = None) -> Tensor:
        """Runs on tokens, all of them."""
        x = x + self.attention(self.norm1(x), mask, cache)
        hidden: Tensor = self.down(F.gelu(self.up(self.norm2(x))))
        return x + hidden


class Codes(nn.Module):
    """Images of one channel as maps of tokens, coarse to fine, and back.

    Each map encodes what the maps before it leave over, averaged to its size, by the nearest of
    its `codes` values. Values start at evenly spaced numbers from -1 to 1; `fit` finds better
    ones.
    """

    def __init__(self, image_size: int, scales: Sequence[int], codes: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.scales = tuple(scales)
        self.edges = (0, *accumulate(side * side for side in scales))
        self.register_buffer("values", torch.linspace(-1, 1, codes).repeat(len(scales), 1))
        self.values: Tensor

    @torch.no_grad()
    def fit(self, images: Tensor, rounds: int = 30) -> None:
        """Finds the values of each map by k-means, starting at the quantiles.

        Args:
            images: Shape (N, 1, image_size, image_size).
            rounds: Steps of k-means.
        """
        left = images
        for number in range(len(self.scales)):
            samples = self._averaged(left, number).flatten()
            self.values[number] = _k_means(samples, self.values.shape[1], rounds)
            left = left - self._painted(self._nearest(left, number), number)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Gives the tokens of images, (N, 1, image_size, image_size) to (N, positions)."""
        left, maps = images, []
        for number in range(len(self.scales)):
            maps.append(self._nearest(left, number))
            left = left - self._painted(maps[-1], number)
        return torch.cat(maps, dim=1)

    def decode(self, tokens: Tensor) -> Tensor:
        """Gives the images of tokens, (N, positions) to (N, 1, image_size, image_size)."""
        return self.painted(tokens)[-1]

    def painted(self, tokens: Tensor) -> list[Tensor]:
        """Gives the image so far behind each complete map of tokens."""
        images: list[Tensor] = []
        for number, (first, end) in enumerate(pairwise(self.edges)):
            if end > tokens.shape[1]:
                break
            new = self._painted(tokens[:, first:end], number)
            images.append(images[-1] + new if images else new)
        return images

    def shown(self, image: Tensor, number: int) -> Tensor:
        """Gives an image at the size of a map, shape (N, tokens of the map, 1)."""
        return self._averaged(image, number).flatten(1).unsqueeze(2)

    def _averaged(self, image: Tensor, number: int) -> Tensor:
        return F.avg_pool2d(image, self.image_size // self.scales[number])

    def _nearest(self, image: Tensor, number: int) -> Tensor:
        seen = self.shown(image, number)
        return (seen - self.values[number]).abs().argmin(2)

    def _painted(self, tokens: Tensor, number: int) -> Tensor:
        side = self.scales[number]
        small = self.values[number][tokens].view(-1, 1, side, side)
        return F.interpolate(small, size=(self.image_size, self.image_size), mode="nearest")


def _k_means(samples: Tensor, count: int, rounds: int) -> Tensor:
    ordered = samples.sort().values
    quantiles = (torch.arange(count, device=samples.device) + 0.5) / count
    values = ordered[(quantiles * len(ordered)).long()]
    for _ in range(rounds):
        nearest = (samples[:, None] - values).abs().argmin(1)
        totals = torch.zeros_like(values).index_add_(0, nearest, samples)
        members = torch.zeros_like(values).index_add_(0, nearest, torch.ones_like(samples))
        values = torch.where(members > 0, totals / members.clamp(min=1), values)
    return values.sort().values


@dataclass(frozen=True)
class Generated:
    """What `VAR.generate` gives.

    Args:
        tokens: Of all maps, shape (N, positions).
        images: Shape (N, 1, image_size, image_size).
        cache_bytes: Bytes of cached keys and values behind each map; zeros without a cache.
    """

    tokens: Tensor
    images: Tensor
    cache_bytes: tuple[int, ...]


class VAR(nn.Module):
    """Predicts all tokens of a map at once, from the class and all coarser maps.

    Attributes:
        codes: What tokens mean.
        edges: Position at which each map starts, and the number of positions.
        blocks: The transformer.
    """

    def __init__(
        self,
        *,
        image_size: int,
        scales: Sequence[int],
        codes: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        hidden: int,
        classes: int,
    ) -> None:
        super().__init__()
        self.codes = Codes(image_size, scales, codes)
        self.edges = self.codes.edges
        positions = self.edges[-1]
        self.start = nn.Embedding(classes, dim)
        self.seen = nn.Linear(1, dim)
        self.position = nn.Parameter(torch.zeros(1, positions, dim))
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, hidden, positions) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, codes)
        of = torch.cat([torch.full((side * side,), i) for i, side in enumerate(scales)])
        self.register_buffer("mask", of[:, None] >= of[None, :], persistent=False)
        self.mask: Tensor

    def forward(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """Gives logits of each map, given all coarser ones.

        Args:
            tokens: Those of the coarsest maps, as many complete maps as there are; the finest
                map's are not looked at. Shape (N, tokens).
            classes: Shape (N,).

        Returns:
            Logits of the given maps and of the next one, shape (N, positions, codes).
        """
        x = self.embed(tokens, classes)
        mask = self.mask[: x.shape[1], : x.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        return self.read(x)

    def embed(self, tokens: Tensor, classes: Tensor) -> Tensor:
        """Gives what enters the blocks, shape (N, positions, dim)."""
        images = self.codes.painted(tokens)[: len(self.edges) - 2]
        parts = [self._entering(None, classes, 0)]
        parts += [self._entering(image, classes, i) for i, image in enumerate(images, 1)]
        return torch.cat(parts, dim=1)

    def read(self, x: Tensor) -> Tensor:
        """Gives the logits of what the blocks gave."""
        logits: Tensor = self.head(self.norm(x))
        return logits

    def _entering(self, image: Tensor | None, classes: Tensor, number: int) -> Tensor:
        """What enters the blocks for one map: the class, then the image so far."""
        if image is None:
            entering: Tensor = self.start(classes).unsqueeze(1)
        else:
            entering = self.seen(self.codes.shown(image, number))
        return entering + self.position[:, self.edges[number] : self.edges[number + 1]]

    @torch.no_grad()
    def generate(
        self,
        classes: Tensor,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        cache: bool = True,
    ) -> Generated:
        """Draws images of some classes, map by map.

        A block that takes no position of a map neither computes nor caches for it, and from
        then on its cache is freed: later maps don't go through it either.

        Args:
            classes: Shape (N,).
            temperature: What logits are divided by; 0 takes the likeliest token.
            generator: Source of randomness, on the device of `classes`.
            cache: Whether keys and values are kept from map to map; without, the whole
                sequence runs again for each.

        Returns:
            Tokens, images, and the bytes of the cache.

        Raises:
            SettingError: The temperature is below 0, or a block takes a part of a map.
        """
        if not temperature >= 0:
            raise SettingError(f"temperature must be at least 0, got {temperature}")
        caches = [KeyValues() for _ in self.blocks]
        tokens = classes.new_zeros(len(classes), 0)
        used = []
        for number in range(len(self.edges) - 1):
            if cache:
                logits = self._next(tokens, classes, number, caches)
            else:
                logits = self(tokens, classes)[:, self.edges[number] :]
            tokens = torch.cat([tokens, _drawn(logits, temperature, generator)], dim=1)
            used.append(sum(each.size_bytes for each in caches))
        return Generated(tokens, self.codes.decode(tokens), tuple(used))

    def _next(
        self, tokens: Tensor, classes: Tensor, number: int, caches: Sequence[KeyValues]
    ) -> Tensor:
        image = self.codes.painted(tokens)[-1] if number else None
        x = self._entering(image, classes, number)
        first, end = self.edges[number], self.edges[number + 1]
        for block, cache in zip(self.blocks, caches, strict=True):
            assert isinstance(block, Block)
            if end <= block.tokens:
                x = block.run(x, None, cache)
            elif first >= block.tokens:
                cache.release()
            else:
                raise SettingError(
                    f"a block must take whole maps, which end at positions {self.edges[1:]}, "
                    f"but one takes {block.tokens} positions"
                )
        return self.read(x)


def _drawn(logits: Tensor, temperature: float, generator: torch.Generator | None) -> Tensor:
    if not temperature:
        return logits.argmax(2)
    shares = (logits / temperature).softmax(2)
    drawn = torch.multinomial(shares.flatten(0, 1), 1, generator=generator)
    return drawn.view(logits.shape[:2])


def build(
    *,
    image_size: int = 8,
    scales: Sequence[int] = (1, 2, 4, 8),
    codes: int = 16,
    dim: int = 64,
    num_layers: int = 8,
    num_heads: int = 4,
    hidden: int | None = None,
    classes: int = 10,
) -> nn.Module:
    """Builds a small visual autoregressive transformer for images of one channel.

    Before training, `model.codes.fit(images)` finds what tokens stand for, and
    `model.codes.encode(images)` gives the tokens to learn.

    Args:
        image_size: Height and width of the images in pixels.
        scales: Heights and widths of the token maps, ascending; each divides `image_size`, and
            the last one is `image_size`.
        codes: Number of values that a token can stand for.
        dim: Width of the tokens, a multiple of `num_heads`.
        num_layers: Number of blocks.
        num_heads: Attention heads per block.
        hidden: Inner width of the perceptrons; 4 x dim by default.
        classes: Number of classes.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> import torch
        >>> model = build(dim=24, num_layers=2)
        >>> tokens = model.codes.encode(torch.zeros(3, 1, 8, 8))
        >>> tokens.shape, model(tokens, torch.tensor([1, 2, 3])).shape
        (torch.Size([3, 85]), torch.Size([3, 85, 16]))

    Source:
        Tian et al. 2024, "Visual Autoregressive Modeling: Scalable Image Generation via
        Next-Scale Prediction", arXiv:2404.02905: residual maps, block-wise causal attention.
        Smaller: pixels are coded one by one by k-means, not by a convolutional network; the
        class enters as the first token, and does not scale the norms.
    """
    scales = tuple(scales)
    hidden = 4 * dim if hidden is None else hidden
    positive(dim=dim, num_layers=num_layers, hidden=hidden, classes=classes)
    positive(image_size=image_size, num_heads=num_heads, codes=codes)
    ascending = all(a < b for a, b in pairwise(scales))
    whole = all(side > 0 and image_size % side == 0 for side in scales)
    if not scales or not ascending or not whole or scales[-1] != image_size:
        raise SettingError(
            f"scales must ascend, divide image_size and end with it, got {scales} and "
            f"{image_size}"
        )
    if dim % num_heads:
        raise SettingError(f"dim must be a multiple of num_heads, got {dim} and {num_heads}")
    return VAR(
        image_size=image_size,
        scales=scales,
        codes=codes,
        dim=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        hidden=hidden,
        classes=classes,
    )
