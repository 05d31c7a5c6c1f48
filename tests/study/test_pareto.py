"""Truths about the evaluation loop, on a network whose front is known."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

import supple
from supple.errors import CheckpointError, SettingError
from supple.search.base import SearchAlgorithm
from supple.search.nsga2 import NSGA2
from supple.search.random_search import RandomSearch
from supple.space import Config
from supple.study import pareto as module
from supple.study.evaluate import Costs, fingerprint
from supple.study.front import Front
from supple.study.pareto import pareto
from tests.study.stub import Net, Toy, accuracy

quiet = functools.partial(pareto, progress=False)


def counted(net: Net) -> Counter[Config]:
    return Counter(net.entered)


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


# ------------------------------------------------------------------------------ one worker


def test_the_whole_of_a_small_space_gives_the_true_front() -> None:
    net = Net(widths=2)
    front = quiet(net, accuracy, ["params"], evaluations=100, study=":memory:")
    assert len(front.evaluated) == net.space.size() == 10
    assert set(counted(net).values()) == {1}
    values = {c: (accuracy(toy(c)), sum(c.values())) for c in counted(net)}
    values_seen = set(values.values())
    truth = {v for v in values_seen if not any(beats(w, v) for w in values_seen)}
    found = {(p.values["accuracy"], p.values["params"]) for p in front.points}
    assert found == truth
    assert len(truth) > 3


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Says whether a dominates b: more accuracy and fewer parameters."""
    return a != b and a[0] >= b[0] and a[1] <= b[1]


def toy(config: Config) -> Toy:
    made = Toy()
    made.config = config
    return made


def test_the_largest_and_the_smallest_come_first_and_the_number_is_kept() -> None:
    net = Net()
    front = quiet(net, accuracy, ["params"], evaluations=7, study=":memory:")
    assert len(front.evaluated) == 7
    assert net.entered[:2] == [net.space.largest(), net.space.smallest()]


def test_every_evaluation_is_kept_and_none_is_repeated(tmp_path: Path) -> None:
    net, study = Net(), tmp_path / "a.db"
    first = quiet(net, accuracy, ["params"], evaluations=5, study=study)
    again = quiet(net, accuracy, ["params"], evaluations=5, study=study)
    assert again == first
    assert len(net.entered) == 5
    more = quiet(net, accuracy, ["params"], evaluations=7, study=str(study))
    assert more.evaluated[:5] == first.evaluated
    assert set(counted(net).values()) == {1}
    assert len(net.entered) == 7


@pytest.mark.parametrize("algorithm", [NSGA2(population=4), RandomSearch()])
def test_a_search_that_stopped_goes_on_as_if_it_had_not(
    tmp_path: Path, algorithm: SearchAlgorithm
) -> None:
    whole, parts = Net(), Net()
    search = functools.partial(quiet, costs=["params"], algorithm=algorithm, seed=3)
    search(whole, accuracy, evaluations=11, study=":memory:")
    for upto in (1, 6, 11):
        search(parts, accuracy, evaluations=upto, study=tmp_path / "b.db")
    assert parts.entered == whole.entered


def test_a_search_is_given_what_costs_and_bounds_need_no_evaluation() -> None:
    class Model:
        name, error = "latency[predicted]", 0.01

        def __call__(self, configs: list[Config]) -> np.ndarray:
            return np.array([config["a"] / 2 for config in configs])

    given: dict[str, Any] = {}

    class Watching(RandomSearch):
        def start(self, *args: Any, **known: Any) -> Any:
            given.update(known)
            return super().start(*args, **known)

    net = Net()
    rows = net.space.encode_many([{"a": 1}, {"a": 4}])  # 10 and 13 parameters
    search = functools.partial(
        quiet, net, accuracy, algorithm=Watching(), evaluations=2, study=":memory:"
    )
    search(["params", Model()], where={"params": "<= 10", "latency[predicted]": "<= 1 s"})
    assert set(given["exact"]) == {"params", "latency[predicted]"}
    np.testing.assert_array_equal(given["exact"]["params"](rows), net.costs(rows)["params"])
    assert given["exact"]["latency[predicted]"](rows).tolist() == [0.5, 2.0]
    assert given["violation"](rows) == pytest.approx([0.0, 3 / 10 + 1])
    search(["params"], where={"accuracy": ">= 0.1"})
    assert given["violation"] is None
    search({"own": lambda configs: np.ones(len(configs))})
    assert given["exact"] == {}


