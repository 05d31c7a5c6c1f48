"""Truths about evaluations that grow: their errors, when they stop, what is kept of them."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from scipy.stats import norm
from scipy.stats import t as student
from torch import nn

import supple
from supple.errors import CheckpointError, SettingError
from supple.space import Config
from supple.study.front import Front
from supple.study.growing import Batchwise, Estimate, Race, Tally
from supple.study.objectives import Objective
from supple.study.pareto import pareto
from supple.study.store import Stopped, StudyStore
from tests.study.stub import Net, Toy, accuracy

quiet = functools.partial(pareto, progress=False)
OBJECTIVES = (Objective("accuracy", True), Objective("params", False))
SMALL, LARGE = Config({"a": 1}), Config({"a": 4})


# ------------------------------------------------------------------------------- estimates


def test_the_error_of_a_mean_is_that_of_batches_drawn_without_replacement() -> None:
    tally = Tally(4)
    tally.add({"score": 0.5}, 10)
    tally.add({"score": 0.7}, 10)
    estimate = tally.estimate()
    assert estimate.values["score"] == pytest.approx(0.6)
    # By hand: variance of the sample 0.02, of its mean 0.01, half of the batches are left.
    assert estimate.errors["score"] == pytest.approx(math.sqrt(0.5 * 0.02 / 2))
    assert (estimate.share, estimate.freedom) == (0.5, 1)
    tally.add({"score": 0.6}, 10)
    tally.add({"score": 0.2}, 5)
    whole = tally.estimate()
    assert whole.values["score"] == pytest.approx((5 + 7 + 6 + 1) / 35)
    assert (whole.errors, whole.share) == ({}, 1)


def test_errors_are_as_large_as_estimates_are_wrong() -> None:
    drawn = np.random.default_rng(0)
    batches, sizes = drawn.normal(size=40), drawn.integers(4, 9, 40)
    truth = float((batches * sizes).sum() / sizes.sum())
    deviations = []
    for _ in range(1000):
        tally = Tally(40)
        for place in drawn.permutation(40)[:20]:
            tally.add({"x": batches[place]}, int(sizes[place]))
        estimate = tally.estimate()
        deviations.append((estimate.values["x"] - truth) / estimate.errors["x"])
    assert np.std(deviations) == pytest.approx(1, abs=0.1)
    assert abs(np.mean(deviations)) < 0.1


def test_batches_come_in_one_shuffled_order_and_are_judged_at_growing_distances() -> None:
    batches = [(torch.full((2, 1), float(place)),) for place in range(20)]
    growing = Batchwise(lambda module, batch: batch[0].mean(), batches)
    order = [int(batch[0][0]) for batch in growing.batches()]
    assert sorted(order) == list(range(20)) != order
    assert order == [int(batch[0][0]) for batch in growing.batches()]
    assert order != [int(b[0][0]) for b in Batchwise(growing.score, batches, seed=1).batches()]
    estimates = list(growing(nn.Identity()))
    assert [round(e.share * 20) for e in estimates] == [4, 6, 9, 14, 20]
    assert [list(e.values) for e in estimates] == [["score"]] * 5
    assert estimates[-1].values["score"] == pytest.approx(9.5)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Batchwise(accuracy, [(1,)], first=1), "first must be at least 2"),
        (lambda: Batchwise(accuracy, iter([])), "how many there are"),
        (lambda: Batchwise(accuracy, []), "at least one"),
        (lambda: Estimate({"a": 1.0}, 0.0), r"share must be in \(0, 1\]"),
        (lambda: Estimate({"a": 1.0}, 0.5, {"b": 1.0}), "of metrics"),
        (lambda: Estimate({"a": 1.0}, 0.5, {"a": -1.0}), "at least 0"),
        (lambda: Race(OBJECTIVES, {}, 1.0), r"confidence must be in \(0, 1\)"),
    ],
)
def test_wrong_settings_are_refused(make: Any, says: str) -> None:
    with pytest.raises(SettingError, match=says):
        make()


# ------------------------------------------------------------------------------------ races


def test_a_size_is_beaten_when_its_best_case_is() -> None:
    race = Race(OBJECTIVES, {SMALL: {"accuracy": 0.8, "params": 10.0}}, 0.99)
    risk = 0.01 * 6 / math.pi**2
    margin = float(norm.isf(risk)) * 0.02  # by the normal distribution at the first look

    def winner(value: float, params: float, look: int = 1, **more: Any) -> Config | None:
        estimate = Estimate({"accuracy": value}, 0.5, {"accuracy": 0.02}, **more)
        return race.winner(estimate, {"params": params}, look)

    assert winner(0.8 - margin - 1e-6, 11.0) == SMALL
    assert winner(0.8 - margin + 1e-6, 11.0) is None
    assert winner(0.1, 9.0) is None  # it is cheaper, whatever its accuracy
    assert winner(0.8 - margin - 1e-6, 11.0, look=2) is None  # looking again costs confidence
    assert winner(0.8 - margin - 1e-6, 11.0, freedom=3) is None  # and so do few batches
    t = float(student.isf(risk / 4, 3)) * 0.02
    assert winner(0.8 - t - 1e-6, 11.0, look=2, freedom=3) == SMALL
    assert winner(0.8 - t + 1e-6, 11.0, look=2, freedom=3) is None


def test_equals_do_not_beat_each_other_and_nobody_wins_against_what_is_not_evaluated() -> None:
    race = Race(OBJECTIVES, {SMALL: {"accuracy": 0.8, "params": 10.0}}, 0.9)
    assert race.winner(Estimate({"accuracy": 0.8}, 0.5), {"params": 10.0}, 1) is None
    assert race.winner(Estimate({"accuracy": 0.8}, 0.5), {"params": 10.5}, 1) == SMALL
    assert race.winner(Estimate({"loss": 9.0}, 0.5), {"params": 99.0}, 1) is None
    assert (
        Race(OBJECTIVES, {}, 0.9).winner(Estimate({"accuracy": 0.0}, 0.5), {"params": 1}, 1)
        is None
    )


def test_of_sizes_on_the_front_no_more_are_given_up_than_was_said() -> None:
    # The truth of each equals that of a finished one, the hardest case: looks at 5, 10, ... of
    # 50 batches, of which one in ten may err at confidence 0.9.
    drawn = np.random.default_rng(1)
    race = Race(OBJECTIVES[:1], {SMALL: {"accuracy": 0.0}}, 0.9)
    lost = 0
    for _ in range(300):
        batches = drawn.normal(size=50)
        batches -= batches.mean() - 1e-9
        tally = Tally(50)
        for count, value in enumerate(batches[:-1], 1):
            tally.add({"accuracy": value}, 8)
            if count % 5 == 0 and race.winner(tally.estimate(), {}, count // 5):
                lost += 1
                break
    assert 0 < lost <= 30


# ----------------------------------------------------------------------- supple.pareto races


class Noisy:
    """The stub's accuracy, batch by batch with noise whose mean is zero."""

    def __init__(self, batches: int = 16, noise: float = 0.02) -> None:
        drawn = np.random.default_rng(0).normal(size=batches) * noise
        self.data = [(torch.zeros(8, 1), float(x)) for x in drawn - drawn.mean()]
        self.scored: Counter[Config] = Counter()
        self.loaded = 0

    def accuracy(self, module: nn.Module, batch: Any) -> float:
        assert isinstance(module, Toy)
        self.scored[module.config] += 1
        return accuracy(module) + batch[1]

    def growing(self) -> Batchwise:
        return Batchwise(self.accuracy, Counted(self))


