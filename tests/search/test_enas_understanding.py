"""Truths about the audit of a controller."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from supple.errors import SettingError
from supple.search.enas_understanding import ENASUnderstanding, states_against_decisions
from supple.space import Site, Space

SPACE = Space([Site(f"s{i}", "width", (1, 2, 4), 4) for i in range(6)])


def _drawn(n: int) -> np.ndarray:
    return np.random.default_rng(0).integers(3, size=(n, 6))


def test_states_that_hold_all_decisions_correlate_and_noise_does_not() -> None:
    rows = _drawn(60)
    one_hot = np.eye(3)[rows].reshape(60, -1)
    # State t holds the decisions before t, each as a corner: distances follow differences.
    seen = np.stack([one_hot * (np.arange(18) < 3 * t) for t in range(6)], axis=1)
    assert states_against_decisions(seen, rows) == pytest.approx(1.0)
    noise = np.random.default_rng(1).normal(size=seen.shape)
    assert abs(states_against_decisions(noise, rows)) < 0.1


def test_the_correlation_is_spearmans_with_ties() -> None:
    # Three sites: only the state before the last counts, after two decisions. The second is the
    # same for all; of four sequences three begin alike.
    rows = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]])
    states = np.zeros((4, 3, 1))
    states[:, 2, 0] = [0.0, 1.0, 3.0, 3.5]
    # Pairs 01 02 03 12 13 23: distances 1 3 3.5 2 2.5 0.5, differing 0 0 1 0 1 1; ranks
    # 2 5 6 3 4 1 and 2 2 5 2 5 5.
    expected = np.corrcoef([2, 5, 6, 3, 4, 1], [2, 2, 5, 2, 5, 5])[0, 1]
    assert states_against_decisions(states, rows) == pytest.approx(expected)


def test_a_state_that_holds_only_the_last_decision_tells_nothing() -> None:
    rows = _drawn(60)
    last = np.eye(3)[np.roll(rows, 1, axis=1)]
    assert math.isnan(states_against_decisions(last, rows))


def test_a_controller_learns_a_score_of_one_site() -> None:
    study = ENASUnderstanding(hidden=8, lr=0.1, temperature=1.0, entropy=0.0)
    audit = study.run(SPACE, lambda config: float(config["s3"] == 2), evaluations=100)
    assert np.mean(audit.scores[-30:]) > 0.8
    assert 0.15 < np.mean(audit.random) < 0.5
    assert (audit.best, audit.best_of_random) == (1.0, 1.0)


def test_memory_makes_what_was_sampled_likelier() -> None:
    # Nothing is better than anything else: only the memory can move the controller, which is
    # all but uniform at the start.
    entropies = [
        ENASUnderstanding(hidden=8, lr=0.1, memory=memory, temperature=1.0, entropy=0.0)
        .run(SPACE, lambda _: 0.0, evaluations=75)
        .entropy
        for memory in (0, 5)
    ]
    assert entropies[0] == pytest.approx(6 * math.log(3), abs=1e-3)
    assert entropies[1] < entropies[0] - 0.01


def test_only_the_last_sequences_are_remembered() -> None:
    study = ENASUnderstanding(memory=2, alpha=3.0)
    rows, weights = torch.zeros(1, 6, dtype=torch.long), torch.tensor([0.5])
    joined, both = study._with_memory(rows, weights, torch.ones(2, 6, dtype=torch.long))
    assert joined[:, 0].tolist() == [0, 1, 1]
    assert both.tolist() == [0.5, 1.5, 1.5]


def test_the_same_seed_gives_the_same_audit() -> None:
    study = ENASUnderstanding(hidden=8, memory=10)
    first, again, other = (
        study.run(SPACE, lambda config: float(config["s0"]), evaluations=12, generator=seed)
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first.scores != other.scores


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"memory": -1}, "memory must be at least 0"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
        ({"lr": 0.0}, "lr and temperature must be above 0"),
    ],
)
def test_settings_are_checked(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        ENASUnderstanding(**wrong)  # type: ignore[arg-type]


def test_a_space_with_too_few_decisions_is_refused() -> None:
    with pytest.raises(SettingError, match="needs 3 sites"):
        ENASUnderstanding().run(Space(SPACE.sites[:2]), lambda _: 0.0)
