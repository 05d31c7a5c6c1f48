"""A linear layer as a product of two, cut at any rank."""

from __future__ import annotations

from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from supple.errors import SettingError

__all__ = ["LowRankLinear", "factorize"]


class LowRankLinear(nn.Module):
    """A linear layer whose matrix is a product `up @ down` of a given rank.

    The axis `supple.Rank` makes the rank elastic. Where the factors come from
    `from_linear`, the first directions are those of the largest singular values, so every
    prefix of them is the best approximation of its rank.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        rank: Number of directions, at most the smaller width.
        bias: Whether to add a bias.

    Shape:
        (..., in_features) to (..., out_features).

    Raises:
        SettingError: The rank is not between 1 and the smaller width.

    Example:
        >>> LowRankLinear(8, 6, rank=2)(torch.ones(3, 8)).shape
        torch.Size([3, 6])
    """

    def __init__(
        self, in_features: int, out_features: int, rank: int, bias: bool = True
    ) -> None:
        super().__init__()
        _check(rank, min(in_features, out_features))
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, out_features, bias=bias)

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, rank: int | None = None) -> LowRankLinear:
        """The best approximation of a linear layer by one of this rank (None: full rank).

        Both factors carry the root of the singular values. At full rank the layer computes
        what `linear` does, up to rounding.

        Raises:
            SettingError: The rank is not between 1 and the smaller width.
        """
        weight = linear.weight
        most = min(weight.shape)
        rank = most if rank is None else rank
        _check(rank, most)
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        root = values[:rank].sqrt()
        layer = cls(linear.in_features, linear.out_features, rank, linear.bias is not None)
        layer.to(weight.device, weight.dtype)
        layer.up.weight.copy_(left[:, :rank] * root)
        layer.down.weight.copy_(root[:, None] * right[:rank])
        if linear.bias is not None:
            layer.up.bias.copy_(linear.bias)
        return layer.train(linear.training)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """The same as one dense layer."""
        out, bias = self.up.weight.shape[0], self.up.bias is not None
        dense = nn.Linear(self.down.weight.shape[1], out, bias=bias)
        dense.to(self.up.weight.device, self.up.weight.dtype)
        dense.weight.copy_(self.up.weight @ self.down.weight)
        if bias:
            dense.bias.copy_(self.up.bias)
        return dense.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.up(self.down(x))
        return result


def _check(rank: int, most: int) -> None:
    if not 1 <= rank <= most:
        raise SettingError(f"rank must be from 1 to the smaller width, {most}, got {rank}")


def factorize(model: nn.Module, where: str = "*", rank: int | None = None) -> list[str]:
    """Put a `LowRankLinear` in the place of linear layers of a model.

    Args:
        model: The network; it is changed.
        where: Only layers whose path matches this shell-style pattern.
        rank: Rank of the factors; None keeps the full rank, and with it the function.

    Returns:
        Paths of the layers that were replaced.

    Raises:
        SettingError: No linear layer matches, or the rank is too large for one that does.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> factorize(model, where="0")
        ['0']
    """
    found = [
        (path, module)
        for path, module in model.named_modules()
        if path and type(module) is nn.Linear and fnmatchcase(path, where)
    ]
    if not found:
        raise SettingError(f"where must match the path of a linear layer, got {where!r}")
    made = [(path, LowRankLinear.from_linear(linear, rank)) for path, linear in found]
    for path, layer in made:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    return [path for path, _ in made]
