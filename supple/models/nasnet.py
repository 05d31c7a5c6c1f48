"""Cells of blocks that join two earlier states, stacked: NASNet's search space for images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from supple.errors import SettingError, nearest
from supple.layers.scheduled_drop_path import ScheduledDropPath
from supple.models.base import positive

__all__ = [
    "COMBINE",
    "NORMAL",
    "OPERATIONS",
    "REDUCTION",
    "Block",
    "Cell",
    "NASNetStack",
    "build",
]

COMBINE = ("add", "concat")
_GIVEN = 2
"""States that a cell begins with: the outputs of the two cells before."""


@dataclass(frozen=True)
class Block:
    """Joins two earlier states of its cell to a new one.

    Args:
        inputs: The two states: 0 is the output of the cell before, 1 that of the cell before
            that, 2 the first block's, and so on.
        ops: What is done to each of them, names of `OPERATIONS`.
        combine: Whether the results are added or put side by side.
    """

    inputs: tuple[int, int]
    ops: tuple[str, str]
    combine: str = "add"

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "ops", tuple(self.ops))
        if len(self.inputs) != 2 or len(self.ops) != 2:
            raise SettingError(
                f"a block has two inputs and two operations, got {self.inputs} and {self.ops}"
            )
        for name in self.ops:
            if name not in OPERATIONS:
                raise SettingError(
                    f"there is no operation {name!r}{nearest(name, list(OPERATIONS))}; "
                    f"operations are: {', '.join(OPERATIONS)}"
                )
        if self.combine not in COMBINE:
            raise SettingError(f"combine must be one of {COMBINE}, got {self.combine!r}")


@dataclass(frozen=True)
class Cell:
    """A small graph that is repeated throughout a network.

    Args:
        blocks: In their order, as `Block`s or mappings of their fields.
        output: The states that are put side by side as the cell's output; None for all that
            no block reads.
    """

    blocks: tuple[Block, ...]
    output: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        blocks = tuple(b if isinstance(b, Block) else Block(**b) for b in self.blocks)
        object.__setattr__(self, "blocks", blocks)
        if not blocks:
            raise SettingError("a cell needs at least one block")
        for i, block in enumerate(blocks):
            if not all(0 <= state < _GIVEN + i for state in block.inputs):
                raise SettingError(
                    f"block {i} reads states 0 to {_GIVEN + i - 1}, got {block.inputs}"
                )
        if self.output is not None:
            object.__setattr__(self, "output", tuple(self.output))
            known = range(_GIVEN + len(blocks))
            if not self.output or not all(state in known for state in self.output):
                raise SettingError(
                    f"the output of a cell is of its states, 0 to {known[-1]}, got "
                    f"{self.output}"
                )

    @property
    def given(self) -> tuple[int, ...]:
        """The states that make the output, ascending."""
        if self.output is not None:
            return tuple(sorted(set(self.output)))
        read = {state for block in self.blocks for state in block.inputs}
        return tuple(s for s in range(_GIVEN + len(self.blocks)) if s not in read)


class Norm(nn.Sequential):
    """ReLU, convolutions, batch norm."""

    def __init__(self, width: int, *convolutions: nn.Module) -> None:
        super().__init__(nn.ReLU(), *convolutions, nn.BatchNorm2d(width))


def _conv(kernel: int, dilation: int = 1) -> Callable[[int, int, int], nn.Module]:
    def made(inputs: int, width: int, stride: int) -> nn.Module:
        pad = dilation * (kernel // 2)
        return Norm(width, nn.Conv2d(inputs, width, kernel, stride, pad, dilation, bias=False))

    return made


def _factorized(kernel: int) -> Callable[[int, int, int], nn.Module]:
    def made(inputs: int, width: int, stride: int) -> nn.Module:
        pad = kernel // 2
        wide = nn.Conv2d(inputs, width, (1, kernel), (1, stride), (0, pad), bias=False)
        high = nn.Conv2d(width, width, (kernel, 1), (stride, 1), (pad, 0), bias=False)
        return Norm(width, wide, high)

    return made


def _separable(kernel: int) -> Callable[[int, int, int], nn.Module]:
    """A separable convolution, applied twice; the first one halves where that is asked for."""

    def once(inputs: int, width: int, stride: int) -> nn.Module:
        depthwise = nn.Conv2d(
            inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False
        )
        return Norm(width, depthwise, nn.Conv2d(inputs, width, 1, bias=False))

    def made(inputs: int, width: int, stride: int) -> nn.Module:
        return nn.Sequential(once(inputs, width, stride), once(width, width, 1))

    return made


def _pool(kind: type[nn.MaxPool2d | nn.AvgPool2d], kernel: int) -> Any:
    def made(inputs: int, width: int, stride: int) -> nn.Module:
        # The average is over pixels that exist, as with TensorFlow's padding.
        border = {"count_include_pad": False} if kind is nn.AvgPool2d else {}
        pool = kind(kernel, stride, kernel // 2, **border)
        if inputs == width:
            return pool
        project = nn.Conv2d(inputs, width, 1, bias=False)
        return nn.Sequential(pool, project, nn.BatchNorm2d(width))

    return made


def _identity(inputs: int, width: int, stride: int) -> nn.Module:
    if stride == 1 and inputs == width:
        return nn.Identity()
    return Norm(width, nn.Conv2d(inputs, width, 1, stride, bias=False))


OPERATIONS: Mapping[str, Callable[[int, int, int], nn.Module]] = {
    "identity": _identity,
    "average-3": _pool(nn.AvgPool2d, 3),
    "max-3": _pool(nn.MaxPool2d, 3),
    "max-5": _pool(nn.MaxPool2d, 5),
    "max-7": _pool(nn.MaxPool2d, 7),
    "conv-1": _conv(1),
    "separable-3": _separable(3),
    "separable-5": _separable(5),
    "separable-7": _separable(7),
    "factorized-3": _factorized(3),
    "conv-3": _conv(3),
    "dilated-3": _conv(3, dilation=2),
    "factorized-7": _factorized(7),
}
"""The operations, about from the cheapest to the dearest; each is made of input channels,
output channels and stride."""


class FactorizedReduction(nn.Module):
    """Halves height and width without losing pixels: two strided halves, one pixel apart."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.even = nn.Conv2d(inputs, width // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(inputs, width - width // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, inputs, H, W) to (N, width, ceil(H / 2), ceil(W / 2))."""
        shifted = F.pad(x, (0, 1, 0, 1))[:, :, 1:, 1:]
        both: Tensor = self.norm(torch.cat([self.even(x), self.odd(shifted)], 1))
        return both


