"""The residual networks for CIFAR, with shortcuts that have no parameters."""

from __future__ import annotations

import os
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import CheckpointError, SettingError
from supple.files import read_tensors
from supple.models.base import positive

__all__ = ["MEAN", "STD", "BasicBlock", "CifarResNet", "build"]

# Input normalisation that the published weights expect, per channel of an image in [0, 1].
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions; where the shape changes, the shortcut slices and pads (option A).

    Channels that the shortcut lacks are zeros, one half on either side.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        missing = outputs - inputs
        self.padding = (missing // 2, missing - missing // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, outputs, H / stride, W / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))

    def shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.padding == (0, 0):
            return x
        strided = x[:, :, :: self.stride, :: self.stride]
        return F.pad(strided, (0, 0, 0, 0, *self.padding))


class CifarResNet(nn.Module):
    """Stem, three stages of basic blocks, mean over the image, classifier."""

    def __init__(self, blocks: int, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = _stage(widths[0], widths[0], blocks, 1)
        self.layer2 = _stage(widths[0], widths[1], blocks, 2)
        self.layer3 = _stage(widths[1], widths[2], blocks, 2)
        self.linear = nn.Linear(widths[2], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps normalised images (N, 3, H, W) to logits (N, classes)."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def build(
    *,
    depth: int = 20,
    classes: int = 10,
    widths: Sequence[int] = (16, 32, 64),
    weights: str | os.PathLike[str] | None = None,
) -> nn.Module:
    """Builds a CIFAR ResNet.

    Args:
        depth: Number of weighted layers, 6n + 2: 20, 32, 44, 56, ...
        classes: Number of logits.
        widths: Channels of the three stages, not decreasing.
        weights: A safetensors file of pretrained weights to load, with this network's names.

    Raises:
        SettingError: A setting can't be used.
        CheckpointError: The weights can't be read or belong to another network.

    Example:
        >>> import torch
        >>> net = build(depth=20)
        >>> net(torch.zeros(2, 3, 32, 32)).shape, sum(p.numel() for p in net.parameters())
        (torch.Size([2, 10]), 269722)

    Source:
        He et al. 2016, "Deep Residual Learning for Image Recognition", arXiv:1512.03385,
        section 4.2. Layer names as in akamaster/pytorch_resnet_cifar10, whose weights load.
    """
    positive(classes=classes)
    if depth < 8 or (depth - 2) % 6:
        raise SettingError(f"depth must be 6n + 2, such as 20, 32 or 56, got {depth}")
    if len(widths) != 3 or sorted(widths) != list(widths) or min(widths) < 1:
        raise SettingError(f"widths must be three increasing numbers, got {tuple(widths)}")
    net = CifarResNet((depth - 2) // 6, widths, classes)
    if weights is not None:
        _load(net, weights)
    return net


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


def _load(net: nn.Module, path: str | os.PathLike[str]) -> None:
    tensors, _ = read_tensors(path)
    # The published files leave out the counters of batch norm, which inference doesn't use.
    wanted = {name for name in net.state_dict() if not name.endswith("num_batches_tracked")}
    given = {name for name in tensors if not name.endswith("num_batches_tracked")}
    if wanted != given:
        differing = sorted(wanted ^ given)
        raise CheckpointError(
            f"{os.fspath(path)} holds weights of another network: {len(differing)} names "
            f"differ, such as '{differing[0]}'; choose the depth that the file was trained with"
        )
    try:
        net.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise CheckpointError(f"{os.fspath(path)} does not fit the network: {error}") from error