def test_nsga2_is_the_default_and_another_seed_searches_elsewhere() -> None:
    default, other, named = Net(), Net(), Net()
    quiet(default, accuracy, ["params"], evaluations=12, study=":memory:")
    quiet(named, accuracy, ["params"], evaluations=12, study=":memory:", algorithm=NSGA2())
    quiet(other, accuracy, ["params"], evaluations=12, study=":memory:", seed=1)
    assert default.entered == named.entered != other.entered


def test_costs_by_name_by_function_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import supple.cost.measure as measuring

    def fake(module: nn.Module, name: str, args: Any, kwargs: Any) -> float:
        assert isinstance(module, Toy)
        assert name == "latency[batch=1]"
        return sum(module.config.values()) * 1e-3

    monkeypatch.setattr(measuring, "measure_named", fake)
    net = Net()
    names = ["latency[batch=1]", "params"]
    front = quiet(net, accuracy, names, evaluations=3, study=":memory:")
    full = front.values(net.space.largest())
    assert dict(full) == {
        "accuracy": pytest.approx(accuracy(toy(net.space.largest()))),
        "latency[batch=1]": pytest.approx(0.013),
        "params": 13,
        "macs": 169,
    }
    assert [o.name for o in front.objectives] == ["accuracy", *names]

    def half(configs: list[Config]) -> np.ndarray:
        return np.array([sum(c.values()) / 2 for c in configs])

    front = quiet(Net(), accuracy, {"half": half}, evaluations=3, study=":memory:")
    assert front.values(net.space.largest())["half"] == 6.5


def test_wrong_costs_are_refused_with_the_nearest() -> None:
    with pytest.raises(SettingError, match="did you mean 'params'"):
        Costs(Net(), ["parms"])
    with pytest.raises(SettingError, match="once"):
        Costs(Net(), ["params", "params"])


def test_several_metrics_their_directions_and_which_are_objectives() -> None:
    def both(module: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(module), "loss": 1.0, "seen": torch.tensor(3)}

    front = quiet(Net(), both, ["params"], objectives=["accuracy", "loss"], study=":memory:")
    assert [(o.name, o.maximize) for o in front.objectives] == [
        ("accuracy", True),
        ("loss", False),
        ("params", False),
    ]
    assert front.evaluated[0].values["seen"] == 3.0


def test_bounds_steer_the_search_without_limiting_what_is_returned() -> None:
    free, bound = Net(widths=8), Net(widths=8)
    algorithm = NSGA2(population=10)
    search = functools.partial(quiet, costs=["params"], algorithm=algorithm, evaluations=80)
    search(free, accuracy, study=":memory:")
    front = search(bound, accuracy, study=":memory:", where={"params": "<= 9"})
    late = [sum(c.values()) <= 9 for c in bound.entered[40:]]
    assert np.mean(late) > np.mean([sum(c.values()) <= 9 for c in free.entered[40:]])
    assert front.evaluated[0].values["params"] == 25
    with pytest.raises(SettingError, match="did you mean 'params'"):
        quiet(Net(), accuracy, ["params"], study=":memory:", where={"parms": "<= 9"})


def test_evaluation_is_in_eval_mode_without_gradients_and_modes_come_back() -> None:
    net = Net()
    net.module.norm.eval()
    seen = []

    def look(module: nn.Module) -> float:
        seen.append((module.training, torch.is_grad_enabled()))
        return 0.5

    quiet(net, look, ["params"], evaluations=2, study=":memory:")
    assert seen == [(False, False)] * 2
    assert net.module.training
    assert not net.module.norm.training


def test_batch_normalization_needs_data_and_is_recalibrated_but_for_the_full_network() -> None:
    net = Net(norm=True)
    with pytest.raises(SettingError, match="pass data="):
        quiet(net, accuracy, ["params"], study=":memory:")
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(5, 3, generator=generator),) for _ in range(2)]
    front = quiet(net, accuracy, ["params"], evaluations=4, study=":memory:", data=batches)
    partial = {p.config for p in front.evaluated} - {net.space.largest()}
    assert set(net.statistics) == partial
    assert len(partial) == 3


