"""Truths about NASNet's controller and its space of cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from supple.errors import SettingError
from supple.models.base import build
from supple.search._policy import drawn_again
from supple.search.base import Told
from supple.search.nasnet import CellSpace, NASNet, Taken, clipped_loss
from supple.space import Site, Space
from tests.search.problems import SPACE, loss_and_cost

GRID = Space([Site(f"s{i}", "width", tuple(range(5)), 4) for i in range(7)])
QUICK = NASNet(population=10, hidden=8, lr=0.05)


def run_on(space: Space, method: NASNet, evaluations: int, seed: int = 0) -> np.ndarray:
    run = method.start(space, ["loss"], seed)
    while len(run.told) < evaluations:
        rows = run.ask_rows(method.population)
        run.tell(rows, rows.sum(axis=1, keepdims=True))
    return run.told.values[:, 0]


def test_the_clipped_loss_by_hand() -> None:
    log_probs = torch.tensor([[1.5, 1.0], [1.5, 0.5], [0.5, 2.0]]).log().requires_grad_()
    taken = Taken(
        torch.zeros(3, 2), torch.tensor([[1.0, 1], [1, 1], [1, 0]]), torch.tensor([2.0, -1, 4])
    )
    # Ratios are what stands above. Gains of what is likelier end at 1.2, losses of what is
    # less likely at 0.8; the other ways nothing is clipped; the last decision does not count.
    expected = (2 * (1.2 + 1.0) - (1.5 + 0.8) + 4 * 0.5) / 3
    loss = clipped_loss(log_probs, taken, 0.2)
    assert loss.item() == pytest.approx(-expected)
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert (gradient != 0).tolist() == [[False, True], [True, False], [True, False]]


def test_it_learns_to_draw_good_configs_and_goes_on_finding_better_ones() -> None:
    losses = run_on(GRID, QUICK, 200)
    assert losses[:20].mean() == pytest.approx(14, abs=2)  # drawn uniformly
    assert losses[100:].mean() < 8
    assert losses.min() <= 1


def test_a_search_that_is_rebuilt_goes_on_exactly() -> None:
    run = QUICK.start(GRID, ["loss"], 3)
    for _ in range(3):
        rows = run.ask_rows(10)
        run.tell(rows, rows.sum(axis=1, keepdims=True))
    other = QUICK.start(GRID, ["loss"], 99)
    other.load_state_dict(run.state_dict())
    assert np.array_equal(other.ask_rows(7), run.ask_rows(7))
    # With other values the policy is another one; nothing of it is left afterwards.
    state = run.state_dict()
    other.load_state_dict(
        {**state, "values": [[-value[0]] for value in run.told.values.tolist()]}
    )
    turned = other.ask_rows(7)
    other.load_state_dict(state)
    asked = other.ask_rows(7)
    assert not np.array_equal(asked, turned)
    run.load_state_dict(state)
    assert np.array_equal(asked, run.ask_rows(7))


def test_known_configs_that_are_drawn_again_teach_again() -> None:
    # With all that is new equally bad, only what is drawn again tells that zeros are good.
    method = NASNet(population=4, hidden=8)
    learner = method.learner(method.start(GRID, ["loss"], 0).problem, 0)
    zeros = np.zeros((4, 7), dtype=np.int64)
    before = Told(zeros, np.zeros((4, 1)), np.zeros(4))
    assert drawn_again(np.array([[1] * 7, [0] * 7, [0] * 7]), before).tolist() == [3, 3]
    seen: list[int] = []
    learner._drawn = lambda *_: zeros[:2]  # type: ignore[attr-defined]
    learner.run.step = lambda batch: seen.append(len(batch[0]))  # type: ignore[attr-defined]
    learner.learn(before, Told(zeros + 1, np.ones((4, 1)), np.zeros(4)))
    assert seen == [6] * method.epochs


def test_sites_that_do_not_exist_count_for_nothing() -> None:
    skipped = SPACE.encode(SPACE.smallest())[None]
    method = NASNet(population=1, hidden=8, epochs=1)
    learner = method.learner(method.start(SPACE, ["loss"], 0).problem, 0)
    taken: list[Taken] = []
    learner.run.step = lambda batch: taken.append(batch[1])  # type: ignore[attr-defined]
    learner.learn(
        Told(skipped[:0], np.zeros((0, 1)), np.zeros(0)),
        Told(skipped, np.ones((1, 1)), np.zeros(1)),
    )
    assert taken[0].here.sum() == 6  # of 18 sites those of depth


def test_several_objectives_are_made_one_by_rank() -> None:
    run = NASNet(population=20, hidden=16, lr=0.03).start(SPACE, ["loss", "cost"], 0)
    while len(run.told) < 160:
        rows = run.ask_rows(20)
        run.tell(rows, loss_and_cost(rows))
    values = run.told.values
    dominated = [
        np.mean([(values <= v).all(1).sum() > 1 for v in part])
        for part in (values[:40], values[-40:])
    ]
    assert dominated[1] < dominated[0]


def test_the_space_of_the_paper() -> None:
    cells = CellSpace()
    per_cell = math.prod((2 + b) ** 2 * 13**2 * 2 for b in range(5))
    assert cells.space().size() == per_cell**2
    config = cells.space().config({"normal.1.input0": 2, "normal.1.op0": 0})
    block = cells.cells(config)["normal"]["blocks"][1]
    assert block == {"inputs": (2, 1), "ops": ("identity", "factorized-7"), "combine": "add"}
    small = CellSpace(blocks=2, operations=("identity", "max-3", "conv-1"))
    for row in small.space().random_many(4, 0):
        settings = small.cells(small.space().decode(row))
        net = build("nasnet", filters=4, stages=2, **settings)
        assert net(torch.zeros(2, 3, 7, 7)).shape == (2, 10)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"population": 0}, "population must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"clip": -0.1}, "clip must be above 0"),
        ({"entropy": -1.0}, "entropy must be at least 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
    ],
)
def test_settings_are_checked(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        NASNet(**wrong)  # type: ignore[arg-type]


def test_cells_of_unknown_operations_are_refused() -> None:
    with pytest.raises(SettingError, match="did you mean 'conv-3'"):
        CellSpace(operations=("conv3",))
    with pytest.raises(SettingError, match="distinct and some"):
        CellSpace(combine=())
    with pytest.raises(SettingError, match="blocks must be at least 1"):
        CellSpace(blocks=0)
