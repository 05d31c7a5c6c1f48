"""What FlatQuant learns: maps of layers' inputs and of keys and values, and ranges."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.calibrate import BlockPass
from supple.formats import QuantSpec
from supple.graph.feeds import Feed
from supple.layers.quantized_attention import QuantizedAttention
from supple.layers.rotations import KroneckerAffine, Rotation
from supple.quantize._reconstruct import examples_of
from supple.weights import as_matrix

__all__ = ["FlatAttention", "FlatBlock", "FlatLinear", "LearnedMap", "matrix_of", "rounded"]

_CLIP = 4.0  # its sigmoid is the share of the range that is kept at first
_CLIP_LR = 10.0


class _Factor(nn.Module):
    """A matrix as two orthogonal ones and a diagonal between them.

    Args:
        size: Of the matrix.
        generator: Draws it; it is orthogonal at first.
    """

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        drawn = [torch.randn(size, size, generator=generator) for _ in range(2)]
        self.before, self.behind = (nn.Parameter(torch.linalg.qr(one)[0]) for one in drawn)
        self.between = nn.Parameter(torch.ones(size))

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Gives the matrix and the transpose of its inverse."""
        before, behind = _cayley(self.before), _cayley(self.behind).T
        return before * self.between @ behind, before / self.between @ behind


def _cayley(raw: Tensor) -> Tensor:
    """Gives an orthogonal matrix, by the skew one of what lies below the diagonal."""
    below = raw.tril(-1)
    skew = (below - below.T) / 2
    unit = torch.eye(len(raw), dtype=raw.dtype, device=raw.device)
    found: Tensor = torch.linalg.solve(unit + skew, unit - skew)
    return found


