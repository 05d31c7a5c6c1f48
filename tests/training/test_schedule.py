"""Learning rates over a run."""

from __future__ import annotations

import itertools

import pytest

from supple.errors import SettingError
from supple.training.schedule import Constant, Cosine, Cyclic, Exponential, WarmUp, schedule_of


def test_exponential_decay_is_geometric_and_stops_at_its_floor():
    schedule = Exponential(floor=0.05, until=0.5)
    factors = [schedule(step, 100) for step in range(100)]
    ratios = [b / a for a, b in itertools.pairwise(factors[:51])]
    assert ratios == pytest.approx([0.05 ** (1 / 50)] * 50)
    assert factors[50:] == pytest.approx([0.05] * 50)


def test_cosine_ends_just_above_its_floor():
    assert Cosine(floor=0.2)(0, 10) == 1.0
    assert Cosine(floor=0.2)(10, 10) == pytest.approx(0.2)
    assert Cosine()(5, 10) == pytest.approx(0.5)


@pytest.mark.parametrize("warmup", [4, 0.25])
def test_warm_up_grows_linearly_and_hands_over(warmup):
    schedule = WarmUp(Cosine(), warmup)
    assert [schedule(step, 16) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert schedule(4, 16) == 1.0
    assert schedule(10, 16) == pytest.approx(Cosine()(6, 12))


def test_names_and_functions_are_schedules():
    assert schedule_of("cosine") == Cosine()
    assert schedule_of("exponential") == Exponential()
    assert schedule_of(None) == Constant() == schedule_of("constant")
    assert schedule_of(lambda step, steps: 3.0, warmup=1)(1, 5) == 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedule_of("cosin"), "did you mean 'cosine'"),
        (lambda: WarmUp(Constant(), 1.0), "warmup must be"),
        (lambda: WarmUp(Constant(), -1), "warmup must be"),
        (lambda: Cosine(floor=1.5), "floor must lie"),
        (lambda: Exponential(floor=0.0), "floor must be above 0"),
    ],
)
def test_settings_are_checked(make, message):
    with pytest.raises(SettingError, match=message):
        make()


@pytest.mark.parametrize("settings", [{"cycles": 0}, {"decay": 0.0}, {"floor": 1.5}])
def test_settings_of_cycles_are_checked(settings):
    with pytest.raises(SettingError, match=next(iter(settings))):
        Cyclic(**settings)


def test_cycles_peak_in_their_middle_and_end_at_the_floor():
    schedule = Cyclic(cycles=3, floor=0.1, decay=0.2)
    peaks = [schedule(step, 60) for step in (10, 30, 50)]
    assert peaks == pytest.approx([1.0, 0.1 + 0.9 * 0.2, 0.1 + 0.9 * 0.04])
    assert [schedule(step, 60) for step in (0, 20, 40)] == pytest.approx([0.1] * 3)