class Counted(list[Any]):
    """Batches that say how often one was loaded."""

    def __init__(self, owner: Noisy) -> None:
        super().__init__(owner.data)
        self.owner = owner

    def __getitem__(self, place: Any) -> Any:
        self.owner.loaded += 1
        return super().__getitem__(place)


def front_values(front: Front) -> set[tuple[float, float]]:
    return {(round(p.values["accuracy"], 9), p.values["params"]) for p in front.points}


@pytest.mark.parametrize("together", [1, 4])
def test_a_race_finds_the_same_front_with_fewer_batches(together: int) -> None:
    whole, raced = Noisy(), Noisy()
    search = functools.partial(
        quiet, Net(), costs=["params"], evaluations=999, study=":memory:"
    )
    full = search(whole.growing(), confidence=None)
    front = search(raced.growing(), together=together)
    assert front_values(front) == front_values(full)
    assert not full.stopped
    assert len(front.stopped) > 20
    assert len(front.evaluated) + len(front.stopped) == len(full.evaluated) == 68
    assert set(whole.scored.values()) == {16}
    assert sum(raced.scored.values()) < 0.7 * sum(whole.scored.values())
    by_config = {p.config: p.values for p in full.evaluated}
    assert all(p.values == pytest.approx(by_config[p.config]) for p in front.evaluated)
    assert f"({len(front.stopped)} more were stopped early)" in str(front)
    assert Front.from_json(front.to_json()) == front


