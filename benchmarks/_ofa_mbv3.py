"""The Once-for-All MobileNetV3 (width 1.0, 224 pixels) as a space with exact costs.

45 sites of three choices: in each of five stages the depth (2, 3, 4 blocks), and in each of 20
blocks the kernel (3, 5, 7) and the expansion (3, 4, 6). What belongs to a block that is left
out does not exist. `macs` is a closed form; it equals the recorded column of all 1,458 rows of
`ofa-mbv3-imagenet` to the last unit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supple.models.mobilenet_v3 import divisible
from supple.space import Site, Space

__all__ = ["BLOCKS", "STAGES", "columns", "macs", "space"]

STAGES, BLOCKS = 5, 4
KERNELS, EXPANSIONS, DEPTHS = (3, 5, 7), (3, 4, 6), (2, 3, 4)
WIDTHS = (24, 40, 80, 112, 160)
STRIDES = (2, 2, 2, 1, 2)
SQUEEZED = (False, True, False, True, True)
STEM, PIXELS, LAST, HIDDEN, CLASSES = 16, 224, 960, 1280, 1000

Rows = NDArray[np.int64]


@cache
def space() -> Space:
    """Gives the space: per stage its depth, then kernel and expansion of its blocks."""
    sites = []
    for stage in range(STAGES):
        depth = f"{stage}.depth"
        sites.append(Site(depth, "depth", DEPTHS, DEPTHS[-1]))
        for block in range(BLOCKS):
            deep = frozenset(d for d in DEPTHS if d > block)
            inside = ((depth, deep),) if len(deep) < len(DEPTHS) else ()
            name = f"{stage}.{block}"
            sites.append(Site(f"{name}.kernel", "kernel", KERNELS, KERNELS[-1], inside))
            sites.append(Site(f"{name}.expansion", "width", EXPANSIONS, EXPANSIONS[-1], inside))
    return Space(sites)


@cache
def columns() -> tuple[Rows, Rows, Rows]:
    """Gives the columns of depths (stages,), and of kernels and expansions (stages, blocks)."""
    here = space()
    depths = [here.column(f"{s}.depth") for s in range(STAGES)]
    blocks = [[f"{s}.{b}" for b in range(BLOCKS)] for s in range(STAGES)]
    kernels = [[here.column(f"{name}.kernel") for name in row] for row in blocks]
    widths = [[here.column(f"{name}.expansion") for name in row] for row in blocks]
    return np.array(depths), np.array(kernels), np.array(widths)


def macs(rows: NDArray[Any]) -> NDArray[np.float64]:
    """Gives the multiply-accumulates of encoded configs for one image, shape (configs,)."""
    depths, kernels, widths = columns()
    constant, table = _terms()
    total = np.full(len(rows), constant)
    for stage in range(STAGES):
        for block in range(BLOCKS):
            cost = table[stage, block][
                rows[:, kernels[stage, block]], rows[:, widths[stage, block]]
            ]
            total += np.where(rows[:, depths[stage]] + DEPTHS[0] > block, cost, 0.0)
    return total


@cache
def _terms() -> tuple[float, NDArray[np.float64]]:
    """Gives the cost of what does not vary, and of each block by kernel and expansion."""
    side = PIXELS // 2
    constant = side**2 * (3 * STEM * 9 + STEM * 9 + STEM * STEM)
    table = np.zeros((STAGES, BLOCKS, len(KERNELS), len(EXPANSIONS)))
    inputs = STEM
    for stage in range(STAGES):
        for block in range(BLOCKS):
            after = side // STRIDES[stage] if block == 0 else side
            for i, kernel in enumerate(KERNELS):
                for j, expansion in enumerate(EXPANSIONS):
                    inner = divisible(inputs * expansion)
                    cost = inputs * inner * side**2
                    cost += inner * (kernel**2 + WIDTHS[stage]) * after**2
                    if SQUEEZED[stage]:
                        cost += 2 * inner * divisible(inner // 4)
                    table[stage, block, i, j] = cost
            side, inputs = after, WIDTHS[stage]
    constant += inputs * LAST * side**2 + LAST * HIDDEN + HIDDEN * CLASSES
    return float(constant), table