class Joint(nn.Module):
    """A block as a module: two operations, each of which a path may be dropped in."""

    def __init__(
        self, block: Block, channels: Sequence[int], width: int, stride: int, drop: Any
    ) -> None:
        super().__init__()
        self.inputs = block.inputs
        self.combine = block.combine
        made = []
        for state, name in zip(block.inputs, block.ops, strict=True):
            here = stride if state < _GIVEN else 1
            op = OPERATIONS[name](channels[state], width, here)
            # An identity is never dropped: something always gets through.
            made.append(op if name == "identity" or drop is None else nn.Sequential(op, drop()))
        self.left, self.right = made

    def forward(self, states: list[Tensor]) -> Tensor:
        """Gives a new state from the earlier ones."""
        left, right = self.left(states[self.inputs[0]]), self.right(states[self.inputs[1]])
        joined: Tensor = left + right if self.combine == "add" else torch.cat([left, right], 1)
        return joined


class CellModule(nn.Module):
    """A cell between the outputs of the two cells before."""

    def __init__(
        self,
        cell: Cell,
        before: tuple[int, int],
        earlier: tuple[int, int],
        width: int,
        stride: int,
        drop: Any,
    ) -> None:
        """Takes channels and halvings of the cell before, and of the cell before that."""
        super().__init__()
        self.first = Norm(width, nn.Conv2d(before[0], width, 1, bias=False))
        self.second = _fitted(earlier, (width, before[1]))
        channels = [width, width]
        self.blocks = nn.ModuleList()
        for block in cell.blocks:
            self.blocks.append(Joint(block, channels, width, stride, drop))
            channels.append(width if block.combine == "add" else 2 * width)
        self.given = cell.given
        # Inputs that go into the output as they are have to be as small as the rest.
        shrunk = [s for s in cell.given if s < _GIVEN and stride > 1]
        self.shrink = nn.ModuleDict({str(s): FactorizedReduction(width, width) for s in shrunk})
        self.width = sum(channels[s] for s in cell.given)

    def forward(self, before: Tensor, earlier: Tensor) -> Tensor:
        """Gives the states that make the output, side by side."""
        states = [self.first(before), self.second(earlier)]
        for block in self.blocks:
            states.append(block(states))
        for name, shrink in self.shrink.items():
            states[int(name)] = shrink(states[int(name)])
        return torch.cat([states[s] for s in self.given], 1)


def _fitted(have: tuple[int, int], want: tuple[int, int]) -> nn.Module:
    """Brings the earlier of two inputs to the channels and the size that are wanted."""
    (inputs, halved), (width, halvings) = have, want
    if halved != halvings:
        return nn.Sequential(nn.ReLU(), FactorizedReduction(inputs, width))
    if inputs != width:
        return Norm(width, nn.Conv2d(inputs, width, 1, bias=False))
    return nn.Identity()


