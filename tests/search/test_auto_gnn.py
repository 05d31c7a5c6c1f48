"""Truths about the search that decides one class of sites at a time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from supple.errors import SettingError
from supple.search._conservative import ConservativeController, Encoder, classes_of, rewards
from supple.search.auto_gnn import AutoGNN, HomogeneousSharing
from supple.search.base import Told
from supple.space import Site, Space

KINDS = ("attention", "activation", "heads")
SPACE = Space(
    [Site(f"{layer}.{kind}", kind, (0, 1, 2, 3), 3) for layer in range(2) for kind in KINDS]
)
CLASSES = [[0, 3], [1, 4], [2, 5]]
SMALL = AutoGNN(hidden=8)


def _told(rows: list[list[int]], values: list[float]) -> Told:
    return Told(np.array(rows), np.array(values)[:, None].astype(float), np.zeros(len(rows)))


def _changed(rows: np.ndarray, best: np.ndarray) -> np.ndarray:
    """Which classes differ, shape (rows, classes)."""
    return np.stack([(rows[:, c] != best[c]).any(1) for c in CLASSES], 1)


def test_sites_are_grouped_by_axis_or_by_the_first_pattern_that_matches() -> None:
    assert [c.tolist() for c in classes_of(SPACE, ()).values()] == CLASSES
    grouped = classes_of(SPACE, ["1.heads", "*.heads", "0.*"])
    assert {name: c.tolist() for name, c in grouped.items()} == {
        "0.*": [0, 1],
        "*.heads": [2],
        "attention": [3],
        "activation": [4],
        "1.heads": [5],
    }
    with pytest.raises(SettingError, match="'norm' matches none"):
        classes_of(SPACE, ["norm"])


def test_children_differ_from_the_best_in_one_class() -> None:
    run = SMALL.start(SPACE, ["loss"], 3)
    for _ in range(20):
        row = run.ask_rows(1)
        if len(run.told):
            best = run.told.rows[run.told.values[:, 0] == run.told.values.min()][-1]
            assert _changed(row, best).sum() == 1
        run.tell(row, row.sum(axis=1, keepdims=True))


def test_the_best_stays_until_a_child_is_as_good() -> None:
    controller = ConservativeController(SMALL, SPACE, 0)
    first, worse, equal = [1] * 6, [1] * 5 + [2], [1] * 5 + [0]
    for rows, values, best in (
        ([first], [3.0], first),
        ([first, worse], [3.0, 4.0], first),
        ([first, worse, equal], [3.0, 4.0, 3.0], equal),
    ):
        controller.learn(_told(rows, values))
        assert controller.best is not None
        assert controller.best.tolist() == best


def test_a_class_is_drawn_by_its_share_of_the_entropy() -> None:
    controller = ConservativeController(SMALL, SPACE, 0)
    controller.learn(_told([[1] * 6], [3.0]))
    random = np.random.default_rng(0)
    # Encoders begin near uniform: two sites of four choices in each class.
    assert controller.guide() == pytest.approx([1 / 3] * 3, abs=0.01)
    # One is settled, one decides between two choices at one site alone.
    for encoder, open_sites in ((0, 0), (1, 1)):
        for site, head in enumerate(_heads(controller, encoder)):
            nn.init.zeros_(head.weight)
            _bias(head, [0.0, 0.0, -60.0, -60.0] if site < open_sites else [0.0] + 3 * [-60.0])
    parts = np.array([0.0, math.log(2), 2 * math.log(4)])
    assert controller.guide() == pytest.approx(parts / parts.sum(), abs=0.01)
    children = np.concatenate([controller.propose(random, 0) for _ in range(9)])
    changed = _changed(children, np.ones(6, dtype=int))
    assert not changed[:, 0].any()
    assert 0 < changed[:, 1].sum() < changed[:, 2].sum()


def _heads(controller: ConservativeController, which: int) -> list[nn.Linear]:
    return list(controller._encoders[which].controller.heads)  # type: ignore[arg-type]


def _bias(head: nn.Linear, values: list[float]) -> None:
    head.bias = nn.Parameter(torch.tensor(values))


def test_a_child_teaches_the_encoder_of_its_class_alone() -> None:
    controller = ConservativeController(SMALL, SPACE, 0)
    controller.learn(_told([[1] * 6], [3.0]))
    before = [_weights(controller, which) for which in range(3)]
    rows = torch.tensor([[1, 2]])
    likely = _log_prob(controller, 1, rows)
    # Better than the average of what was told before: minus 1 against minus 3.
    controller.learn(_told([[1] * 6, [1, 1, 1, 1, 2, 1]], [3.0, 1.0]))
    moved = [not torch.equal(b, _weights(controller, w)) for w, b in enumerate(before)]
    assert moved == [False, True, False]
    assert _log_prob(controller, 1, rows) > likely
    # Worse: what was decided becomes less likely.
    rows = torch.tensor([[3, 1]])
    likely = _log_prob(controller, 2, rows)
    told = [[1] * 6, [1, 1, 1, 1, 2, 1], [1, 1, 3, 1, 2, 1]]
    controller.learn(_told(told, [3.0, 1.0, 9.0]))
    assert _log_prob(controller, 2, rows) < likely


def test_a_config_that_differs_in_several_classes_teaches_none() -> None:
    controller = ConservativeController(SMALL, SPACE, 0)
    controller.learn(_told([[1] * 6], [3.0]))
    before = [_weights(controller, which) for which in range(3)]
    controller.learn(_told([[1] * 6, [2, 2, 1, 1, 1, 1]], [3.0, 1.0]))
    assert all(torch.equal(b, _weights(controller, w)) for w, b in enumerate(before))
    assert controller.best is not None
    assert controller.best.tolist() == [2, 2, 1, 1, 1, 1]


def _weights(controller: ConservativeController, which: int) -> Tensor:
    parameters = controller._encoders[which].parameters()
    return nn.utils.parameters_to_vector(parameters).detach().clone()


def _log_prob(controller: ConservativeController, which: int, rows: Tensor) -> float:
    encoder: Encoder = controller._encoders[which]
    found = encoder(rows, controller._masked(which)).log_probs.detach()
    return float(found.gather(2, rows[..., None]).sum())


def test_sites_that_do_not_exist_teach_nothing() -> None:
    block = (("depth", frozenset({1})),)
    space = Space([Site("depth", "depth", (0, 1), 1), Site("w", "width", (1, 2, 4), 4, block)])
    controller = ConservativeController(SMALL, space, 0)
    controller.learn(_told([[1, 0]], [3.0]))
    before = [_weights(controller, which) for which in range(2)]
    # Without the block there is no width, so only the depth was decided anew.
    controller.learn(_told([[1, 0], [0, 2]], [3.0, 1.0]))
    moved = [not torch.equal(b, _weights(controller, w)) for w, b in enumerate(before)]
    assert moved == [True, False]
    # And only the depth can be: from here a child has the block back, at its full width.
    assert controller.guide().tolist() == [1.0, 0.0]
    assert {tuple(r) for r in controller.propose(np.random.default_rng(0), 0)} <= {
        (0, 2),
        (1, 2),
    }


def test_rewards_by_hand() -> None:
    told = Told(
        np.zeros((4, 1), dtype=int), np.array([[3.0], [1.0], [np.nan], [0.0]]), np.zeros(4)
    )
    told = Told(told.rows, told.values, np.array([0.0, 0.0, np.inf, 2.0]))
    assert rewards(told).tolist() == [-3.0, -1.0, -3.0, -3.0]
    several = np.array([[1.0, 2.0], [2.0, 1.0], [3.0, 3.0], [4.0, 4.0]])
    assert rewards(Told(told.rows, several, np.zeros(4))).tolist() == [0.0, 0.0, -1.0, -2.0]
    assert rewards(Told(told.rows, told.values, np.full(4, np.inf))).tolist() == [0.0] * 4


def test_a_search_that_is_told_everything_again_goes_on_exactly() -> None:
    method = AutoGNN(hidden=8, batch=2)
    run = method.start(SPACE, ["loss"], 5)
    for _ in range(7):
        rows = run.ask_rows(2)
        run.tell(rows, rows.sum(axis=1, keepdims=True))
    again = method.start(SPACE, ["loss"], 5)
    again.load_state_dict(run.state_dict())
    other = method.start(SPACE, ["loss"], 6)
    other.tell(run.told.rows, run.told.values)
    expected = run.ask_rows(9).tolist()
    assert again.ask_rows(9).tolist() == expected
    assert other.ask_rows(9).tolist() != expected


def test_what_only_harms_is_found_sooner_than_at_random() -> None:
    bests = []
    for seed in range(3):
        run = SMALL.start(SPACE, ["loss"], seed)
        for _ in range(30):
            row = run.ask_rows(1)
            run.tell(row, row.sum(axis=1, keepdims=True))
        bests.append(int(run.told.values.min()))
        drawn = SPACE.random_many(30, seed).sum(axis=1).min()
        assert bests[-1] < drawn
    assert min(bests) <= 2


def test_the_first_configs_are_random() -> None:
    run = AutoGNN(hidden=8, first=5).start(SPACE, ["loss"], 0)
    for _ in range(5):
        row = run.ask_rows(1)
        run.tell(row, row.sum(axis=1, keepdims=True))
    assert (_changed(run.told.rows[1:], run.told.rows[0]).sum(1) > 1).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"first": 0}, "first must be at least 1"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"hidden": 0}, "hidden must be at least 1"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"decay": 1.0}, r"decay must be in \[0, 1\)"),
    ],
)
def test_settings_are_checked(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        AutoGNN(**wrong)  # type: ignore[arg-type]


class _Layer(nn.Module):
    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.linear = nn.Linear(3, width)
        self.norm = nn.BatchNorm1d(width)
        self.skip = nn.Linear(3, width)
        for tensor in (*self.parameters(), self.norm.running_mean):
            nn.init.constant_(tensor, 7.0)  # type: ignore[arg-type]


def _net(width: int, kind: str) -> nn.Sequential:
    return nn.Sequential(_Layer(width, kind), _Layer(width, "plain"))


def _blank(width: int, kind: str) -> nn.Sequential:
    net = _net(width, kind)
    for tensor in (*net.parameters(), net[0].norm.running_mean):
        nn.init.zeros_(tensor)
    return net


def test_layers_inherit_only_what_is_homogeneous() -> None:
    share = HomogeneousSharing("?", kind=lambda layer: layer.kind, own=("skip.*",))
    share.keep(_net(5, "gat"))
    same, kind, shape = _blank(5, "gat"), _blank(5, "cos"), _blank(2, "gat")
    assert share.inherit(same) == ["0", "1"]
    assert share.inherit(kind) == ["1"]
    assert share.inherit(shape) == []
    assert (same[0].linear.weight == 7).all()
    assert not kind[0].linear.weight.any()
    # What is the layer's own: the skip connection, and all of the norm.
    left = (same[0].skip.weight, same[0].norm.weight, same[0].norm.running_mean)
    assert not any(tensor.any() for tensor in left)


def test_sharing_without_limits_takes_whatever_fits() -> None:
    share = HomogeneousSharing("?", norms=True)
    share.keep(_net(5, "gat"))
    kind = _blank(5, "cos")
    assert share.inherit(kind) == ["0", "1"]
    taken = (kind[0].linear.weight, kind[0].skip.weight, kind[0].norm.running_mean)
    assert all((tensor == 7).all() for tensor in taken)


def test_later_weights_take_the_place_of_earlier_ones_and_are_copies() -> None:
    share = HomogeneousSharing("?")
    share.keep(_net(5, "gat"))
    later = _net(5, "gat")
    nn.init.constant_(later[0].linear.weight, 3.0)
    share.keep(later)
    nn.init.constant_(later[0].linear.weight, 4.0)
    new = _blank(5, "gat")
    share.inherit(new)
    assert (new[0].linear.weight == 3).all()


def test_sharing_needs_layers() -> None:
    with pytest.raises(SettingError, match="matches no module"):
        HomogeneousSharing("stages.*").keep(_net(5, "gat"))