def test_several_sizes_share_each_batch_that_is_loaded() -> None:
    alone, shared = Noisy(), Noisy()
    search = functools.partial(
        quiet, Net(), costs=["params"], evaluations=13, study=":memory:", confidence=None
    )
    one_by_one = search(alone.growing())
    together = search(shared.growing(), together=4)
    assert alone.loaded == 13 * 16
    assert shared.loaded == (1 + 3) * 16  # the first alone, then three times four
    assert {p.config: p.values for p in together.evaluated} == {
        p.config: p.values for p in one_by_one.evaluated
    }


def test_halving_keeps_one_front_after_the_other_and_spreads_along_the_last() -> None:
    values = {
        "steep": (0.9, 4.0),
        "middle": (0.8, 3.0),
        "near": (0.79, 2.9),
        "cheap": (0.5, 1.0),
        "worse": (0.7, 3.5),
        "worst": (0.1, 9.0),
        "broken": (math.nan, 0.5),
    }
    known = {
        Config({"a": place}): {"accuracy": accuracy, "params": params}
        for place, (accuracy, params) in enumerate(values.values())
    }
    names = dict(zip(known, values, strict=True))

    def goes_on(halving: int) -> set[str]:
        gone = Race(OBJECTIVES, {}, None, halving).halved(known)
        assert all(winner not in gone for winner in gone.values())
        return set(values) - {names[config] for config in gone}

    # By hand: the front is steep, middle, near, cheap, and broken for its costs alone.
    assert goes_on(2) == {"steep", "middle", "cheap", "broken"}
    assert goes_on(7) == {"steep"}
    assert Race(OBJECTIVES, {}, 0.9).halved(known) == {}


def test_of_sizes_that_run_together_fewer_and_fewer_go_on() -> None:
    noisy = Noisy(noise=0.0)
    front = quiet(
        Net(),
        noisy.growing(),
        ["params"],
        evaluations=9,
        study=":memory:",
        confidence=None,
        together=8,
        halving=2,
    )
    # Looks are after 4, 6, 9 and 14 of 16 batches; the largest is evaluated before, alone.
    assert sorted(noisy.scored.values()) == [4, 4, 4, 4, 6, 6, 9, 16, 16]
    assert (len(front.evaluated), len(front.stopped)) == (2, 7)


def test_halving_without_company_is_refused() -> None:
    noisy = Noisy()
    search = functools.partial(quiet, Net(), noisy.growing(), ["params"], study=":memory:")
    with pytest.raises(SettingError, match="halving must be at least 2, got 1"):
        search(together=4, halving=1)
    with pytest.raises(SettingError, match="give together=4 or more, got 2"):
        search(together=2, halving=4)