class LearnedMap(Rotation):
    """A Kronecker product that learns, behind factors of the channels that may learn, too.

    Args:
        size: Channels.
        units: For each channel the number of its factor; None: there are no factors.
        generator: Draws the matrices.
        left: Size of the first matrix; by default such that both are about as large.
    """

    def __init__(
        self,
        size: int,
        units: Tensor | None,
        generator: torch.Generator,
        left: int | None = None,
    ) -> None:
        super().__init__()
        first = KroneckerAffine.sizes(size)[0] if left is None else left
        self.left, self.right = _Factor(first, generator), _Factor(size // first, generator)
        self.units = units
        self._known: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
        count = 0 if units is None else int(units.max()) + 1
        # Learned as logarithms, so that they stay above 0: a norm's gain takes them in.
        self.logarithm = nn.Parameter(torch.zeros(count)) if count else None

    @torch.no_grad()
    def begin(self, weights: Tensor, inputs: Tensor, alpha: float) -> None:
        """Sets the factors as SmoothQuant does, from the largest weights and inputs."""
        assert self.logarithm is not None
        assert self.units is not None
        factor = weights.clamp_min(1e-5) ** (1 - alpha) / inputs.clamp_min(1e-5) ** alpha
        logs = factor.clamp_min(1e-5).float().log()
        sums = torch.zeros_like(self.logarithm).index_add(0, self.units, logs)
        count = torch.zeros_like(sums).index_add(0, self.units, torch.ones_like(logs))
        self.logarithm.copy_(sums / count.clamp_min(1))

    def channels(self) -> Tensor | None:
        """Gives the factors of all channels, or None."""
        return None if self.logarithm is None else self.logarithm.exp()[self.units]

    def forget(self) -> None:
        """Lets the matrices be put together anew: to be called before each step."""
        self._known = None

    @torch.no_grad()
    def plain(self) -> KroneckerAffine:
        """Gives the product alone, as it is now."""
        return KroneckerAffine.of(self.left.matrices()[0], self.right.matrices()[0])

    def settings(self) -> dict[str, Any]:
        """There is nothing that a file would have to tell."""
        return {}

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies."""
        factor = self.channels()
        return self._both(x if factor is None else x * factor.to(x.dtype), 0)

    def inverse_t(self, weight: Tensor) -> Tensor:
        """Gives the matrix of a layer whose inputs are multiplied."""
        factor = self.channels()
        return self._both(weight if factor is None else weight / factor.to(weight.dtype), 1)

    def inverse(self, x: Tensor) -> Tensor:
        """Multiplies by the inverses."""
        left, right = (pair[1].T for pair in self._matrices())
        found = self._products(x, left, right)
        factor = self.channels()
        return found if factor is None else found / factor.to(x.dtype)

    def _both(self, x: Tensor, which: int) -> Tensor:
        left, right = self._matrices()
        return self._products(x, left[which], right[which])

    def _matrices(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        if self._known is None:
            self._known = self.left.matrices(), self.right.matrices()
        return self._known

    def _products(self, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        parts = torch.unflatten(x, -1, (len(left), len(right)))
        return (left.T.to(x.dtype) @ (parts @ right.to(x.dtype))).flatten(-2)


class FlatLinear(nn.Module):
    """A linear layer behind a map that learns, with rounding that lets gradients through.

    Args:
        layer: The layer, whose weight stays as it is.
        map: The map.
        spec: How the weight is rounded, or None.
        input: How the input is rounded, or None.
    """

    def __init__(
        self, layer: nn.Module, map: LearnedMap, spec: QuantSpec | None, input: QuantSpec | None
    ) -> None:
        super().__init__()
        self.map, self.spec, self.input = map, spec, input
        self.matrix = matrix_of(layer)
        bias = layer.bias
        self.bias = bias.detach() if isinstance(bias, Tensor) else None
        self.weight_clip = nn.Parameter(torch.full((len(self.matrix), 1), _CLIP))
        self.input_clip = nn.Parameter(torch.full((1,), _CLIP))

    def weight_share(self) -> Tensor:
        """Gives the share of each output's range that is kept."""
        return self.weight_clip.detach().sigmoid()

    def input_share(self) -> Tensor:
        """Gives the share of each token's range that is kept."""
        return self.input_clip.detach().sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """Gives what the rounded layer gives."""
        x, matrix = self.map(x), self.map.inverse_t(self.matrix)
        if self.input is not None:
            x = rounded(x, self.input, self.input_clip.sigmoid())
        if self.spec is not None:
            matrix = rounded(matrix, self.spec, self.weight_clip.sigmoid())
        return F.linear(x, matrix.to(x.dtype), self.bias)


class FlatAttention(QuantizedAttention):
    """Attention whose keys and values are rounded with a gradient for their ranges."""

    def rounded(self, x: Tensor) -> Tensor:
        assert self.spec is not None
        return rounded(x, self.spec, torch.ones(1, dtype=x.dtype, device=x.device))


def rounded(x: Tensor, spec: QuantSpec, share: Tensor) -> Tensor:
    """Rounds to whole numbers with gradients for the numbers, their range, and its share.

    Args:
        x: The numbers.
        spec: How, of a format of whole numbers.
        share: The part of each range that is kept, in a shape that broadcasts to the scales'.

    Example:
        >>> x = torch.tensor([[7.5, 2.2, -3.9]], requires_grad=True)
        >>> share = torch.tensor([1.0], requires_grad=True)
        >>> found = rounded(x, QuantSpec("int4"), share)
        >>> by_share = torch.autograd.grad(found[0, 1], share)[0].item()
        >>> found.tolist(), round(by_share, 3)  # of a step: 2 for the code, less 2.2
        ([[7.0, 2.0, -4.0]], -0.2)
    """
    ends = [(part.amin(-1), part.amax(-1)) for part in spec.blocks(x)]
    least, most = (torch.cat(end, 1).float() * share for end in zip(*ends, strict=True))
    form, zero = spec.format, None
    if spec.symmetric:
        scale = form.scale(least, most)
    else:
        least, most = least.clamp_max(0), most.clamp_min(0)
        scale = (most - least) / (form.most - form.least)
    scale = torch.where(scale > 0, scale, 1.0)
    ready = x.float().reshape(spec.matrix_shape(x.shape)) / spec.spread(scale, x.shape)
    if not spec.symmetric:
        zero = spec.spread(_straight(form.least - least / scale), x.shape)
        ready = ready + zero
    codes = _straight(ready.clamp(form.least, form.most))
    codes = codes if zero is None else codes - zero
    return (codes * spec.spread(scale, x.shape)).reshape(x.shape).to(x.dtype)


def _straight(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


class FlatBlock:
    """A block of which a copy learns.

    Args:
        block: The block; it is left as it is.
    """

    def __init__(self, block: BlockPass) -> None:
        self.examples = examples_of(block)
        self.linear: dict[str, tuple[Feed | None, FlatLinear]] = {}
        self.attention: dict[str, tuple[LearnedMap, LearnedMap]] = {}
        self.module: nn.Module = _Held(_twin(block.module))
        self._path = block.path

    def flatten(self, name: str, feed: Feed | None, layer: FlatLinear) -> None:
        """Puts a layer that learns into the copy, by the name of its weight in the network."""
        self.linear[name] = (feed, layer)
        self._put(name.rpartition(".")[0], layer)

    def attend(self, path: str, keys: LearnedMap, values: LearnedMap, spec: QuantSpec) -> None:
        """Lets attention in the copy round its keys and values, with maps that learn."""
        self.attention[path] = (keys, values)
        module = self.module.get_submodule(self._inside(path))
        self._put(path, FlatAttention(module, spec, key_map=keys, value_map=values))

    def parameters_of(self, lr: float) -> list[dict[str, Any]]:
        """Gives what learns, in groups: maps, and shares of ranges."""
        learned = [parameter for one in self._maps() for parameter in one.parameters()]
        clips = [
            clip
            for _, layer in self.linear.values()
            for clip in (layer.weight_clip, layer.input_clip)
        ]
        groups = [{"params": learned, "lr": lr}, {"params": clips, "lr": _CLIP_LR * lr}]
        return [group for group in groups if group["params"]]

    def forget(self, step: int = 0) -> None:
        """Lets all maps be put together anew."""
        for one in self._maps():
            one.forget()

    def _maps(self) -> list[LearnedMap]:
        own = {id(layer.map): layer.map for _, layer in self.linear.values()}
        return [*own.values(), *(one for pair in self.attention.values() for one in pair)]

    def _inside(self, path: str) -> str:
        rest = path[len(self._path) :].removeprefix(".") if self._path else path
        return f"block.{rest}" if rest else "block"

    def _put(self, path: str, layer: nn.Module) -> None:
        parent, _, name = self._inside(path).rpartition(".")
        self.module.get_submodule(parent)._modules[name] = layer


class _Held(nn.Module):
    """Has a block as a part, so that something can take the whole block's place."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


def _twin(module: nn.Module) -> nn.Module:
    """Copies a block, but not its tensors."""
    memo: dict[int, Any] = {id(one): one for one in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, memo)


def matrix_of(layer: nn.Module) -> Tensor:
    """Gives a layer's weight as a matrix, float32, without a gradient.

    Args:
        layer: The layer.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return as_matrix(layer, weight.detach()).float()
