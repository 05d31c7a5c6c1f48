"""Detection: pyramids of features, queries, and heads at several scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.base import BATCH, CLASSES, Entry, family, image


class Bottleneck(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(x + self.norm3(self.conv3(y)))


def stage(inputs: int, outputs: int, inner: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        *(Bottleneck(outputs, inner) for _ in range(blocks)),
    )


class FeaturePyramid(nn.Module):
    """RetinaNet-like: lateral and top-down paths, one head for all levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = stage(3, 18, 10, 2)
        self.stage2 = stage(18, 26, 14, 2)
        self.stage3 = stage(26, 38, 22, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(n, 20, 1) for n in (18, 26, 38))
        self.smooth = nn.ModuleList(nn.Conv2d(20, 20, 3, padding=1) for _ in range(3))
        self.tower = nn.Conv2d(20, 28, 3, padding=1)
        self.classes = nn.Conv2d(28, 3 * CLASSES, 3, padding=1)
        self.boxes = nn.Conv2d(28, 3 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = []
        for part in (self.stage1, self.stage2, self.stage3):
            x = part(x)
            features.append(x)
        above = self.lateral[2](features[2])
        levels = [above]
        for i in (1, 0):
            size = features[i].shape[-2:]
            above = self.lateral[i](features[i]) + F.interpolate(above, size=size)
            levels.insert(0, above)
        classes, boxes = [], []
        for smooth, level in zip(self.smooth, levels, strict=True):
            y = F.relu(self.tower(smooth(level)))
            classes.append(self.flat(self.classes(y), CLASSES))
            boxes.append(self.flat(self.boxes(y), 4))
        return torch.cat(classes, 1), torch.cat(boxes, 1)

    @staticmethod
    def flat(x: Tensor, values: int) -> Tensor:
        """All anchors of all places in a row, shape (batch, anchors, values)."""
        batch, _, height, width = x.shape
        x = x.view(batch, -1, values, height, width).permute(0, 3, 4, 1, 2)
        return x.reshape(batch, -1, values)


@family(
    sites={
        "width stage1.0": 1,
        "width stage1.*.conv1": 2,
        "width stage1.*.conv2": 2,
        "width stage2.0": 1,
        "width stage2.*.conv1": 2,
        "width stage2.*.conv2": 2,
        "width stage3.0": 1,
        "width stage3.*.conv1": 2,
        "width stage3.*.conv2": 2,
        "width lateral.0": 1,
        "width smooth.0": 1,
        "width tower": 1,
        "depth stage1.depth": 1,
        "depth stage2.depth": 1,
        "depth stage3.depth": 1,
    },
    fixed={
        "stage1.0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "classes.weight[0]": "output",
        "boxes.weight[0]": "output",
        "stage1.0": "changes the shape",
        "stage2.0": "changes the shape",
        "stage3.0": "changes the shape",
        "stage1.*": "computes nothing",
        "stage2.*": "computes nothing",
        "stage3.*": "computes nothing",
    },
)
def feature_pyramid() -> Entry:
    return FeaturePyramid(), (image(32),), {}


class DETR(nn.Module):
    """A convolutional backbone, PyTorch's own encoder-decoder, learned queries, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(stage(3, 18, 10, 1), stage(18, 34, 14, 1))
        self.project = nn.Conv2d(34, 40, 1)
        self.transformer = nn.Transformer(
            40, 4, 2, 2, dim_feedforward=52, dropout=0.0, batch_first=True
        )
        self.queries = nn.Parameter(torch.randn(5, 40))
        self.rows = nn.Parameter(torch.randn(10, 20))
        self.columns = nn.Parameter(torch.randn(10, 20))
        self.label = nn.Linear(40, CLASSES + 1)
        self.box = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.project(self.backbone(x))
        batch, _, height, width = features.shape
        places = torch.cat(
            [
                self.columns[:width].unsqueeze(0).repeat(height, 1, 1),
                self.rows[:height].unsqueeze(1).repeat(1, width, 1),
            ],
            dim=-1,
        ).flatten(0, 1)
        source = places.unsqueeze(0) + features.flatten(2).permute(0, 2, 1)
        queries = self.queries.unsqueeze(0).expand(batch, -1, -1)
        hidden = self.transformer(source, queries)
        return {"labels": self.label(hidden), "boxes": self.box(hidden).sigmoid()}


@family(
    sites={
        "width queries": 1,
        "width backbone.0.0": 1,
        "width backbone.*.*.conv1": 2,
        "width backbone.*.*.conv2": 2,
        "width backbone.1.0": 1,
        "width transformer.encoder.layers.*.linear1": 2,
        "width transformer.decoder.layers.*.linear1": 2,
        "width box.0": 1,
        "depth backbone.*.depth": 2,
        "depth transformer.encoder.layers.depth": 1,
        "depth transformer.decoder.layers.depth": 1,
    },
    fixed={
        "queries[0]": "output",
        "label.weight[0]": "output",
        "box.2.weight[0]": "output",
        "rows[0]": "a spatial size",
        "transformer.decoder.layers.*.heads": "the code computes a size as 40",
        "columns[0]": "a spatial size",
        "backbone.0.0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "backbone.*.0": "changes the shape",
        "backbone.*.1": "computes nothing",
        "backbone.*.2": "computes nothing",
    },
)
def detr() -> Entry:
    return DETR(), (image(16),), {}


class ConvBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.bn(self.conv(x)))


class DarkBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvBlock(channels, channels, 3)
        self.cv2 = ConvBlock(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C3(nn.Module):
    """Cross-stage partial: two projections, one of them through blocks, then joined."""

    def __init__(self, inputs: int, outputs: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.cv1 = ConvBlock(inputs, inner)
        self.cv2 = ConvBlock(inputs, inner)
        self.m = nn.Sequential(*(DarkBlock(inner) for _ in range(blocks)))
        self.cv3 = ConvBlock(2 * inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C2f(nn.Module):
    """The later form: one projection in two halves, and every block's output is kept."""

    def __init__(self, inputs: int, outputs: int, inner: int, blocks: int) -> None:
        super().__init__()
        self.cv1 = ConvBlock(inputs, 2 * inner)
        self.cv2 = ConvBlock((2 + blocks) * inner, outputs)
        self.m = nn.ModuleList(DarkBlock(inner) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class PoolingPyramid(nn.Module):
    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.cv1 = ConvBlock(channels, inner)
        self.cv2 = ConvBlock(4 * inner, channels)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.pool(x)
        y2 = self.pool(y1)
        return self.cv2(torch.cat((x, y1, y2, self.pool(y2)), 1))


class YOLO(nn.Module):
    """A partial backbone, a path up and a path down, and a head at each of two scales."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.anchors, self.values = 3, CLASSES + 5
        self.stem = ConvBlock(3, 10, 3, 2)
        self.down1 = ConvBlock(10, 18, 3, 2)
        self.stage1 = block(18, 22, 8, 2)
        self.down2 = ConvBlock(22, 34, 3, 2)
        self.stage2 = block(34, 38, 14, 2)
        self.pyramid = PoolingPyramid(38, 12)
        self.lateral = ConvBlock(38, 16)
        self.up = block(16 + 22, 26, 9, 1)
        self.down = ConvBlock(26, 28, 3, 2)
        self.out = block(28 + 16, 30, 11, 1)
        outputs = self.anchors * self.values
        self.detect = nn.ModuleList(nn.Conv2d(n, outputs, 1) for n in (26, 30))

    def forward(self, x: Tensor) -> list[Tensor]:
        fine = self.stage1(self.down1(self.stem(x)))
        lateral = self.lateral(self.pyramid(self.stage2(self.down2(fine))))
        up = F.interpolate(lateral, scale_factor=2.0, mode="nearest")
        fine = self.up(torch.cat([up, fine], 1))
        coarse = self.out(torch.cat([self.down(fine), lateral], 1))
        return [self.boxes(d(f)) for d, f in zip(self.detect, (fine, coarse), strict=True)]

    def boxes(self, x: Tensor) -> Tensor:
        batch, _, height, width = x.shape
        x = x.view(batch, self.anchors, self.values, height, width)
        return x.permute(0, 1, 3, 4, 2).contiguous()


@family(
    sites={
        "width stem.conv": 1,
        "width down1.conv": 1,
        "width stage1.cv1.conv": 1,
        "width stage1.cv2.conv": 1,
        "width stage1.m.*.cv1.conv": 2,
        "width stage1.cv3.conv": 1,
        "width down2.conv": 1,
        "width stage2.cv1.conv": 1,
        "width stage2.cv2.conv": 1,
        "width stage2.m.*.cv1.conv": 2,
        "width stage2.cv3.conv": 1,
        "width pyramid.cv1.conv": 1,
        "width pyramid.cv2.conv": 1,
        "width lateral.conv": 1,
        "width up.cv1.conv": 1,
        "width up.cv2.conv": 1,
        "width up.m.0.cv1.conv": 1,
        "width up.cv3.conv": 1,
        "width down.conv": 1,
        "width out.cv1.conv": 1,
        "width out.cv2.conv": 1,
        "width out.m.0.cv1.conv": 1,
        "width out.cv3.conv": 1,
        "depth stage1.m.depth": 1,
        "depth stage2.m.depth": 1,
    },
    fixed={
        "stem.conv.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "detect.*.weight[0]": "output",
    },
)
def yolo_v5() -> Entry:
    return YOLO(C3), (image(16),), {}


@family(
    sites={
        "width stem.conv": 1,
        "width down1.conv": 1,
        "width stage1.cv1.conv": 1,
        "width stage1.cv2.conv": 1,
        "width stage1.m.*.cv1.conv": 2,
        "width down2.conv": 1,
        "width stage2.cv1.conv": 1,
        "width stage2.cv2.conv": 1,
        "width stage2.m.*.cv1.conv": 2,
        "width pyramid.cv1.conv": 1,
        "width pyramid.cv2.conv": 1,
        "width lateral.conv": 1,
        "width up.cv1.conv": 1,
        "width up.cv2.conv": 1,
        "width up.m.0.cv1.conv": 1,
        "width down.conv": 1,
        "width out.cv1.conv": 1,
        "width out.cv2.conv": 1,
        "width out.m.0.cv1.conv": 1,
    },
    fixed={
        "stem.conv.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "detect.*.weight[0]": "output",
        "stage1.m.*": "its output is joined with those of other blocks",
        "stage2.m.*": "its output is joined with those of other blocks",
    },
)
def yolo_v8() -> Entry:
    return YOLO(C2f), (image(16),), {}


class CrossStagePartial(nn.Module):
    """CSPNet proper: the channels are cut in two, one part passes by the blocks."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        half = channels // 2
        self.blocks = nn.Sequential(*(Bottleneck(half, half - 3) for _ in range(blocks)))
        self.transition = nn.Conv2d(half, half, 1)
        self.join = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        past, through = torch.split(x, x.shape[1] // 2, dim=1)
        return self.join(torch.cat([past, self.transition(self.blocks(through))], 1))


@family(
    sites={
        "width 0": 1,
        "width *.blocks.*.conv1": 4,
        "width *.blocks.*.conv2": 4,
        "width *.transition": 2,
        "width *.join": 2,
        "width 2": 1,
        "depth *.blocks.depth": 2,
    },
    fixed={
        "0.weight[1]": "input dimension",
        "*[2, 3]": "kernel size",
        "6.weight[0]": "output",
    },
)
def cross_stage_partial() -> Entry:
    model = nn.Sequential(
        nn.Conv2d(3, 26, 3, padding=1),
        CrossStagePartial(26, 2),
        nn.Conv2d(26, 34, 3, stride=2, padding=1),
        CrossStagePartial(34, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(34, CLASSES),
    )
    return model, (torch.randn(BATCH, 3, 8, 8),), {}
