"""What a search takes over from an earlier one, and what it must not."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import torch
from torch import nn

from supple.errors import CheckpointError, SettingError
from supple.search.random_search import RandomSearch
from supple.space import Config
from supple.study import pareto as module
from supple.study.front import Front
from supple.study.pareto import pareto
from tests.study.stub import Net, accuracy

quiet = functools.partial(pareto, progress=False)


@pytest.fixture(autouse=True)
def fast_polls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POLL_SECONDS", 0.01)


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of twelve evaluations, by parameters."""
    path = tmp_path_factory.mktemp("earlier") / "a.db"
    quiet(Net(), accuracy, ["params"], evaluations=12, study=path)
    return path


def front_of(path: Path) -> Front:
    return quiet(Net(), accuracy, ["params"], evaluations=1, study=path)


def seconds(configs: list[Config]) -> Any:
    """Another device's cost, on which depth costs most."""
    return np.array([1e-3 * (1 + 9 * config["depth"]) for config in configs])


@pytest.mark.parametrize("kind", ["path", "text", "front"])
def test_with_costs_for_free_all_is_known_at_once_and_counts_for_nothing(
    earlier: Path, kind: str
) -> None:
    before = front_of(earlier)
    given: Any = {"path": earlier, "text": str(earlier), "front": before}[kind]
    net = Net()
    front = quiet(net, accuracy, ["macs"], evaluations=5, study=":memory:", warm_start=given)
    known = {p.config for p in before.evaluated}
    # The largest is evaluated anew, to see that it means the same; four others are new.
    assert len(net.entered) == 5
    assert net.entered[0] == net.space.largest()
    assert set(net.entered[1:]).isdisjoint(known)
    assert known <= {p.config for p in front.evaluated}
    assert len(front.evaluated) == 12 + 4
    for point in before.evaluated:
        values = front.values(point.config)
        assert values["accuracy"] == point.values["accuracy"]
        assert values["macs"] == sum(point.config.values()) ** 2  # not taken over


def test_where_costs_are_measured_the_front_comes_first_and_others_when_they_are_asked_for(
    earlier: Path,
) -> None:
    before = front_of(earlier)
    net, measured = Net(), []

    def watched(configs: list[Config]) -> Any:
        measured.extend(configs)
        return seconds(configs)

    front = quiet(
        net,
        accuracy,
        {"latency": watched},
        evaluations=6,
        study=":memory:",
        warm_start=earlier,
        algorithm=RandomSearch(),
    )
    ends = [net.space.largest(), net.space.smallest()]
    points = [p.config for p in before.points if p.config not in ends]
    assert measured[: 2 + len(points)] == ends + points
    assert {p.config for p in front.evaluated} >= set(points)
    known = {p.config for p in before.evaluated}
    assert net.entered[0] == net.space.largest()
    assert len(net.entered) == 6
    assert not set(net.entered[1:]) & known
    asked = set(measured[2 + len(points) :]) & known
    assert len(front.evaluated) == 6 + 1 + len(points) + len(asked)  # and the smallest
    for point in front.evaluated:
        assert point.values["latency"] == seconds([point.config])[0]


def test_what_was_taken_over_is_marked_and_found_again(earlier: Path, tmp_path: Path) -> None:
    study, net = tmp_path / "b.db", Net()
    search = functools.partial(quiet, net, accuracy, ["macs"], study=study, warm_start=earlier)
    first = search(evaluations=3)
    entered = len(net.entered)
    assert search(evaluations=3) == first
    assert len(net.entered) == entered
    trials = optuna.load_study(study_name="pareto", storage=f"sqlite:///{study}").get_trials()
    marked = [t for t in trials if t.user_attrs.get("source") == str(earlier)]
    assert len(marked) == 11
    assert len(trials) == 3 + 11
    assert len(search(evaluations=6).evaluated) == 6 + 11
    assert len(net.entered) == 6


def test_the_study_of_other_weights_gives_its_front_and_no_values(earlier: Path) -> None:
    before, net = front_of(earlier), Net()
    with torch.no_grad():
        net.module.weight += 1
    front = quiet(
        net, accuracy, ["params"], evaluations=9, study=":memory:", warm_start=earlier
    )
    points = [p.config for p in before.points if p.config not in net.entered[:2]]
    assert net.entered[:2] == [net.space.largest(), net.space.smallest()]
    assert net.entered[2 : 2 + len(points)] == points[:7]
    assert len(front.evaluated) == len(net.entered) == 9


def test_metrics_of_a_device_are_not_taken_over(tmp_path: Path) -> None:
    def timed(model: nn.Module) -> dict[str, float]:
        return {"accuracy": accuracy(model), "latency": 1.0}

    path, net = tmp_path / "a.db", Net()
    quiet(Net(), timed, ["params"], evaluations=6, study=path)
    front = quiet(net, timed, ["params"], evaluations=6, study=":memory:", warm_start=path)
    assert len(front.evaluated) == len(net.entered) == 6


# --------------------------------------------------------------------------- what is refused


def refused(warm_start: Any, says: str, net: Net | None = None, **more: Any) -> None:
    settings = {"evaluate": accuracy, "costs": ["params"], "study": ":memory:"} | more
    with pytest.raises(SettingError, match=says) as caught:
        quiet(net or Net(), warm_start=warm_start, **settings)
    assert str(caught.value).startswith("warm_start")
    assert str(caught.value).count("warm_start:") <= 1


def test_another_space_is_refused(earlier: Path) -> None:
    refused(earlier, "was made for another space", Net(widths=3))


def test_what_is_no_study_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "none.db", "there is no study .*none.db")
    assert not (tmp_path / "none.db").exists()
    refused(tmp_path / "none.txt", "ends in .db")
    refused(":memory:", "in memory only")
    (tmp_path / "text.db").write_text("this is no database at all, but a text")
    with pytest.raises(CheckpointError, match=r"text\.db"):
        quiet(Net(), accuracy, ["params"], study=":memory:", warm_start=tmp_path / "text.db")


def test_of_several_studies_one_must_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.db"
    for name in ("first", "second"):
        quiet(Net(), accuracy, ["params"], evaluations=2, study=path, name=name)
    refused(path, "'first', 'second' and none is called 'pareto'")
    net = Net()
    quiet(
        net,
        accuracy,
        ["params"],
        evaluations=1,
        study=":memory:",
        warm_start=path,
        name="first",
    )
    assert len(net.entered) == 1


def test_an_evaluation_that_means_something_else_is_refused(earlier: Path) -> None:
    refused(
        earlier,
        "has the metrics accuracy, this evaluation gives top1",
        evaluate=lambda model: {"top1": accuracy(model)},
    )
    refused(
        earlier,
        "the largest size has accuracy .* here and .* evaluated otherwise",
        evaluate=lambda model: {"accuracy": accuracy(model) / 2},
    )