def test_a_stopped_trial_is_pruned_with_what_was_known_and_never_repeated(
    tmp_path: Path,
) -> None:
    noisy, study = Noisy(), tmp_path / "a.db"
    search = functools.partial(quiet, Net(), costs=["params"], study=study)
    first = search(noisy.growing(), evaluations=24)
    assert first.stopped
    loaded = noisy.loaded
    assert search(noisy.growing(), evaluations=24) == first
    assert noisy.loaded == loaded
    trials = optuna.load_study(study_name="pareto", storage=f"sqlite:///{study}").get_trials()
    pruned = [t for t in trials if t.state == optuna.trial.TrialState.PRUNED]
    assert len(pruned) == len(first.stopped)
    assert not [t for t in trials if t.state == optuna.trial.TrialState.FAIL]
    known = pruned[0].user_attrs
    assert known["reason"] == "another config beats it"
    assert 0 < known["share"] < 1
    assert set(known["errors"]) == {"accuracy"}
    winner = first.values(Config.from_json(known["winner"]))
    assert winner["accuracy"] > known["metrics"]["accuracy"]
    assert winner["params"] <= known["costs"]["params"]
    with pytest.raises(SettingError, match="was not evaluated"):
        first.values(Config.from_json(known["config"]))


def test_a_stopped_trial_that_was_tampered_with_is_told(tmp_path: Path) -> None:
    net = Net()
    with StudyStore(tmp_path / "a.db", name="s", space=net.space) as store:
        store.create(OBJECTIVES)
        trial = store.claim(net.space.smallest(), 9)
        assert isinstance(trial, int)
        stopped = Stopped(
            net.space.smallest(),
            {"accuracy": 0.1},
            {"params": 3.0},
            {"accuracy": 0.01},
            0.5,
            net.space.largest(),
        )
        assert store.stop(trial, stopped)
        assert (store.known(), store.results()) == ([stopped], [])
    with StudyStore(tmp_path / "a.db", name="s", space=net.space) as store:
        (read,) = store._trials()
        read.user_attrs["share"] = 0.9
        with pytest.raises(CheckpointError, match="doesn't match its checksum"):
            store._read(read)


def test_an_evaluation_may_yield_estimates_of_its_own() -> None:
    closed: list[bool] = []

    def evaluate(module: nn.Module) -> Iterator[supple.Estimate]:
        value = {"accuracy": accuracy(module)}
        try:
            yield supple.Estimate(value, 0.1, {"accuracy": 1e-6})
            yield supple.Estimate(value, 1)
        finally:
            closed.append(True)

    net = Net(widths=2)
    front = quiet(net, evaluate, ["params"], evaluations=99, study=":memory:")
    full = quiet(Net(widths=2), accuracy, ["params"], evaluations=99, study=":memory:")
    assert front_values(front) == front_values(full)
    assert front.stopped
    assert len(closed) == 10


@pytest.mark.parametrize(
    ("yields", "says"),
    [
        ([0.5], "must yield supple.Estimate, got float"),
        ([Estimate({"accuracy": 0.5}, 0.5)], "must be of all the data"),
        ([], "must be of all the data"),
    ],
)
def test_what_is_no_estimate_is_refused(yields: list[Any], says: str) -> None:
    with pytest.raises(SettingError, match=says):
        quiet(Net(), lambda module: iter(yields), ["params"], study=":memory:")


def test_wrong_words_about_growing_evaluations_are_refused() -> None:
    search = functools.partial(quiet, Net(), costs=["params"], study=":memory:")
    with pytest.raises(SettingError, match=r"confidence must be in \(0, 1\), got 1.5"):
        search(accuracy, confidence=1.5)
    with pytest.raises(SettingError, match="together must be at least 1"):
        search(accuracy, together=0)
    with pytest.raises(SettingError, match=r"together=4 needs .*Batchwise.*got function"):
        search(accuracy, together=4)
    with pytest.raises(SettingError, match="score must return a number"):
        search(Batchwise(lambda module, batch: "good", Noisy().data))

    class Loader:
        def __len__(self) -> int:
            return 5

        def __iter__(self) -> Iterator[Any]:
            return iter(Noisy().data[:3])

    with pytest.raises(SettingError, match="gave 3 batches, its length says 5"):
        search(Batchwise(Noisy().accuracy, Loader()))
