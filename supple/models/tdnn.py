"""A time-delay network that embeds speakers: 1-D convolutions over frames, ECAPA-like."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.models.base import positive

__all__ = ["TDNN", "AttentiveStatistics", "Block", "Res2", "Speakers", "build"]


class ConvNorm(nn.Module):
    """Convolution over frames that keeps their number, ReLU, then batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> None:
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv1d(
            inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False
        )
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps frames (N, inputs, T) to (N, outputs, T)."""
        out: Tensor = self.norm(F.relu(self.conv(x)))
        return out


class Res2(nn.Module):
    """Groups of channels, each filtered together with what came out of the group before.

    The last group passes by. Shape (N, channels, T) is kept.
    """

    def __init__(self, channels: int, scale: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.scale = scale
        width = channels // scale
        filters = (ConvNorm(width, width, kernel, dilation) for _ in range(max(1, scale - 1)))
        self.filters = nn.ModuleList(filters)

    def forward(self, x: Tensor) -> Tensor:
        """Filters the groups from the first to the last."""
        groups = x.chunk(self.scale, 1)
        done = [self.filters[0](groups[0])]
        for own, group in zip(list(self.filters)[1:], groups[1:], strict=False):
            done.append(own(group + done[-1]))
        return torch.cat([*done, *groups[len(done) :]], 1)


class SqueezeExcite(nn.Module):
    """Rescales channels by a gate computed from their means. Shape (N, C, T) is kept."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = nn.Linear(channels, max(1, channels // 4))
        self.expand = nn.Linear(max(1, channels // 4), channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.sigmoid(self.expand(F.relu(self.reduce(x.mean(2)))))
        return x * gate.unsqueeze(2)


class Block(nn.Module):
    """Inner channels in groups with a residual among them, gated, and the identity."""

    def __init__(
        self, channels: int, inner: int, kernel: int, dilation: int, scale: int
    ) -> None:
        super().__init__()
        self.enter = ConvNorm(channels, inner)
        self.res2 = Res2(inner, scale, kernel, dilation)
        self.leave = ConvNorm(inner, channels)
        self.gate = SqueezeExcite(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Keeps the shape (N, channels, T)."""
        out: Tensor = self.gate(self.leave(self.res2(self.enter(x))))
        return x + out


class AttentiveStatistics(nn.Module):
    """Mean and standard deviation over time, each channel weighing the frames by itself."""

    def __init__(self, channels: int, bottleneck: int) -> None:
        super().__init__()
        self.reduce = nn.Conv1d(channels, bottleneck, 1)
        self.expand = nn.Conv1d(bottleneck, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Maps frames (N, C, T) to statistics (N, 2 C)."""
        weights = self.expand(torch.tanh(self.reduce(x))).softmax(2)
        mean = (weights * x).sum(2)
        spread = (weights * x**2).sum(2) - mean**2
        # The clamp keeps the root's gradient finite where a channel is constant.
        return torch.cat([mean, spread.clamp(min=1e-6).sqrt()], 1)


class TDNN(nn.Module):
    """Front convolution, dilated blocks, all blocks' outputs side by side, statistics."""

    def __init__(
        self,
        *,
        features: int,
        channels: int,
        blocks: int,
        inner: int,
        kernel: int,
        scale: int,
        joint: int,
        bottleneck: int,
        embedding: int,
    ) -> None:
        super().__init__()
        self.front = ConvNorm(features, channels, kernel)
        self.blocks = nn.ModuleList(
            Block(channels, inner, kernel, 2 + i, scale) for i in range(blocks)
        )
        self.join = nn.Conv1d(blocks * channels, joint, 1)
        self.pool = AttentiveStatistics(joint, bottleneck)
        self.norm = nn.BatchNorm1d(2 * joint)
        self.embed = nn.Linear(2 * joint, embedding)
        self.last = nn.BatchNorm1d(embedding)

    def forward(self, x: Tensor) -> Tensor:
        """Maps features (N, features, T) to embeddings (N, embedding)."""
        x = self.front(x)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        x = F.relu(self.join(torch.cat(outputs, 1)))
        embeddings: Tensor = self.last(self.embed(self.norm(self.pool(x))))
        return embeddings


class Speakers(nn.Module):
    """A network that embeds, and the cosines of its embeddings to one direction per speaker.

    For training with `supple.training.losses.angular_margin`; embeddings of speakers that were
    not trained on are compared by their cosine, too.
    """

    def __init__(self, network: nn.Module, embedding: int, speakers: int) -> None:
        super().__init__()
        self.network = network
        self.directions = nn.Parameter(torch.empty(speakers, embedding))
        nn.init.xavier_normal_(self.directions)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps features (N, features, T) to cosines (N, speakers) and embeddings."""
        embeddings = self.network(x)
        cosines = F.linear(F.normalize(embeddings), F.normalize(self.directions))
        return cosines, embeddings


def build(
    *,
    features: int = 80,
    channels: int = 512,
    blocks: int = 4,
    inner: int | None = None,
    kernel: int = 5,
    scale: int = 8,
    joint: int = 1536,
    bottleneck: int = 128,
    embedding: int = 192,
    classes: int = 0,
) -> nn.Module:
    """Builds a time-delay network that embeds recordings of speech; the defaults are large.

    A front convolution, then residual blocks with dilations 2, 3, ... whose inner channels are
    filtered in groups (Res2) and gated (squeeze-and-excitation), a 1 x 1 convolution over all
    blocks' outputs side by side, attentive statistics over time, and a linear embedding.

    The blocks can be left out with `Depth(joined=True)`; inner widths are cut in every group
    alike.

    Args:
        features: Features per frame (filterbanks).
        channels: Channels between the blocks.
        blocks: Number of blocks.
        inner: Channels inside the blocks, a multiple of `scale`; None for `channels`.
        kernel: Size of the front's and the groups' kernels, odd.
        scale: Number of groups.
        joint: Channels of the convolution over all blocks' outputs.
        bottleneck: Channels of the attention.
        embedding: Size of the embedding.
        classes: How many speakers are told apart in training. The network then gives cosines
            to each beside the embedding; with 0 it gives the embedding only.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> import torch
        >>> build(features=20, channels=32, blocks=2, joint=48)(torch.zeros(2, 20, 30)).shape
        torch.Size([2, 192])

    Source:
        Wang et al. 2022, "EfficientTDNN: Efficient Architecture Search for Speaker
        Recognition", arXiv:2103.13581 (authors' code: mechanicalsea/sugar); blocks as in
        Desplanques et al. 2020, "ECAPA-TDNN", arXiv:2005.07143. The blocks' identity is inside
        them, and each is given the last one's output; the authors' are given the sum of all.
    """
    inner = channels if inner is None else inner
    positive(
        features=features,
        channels=channels,
        blocks=blocks,
        inner=inner,
        scale=scale,
        joint=joint,
        bottleneck=bottleneck,
        embedding=embedding,
    )
    if inner % scale or kernel < 1 or kernel % 2 == 0 or classes < 0:
        raise SettingError(
            "inner must be a multiple of scale, kernel odd and classes at least 0, got "
            f"inner={inner}, scale={scale}, kernel={kernel}, classes={classes}"
        )
    network = TDNN(
        features=features,
        channels=channels,
        blocks=blocks,
        inner=inner,
        kernel=kernel,
        scale=scale,
        joint=joint,
        bottleneck=bottleneck,
        embedding=embedding,
    )
    return Speakers(network, embedding, classes) if classes else network
