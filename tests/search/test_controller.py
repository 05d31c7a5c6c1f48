"""Truths about the controller that searches by reinforcement learning share."""

from __future__ import annotations

import math

import pytest
import torch

from supple.errors import SettingError
from supple.search._controller import (
    Baseline,
    Decisions,
    SequenceController,
    chosen,
    entropy,
    learning,
)
from supple.training.seeds import generator

COUNTS = (2, 3, 5)


def test_only_choices_that_exist_have_a_probability() -> None:
    rows = torch.tensor([[0, 2, 4], [1, 0, 3]])
    probs = SequenceController(COUNTS, hidden=7)(rows).log_probs.exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3))
    for site, count in enumerate(COUNTS):
        assert (probs[:, site, :count] > 0).all()
        assert (probs[:, site, count:] == 0).all()


def test_samples_follow_the_probabilities_that_forward_gives() -> None:
    controller = SequenceController((2, 3), hidden=7, temperature=0.05)
    drawn = controller.sample(4000, generator(0, "test"))
    every = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    expected = chosen(controller(every), every).exp()
    torch.testing.assert_close(expected.sum(), torch.tensor(1.0))
    share = (drawn[:, None] == every).all(-1).float().mean(0)
    assert (expected.max() - expected.min()) > 0.05
    assert (share - expected).abs().max() < 0.03


def test_hotter_samples_are_nearer_to_uniform() -> None:
    controller = SequenceController((3,), hidden=7, temperature=0.005, limit=None)
    probs = controller(torch.zeros(1, 1, dtype=torch.long)).log_probs[0, 0].exp()
    for heat in (1.0, 4.0):
        drawn = controller.sample(4000, generator(0, "test"), heat=heat)
        share = torch.bincount(drawn[:, 0], minlength=3) / 4000
        expected = probs ** (1 / heat) / (probs ** (1 / heat)).sum()
        assert (share - expected).abs().max() < 0.03
    assert probs.max() > expected.max() + 0.1


def test_a_state_has_seen_the_decisions_before_and_no_others() -> None:
    controller = SequenceController(COUNTS, hidden=7)
    a = controller(torch.tensor([[0, 1, 2]]))
    b = controller(torch.tensor([[0, 2, 2]]))
    torch.testing.assert_close(a.states[:, :2], b.states[:, :2], rtol=0, atol=0)
    assert not torch.equal(a.states[:, 2], b.states[:, 2])


def test_a_sequence_begins_in_the_state_that_is_given() -> None:
    controller = SequenceController((2, 3), hidden=7, temperature=0.05)
    every = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    state = torch.linspace(-3, 3, 7).roll(1)
    expected = chosen(controller(every, state.repeat(6, 1)), every).exp()
    assert (expected - chosen(controller(every), every).exp()).abs().max() > 0.04
    drawn = controller.sample(4000, generator(0, "test"), state.repeat(4000, 1))
    share = (drawn[:, None] == every).all(-1).float().mean(0)
    assert (share - expected).abs().max() < 0.03


def test_logits_are_divided_and_squashed() -> None:
    rows = torch.tensor([[0, 0, 0]])
    plain = SequenceController(COUNTS, hidden=7, temperature=1.0, limit=None)(rows).log_probs
    squashed = SequenceController(COUNTS, hidden=7, temperature=0.5, limit=1.5)(rows).log_probs
    # The difference of two logits tells them but for what both have in common.
    logits = plain[0, 0, :2]
    controller = SequenceController(COUNTS, hidden=7, temperature=1.0, limit=None)
    raw = controller.heads[0](controller(rows).states[0, 0])[:2]
    torch.testing.assert_close(logits[0] - logits[1], raw[0] - raw[1])
    expected = 1.5 * torch.tanh(raw / 0.5)
    torch.testing.assert_close(squashed[0, 0, 0] - squashed[0, 0, 1], expected[0] - expected[1])


def test_likelihood_and_entropy_by_hand() -> None:
    log_probs = torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]).log()
    decisions = Decisions(log_probs, torch.zeros(1, 2, 1))
    torch.testing.assert_close(
        chosen(decisions, torch.tensor([[1, 0]])).exp(), torch.tensor([0.375])
    )
    nats = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) + math.log(2)
    torch.testing.assert_close(entropy(decisions), torch.tensor([nats]))


def test_the_baseline_is_the_average_of_what_was_before() -> None:
    baseline = Baseline(0.9)
    assert baseline.advantages(torch.tensor([1.0, 3.0])).tolist() == [-1.0, 1.0]
    assert baseline.advantages(torch.tensor([5.0])).tolist() == [3.0]
    assert baseline.value == pytest.approx(0.9 * 2.0 + 0.1 * 5.0)


def test_learning_raises_what_has_weight_and_lowers_what_has_negative_weight() -> None:
    controller = SequenceController(COUNTS, hidden=7)
    rows = torch.tensor([[0, 1, 2], [1, 2, 4]])
    before = chosen(controller(rows), rows)
    run = learning(controller, lr=0.01, bonus=0.0)
    for _ in range(5):
        run.step((rows, torch.tensor([1.0, -1.0])))
    after = chosen(controller(rows), rows)
    assert after[0] > before[0]
    assert after[1] < before[1]


def test_the_bonus_keeps_decisions_open() -> None:
    rows = torch.tensor([[0, 1, 2]])
    ends = []
    for bonus in (0.0, 10.0):
        controller = SequenceController(COUNTS, hidden=7, temperature=0.1)
        run = learning(controller, lr=0.01, bonus=bonus)
        for _ in range(20):
            run.step((rows, torch.ones(1)))
        ends.append(entropy(controller(rows)).item())
    assert ends[1] > ends[0] + 0.5


def test_the_same_seed_gives_the_same_controller_and_samples() -> None:
    state = torch.random.get_rng_state()
    first, second = (SequenceController(COUNTS, hidden=7, seed=3) for _ in range(2))
    other = SequenceController(COUNTS, hidden=7, seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first.embedding.weight, second.embedding.weight)
    assert not torch.equal(first.embedding.weight, other.embedding.weight)
    assert first.embedding.weight.abs().max() <= 0.1
    drawn = [each.sample(9, generator(0, "test")) for each in (first, second)]
    assert torch.equal(*drawn)


@pytest.mark.parametrize("wrong", [{"counts": ()}, {"counts": (2, 0)}, {"temperature": 0.0}])
def test_a_controller_that_can_decide_nothing_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(SettingError, match="a controller needs"):
        SequenceController(**{"counts": COUNTS, **wrong})  # type: ignore[arg-type]