class NASNetStack(nn.Module):
    """A stem, then normal cells with a reduction cell between the stages, and a classifier."""

    def __init__(
        self,
        normal: Cell,
        reduction: Cell,
        *,
        cells: int,
        stages: int,
        filters: int,
        stem: int,
        classes: int,
        channels: int,
        drop: float,
        steps: int,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem)
        )
        self.cells = nn.ModuleList()
        kinds = (["normal"] * cells + ["reduction"]) * (stages - 1) + ["normal"] * cells
        before = earlier = (stem, 0)
        width, halvings = filters, 0
        for i, kind in enumerate(kinds):
            shrinks = kind == "reduction"
            width *= 2 if shrinks else 1
            # Later cells are dropped more, as in the authors' code.
            final = drop * (i + 1) / len(kinds)
            path = _dropping(final, steps) if drop else None
            cell = reduction if shrinks else normal
            made = CellModule(cell, before, earlier, width, 2 if shrinks else 1, path)
            self.cells.append(made)
            halvings += shrinks
            earlier, before = before, (made.width, halvings)
        self.head = nn.Linear(before[0], classes)

    def forward(self, x: Tensor) -> Tensor:
        """Maps images (N, channels, H, W) to logits (N, classes)."""
        before = earlier = self.stem(x)
        for cell in self.cells:
            before, earlier = cell(before, earlier), before
        logits: Tensor = self.head(F.relu(before).mean((2, 3)))
        return logits


def _dropping(drop: float, steps: int) -> Callable[[], nn.Module]:
    return lambda: ScheduledDropPath(drop, steps=steps)


def _blocks(inputs: Sequence[int], ops: str) -> tuple[Block, ...]:
    names = ops.split()
    pairs = range(0, len(names), 2)
    return tuple(Block((inputs[i], inputs[i + 1]), (names[i], names[i + 1])) for i in pairs)


NORMAL = Cell(
    _blocks(
        (0, 1, 1, 1, 0, 1, 1, 1, 0, 0),
        "separable-5 separable-3 separable-5 separable-3 average-3 identity "
        "average-3 average-3 separable-3 identity",
    ),
    output=(1, 2, 3, 4, 5, 6),
)
"""The normal cell of NASNet-A. Its output holds an input that blocks read, too, as the
authors' does."""
REDUCTION = Cell(
    _blocks(
        (0, 1, 0, 1, 0, 1, 3, 2, 2, 0),
        "separable-5 separable-7 max-3 separable-7 average-3 separable-5 "
        "identity average-3 separable-3 max-3",
    ),
    output=(3, 4, 5, 6),
)
"""The reduction cell of NASNet-A."""


def build(
    *,
    cells: int = 1,
    filters: int = 8,
    normal: Cell | Mapping[str, Any] = NORMAL,
    reduction: Cell | Mapping[str, Any] = REDUCTION,
    stages: int = 3,
    stem: int | None = None,
    classes: int = 10,
    channels: int = 3,
    drop: float = 0.0,
    steps: int = 1000,
) -> nn.Module:
    """Builds a stack of cells: `cells` normal ones per stage, a reduction cell in between.

    Args:
        cells: Normal cells in each stage, N.
        filters: Channels of each block in the first stage, F; a reduction cell doubles them.
        normal: The cell that keeps height and width; a `Cell` or a mapping of its fields.
        reduction: The cell that halves them.
        stages: Stages, at least 1.
        stem: Channels of the first convolution; None for three times `filters`.
        classes: Number of logits.
        channels: Number of image channels.
        drop: Probability of dropping a path of the last cell at the end of training, in
            [0, 1); earlier cells drop less (`ScheduledDropPath`).
        steps: Training forwards until then.

    Raises:
        SettingError: A setting can't be used.

    Example:
        >>> build(cells=1, filters=4)(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 10])

    Source:
        Zoph et al. 2018, "Learning Transferable Architectures for Scalable Image Recognition",
        arXiv:1707.07012; tensorflow/models, research/slim/nets/nasnet, the network for CIFAR.
    Differs:
        There is no auxiliary classifier. The first cell's earlier input, the stem again, is
        projected once, where the authors' operations take it as wide as it is.
    """
    positive(cells=cells, filters=filters, stages=stages, classes=classes, channels=channels)
    if stem is not None:
        positive(stem=stem)
    return NASNetStack(
        normal if isinstance(normal, Cell) else Cell(**normal),
        reduction if isinstance(reduction, Cell) else Cell(**reduction),
        cells=cells,
        stages=stages,
        filters=filters,
        stem=3 * filters if stem is None else stem,
        classes=classes,
        channels=channels,
        drop=drop,
        steps=steps,
    )
