"""Who evaluates: what `workers=` may say, and what becomes of a worker that dies."""

from __future__ import annotations

import functools
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import optuna
import pytest

from supple.errors import MissingExtraError, SettingError, WorkerError
from supple.space import Config
from supple.study import crew
from supple.study import pareto as module
from supple.study.crew import Alone, Answer, Evaluate, Place, crew_of, place_of
from supple.study.growing import Race
from supple.study.pareto import pareto
from tests.study.stub import Net, accuracy

quiet = functools.partial(pareto, progress=False)


# ---------------------------------------------------------------------------- what is said


def test_nobody_else_is_the_default() -> None:
    assert place_of(None) is None
    assert isinstance(crew_of(None, lambda config: None), Alone)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(("text", "number"), [("ray", None), ("ray:1", 1), (" ray:12 ", 12)])
def test_workers_on_this_machine(text: str, number: int | None) -> None:
    pytest.importorskip("ray")
    assert place_of(text) == Place(number=number)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("rya", "did you mean 'ray'"),
        ("ray:0", "must be 1 to 1024 in number"),
        ("2", "'ray:2' are as many workers of one search"),
        ("cluster", "an address needs a port, such as cluster:6379"),
        ("ray://cluster", "an address needs a port, such as ray://cluster:10001"),
        ("http://cluster:80", "workers must be 'ray'"),
        ("", "workers must be 'ray'"),
    ],
)
def test_anything_else_is_refused_with_what_would_do(text: str, says: str) -> None:
    with pytest.raises(SettingError) as caught:
        place_of(text)
    assert says in str(caught.value)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'supple\[ray\]'"):
        quiet(Net(), accuracy, ["params"], workers="ray", study=":memory:")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_answers_is_told_before_anything_is_done(
    scheme: str, tmp_path: Path
) -> None:
    pytest.importorskip("ray")
    with socket.socket() as held:  # bound, and so nobody else's, but deaf
        held.bind(("127.0.0.1", 0))
        address = f"{scheme}127.0.0.1:{held.getsockname()[1]}"
        with pytest.raises(WorkerError, match="no Ray cluster answers") as caught:
            quiet(Net(), accuracy, ["params"], workers=address, study=tmp_path / "a.db")
    assert address in str(caught.value)
    assert "ray start --head" in str(caught.value)
    assert not (tmp_path / "a.db").exists()


def test_an_address_where_something_else_answers_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("ray")
    monkeypatch.setattr(crew, "CONNECT_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(WorkerError, match=r"answers at .* \(something else does\)"):
            place_of(address)


# ------------------------------------------------------------------------ workers that die


class Mortal:
    """Two workers side by side, of which one dies at chosen configs, so often."""

    def __init__(self, evaluate: Evaluate, deaths: Counter[Config]) -> None:
        self.evaluate, self.deaths = evaluate, deaths
        self.given: list[tuple[int, Config]] = []
        self.most = 0
        self.closed = False

    @property
    def free(self) -> bool:
        return len(self.given) < 2

    @property
    def busy(self) -> bool:
        return bool(self.given)

    def give(self, claimed: Sequence[tuple[int, Config]], race: Race | None) -> None:
        self.given += claimed
        self.most = max(self.most, len(self.given))

    def answers(self) -> list[Answer]:
        trial, config = self.given.pop()
        if self.deaths[config] > 0:
            self.deaths[config] -= 1
            return [Answer(trial, config, lost="it was killed")]
        return [Answer(trial, config, self.evaluate(config))]

    def close(self) -> None:
        self.closed = True


def mortal(monkeypatch: pytest.MonkeyPatch, deaths: Counter[Config]) -> list[Mortal]:
    """Has `supple.pareto` employ mortal workers."""
    made: list[Mortal] = []

    def mortals(_: object, evaluate: Evaluate) -> Mortal:
        made.append(Mortal(evaluate, deaths))
        return made[-1]

    monkeypatch.setattr(module, "crew_of", mortals)
    return made


def states(study: Path) -> Counter[tuple[str, str]]:
    trials = optuna.load_study(study_name="pareto", storage=f"sqlite:///{study}").get_trials()
    return Counter((t.state.name, t.user_attrs.get("reason", "")) for t in trials)


def test_what_a_dead_worker_was_at_is_evaluated_again_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = Net()
    dies = Counter({net.space.smallest(): 2})
    made = mortal(monkeypatch, dies)
    front = quiet(net, accuracy, ["params"], evaluations=9, study=tmp_path / "a.db")
    assert len(front.evaluated) == 9
    assert set(Counter(net.entered).values()) == {1}
    assert states(tmp_path / "a.db") == {
        ("COMPLETE", ""): 9,
        ("FAIL", "interrupted: it was killed"): 2,
    }
    assert (made[0].most, made[0].closed) == (2, True)


def test_a_config_that_kills_every_worker_ends_the_search_with_what_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net = Net()
    made = mortal(monkeypatch, Counter({net.space.smallest(): 99}))
    with pytest.raises(WorkerError, match=r"died 3 times .*'a': 1.* \(it was killed\)"):
        quiet(net, accuracy, ["params"], evaluations=9, study=tmp_path / "a.db")
    assert made[0].closed
    # The other worker's evaluation is given back, so that the same command goes on with it.
    left = states(tmp_path / "a.db")
    assert not any(state == "RUNNING" for state, _ in left)
    monkeypatch.undo()
    again = quiet(net, accuracy, ["params"], evaluations=9, study=tmp_path / "a.db")
    assert len(again.evaluated) == 9


def test_a_finished_study_needs_no_workers(tmp_path: Path) -> None:
    search = functools.partial(quiet, Net(), accuracy, ["params"], study=tmp_path / "a.db")
    first = search(evaluations=3)
    pytest.importorskip("ray")
    assert search(evaluations=3, workers="ray:2") == first
    import ray

    assert not ray.is_initialized()
