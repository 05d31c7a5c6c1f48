"""Networks that mix positions without full attention: tables, convolutions, axes, graphs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.base import BATCH, CLASSES, LENGTH, VOCAB, Entry, family, image, tokens


class MixerBlock(nn.Module):
    """Features are mixed along positions, then along channels."""

    def __init__(self, width: int, places: int, inner: int, wide: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.tokens = nn.Sequential(
            nn.Linear(places, inner), nn.GELU(), nn.Linear(inner, places)
        )
        self.norm2 = nn.LayerNorm(width)
        self.channels = nn.Sequential(nn.Linear(width, wide), nn.GELU(), nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))


class PatchNetwork(nn.Module):
    """Patches, blocks, the mean over places, a head."""

    def __init__(self, width: int, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


@family(
    sites={
        "width patch": 1,
        "width blocks.*.tokens.*": 3,
        "width blocks.*.channels.*": 3,
        "depth blocks.depth": 1,
    },
    fixed={
        "patch.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "blocks.0.tokens.0.weight[1]": "a spatial size",
        "head.weight[0]": "output",
    },
)
def mlp_mixer() -> Entry:
    blocks = [MixerBlock(30, 16, 22, 58) for _ in range(3)]
    return PatchNetwork(30, blocks), (image(16),), {}


class Affine(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, 1, width))
        self.beta = nn.Parameter(torch.zeros(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


class ResMLPBlock(nn.Module):
    def __init__(self, width: int, places: int, inner: int) -> None:
        super().__init__()
        self.affine1 = Affine(width)
        self.mix = nn.Linear(places, places)
        self.gain1 = nn.Parameter(torch.full((width,), 0.1))
        self.affine2 = Affine(width)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.gain2 = nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gain1 * self.mix(self.affine1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.gain2 * self.fc2(F.gelu(self.fc1(self.affine2(x))))


@family(
    sites={
        "width patch": 1,
        "width blocks.*.fc1": 3,
        "depth blocks.depth": 1,
    },
    fixed={
        "patch.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "blocks.0.mix.weight[0]": "a spatial size",
        "head.weight[0]": "output",
    },
)
def res_mlp() -> Entry:
    blocks = [ResMLPBlock(26, 16, 62) for _ in range(3)]
    return PatchNetwork(26, blocks), (image(16),), {}


class SpatialGate(nn.Module):
    """gMLP: one half gates the other after it was mixed along positions."""

    def __init__(self, width: int, inner: int, places: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * inner)
        self.gate_norm = nn.LayerNorm(inner)
        self.mix = nn.Conv1d(places, places, 1)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        u, v = F.gelu(self.up(self.norm(x))).chunk(2, dim=-1)
        return x + self.down(u * self.mix(self.gate_norm(v)))


@family(
    sites={
        "width patch": 1,
        "width blocks.*.up": 3,
        "depth blocks.depth": 1,
    },
    fixed={
        "patch.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "blocks.0.mix.weight[0]": "a spatial size",
        "head.weight[0]": "output",
    },
)
def gated_mlp() -> Entry:
    blocks = [SpatialGate(26, 34, 16) for _ in range(3)]
    return PatchNetwork(26, blocks), (image(16),), {}


class AxialAttention(nn.Module):
    """Attention along one axis of an image at a time; `axis` is 1 (rows) or 2 (columns)."""

    def __init__(self, width: int, heads: int, axis: int) -> None:
        super().__init__()
        self.heads, self.axis = heads, axis
        self.norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width, bias=False)
        self.memory = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x).transpose(self.axis, 2)
        batch, lines, length, _ = y.shape
        k, v = self.memory(y).chunk(2, dim=-1)
        q, k, v = (
            part.reshape(batch * lines, length, self.heads, -1).transpose(1, 2)
            for part in (self.query(y), k, v)
        )
        y = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = y.transpose(1, 2).reshape(batch, lines, length, -1)
        return x + self.out(y).transpose(self.axis, 2)


class AxialNetwork(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 40, 4, stride=4)
        self.blocks = nn.Sequential(*(AxialAttention(40, 4, 1 + i % 2) for i in range(4)))
        self.head = nn.Linear(40, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x).permute(0, 2, 3, 1))
        return self.head(x.mean((1, 2)))


@family(
    sites={
        "width stem": 1,
        "heads blocks.*.heads": 4,
        "depth blocks.depth": 1,
    },
    fixed={
        "stem.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "head.weight[0]": "output",
    },
)
def axial_attention() -> Entry:
    return AxialNetwork(), (torch.randn(BATCH, 3, 16, 20),), {}


class TemporalBlock(nn.Module):
    """TCN: two dilated causal convolutions under weight norm."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        normed = nn.utils.parametrizations.weight_norm
        self.padding = 2 * dilation
        self.conv1 = normed(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.conv2 = normed(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        same = inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(F.pad(x, (self.padding, 0))))
        y = F.relu(self.conv2(F.pad(y, (self.padding, 0))))
        return F.relu(y + self.shortcut(x))


@family(
    sites={
        "width *.conv1": 4,
        "width *.conv2": 2,
        "depth depth": 1,
        "depth depth#2": 1,
    },
    fixed={
        "0.conv1.parametrizations.weight.original1[1]": "input dimension",
        "*[2]": "kernel size",
        "4.weight[0]": "output",
        "*": "changes the shape",
    },
)
def temporal_convolution() -> Entry:
    model = nn.Sequential(
        TemporalBlock(13, 22, 1),
        TemporalBlock(22, 22, 2),
        TemporalBlock(22, 30, 4),
        TemporalBlock(30, 30, 8),
        nn.Conv1d(30, CLASSES, 1),
    )
    return model, (torch.randn(BATCH, 13, LENGTH),), {}


class GatedDilation(nn.Module):
    def __init__(self, residual: int, gate: int, skip: int, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.dilated = nn.Conv1d(residual, 2 * gate, 2, dilation=dilation)
        self.residual = nn.Conv1d(gate, residual, 1)
        self.skip = nn.Conv1d(gate, skip, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        filtered, gate = self.dilated(F.pad(x, (self.dilation, 0))).chunk(2, dim=1)
        y = torch.tanh(filtered) * torch.sigmoid(gate)
        return x + self.residual(y), self.skip(y)


class WaveNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 22)
        self.blocks = nn.ModuleList(GatedDilation(22, 18, 30, 2**i) for i in range(3))
        self.hidden = nn.Conv1d(30, 34, 1)
        self.head = nn.Conv1d(34, VOCAB, 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).transpose(1, 2)
        total = 0
        for block in self.blocks:
            x, skip = block(x)
            total = total + skip
        return self.head(F.relu(self.hidden(F.relu(total))))


@family(
    sites={
        "width embed": 1,
        "width blocks.*.dilated": 3,
        "width blocks.0.skip": 1,
        "width hidden": 1,
    },
    fixed={
        "embed.weight[0]": "looked up by index",
        "*[2]": "kernel size",
        "head.weight[0]": "output",
        "blocks.*": "what it computes beside its output is used later",
    },
)
def wavenet() -> Entry:
    return WaveNet(), (tokens(),), {}


class Res2Block(nn.Module):
    """ECAPA: channels in four groups, each convolved after the one before was added."""

    def __init__(self, channels: int, scale: int, squeezed: int, dilation: int) -> None:
        super().__init__()
        self.scale = scale
        part = channels // scale
        self.into = nn.Conv1d(channels, channels, 1)
        self.norm1 = nn.BatchNorm1d(channels)
        self.convs = nn.ModuleList(
            nn.Conv1d(part, part, 3, padding=dilation, dilation=dilation)
            for _ in range(scale - 1)
        )
        self.norms = nn.ModuleList(nn.BatchNorm1d(part) for _ in range(scale - 1))
        self.out = nn.Conv1d(channels, channels, 1)
        self.norm2 = nn.BatchNorm1d(channels)
        self.down = nn.Conv1d(channels, squeezed, 1)
        self.up = nn.Conv1d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        first, *others = torch.chunk(F.relu(self.norm1(self.into(x))), self.scale, dim=1)
        parts, last = [first], 0
        for conv, norm, part in zip(self.convs, self.norms, others, strict=True):
            last = F.relu(norm(conv(part + last)))
            parts.append(last)
        y = F.relu(self.norm2(self.out(torch.cat(parts, 1))))
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean(2, keepdim=True)))))
        return x + y * gate