def test_an_evaluation_that_raises_is_repeated_when_called_again(tmp_path: Path) -> None:
    net, study = Net(), tmp_path / "a.db"

    def fails_at_fourth(module: nn.Module) -> dict[str, float]:
        if len(net.entered) == 4:
            raise RuntimeError("out of memory")
        return {"accuracy": accuracy(module)}

    with pytest.raises(RuntimeError, match="out of memory"):
        quiet(net, fails_at_fourth, ["params"], evaluations=6, study=study)
    front = quiet(net, fails_at_fourth, ["params"], evaluations=6, study=study)
    assert len(front.evaluated) == 6
    assert net.entered[3] == net.entered[4]
    assert sorted(counted(net).values()) == [1, 1, 1, 1, 1, 2]


def test_values_that_are_not_finite_are_kept_out_of_the_front() -> None:
    net = Net(widths=2)

    def sometimes(module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Toy)
        return {"accuracy": float("nan") if module.config["a"] == 1 else accuracy(module)}

    front = quiet(net, sometimes, ["params"], study=":memory:")
    assert len(net.entered) == 10
    assert {p.config["a"] for p in front.evaluated} == {2}


def test_a_study_for_other_weights_space_or_objectives_is_refused(tmp_path: Path) -> None:
    study = tmp_path / "a.db"
    net = Net()
    quiet(net, accuracy, ["params"], evaluations=2, study=study)
    with pytest.raises(SettingError, match=r"objectives accuracy \(up\), params \(down\), not"):
        quiet(net, accuracy, ["macs"], evaluations=2, study=study)
    with pytest.raises(SettingError, match="objectives"):
        quiet(net, accuracy, ["params"], evaluations=2, study=study, maximize=[])
    with pytest.raises(SettingError, match="another space"):
        quiet(Net(widths=3), accuracy, ["params"], evaluations=2, study=study)
    with torch.no_grad():
        net.module.weight += 1e-6
    with pytest.raises(SettingError, match="other weights"):
        quiet(net, accuracy, ["params"], evaluations=2, study=study)
    front = quiet(net, accuracy, ["params"], evaluations=2, study=study, name="second")
    assert len(front.evaluated) == 2


def test_a_fingerprint_follows_the_weights_of_every_type() -> None:
    layer = nn.Linear(300, 70).bfloat16()
    before = fingerprint(layer)
    assert fingerprint(layer) == before
    with torch.no_grad():
        layer.weight *= 1.1
    assert fingerprint(layer) != before


def test_without_a_study_a_new_file_is_made_in_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first = quiet(Net(), accuracy, ["params"], evaluations=2)
    second = quiet(Net(), accuracy, ["params"], evaluations=2)
    assert Path(first.study).parent == Path("runs")
    assert Path(first.study).is_file()
    assert first.study != second.study


def test_what_is_no_number_of_evaluations_or_no_metric_is_refused() -> None:
    with pytest.raises(SettingError, match="at least 1"):
        quiet(Net(), accuracy, ["params"], evaluations=0)
    with pytest.raises(SettingError, match="must return a number"):
        quiet(Net(), lambda _: "good", ["params"], study=":memory:")
    with pytest.raises(SettingError, match="must return a number"):
        quiet(Net(), lambda _: {"accuracy": torch.zeros(2)}, ["params"], study=":memory:")


def test_a_search_that_can_not_be_rebuilt_is_refused() -> None:
    sampler: Any = optuna.samplers.TPESampler()
    with pytest.raises(SettingError, match=r"got TPESampler; what can't be rebuilt"):
        quiet(Net(), accuracy, ["params"], algorithm=sampler, study=":memory:")


def test_one_number_is_called_after_its_function() -> None:
    def evaluate(_: nn.Module) -> float:
        return 1.0

    named = quiet(Net(), functools.partial(accuracy), [], evaluations=1, study=":memory:")
    plain = quiet(Net(), evaluate, ["params"], evaluations=1, study=":memory:")
    assert [o.name for o in named.objectives] == ["accuracy"]
    assert [o.name for o in plain.objectives] == ["score", "params"]


def test_progress_goes_to_standard_error_with_its_figures(
    capsys: pytest.CaptureFixture[str],
) -> None:
    pareto(Net(), accuracy, ["params"], evaluations=5, study=":memory:", name="toy")
    out, err = capsys.readouterr()
    assert out == ""
    for part in ("toy", "5/5", "hypervolume 0.", "evaluations/min", "left"):
        assert part in err


