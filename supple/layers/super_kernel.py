"""A convolution whose kernel size, width and presence are decided by trained thresholds."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from supple.errors import SettingError

__all__ = ["Decision", "SuperKernelConv2d", "deciding", "indicator"]


class Decision(NamedTuple):
    """What the thresholds of a layer say; its entries are 1 (or `1 / keep`) or 0.

    Args:
        kernels: For each kernel size but the smallest, whether its ring counts, shape
            (kernel sizes - 1,).
        widths: For each width, whether the channels that it adds count, shape (widths,).
    """

    kernels: Tensor
    widths: Tensor

    def counts(self) -> tuple[int, int]:
        """How many kernel sizes after the smallest are taken, and how many widths.

        What follows a refusal does not count, as in the layer. No width is a layer left out.
        """
        kernels, widths = (int((each > 0).cumprod(0).sum()) for each in self)
        return kernels, widths


def indicator(x: Tensor) -> Tensor:
    """Gives 1 where `x` is at least 0 and 0 elsewhere, with the derivative of the sigmoid.

    Example:
        >>> x = torch.tensor([-1.0, 0.0], requires_grad=True)
        >>> indicator(x).sum().backward()
        >>> indicator(x).tolist(), x.grad[1].item()
        ([0.0, 1.0], 0.25)
    """
    soft = torch.sigmoid(x)
    # in this order the value is exactly 0 or 1
    return (x >= 0).to(x) + (soft - soft.detach())


class SuperKernelConv2d(nn.Conv2d):
    r"""A convolution that holds its smaller kernels and widths inside its own weight.

    By itself it is the whole convolution, and `supple.Kernel` and `supple.Width` make its
    sizes elastic as anywhere. Inside `deciding` it computes with

    $$w = d_0\,(w^{(1)} + d_1\,(w^{(2)} + \dots)), \qquad
      w' = w_\text{core} + e_1\,(w_\text{ring} + \dots):$$

    the core is the centre of the smallest kernel size and each ring what the next size adds;
    $w^{(1)}$ are the output channels of the smallest width (of $w'$) and so on. An indicator
    says whether the norm of what it belongs to reaches a threshold,
    $e_1 = [\|w_\text{ring}\| \ge t]$, $d_1 = [\|w^{(2)}\| \ge t]$; its gradient is that of a
    sigmoid. Without any channels ($d_0 = 0$) the layer gives zeros.

    The thresholds are parameters, zeros at first (`supple_kernel_thresholds` and
    `supple_width_thresholds`). Networks that `extract` gives do not have them.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_sizes: Odd sizes, ascending; the last is the kernel's.
        widths: Shares of the output channels, ascending; the last is 1.
        skip: Whether there may be no channels at all.
        stride: Stride.
        dilation: Distance of the kernel's points.
        groups: Parts of the channels that don't see one another; `in_channels` where each
            channel is filtered alone.
        bias: Whether to add a bias; channels that don't count have none.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), rounded up.

    Raises:
        SettingError: The sizes or widths can't be nested.

    Example:
        >>> layer = SuperKernelConv2d(8, 8, groups=8)
        >>> layer.weight.shape, layer.decide().counts()
        (torch.Size([8, 1, 5, 5]), (1, 2))

    Source:
        Stamoulis et al. 2019, "Single-Path NAS: Designing Hardware-Efficient ConvNets in less
        than 4 Hours", arXiv:1904.02877; dstamoulis/single-path-nas, `superkernel.py`.
    Differs:
        Any number of kernel sizes and widths, any convolution; the authors' has two of each
        and is depthwise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_sizes: Sequence[int] = (3, 5),
        widths: Sequence[float] = (0.5, 1.0),
        *,
        skip: bool = True,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        self.kernel_sizes = tuple(kernel_sizes)
        self.channels = tuple(round(share * out_channels) for share in widths)
        self._check(widths, out_channels)
        full = self.kernel_sizes[-1]
        padding = dilation * (full // 2)
        super().__init__(
            *(in_channels, out_channels, full, stride, padding, dilation, groups, bias)
        )
        self.skip = skip
        self.decision: Decision | None = None
        self.supple_kernel_thresholds = nn.Parameter(torch.zeros(len(self.kernel_sizes) - 1))
        self.supple_width_thresholds = nn.Parameter(torch.zeros(len(widths) - (not skip)))

    def _check(self, widths: Sequence[float], out_channels: int) -> None:
        sizes = self.kernel_sizes
        if not sizes or min(sizes) < 1 or any(size % 2 != 1 for size in sizes):
            raise SettingError(f"kernel_sizes must be odd numbers above 0, got {sizes}")
        if not _ascends(sizes):
            raise SettingError(f"kernel_sizes must ascend, got {sizes}")
        channels = (0, *self.channels)
        if not widths or self.channels[-1] != out_channels or not _ascends(channels):
            raise SettingError(
                f"widths must ascend to 1 and give {out_channels} channels or fewer each, "
                f"at least 1 more than the width before, got {tuple(widths)}"
            )

    def decide(self, keep: float = 1.0, generator: torch.Generator | None = None) -> Decision:
        """Compares norms with thresholds, differentiably.

        Args:
            keep: Probability with which an indicator is not dropped; those that are not are
                divided by it.
            generator: What dropping draws from.
        """
        rings = self._rings()
        kernels: list[Tensor] = []
        for number, threshold in enumerate(self.supple_kernel_thresholds, start=1):
            norm = torch.linalg.vector_norm(self.weight * (rings == number))
            kernels.append(_kept(indicator(norm - threshold), keep, generator))
        none = self.weight.new_zeros(0)
        chosen = torch.stack(kernels) if kernels else none
        masked = self.weight * _nested(chosen, first=True)[rings]
        parts = torch.split(masked, self._added())
        widths = [] if self.skip else [self.weight.new_ones(())]
        decided = parts if self.skip else parts[1:]
        for part, threshold in zip(decided, self.supple_width_thresholds, strict=True):
            norm = torch.linalg.vector_norm(part)
            widths.append(_kept(indicator(norm - threshold), keep, generator))
        return Decision(chosen, torch.stack(widths))

    def forward(self, input: Tensor) -> Tensor:
        """Convolves, with the whole kernel or as was decided."""
        if self.decision is None:
            return super().forward(input)
        kernels = _nested(self.decision.kernels, first=True)[self._rings()]
        parts = torch.tensor(self._added(), device=self.weight.device)
        widths = _nested(self.decision.widths).repeat_interleave(parts)
        weight = self.weight * kernels * widths[:, None, None, None]
        bias = None if self.bias is None else self.bias * widths
        output: Tensor = self._conv_forward(input, weight, bias)
        return output

    def _rings(self) -> Tensor:
        """For each point of the kernel, the number of the smallest size that has it."""
        full = self.kernel_sizes[-1]
        away = (torch.arange(full, device=self.weight.device) - full // 2).abs()
        sizes = torch.tensor(self.kernel_sizes, device=self.weight.device) // 2
        return torch.bucketize(torch.maximum(away[:, None], away[None, :]), sizes)

    def _added(self) -> list[int]:
        """How many channels each width adds."""
        return [b - a for a, b in itertools.pairwise((0, *self.channels))]


@contextmanager
def deciding(
    layers: Sequence[SuperKernelConv2d], decisions: Sequence[Decision]
) -> Iterator[None]:
    """Lets layers compute as was decided, for the duration of the block.

    Args:
        layers: The layers.
        decisions: What each of them decided.

    Example:
        >>> layer = SuperKernelConv2d(2, 2)
        >>> nothing = Decision(torch.zeros(1), torch.zeros(2))
        >>> with deciding([layer], [nothing]):
        ...     layer(torch.ones(1, 2, 5, 5)).abs().sum().item()
        0.0
    """
    before = [layer.decision for layer in layers]
    for layer, decision in zip(layers, decisions, strict=True):
        layer.decision = decision
    try:
        yield
    finally:
        for layer, earlier in zip(layers, before, strict=True):
            layer.decision = earlier


def _ascends(values: Sequence[int]) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


def _kept(value: Tensor, keep: float, generator: torch.Generator | None) -> Tensor:
    if keep == 1:
        return value
    drawn = float(torch.rand((), generator=generator))
    return value / keep if drawn < keep else value * 0


def _nested(indicators: Tensor, first: bool = False) -> Tensor:
    """What each part is multiplied by: its own indicator and all before it."""
    factors = indicators.cumprod(0)
    return torch.cat([factors.new_ones(1), factors]) if first else factors
