"""A device profile holds what was measured, decides soberly, and refuses what doesn't fit."""

from __future__ import annotations

import dataclasses
import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from supple.cost import profile as module
from supple.cost.measure import interleaved, without_drift
from supple.cost.operators import KINDS
from supple.cost.profile import (
    DeviceProfile,
    Divisor,
    OperatorTable,
    ThreadTimes,
    judge_divisor,
    profile_device,
)
from supple.errors import CheckpointError, SettingError


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grids of two sizes each, so that a whole profile takes a moment."""
    for kind, operator in module._OPERATORS.items():
        grid = tuple(sizes[:2] for sizes in operator.grid)
        changed = dataclasses.replace(operator, grid=grid)
        monkeypatch.setitem(module._OPERATORS, kind, changed)
    monkeypatch.setattr(module, "_WIDEST", 66)
    monkeypatch.setattr(module, "_POSITIONS", 2)
    monkeypatch.setattr(module, "_TRIED", (2, 4))
    monkeypatch.setattr(module, "_BATCHES", (1, 3))


@pytest.fixture
def profile() -> DeviceProfile:
    """A profile of a device that does not exist."""
    table = OperatorTable(("elements",), ((10, 100),), np.array([1e-6, 4e-6]))
    return DeviceProfile(
        device="a toaster, 2 threads",
        torch_version="1.0",
        threads=2,
        date="2026-11-21T00:00:00+00:00",
        fast=True,
        operators={"softmax": table},
        divisors={"conv": Divisor("conv", 16, {16: (0.1, 0.0, 0.2)})},
        thread_times=(ThreadTimes("toast", 1, {1: 2e-3, 2: 1e-3}),),
    )


# --- tables -----------------------------------------------------------------------------------


def test_a_table_gives_what_was_measured_and_power_laws_between() -> None:
    grid = ((1, 4, 16), (2, 8))
    seconds = np.array([[3e-6 * a**2 * b for b in grid[1]] for a in grid[0]])
    table = OperatorTable(("a", "b"), grid, seconds)
    np.testing.assert_allclose(table.at(np.array([1, 4, 16]), 8), seconds[:, 1])
    np.testing.assert_allclose(
        table.at(2.0, np.array([2, 3, 5])), 3e-6 * 4 * np.array([2, 3, 5])
    )


def test_below_a_table_overhead_rules_and_above_it_work() -> None:
    table = OperatorTable(("a", "b"), ((2, 4), (2, 4)), np.array([[1e-6, 2e-6], [2e-6, 3e-6]]))
    assert table.at(1, 1) == pytest.approx(1e-6)
    assert table.at(8, 4) == pytest.approx(6e-6)
    assert table.at(8, 12) == pytest.approx(18e-6)


def test_sizes_of_too_much_work_are_filled_in_by_their_work() -> None:
    seconds = np.array([[1e-6, 2e-6], [3e-6, np.nan]])
    filled = module._filled(seconds, [(10, 20), (10, 40)])
    assert filled[1, 1] == pytest.approx(np.sqrt(4e-6 * 12e-6))  # twice 2e-6, four times 3e-6
    assert filled[0, 1] == 2e-6


# --- channel divisors -------------------------------------------------------------------------


def timed(seconds, noise=0.002, rounds=15):
    """Timings of all channel counts that are tried, with noise and drift."""
    channels = sorted({c for d in module._TRIED for pair in module._pairs(d) for c in pair})
    random = np.random.default_rng(0)
    exact = np.array([seconds(c) for c in channels])
    disturbed = exact * np.exp(random.normal(0, noise, (rounds, len(channels))))
    return channels, disturbed * np.linspace(1, 1.3, rounds)[:, None]


@pytest.mark.parametrize("step", [8, 16, 32])
def test_steps_in_the_time_are_found(step: int) -> None:
    found = judge_divisor("conv", *timed(lambda c: 1e-5 + 1e-6 * (-(-c // step) * step)))
    assert found.divisor == step
    share, low, high = found.savings[step]
    assert low <= share <= high < 0.5


def test_a_time_that_follows_the_channels_has_no_divisor() -> None:
    found = judge_divisor("linear", *timed(lambda c: 1e-5 + 1e-6 * c))
    assert found.divisor == 1
    assert found.savings[64][0] == pytest.approx(1.0, abs=0.1)


def test_noise_alone_makes_no_divisor() -> None:
    found = judge_divisor("linear", *timed(lambda c: 1e-5 + 1e-6 * c, noise=0.2))
    assert found.divisor == 1


def test_where_the_time_hardly_depends_on_channels_nothing_pays() -> None:
    assert judge_divisor("conv", *timed(lambda c: 1e-4 + 1e-8 * c)) == Divisor("conv", 1)


def test_odd_counts_that_are_slower_than_the_next_multiple_make_a_divisor() -> None:
    found = judge_divisor("linear", *timed(lambda c: 1e-6 * c * (1.2 if c % 8 else 1.0)))
    assert found.divisor == 8


# --- timing in turn ---------------------------------------------------------------------------


def test_every_thing_is_visited_in_each_round_and_next_in_reverse() -> None:
    visits: list[int] = []

    def prepare(index: int):
        visits.append(index)
        return lambda: None

    times = interleaved(5, prepare, rounds=4, seconds=0.0)
    assert times.shape == (4, 5)
    rounds = [visits[start : start + 5] for start in range(0, 20, 5)]
    assert all(sorted(one) == list(range(5)) for one in rounds)
    assert rounds[1] == rounds[0][::-1]
    assert rounds[3] == rounds[2][::-1]


def test_a_slow_round_and_a_disturbed_visit_do_not_show() -> None:
    alone = np.array([1.0, 2.0, 3.0, 5.0])
    times = alone * np.array([[1.0], [1.4], [1.1], [0.9], [1.2]])
    times[2, 1] *= 30
    np.testing.assert_allclose(without_drift(times), 1.1 * alone)  # as in the middle round


def test_calls_that_others_interrupt_do_not_count(monkeypatch) -> None:
    """Every other call sleeps, as one does that has to wait for a CPU."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    calls = 0

    def run() -> None:
        nonlocal calls
        calls += 1
        end = time.thread_time() + 1e-3
        while time.thread_time() < end:
            pass
        if calls % 4:
            time.sleep(0.02)

    assert 1e-3 <= interleaved(1, lambda _: run, rounds=1, seconds=0.03)[0, 0] < 1e-2


