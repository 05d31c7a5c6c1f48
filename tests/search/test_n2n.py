"""Truths about compressing a network by two policies."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from supple.errors import SettingError
from supple.search.base import AskTell, Told
from supple.search.n2n import N2N, Removal, Shrinkage, compression_rewards
from supple.space import Site, Space
from supple.training.seeds import generator

SITES = [
    Site("a.depth", "depth", (0, 1), 1),
    Site("b.depth", "depth", (1, 2, 3), 3),
    Site("a.width", "width", (2, 4, 8), 8, (("a.depth", frozenset({1})),)),
    Site("b.width", "width", (3, 5, 7, 10), 10),
    Site("kernel", "kernel", (1, 3), 3),
]
SPACE = Space(SITES)
DEPTH, OTHERS = np.array([0, 1]), np.array([2, 3, 4])


def costs(rows: np.ndarray) -> np.ndarray:
    """Two stacks; accuracy falls a little with each removal."""
    a, b, wide, wider, kernel = SPACE.choices_of(rows).T
    cost = a * wide**2 + b * wider**2 * kernel + 1.0
    accuracy = 0.99 - 0.02 * (1 - a) - 0.3 * (b < 2) - 0.05 * (wider < 5)
    return np.stack([-accuracy, cost], axis=1)


def evaluated(run: AskTell, count: int) -> np.ndarray:
    first = len(run.told)
    while len(run.told) < first + count:
        rows = run.ask_rows(1)
        run.tell(rows, costs(rows))
    return run.told.rows[first:]


def test_rewards_by_hand() -> None:
    values = np.array([[-0.45, 25.0], [-0.9, 100.0], [-0.9, 90.0], [-0.9, 50.0], [np.nan, 1.0]])
    violations = np.array([0.0, 0.0, 0.0, 3.0, np.inf])
    told = Told(np.zeros((5, 1), dtype=np.int64), values, violations)
    teacher = np.array([-0.9, 100.0])
    # C is 0.75 and 0.1; half of the accuracy is left of the first; 0.75 over budget.
    expected = [0.5 * 0.75 * 1.25, -1.0, 0.1 * 1.9, 0.75, -1.0]
    assert compression_rewards(told, teacher, 100.0) == pytest.approx(expected)
    patience = (1 - 3 / 15) ** 4
    strict = [*expected[:3], patience - 1 + patience * 0.75, -1.0]
    assert compression_rewards(told, teacher, 100.0, 3) == pytest.approx(strict)
    assert compression_rewards(told, teacher, 100.0, 15)[3] == -1.0
    # Not smaller than what it is made of.
    assert compression_rewards(told, teacher, 90.0)[2] == -1.0


def test_losses_are_judged_by_their_rise() -> None:
    values = np.array([[3.0, 50.0], [2.0, 50.0], [9.0, 50.0]])
    told = Told(np.zeros((3, 1), dtype=np.int64), values, np.zeros(3))
    worth = compression_rewards(told, np.array([2.0, 100.0]), 100.0)
    assert worth == pytest.approx([0.5 * 0.75, 0.75, 0.0])
    with pytest.raises(SettingError, match="neither may be 0"):
        compression_rewards(told, np.array([0.0, 100.0]), 100.0)


def test_the_removal_policy_is_a_distribution_over_all_depths() -> None:
    policy = Removal(SPACE, DEPTH, 5, 0)
    every = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    probs = policy(every).sum(1).exp()
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
    # Two of three blocks stay: one is kept, the next removed.
    decided = policy.head(policy.lstm(policy.states)[0]).log_softmax(-1)
    expected = decided[0, 1] + decided[1, 1] + decided[2, 0]
    torch.testing.assert_close(policy(torch.tensor([[1, 1]])).sum(), expected)
    drawn = policy.sample(4000, generator(0, "test"), 1.0)
    share = (drawn[:, None] == every).all(-1).float().mean(0)
    assert (share - probs).abs().max() < 0.03


def test_the_shrinking_policy_is_a_distribution_over_all_choices() -> None:
    policy = Shrinkage(SPACE, OTHERS, 5, 0)
    with torch.no_grad():
        policy.head.weight.mul_(20)  # or all is nearly uniform
    # Of 10: 0.1 to 0.4 lead to 3, 0.5 to 5, then 7 and 10; of 8: 2, 4 (from 0.4) and 8.
    assert policy.taken[1].tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 3, 3]
    assert policy.taken[0].tolist() == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    every = torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(2))
    probs = policy(every).sum(1).exp()
    torch.testing.assert_close(probs.sum(), torch.tensor(1.0))
    drawn = policy.sample(6000, generator(0, "test"), 1.0)
    share = (drawn[:, None] == every).all(-1).float().mean(0)
    assert (share - probs).abs().max() < 0.02
    # A decision is known to those after it, not to itself or those before.
    first, second = policy(torch.tensor([[0, 1, 1], [2, 1, 1]]))
    assert first[1] != second[1]
    torch.testing.assert_close(
        policy(torch.tensor([[0, 1, 1]]))[0, :2], policy(torch.tensor([[0, 1, 0]]))[0, :2]
    )


def test_choices_that_no_factor_leads_to_are_known() -> None:
    space = Space([Site("w", "width", tuple(range(1, 21)), 20)])
    policy = Shrinkage(space, np.array([0]), 5, 0)
    rows = np.arange(20)[:, None]
    assert policy.reachable(rows).tolist() == [i % 2 == 1 for i in range(20)]


def test_the_teacher_comes_first_then_depths_then_shrunk_students_of_the_best() -> None:
    run = N2N(hidden=5, population=2).start(SPACE, ["accuracy", "params"], 0)
    rows = evaluated(run, 6)
    assert np.array_equal(rows[0], SPACE.encode(SPACE.largest()))
    # All six depths there are, and nothing else is touched.
    assert len(np.unique(rows[:, DEPTH], axis=0)) == 6
    full = np.where([True, True, False, False, False], rows, [0, 0, 2, 3, 1])
    assert np.array_equal(SPACE.canonical_many(full), rows)
    worth = compression_rewards(run.told, costs(rows[:1])[0], np.inf)
    student = rows[worth.argmax()]
    later = evaluated(run, 6)  # of 7 that there are
    assert (later[:, DEPTH] == student[DEPTH]).all()
    assert (later[:, OTHERS] != student[OTHERS]).any(axis=1).all()


def test_removing_ends_after_so_many_students() -> None:
    run = N2N(hidden=5, population=2, removals=2).start(SPACE, ["accuracy", "params"], 0)
    rows = evaluated(run, 8)
    removed = (rows[:, OTHERS] == [2, 3, 1]).all(axis=1)
    assert removed.tolist() == [True, True] + [False] * 6


def test_an_update_reinforces_all_students_by_their_mean() -> None:
    run = N2N(hidden=5, population=2).start(SPACE, ["accuracy", "params"], 0)
    learner = run._learner  # type: ignore[attr-defined]
    steps: list[float] = []
    policy = learner.policy
    policy.run.step = lambda batch: steps.append(batch[1])
    rows = np.zeros((2, 5), dtype=np.int64)
    policy.learn(rows, np.array([0.2, 0.6]))
    policy.learn(rows, np.array([0.5, 0.9]))
    policy.learn(rows, np.array([0.1, 0.1]))
    # Nothing before the first; then 0.7 - 0.4, and 0.1 - (0.4 + 0.7) / 2.
    assert steps == pytest.approx([0.4, 0.4, 0.3, 0.3, -0.45, -0.45])


def test_a_step_makes_good_students_likelier() -> None:
    run = N2N(hidden=5, population=1).start(SPACE, ["accuracy", "params"], 0)
    policy = run._learner.policy  # type: ignore[attr-defined]
    rows = np.array([[0, 1, 2, 3, 1]])
    chosen = torch.from_numpy(rows[:, DEPTH])
    before = policy.policy(chosen).sum().item()
    policy.learn(rows, np.array([0.9]))
    assert policy.policy(chosen).sum().item() > before


def test_a_search_that_is_rebuilt_goes_on_exactly() -> None:
    method = N2N(hidden=5, population=2, removals=4)
    run = method.start(SPACE, ["accuracy", "params"], 3)
    evaluated(run, 9)
    other = method.start(SPACE, ["accuracy", "params"], 99)
    other.load_state_dict(run.state_dict())
    run.load_state_dict(run.state_dict())  # what was asked and never told is asked again
    assert np.array_equal(other.ask_rows(5), run.ask_rows(5))


def test_other_objectives_are_refused() -> None:
    with pytest.raises(SettingError, match="needs two objectives"):
        N2N().start(SPACE, ["accuracy"], 0)


@pytest.mark.parametrize("wrong", [{"population": 0}, {"removals": 0}, {"lr": 0.0}])
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        N2N(**wrong)  # type: ignore[arg-type]
