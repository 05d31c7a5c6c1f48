"""Truths about ensembles with a shared trunk, and how their space shrinks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supple.axes.operator import Operator
from supple.cost.count import macs
from supple.errors import SettingError
from supple.layers.choice import Choice
from supple.network import Elastic, elastic
from supple.search._ensembles import best_of, ensembles, members_of
from supple.search.neas import NEAS, EnsembleRun, EnsembleSampler, SharedTrunk
from supple.space import Config, Site, Space
from supple.training.seeds import generator, kept
from supple.training.step import Pass, Seen, StepOptions

LAYERS = Space([Site(name, "operator", (0, 1, 2), 2) for name in ("a", "b")])


def _rows(space: Space) -> list[tuple[tuple[int, ...], ...]]:
    """All ensembles, each as what its members choose."""
    ensembles = map(space.decode, space.every())
    return [tuple(tuple(m.values()) for m in members_of(LAYERS, e)) for e in ensembles]


def test_every_ensemble_is_members_with_a_common_beginning() -> None:
    space = ensembles(LAYERS, 3)
    # Three members with nothing in common by force, or with the first layer in common.
    assert space.size() == 9**3 + 3 * 3**3
    for ensemble in map(space.decode, space.random_many(50, 0)):
        members = members_of(LAYERS, ensemble)
        assert len(members) == 3
        assert all(member in LAYERS for member in members)
        if ensemble["split"] == 1:
            assert len({member["a"] for member in members}) == 1
    assert set(_rows(ensembles(LAYERS))) == {
        (x, y) for x in _rows_of(LAYERS) for y in _rows_of(LAYERS)
    }


def _rows_of(space: Space) -> list[tuple[int, ...]]:
    return [tuple(row) for row in space.every().tolist()]


def test_ensembles_need_independent_sites() -> None:
    dependent = Space([*LAYERS.sites, Site("c", "width", (1, 2), 2, (("a", frozenset({1})),))])
    with pytest.raises(SettingError, match=r"depend on one another.* got 2 and c;"):
        ensembles(dependent)
    with pytest.raises(SettingError, match="at least one member"):
        ensembles(LAYERS, 0)


def test_the_best_choices_stay() -> None:
    left = best_of(LAYERS, {"a": (0.1, 0.3, 0.2), "b": (1.0, 1.0, 1.0)}, {"a": 2, "b": 1})
    assert [site.choices for site in left.sites] == [(1, 2), (2,)]
    assert best_of(LAYERS, {"a": (0.1, 0.3, 0.2)}, {"a": 5}) == LAYERS
    with pytest.raises(SettingError, match="3 choices, got 2 scores"):
        best_of(LAYERS, {"a": (0.1, 0.3)}, {"a": 2})


HALVES, QUARTERS = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
APART = 0.25 * math.log(2) + 0.25 * math.log(1.5)
"""Symmetric KL divergence of the two."""


def _sampler(method: NEAS, space: Space = LAYERS) -> EnsembleSampler:
    return EnsembleSampler(method, space, generator(0, "test"))


def _observe(sampler: EnsembleSampler, *members: tuple[tuple[int, int], float, Tensor]) -> None:
    for row, loss, probs in members:
        entry = Pass(Config(dict(zip("ab", row, strict=True))), "member")
        # Logits are known but for a constant.
        sampler.observe(Seen(entry, torch.tensor(loss), probs.log() + 3, None, nn.Identity()))


def test_scores_by_hand() -> None:
    sampler = _sampler(NEAS(alpha=2.0))
    _observe(sampler, ((0, 2), 1.0, HALVES), ((0, 1), 3.0, QUARTERS))
    _observe(sampler, ((0, 2), 4.0, HALVES), ((1, 0), 4.0, HALVES))
    _observe(sampler, ((0, 1), 1.0, HALVES), ((1, 1), 2.0, HALVES))
    scores = sampler.scores()
    # In the first layer they differ twice; operator 0 was a quarter better on average.
    assert scores["a"] == pytest.approx([1.0, -1.0, 0.0])
    # In the second 2 was 1 better once and equal once, 1 was 1 worse, and 0 was equal.
    loss = np.array([0.0, 1.0, -0.5])
    apart = np.array([0.0, APART, APART / 2])
    expected = 2.0 * (apart - apart.mean()) / apart.std() - (loss - loss.mean()) / loss.std()
    assert scores["b"] == pytest.approx(expected, abs=1e-5)


def test_predictions_are_compared_with_those_of_other_operators_only() -> None:
    sampler = _sampler(NEAS(members=3))
    _observe(sampler, ((0, 0), 1.0, HALVES), ((0, 1), 1.0, QUARTERS), ((1, 1), 1.0, HALVES))
    sums = sampler._sums[1]
    # Layer a: operator 0 of two members against the third, which is apart from one of them.
    assert sums[0, :2] == pytest.approx(np.array([[APART, 2], [APART, 2]]), abs=1e-5)
    # Layer b: the first member against both others; they do not count against each other.
    assert sums[1, :2] == pytest.approx(np.array([[APART, 2], [APART, 2]]), abs=1e-5)
    assert not sums[:, 2].any()


def test_what_was_not_seen_is_neither_good_nor_bad() -> None:
    sampler = _sampler(NEAS(alpha=0.0))
    _observe(sampler, ((0, 2), 1.0, HALVES), ((0, 1), 3.0, QUARTERS))
    assert sampler.scores()["b"] == pytest.approx([0.0, -1.0, 1.0])


def _net(options: int = 3) -> Elastic:
    def layer() -> Choice:
        return Choice(*(nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(options)))

    with kept(0):
        model = nn.Sequential(nn.Linear(5, 7), layer(), layer(), nn.Linear(7, 3))
    return elastic(model, (torch.zeros(2, 5),), axes=[Operator()], verify=False)


def _loss(output: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(output, batch[1])


def _batch(n: int = 17) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 5, generator=generator(1, "test"))
    return x, (x @ torch.randn(5, 3, generator=generator(2, "test"))).argmax(1)


def _run(net: Elastic, method: NEAS, steps: int, lr: float = 0.5) -> EnsembleRun:
    optimizer = torch.optim.SGD(net.module.parameters(), lr=lr)
    return method.start(net, optimizer, loss=_loss, options=StepOptions(steps=steps))


def test_a_weight_gets_the_mean_gradient_of_the_members_that_use_it() -> None:
    net, members = _net(), [{"1": 0, "2": 1}, {"1": 0, "2": 2}]
    first, one, two, head = net.module  # type: ignore[misc]
    total = torch.zeros(())
    for member in members:
        hidden = two.options[member["2"]](one.options[member["1"]](first(_batch()[0])))
        total = total + _loss(head(hidden), _batch())
    names, owners = zip(*net.module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(total, owners, allow_unused=True)
    before = [owner.detach().clone() for owner in owners]
    run = _run(net, NEAS(), 10, lr=1.0)
    _fix(run, members)
    run.step(_batch())
    for name, owner, old, gradient in zip(names, owners, before, gradients, strict=True):
        if gradient is None:
            assert torch.equal(owner, old)
        else:
            used = 1 if name.startswith("2.") else 2
            torch.testing.assert_close(old - owner.detach(), gradient / used)


def _fix(run: EnsembleRun, members: list[dict[str, int]]) -> None:
    space = run.sampler._ensembles
    config = {
        "split": 1,
        **{f"{k}.{n}": v for k, m in enumerate(members) for n, v in m.items()},
    }
    run.sampler._ensembles = space.subspace(config)


def test_operators_go_at_the_events_and_equally_many_in_each_layer() -> None:
    run = _run(_net(5), NEAS(events=2, until=0.5, keep=1), 12)
    counts = []
    for _ in range(12):
        run.step(_batch())
        counts.append([len(site.choices) for site in run.left.sites])
    # Of 5 operators, 2 go after a quarter of the steps and 2 after half of them.
    assert counts == [[5, 5]] * 3 + [[3, 3]] * 3 + [[1, 1]] * 6


def test_members_are_drawn_from_what_is_left() -> None:
    run = _run(_net(), NEAS(events=1, until=0.1, keep=2), 20)
    run.step(_batch())
    run.step(_batch())
    run.step(_batch())
    assert [len(site.choices) for site in run.left.sites] == [2, 2]
    for _ in range(20):
        assert all(entry.config in run.left for entry in run.sampler.sample(5, 20))


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.0 * x


def test_an_operator_that_loses_everything_goes() -> None:
    with kept(0):
        linear = [nn.Sequential(nn.Linear(7, 7), nn.Tanh()) for _ in range(4)]
        layers = [Choice(linear[0], _Nothing(), linear[1]), Choice(_Nothing(), *linear[2:])]
        model = nn.Sequential(nn.Linear(5, 7), *layers, nn.Linear(7, 3))
    net = elastic(model, (torch.zeros(2, 5),), axes=[Operator()], verify=False)
    run = _run(net, NEAS(alpha=0.1, events=1), 60)
    for _ in range(60):
        run.step(_batch())
    assert [site.choices for site in run.left.sites] == [(0, 2), (1, 2)]


def test_diversity_decides_between_equal_losses() -> None:
    for alpha, left in ((0.0, (1, 2)), (1.0, (0, 1))):
        sampler = _sampler(NEAS(alpha=alpha))
        # Operator 0 is slightly worse than 2, and far from 1, from which 2 is not.
        _observe(sampler, ((0, 0), 1.01, QUARTERS), ((0, 1), 0.5, HALVES))
        _observe(sampler, ((0, 2), 1.0, HALVES), ((0, 1), 0.5, HALVES))
        kept_ = best_of(LAYERS, {"b": sampler.scores()["b"].tolist()}, {"b": 2})
        assert kept_.site("b").choices == left


def test_the_trunk_runs_once_and_gets_the_mean_gradient() -> None:
    trunk, branches = nn.Linear(5, 7), [nn.Linear(7, 3) for _ in range(2)]
    net = SharedTrunk(trunk, branches)
    x = _batch()[0]
    outputs = net(x)
    assert torch.equal(outputs[1], branches[1](trunk(x)))
    sum(out.square().sum() for out in outputs).backward()
    got, own = trunk.weight.grad, branches[0].weight.grad
    trunk.weight.grad = branches[0].weight.grad = None
    sum(branch(trunk(x)).square().sum() for branch in branches).backward()
    assert got is not None
    assert trunk.weight.grad is not None
    torch.testing.assert_close(got, trunk.weight.grad / 2)
    torch.testing.assert_close(own, branches[0].weight.grad)
    assert macs(net, (x[:1],)) == 5 * 7 + 2 * 7 * 3
    with pytest.raises(SettingError, match="at least one branch"):
        SharedTrunk(trunk, [])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"members": 1}, "members must be at least 2"),
        ({"events": 0}, "events must be at least 1"),
        ({"keep": 0}, "keep must be at least 1"),
        ({"alpha": -1.0}, "alpha must be at least 0"),
        ({"until": 0.0}, r"until must lie in \(0, 1\]"),
    ],
)
def test_settings_are_checked(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        NEAS(**wrong)  # type: ignore[arg-type]


def test_what_cannot_be_trained_so_is_refused() -> None:
    net = _net()
    optimizer = torch.optim.SGD(net.module.parameters(), lr=0.1)
    with pytest.raises(SettingError, match="trains an elastic network, got Sequential"):
        NEAS().start(net.module, optimizer, loss=_loss)
    with pytest.raises(SettingError, match="pass steps="):
        NEAS().start(net, optimizer, loss=_loss).step(_batch())