# --- threads ----------------------------------------------------------------------------------


def test_the_fewest_threads_that_are_about_as_fast_are_best() -> None:
    assert ThreadTimes("w", 1, {1: 1.0, 2: 0.97, 4: 1.5}).best == 1
    assert ThreadTimes("w", 1, {1: 1.0, 2: 0.6, 4: 0.58}).best == 2


# --- the whole --------------------------------------------------------------------------------


@pytest.mark.usefixtures("tiny")
def test_a_profile_is_measured_and_read_back(tmp_path) -> None:
    steps: list[tuple[str, int, int]] = []
    threads = torch.get_num_threads()
    found = profile_device(fast=True, progress=lambda *step: steps.append(step))
    assert torch.get_num_threads() == threads
    assert set(found.operators) == set(KINDS)
    for kind, table in found.operators.items():
        assert table.axes == KINDS[kind]
        assert (table.seconds > 0).all()
    assert set(found.divisors) == {"conv", "linear"}
    assert [times.batch for times in found.thread_times] == [1, 3]
    assert {1} <= set(found.thread_times[0].seconds)
    assert found.differences("cpu", 1) == {}
    whats = {what: total for what, _, total in steps}
    assert {("operators", whats["operators"], whats["operators"])} <= set(steps)
    found.save(tmp_path / "device.json")
    assert DeviceProfile.load(tmp_path / "device.json")._to_json() == found._to_json()


@pytest.mark.usefixtures("tiny")
def test_threads_are_compared_on_the_users_network() -> None:
    seen: list[tuple[int, int]] = []

    class Net(nn.Linear):
        def forward(self, x):
            seen.append((len(x), torch.get_num_threads()))
            return super().forward(x)

    net = Net(3, 5).train()
    found = profile_device(fast=True, model=net, args=(torch.zeros(2, 3),))
    assert {times.work for times in found.thread_times} == {"Net"}
    assert {batch for batch, _ in seen} == {1, 3}
    assert {number for _, number in seen} == set(module._thread_counts())
    assert net.training


def test_what_differs_from_this_machine_is_named(profile) -> None:
    differs = profile.differences("cpu", 1)
    assert "a toaster, 2 threads" in differs["device"]
    assert "2 threads, not 1" in differs["threads"]
    assert torch.__version__ in differs["torch"]


def test_a_kind_that_was_not_measured_has_no_divisor(profile) -> None:
    assert profile.divisor("conv") == 16
    assert profile.divisor("linear") == 1


def test_a_damaged_profile_is_refused(profile, tmp_path) -> None:
    path = tmp_path / "device.json"
    profile.save(path)
    assert DeviceProfile.load(path).device == profile.device
    path.write_text(path.read_text().replace("toaster", "kettle"))
    with pytest.raises(CheckpointError, match=r"device\.json.*checksum"):
        DeviceProfile.load(path)
    path.write_text(path.read_text()[:100])
    with pytest.raises(CheckpointError, match=r"device\.json"):
        DeviceProfile.load(path)


def test_another_json_file_is_no_profile(profile, tmp_path) -> None:
    from supple.files import write_json

    write_json(tmp_path / "a.json", {"kind": "something"})
    with pytest.raises(CheckpointError, match="no device profile"):
        DeviceProfile.load(tmp_path / "a.json")
    content = profile._to_json()
    content["operators"]["softmax"]["seconds"] = [1e-6]
    write_json(tmp_path / "b.json", content)
    with pytest.raises(CheckpointError, match=r"b\.json is a damaged device profile"):
        DeviceProfile.load(tmp_path / "b.json")
    write_json(tmp_path / "c.json", {"kind": "device profile"})
    with pytest.raises(CheckpointError, match=r"c\.json is a damaged device profile"):
        DeviceProfile.load(tmp_path / "c.json")


@pytest.mark.parametrize("threads", [0, -1, 1.5, "two"])
def test_wrong_threads_are_refused(threads) -> None:
    with pytest.raises(SettingError, match="threads"):
        profile_device(threads=threads)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(SettingError, match="no GPU"):
        profile_device(device="cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("tiny")
def test_a_gpu_is_profiled_without_threads() -> None:
    found = profile_device(fast=True, device="cuda")
    assert found.thread_times == ()
    assert found.device == torch.cuda.get_device_name()
    assert json.dumps(found._to_json())
