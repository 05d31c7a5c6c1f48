"""Paths of a network that are dropped more and more often as training goes on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from supple.errors import SettingError

__all__ = ["ScheduledDropPath"]


class ScheduledDropPath(nn.Module):
    r"""Drops a path for some examples of a batch, more often the longer training goes on.

    At training forward $t$, counted from 0, an example's path is zero with probability
    $p_t = p \min(t / T, 1)$, independently of the others; what stays is divided by $1 - p_t$,
    so that its mean is kept. In eval mode nothing is dropped.

    Args:
        drop: $p$, the probability at the end, in [0, 1).
        steps: $T$, training forwards until then, at least 1.

    Attributes:
        forwards: Training forwards so far, saved with the weights.

    Raises:
        SettingError: A setting is out of range.

    Example:
        >>> layer = ScheduledDropPath(0.5, steps=100)
        >>> torch.equal(layer(torch.ones(3, 2)), torch.ones(3, 2))  # nothing at the beginning
        True

    Source:
        Zoph et al. 2018, "Learning Transferable Architectures for Scalable Image Recognition",
        arXiv:1707.07012, section 4.1; tensorflow/models, research/slim/nets/nasnet.
    """

    forwards: Tensor

    def __init__(self, drop: float, *, steps: int) -> None:
        super().__init__()
        if not 0 <= drop < 1:
            raise SettingError(f"drop must be in [0, 1), got {drop}")
        if steps < 1:
            raise SettingError(f"steps must be at least 1, got {steps}")
        self.drop = drop
        self.steps = steps
        self.register_buffer("forwards", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (N, ...)."""
        if not self.training or not self.drop:
            return x
        keep = 1 - self.drop * (self.forwards / self.steps).clamp(max=1)
        self.forwards.add_(1)
        drawn = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device)
        return x * ((drawn < keep) / keep).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.drop}, steps={self.steps}"
