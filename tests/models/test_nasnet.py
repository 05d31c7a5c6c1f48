"""Truths about stacks of cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from supple.errors import SettingError
from supple.layers.scheduled_drop_path import ScheduledDropPath
from supple.models.base import build
from supple.models.nasnet import (
    NORMAL,
    OPERATIONS,
    Block,
    Cell,
    CellModule,
    FactorizedReduction,
)


def bare(cell: Cell, stride: int = 1) -> CellModule:
    """A cell of three channels that takes its inputs as they are."""
    made = CellModule(cell, (3, 0), (3, 0), 3, stride, None)
    made.first, made.second = nn.Identity(), nn.Identity()
    return made


def test_nasnet_a_has_as_many_parameters_as_the_paper_says():
    net = build("nasnet", cells=6, filters=32)  # "6 @ 768" on CIFAR-10: 3.3 M
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 3.3
    assert net.head.in_features == 768


def test_blocks_join_states_and_what_nobody_reads_is_the_output():
    cell = Cell(
        (
            Block((0, 1), ("identity", "identity")),
            Block((2, 0), ("average-3", "identity")),
            Block((0, 0), ("identity", "max-3"), "concat"),
        )
    )
    assert cell.given == (3, 4)
    x, y = torch.randn(2, 2, 3, 5, 5)
    first = x + y
    second = F.avg_pool2d(first, 3, 1, 1, count_include_pad=False) + x
    third = torch.cat([x, F.max_pool2d(x, 3, 1, 1)], 1)
    torch.testing.assert_close(bare(cell)(x, y), torch.cat([second, third], 1))
    assert bare(cell).width == 9


def test_a_reduction_halves_what_comes_in_once():
    # The second block reads the first, which is small already; input 1 is read by nobody.
    cell = Cell((Block((0, 0), ("max-3", "max-3")), Block((2, 2), ("max-3", "identity"))))
    module = bare(cell, stride=2)
    x, y = torch.randn(2, 2, 3, 7, 7)
    small = 2 * F.max_pool2d(x, 3, 2, 1)
    expected = F.max_pool2d(small, 3, 1, 1) + small
    out = module(x, y)
    assert out.shape == (2, 6, 4, 4)
    torch.testing.assert_close(out[:, 3:], expected)
    torch.testing.assert_close(out[:, :3], module.shrink["1"](y))


def test_a_factorized_reduction_sees_pixels_on_both_diagonals():
    layer = FactorizedReduction(1, 2).eval()
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).sum(), x)
    assert torch.equal(gradient[0, 0] != 0, torch.eye(2).repeat(2, 2).bool())
    assert layer(torch.zeros(1, 1, 5, 5)).shape == (1, 2, 3, 3)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("size", [6, 7])
def test_operations_fit_any_width_and_halve_when_asked(name, size):
    x = torch.randn(2, 3, size, size)
    assert OPERATIONS[name](3, 5, 1)(x).shape == (2, 5, size, size)
    assert OPERATIONS[name](3, 3, 2)(x).shape == (2, 3, (size + 1) // 2, (size + 1) // 2)


def test_all_paths_but_identities_may_be_dropped_later_ones_more_often():
    net = build("nasnet", cells=1, filters=4, stages=2, drop=0.6, steps=9)
    drops = [
        [m.drop for m in cell.modules() if isinstance(m, ScheduledDropPath)]
        for cell in net.cells
    ]
    # NASNet-A has two identities in its normal cell and one in its reduction cell.
    assert [len(each) for each in drops] == [8, 9, 8]
    assert [each[0] for each in drops] == pytest.approx([0.2, 0.4, 0.6])


def test_cells_may_be_given_as_mappings():
    plain = {"inputs": [0, 1], "ops": ["conv-1", "max-3"], "combine": "concat"}
    net = build("nasnet", filters=4, normal={"blocks": [plain]}, stages=1)
    assert net.supple_origin["settings"]["normal"] == {"blocks": [plain]}
    assert net(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": []}, "at least one block"),
        ({"blocks": [{"inputs": [0, 2], "ops": ["max-3", "max-3"]}]}, "reads states 0 to 1"),
        ({"blocks": [{"inputs": [0, 1], "ops": ["max3", "max-3"]}]}, "did you mean 'max-3'"),
        ({"blocks": [{"inputs": [0], "ops": ["max-3"]}]}, "two inputs and two operations"),
        (
            {"blocks": [{"inputs": [0, 1], "ops": ["max-3", "max-3"], "combine": "mul"}]},
            "combine must be one of",
        ),
        ({"blocks": NORMAL.blocks, "output": [9]}, "of its states, 0 to 6"),
    ],
)
def test_cells_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(SettingError, match=message):
        build("nasnet", normal=wrong)