class SpeakerNetwork(nn.Module):
    """ECAPA-TDNN-like: features of all blocks joined, attentive statistics, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(13, 28, 5, padding=2)
        self.norm = nn.BatchNorm1d(28)
        self.blocks = nn.ModuleList(Res2Block(28, 4, 10, d) for d in (1, 2, 3))
        self.join = nn.Conv1d(3 * 28, 38, 1)
        self.attend = nn.Sequential(nn.Conv1d(38, 12, 1), nn.Tanh(), nn.Conv1d(12, 38, 1))
        self.stats = nn.BatchNorm1d(2 * 38)
        self.embed = nn.Linear(2 * 38, 22)
        self.head = nn.Linear(22, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        x = F.relu(self.join(torch.cat(features, 1)))
        weights = self.attend(x).softmax(2)
        mean = (weights * x).sum(2)
        spread = ((weights * x.square()).sum(2) - mean.square()).clamp(min=1e-4).sqrt()
        return self.head(self.embed(self.stats(torch.cat([mean, spread], 1))))


@family(
    sites={
        "width stem": 1,
        "width blocks.*.into": 3,
        "width blocks.*.convs.*": 3,
        "width blocks.*.down": 3,
        "width join": 1,
        "width attend.0": 1,
        "width embed": 1,
    },
    fixed={
        "stem.weight[1]": "input dimension",
        "*[2]": "kernel size",
        "head.weight[0]": "output",
        "blocks.*": "its output is joined with those of other blocks",
    },
)
def speaker_tdnn() -> Entry:
    return SpeakerNetwork(), (torch.randn(BATCH, 13, 16),), {}


class GraphConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Linear(a, b) for a, b in ((13, 26), (26, 26), (26, 18)))
        self.head = nn.Linear(18, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        looped = adjacency + torch.eye(adjacency.shape[-1])
        scale = looped.sum(-1).rsqrt()
        normed = scale[..., None] * looped * scale[..., None, :]
        for conv in self.convs:
            x = F.relu(normed @ conv(x))
        return self.head(x.mean(1))


def graph(nodes: int) -> Tensor:
    """A random symmetric adjacency, shape (batch, nodes, nodes)."""
    edges = (torch.rand(BATCH, nodes, nodes) < 0.4).float().triu(1)
    return edges + edges.mT


@family(
    sites={
        "width convs.*": 3,
    },
    fixed={
        "convs.0.weight[1]": "input dimension",
        "head.weight[0]": "output",
    },
)
def graph_convolution() -> Entry:
    return GraphConvolution(), (torch.randn(BATCH, 9, 13), graph(9)), {}


class GraphAttentionLayer(nn.Module):
    """Several heads, each scoring an edge by what its two ends say."""

    def __init__(self, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(inputs, width, bias=False)
        self.source = nn.Parameter(torch.randn(heads, width // heads))
        self.target = nn.Parameter(torch.randn(heads, width // heads))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        batch, nodes, _ = x.shape
        h = self.project(x).view(batch, nodes, self.heads, -1)
        source, target = (h * self.source).sum(-1), (h * self.target).sum(-1)
        scores = F.leaky_relu(source[:, :, None] + target[:, None], 0.2)
        absent = (adjacency + torch.eye(nodes) == 0)[..., None]
        weights = scores.masked_fill(absent, -1e9).softmax(2)
        return torch.einsum("bijh,bjhd->bihd", weights, h).flatten(2)


class GraphAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = GraphAttentionLayer(13, 30, 3)
        self.second = GraphAttentionLayer(30, 44, 4)
        self.head = nn.Linear(44, CLASSES)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.elu(self.first(x, adjacency))
        return self.head(F.elu(self.second(x, adjacency)))


@family(
    sites={
        "heads first.heads": 1,
        "heads second.heads": 1,
    },
    fixed={
        "first.project.weight[1]": "input dimension",
        "head.weight[0]": "output",
    },
)
def graph_attention() -> Entry:
    return GraphAttention(), (torch.randn(BATCH, 9, 13), graph(9)), {}