def test_the_public_name_is_this_function() -> None:
    assert supple.pareto is pareto


# --------------------------------------------------------------------------- several, killed

fork = multiprocessing.get_context("fork")


def start(work: Callable[[], object]) -> Any:
    process = fork.Process(target=work)
    process.start()
    return process


@dataclass
class Slow:
    """Writes each config that it is asked about to a file, and takes its time."""

    log: Path
    seconds: float = 0.02
    hang_at: int = 0

    def __call__(self, module: nn.Module) -> dict[str, float]:
        assert isinstance(module, Toy)
        with self.log.open("a") as file:
            file.write(f"{os.getpid()} {module.config.to_json()}\n")
        if self.hang_at and len(self.lines()) == self.hang_at:
            time.sleep(60)
        time.sleep(self.seconds)
        return {"accuracy": accuracy(module)}

    def lines(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def configs(self) -> list[str]:
        return [line.split(maxsplit=1)[1] for line in self.lines()]


def wait_for(happened: Callable[[], bool]) -> None:
    for _ in range(2000):
        if happened():
            return
        time.sleep(0.01)
    raise AssertionError("it did not happen within 20 s")


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def states(study: Path) -> Counter[str]:
    with contextlib.closing(sqlite3.connect(study)) as connection:
        return Counter(row[0] for row in connection.execute("SELECT state FROM trials"))


@pytest.mark.parametrize("hang_at", [1, 5])
def test_a_search_killed_in_the_middle_of_an_evaluation_goes_on(
    tmp_path: Path, hang_at: int
) -> None:
    study, slow = tmp_path / "a.db", Slow(tmp_path / "log", seconds=0.0, hang_at=hang_at)
    whole = Net()
    quiet(whole, accuracy, ["params"], evaluations=8, study=":memory:")
    search = functools.partial(quiet, Net(), slow, ["params"], evaluations=8, study=study)
    child = start(search)
    wait_for(lambda: len(slow.lines()) == hang_at)
    kill(child)
    front = search()
    assert len(front.evaluated) == 8
    assert slow.configs()[hang_at - 1] == slow.configs()[hang_at]
    expected = [config.to_json() for config in whole.entered]
    assert list(dict.fromkeys(slow.configs())) == expected
    assert len(slow.configs()) == 9
    interrupted = Counter({"FAIL": 1}) if hang_at > 1 else Counter()
    assert states(study) == Counter({"COMPLETE": 8}) + interrupted


def test_two_workers_share_a_study_and_repeat_nothing(tmp_path: Path) -> None:
    study, slow = tmp_path / "a.db", Slow(tmp_path / "log", seconds=0.05)

    def work() -> None:
        front = quiet(Net(), slow, ["params"], evaluations=10, study=study)
        (tmp_path / f"{os.getpid()}.json").write_text(front.to_json())

    workers = [start(work) for _ in range(2)]
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    read = [Front.from_json(path.read_text()) for path in tmp_path.glob("*.json")]
    assert read[0] == read[1]
    assert len(read[0].evaluated) == 10
    assert sorted(Counter(slow.configs()).values()) == [1] * 10
    assert len({line.split()[0] for line in slow.lines()}) == 2


def test_a_worker_takes_over_what_another_one_was_killed_at(tmp_path: Path) -> None:
    study, log = tmp_path / "a.db", tmp_path / "log"
    hangs, works = Slow(log, 0.0, hang_at=4), Slow(log, 0.0)
    search = functools.partial(quiet, Net(), costs=["params"], evaluations=8, study=study)
    child = start(functools.partial(search, hangs))
    wait_for(lambda: len(hangs.lines()) == 4)
    other = start(functools.partial(search, works))
    wait_for(lambda: states(study)["COMPLETE"] == 7)
    assert other.is_alive()
    kill(child)
    other.join(20)
    assert other.exitcode == 0
    assert states(study) == Counter({"COMPLETE": 8, "FAIL": 1})
    assert Counter(Counter(works.configs()).values()) == Counter({1: 7, 2: 1})


def test_a_study_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=r"file/a\.db"):
        quiet(Net(), accuracy, ["params"], study=tmp_path / "file" / "a.db")
