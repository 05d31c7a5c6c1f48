"""2,000 mutations of recipes, studies, checkpoints and saved networks.

Whatever was done to a file: either it is read, or a message says what is wrong with it. There
is no other exception, no endless loop, no file more or less than before, and no code that runs.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import supple
from supple import files
from supple.errors import SuppleError
from supple.models.base import build
from supple.recipe.load import load_recipe
from supple.space import Site, Space
from supple.study.objectives import Objective
from supple.study.store import Evaluation, StudyStore
from supple.training import checkpoint
from tests.faults import mutations
from tests.recipe.small_recipe import SMALL

SECONDS = 20  # in which a file must be read or refused
SEEDS = st.integers(0, 2**32 - 1)
unhurried: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
EVENTS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork")
ran: list[str] = []
watching = False


def _audit(event: str, args: tuple[Any, ...]) -> None:
    if watching and (event in EVENTS or (event == "import" and args[0] == "canary")):
        ran.append(f"{event} {args!r:.200}")


sys.addaudithook(_audit)


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Fails on anything but a clean reading or a `SuppleError` inside."""
    global watching
    before, said = sorted(folder.rglob("*")), "nothing"
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    ran.clear()
    sys.modules["canary"] = _canary()
    watching = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (SuppleError, OSError) as error:
        said = str(error)
    finally:
        watching = False
        signal.alarm(0)
        del sys.modules["canary"]
    assert said, "an error without a message"
    assert not ran, f"code ran: {ran}"
    assert sorted(folder.rglob("*")) == before, "files came or went"


def _canary() -> ModuleType:
    module = ModuleType("canary")

    def touch(*args: Any, **kwargs: Any) -> None:
        ran.append("canary.touch")

    module.touch = module.Thing = touch  # type: ignore[attr-defined]
    return module


def _too_long(*_: object) -> None:
    raise AssertionError(f"no end after {SECONDS} seconds")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network, an elastic network, a checkpoint and a study, as they are written."""
    home = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    model = build("digits-cnn", widths=[8, 12], blocks=[1, 1])
    net = supple.elastic(model, torch.randn(1, 1, 8, 8), verify=False)
    net.save(home / "elastic")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        supple.save(net.extract(net.space.smallest()), home / "network")
    own = {"random": torch.arange(5), "order": [3, (1, 2.5)], "moments": {("a", 0): None}}
    given = {"shared": {"step": 3, "log": [{"loss": 0.5}]}, "own": own}
    checkpoint.save(home / "checkpoints", 3, module=model, settings={"threads": 1}, **given)
    space = Space([Site("a", "width", (2, 4, 8), 8), Site("b", "width", (1, 3), 3)])
    with StudyStore(home / "study" / "study.db", name="s", space=space, weights="w") as store:
        store.create((Objective("accuracy", True), Objective("params", False)))
        for config in (space.config(a=2), space.config(a=4), space.config(b=1)):
            trial = store.claim(config, 100)
            assert isinstance(trial, int)
            store.finish(trial, Evaluation(config, {"accuracy": 0.5}, {"params": 7.0}))
    return home


def read_recipe(folder: Path) -> None:
    load_recipe(folder / "recipe.yaml")


def mutate_recipe(folder: Path, random: Random) -> None:
    text = SMALL
    for _ in range(random.choice([1, 1, 2, 4])):
        text = mutations.lines(text, random)
    content = text.encode("utf-8", "surrogatepass")
    if random.random() < 0.1:
        content = mutations.scrambled(content, random)
    (folder / "recipe.yaml").write_bytes(content)


def read_study(folder: Path) -> None:
    space = Space([Site("a", "width", (2, 4, 8), 8), Site("b", "width", (1, 3), 3)])
    objectives = (Objective("accuracy", True), Objective("params", False))
    with StudyStore(folder / "study.db", name="s", space=space, weights="w") as store:
        if store.exists:
            store.check(objectives)
            store.results()
            store.fail_interrupted()


def mutate_study(folder: Path, random: Random) -> None:
    path = folder / "study.db"
    if random.random() < 0.3:
        path.write_bytes(mutations.scrambled(path.read_bytes(), random))
    else:
        mutations.edit_database(path, random)


def read_checkpoint(folder: Path) -> None:
    path = checkpoint.latest(folder)
    assert path is not None
    model = build("digits-cnn", widths=[8, 12], blocks=[1, 1])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        checkpoint.load(path, module=model, settings={"threads": 1})
    except SuppleError:
        after = model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
        raise


def read_network(folder: Path) -> None:
    supple.load(folder)


Kind = tuple[str, Callable[[Path, Random], None], Callable[[Path], None]]
KINDS: dict[str, Kind] = {
    "recipe": ("", mutate_recipe, read_recipe),
    "study": ("study", mutate_study, read_study),
    "checkpoint": ("checkpoints", mutations.mutate_folder, read_checkpoint),
    "network": ("network", mutations.mutate_folder, read_network),
    "elastic network": ("elastic", mutations.mutate_folder, read_network),
}


def check(kind: str, seed: int, home: Path, scratch: Path) -> None:
    whole, mutate, read = KINDS[kind]
    folder = scratch / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    if whole:
        shutil.copytree(home / whole, folder)
    else:
        folder.mkdir(parents=True)
    mutate(folder, Random(seed))
    with watched(folder):
        read(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(kind: str, home: Path, tmp_path: Path) -> None:
    """The checks below would hold for a reader that refuses everything."""
    whole, _, read = KINDS[kind]
    (tmp_path / "recipe.yaml").write_text(SMALL)
    read(home / whole if whole else tmp_path)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
@settings(max_examples=20, derandomize=True, **unhurried)
def test_a_mutation_is_read_or_refused(
    kind: str, home: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    check(kind, seed, home, tmp_path_factory.getbasetemp() / "scratch")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@given(seed=SEEDS)
@settings(max_examples=400, **unhurried)
def test_2000_mutations_are_read_or_refused(
    kind: str, home: Path, tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    check(kind, seed, home, tmp_path_factory.getbasetemp() / "scratch")


def test_aliases_that_multiply_are_refused(tmp_path: Path) -> None:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    (tmp_path / "recipe.yaml").write_text("\n".join(rows))
    with watched(tmp_path), pytest.raises(SuppleError, match="at most 100,000 values"):
        read_recipe(tmp_path)


def test_code_that_runs_is_noticed(tmp_path: Path) -> None:
    """The watch itself works: a careless reader of YAML would be caught."""
    import yaml

    with pytest.raises(AssertionError, match="code ran"), watched(tmp_path):
        yaml.unsafe_load(mutations.YAML[0])


def test_a_file_that_stays_behind_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="came or went"), watched(tmp_path):
        files.write_text(tmp_path / "left", "x")
