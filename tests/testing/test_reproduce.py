from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from supple.errors import CheckpointError, SettingError, UnknownTechniqueError
from supple.testing.reproduce import (
    Claim,
    across,
    listing,
    reproductions,
    result,
    run_reproduction,
    stale,
    stale_keys,
    status,
    verdict,
)

KEY = "supernet/bignas"
SECONDS = 180
GOOD = """
    from supple.supernet.bignas import BigNAS
    from supple.supernet.sortednet import SortedNet
    from supple.testing.reproduce import Claim

    ON = BigNAS()
    OFF = SortedNet()
    SEEDS = (3, 4, 5)
    DATA = ("figures.txt",)

    def claims(method, seeds):
        gain = 0.1 if method == ON else 0.0
        ours = [0.8 + gain + seed / 1000 for seed in seeds]
        baseline = [0.8 - seed / 1000 for seed in seeds]
        yield Claim("small sizes gain", ours, baseline, 0.05, unit="accuracy")
        yield Claim("nothing is lost", ours, baseline, -0.01)
"""
Make = Callable[[str], Path]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes a reproduction of bignas and gives the folder of reproductions."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "figures.txt").write_text("1 2 3", encoding="utf-8")
    monkeypatch.setenv("SUPPLE_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    # Modules are found by name: no two tests may share one.
    folder = tmp_path / f"reproductions_{abs(hash(tmp_path))}"

    def write(source: str) -> Path:
        (folder / "supernet").mkdir(parents=True, exist_ok=True)
        (folder / "supernet" / "bignas.py").write_text(textwrap.dedent(source), "utf-8")
        return folder

    return write


# ---------------------------------------------------------------------------------- claims


@pytest.mark.parametrize(
    ("ours", "baseline", "threshold", "holds"),
    [
        # Effects 3, 4, 5: mean 4, sample deviation 1.
        ((3, 4, 5), (0, 0, 0), 2.9, True),
        ((3, 4, 5), (0, 0, 0), 3.1, None),
        ((3, 4, 5), (0, 0, 0), 4.9, None),
        ((3, 4, 5), (0, 0, 0), 5.1, False),
        # The same baseline for every seed doesn't matter: effects are paired.
        ((13, 24, 35), (10, 20, 30), 2.9, True),
        # No effect at all is no support for "better", and is support for "not worse by 1".
        ((1, 1, 1), (1, 1, 1), 0.0, None),
        ((1, 1, 1), (1, 1, 1), -1.0, True),
    ],
)
def test_a_claim_holds_if_its_effect_exceeds_the_threshold_by_more_than_its_spread(
    ours: tuple[float, ...], baseline: tuple[float, ...], threshold: float, holds: bool | None
) -> None:
    assert Claim("c", ours, baseline, threshold).holds is holds


def test_lower_is_better_turns_the_effect() -> None:
    claim = Claim("faster", (1.0, 1.1, 1.2), (2.0, 2.1, 2.2), better="lower", unit="s")
    assert claim.effects == pytest.approx((1.0, 1.0, 1.0))
    assert claim.holds


def test_an_exact_claim_needs_one_figure_and_is_never_undecided() -> None:
    assert Claim("c", (2,), (1,), exact=True).holds is True
    assert Claim("c", (1,), (1,), exact=True).holds is False


@pytest.mark.parametrize(
    ("ours", "baseline", "message"),
    [
        ((1, 2, 3), (1, 2), "got 3 and 2"),
        ((1, 2), (1, 2), "fewer than 3"),
        ((), (), "fewer than 3"),
    ],
)
def test_a_claim_without_enough_paired_seeds_is_refused(
    ours: tuple[float, ...], baseline: tuple[float, ...], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        Claim("c", ours, baseline)


def test_verdicts_are_worded() -> None:
    assert [verdict(holds) for holds in (True, False, None)] == ["yes", "no", "undecided"]


# ------------------------------------------------------------------------------------- runs


def test_a_run_writes_figures_seeds_hashes_machine_and_seconds(make: Make) -> None:
    folder = make(GOOD)
    told: list[str] = []
    outcome = run_reproduction(KEY, folder=folder, tell=told.append)
    assert outcome["holds"] is True
    assert outcome["switched_off_holds"] is False
    assert outcome["seeds"] == [3, 4, 5]
    first = outcome["claims"][0]
    assert first["name"] == "small sizes gain"
    assert first["ours"] == pytest.approx([0.903, 0.904, 0.905])
    assert first["holds"] is True
    assert first["switched_off"]["holds"] is False
    assert outcome["machine"]["torch"] == torch.__version__
    assert outcome["seconds"] >= 0
    assert set(outcome["hashes"]) == {"technique", "reproduction", "data"}
    assert all(len(digest) == 64 for digest in outcome["hashes"]["data"].values())
    assert len(told) == 5
    assert told[0].startswith("small sizes gain: yes (effect +0.108")
    path = folder / "results" / "supernet" / "bignas.json"
    assert json.loads(path.read_text("utf-8"))["holds"] is True
    assert result(KEY, folder=folder) == outcome
    assert status(KEY, folder=folder) == "reproduced"
    assert reproductions(folder) == [KEY]


def test_what_holds_with_the_idea_switched_off_is_undecided(make: Make) -> None:
    folder = make(GOOD.replace("0.1 if method == ON else 0.0", "0.1"))
    outcome = run_reproduction(KEY, folder=folder)
    assert outcome["holds"] is None
    assert outcome["switched_off_holds"] is True
    assert status(KEY, folder=folder) == "undecided"


def test_one_claim_that_fails_is_enough_for_no(make: Make) -> None:
    folder = make(GOOD.replace("0.05, unit", "0.5, unit"))
    assert run_reproduction(KEY, folder=folder)["holds"] is False
    assert status(KEY, folder=folder) == "not reproduced"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("OFF = SortedNet()", "", "must define OFF"),
        ("ON = BigNAS()", "ON = SortedNet()", r"must be BigNAS\(...\)"),
        ('"nothing is lost"', '"small sizes gain"', "claims twice"),
        ("yield Claim", "(lambda *a, **k: [])() or Claim", "yields no claim"),
        ('"nothing is lost"', "repr(method)", "other claims when switched off"),
        ("figures.txt", "faces.txt", "needs the files faces.txt; set SUPPLE_DATA"),
    ],
)
def test_a_reproduction_that_does_not_keep_to_the_form_says_how(
    make: Make, old: str, new: str, message: str
) -> None:
    source = GOOD.replace(old, new)
    if "no claim" in message:
        source = GOOD.replace("yield Claim", "Claim") + "        return iter(())\n"
    folder = make(source)
    with pytest.raises(SettingError, match=message):
        run_reproduction(KEY, folder=folder)
    assert result(KEY, folder=folder) is None


def test_unknown_keys_are_told_apart_from_missing_reproductions(make: Make) -> None:
    folder = make(GOOD)
    with pytest.raises(UnknownTechniqueError, match="did you mean 'supernet/bignas'"):
        run_reproduction("supernet/bignaz", folder=folder)
    with pytest.raises(SettingError, match="supernet/sortednet has no reproduction"):
        run_reproduction("supernet/sortednet", folder=folder)


def test_a_damaged_result_is_named(make: Make) -> None:
    folder = make(GOOD)
    run_reproduction(KEY, folder=folder)
    path = folder / "results" / "supernet" / "bignas.json"
    path.write_text(path.read_text("utf-8").replace("true", "false", 1), "utf-8")
    with pytest.raises(CheckpointError, match=r"bignas\.json"):
        result(KEY, folder=folder)


# -------------------------------------------------------------------------------- staleness


def test_a_result_is_stale_once_what_it_depends_on_does_something_else(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(GOOD)
    assert stale(KEY, folder=folder) == []
    run_reproduction(KEY, folder=folder)
    assert stale(KEY, folder=folder) == []
    make('"""A docstring."""' + textwrap.dedent(GOOD) + "\n# a comment\n")
    assert stale(KEY, folder=folder) == []
    make(GOOD.replace("0.05", "0.04"))
    assert stale(KEY, folder=folder) == ["reproduction"]
    assert stale_keys(folder=folder) == [KEY]
    assert status(KEY, folder=folder) == "stale"
    make(GOOD)
    assert stale_keys(folder=folder) == []
    figures = Path(os.environ["SUPPLE_DATA"]) / "figures.txt"
    figures.write_text("1 2 4!", encoding="utf-8")
    assert stale(KEY, folder=folder) == ["figures.txt"]
    monkeypatch.delenv("SUPPLE_DATA")
    assert stale(KEY, folder=folder) == []


def test_private_files_that_a_reproduction_imports_count_too(make: Make) -> None:
    folder = make(GOOD)
    source = GOOD + f"    from {folder.name}.supernet._shared import GAIN\n"
    make(source)
    shared = folder / "supernet" / "_shared.py"
    shared.write_text("GAIN = 1\n", "utf-8")
    (folder / "supernet" / "_other.py").write_text("", "utf-8")
    run_reproduction(KEY, folder=folder)
    (folder / "supernet" / "_other.py").write_text("x = 1\n", "utf-8")
    assert stale(KEY, folder=folder) == []
    shared.write_text("GAIN = 2\n", "utf-8")
    assert stale(KEY, folder=folder) == ["reproduction"]
    assert reproductions(folder) == [KEY]


@pytest.mark.parametrize("name", ["bignas", "base"])
def test_a_result_is_stale_once_the_technique_or_its_room_s_base_changes(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    folder = make(GOOD)
    run_reproduction(KEY, folder=folder)
    module = sys.modules[f"supple.supernet.{name}"]
    text = Path(str(module.__file__)).read_text("utf-8")
    changed = tmp_path / f"{name}.py"
    monkeypatch.setattr(module, "__file__", str(changed))
    changed.write_text(text + "\n# a comment\n", "utf-8")
    assert stale(KEY, folder=folder) == []
    changed.write_text(text + "\nmore = 1\n", "utf-8")
    assert stale(KEY, folder=folder) == ["technique"]


# ---------------------------------------------------------------------------------- listing


def test_the_listing_has_every_technique_and_its_last_result(make: Make) -> None:
    folder = make(GOOD)
    before = {row["key"]: row for row in listing(folder=folder)}
    assert before[KEY]["reproduction"] is None
    assert before[KEY]["status"] == "not tried"
    run_reproduction(KEY, folder=folder)
    rows = listing("supernet", folder=folder)
    row = next(row for row in rows if row["key"] == KEY)
    assert (row["room"], row["kind"], row["title"]) == ("supernet", "rule", "BigNAS")
    assert row["status"] == "reproduced"
    assert set(row["reproduction"]) == {"holds", "claims", "seconds"}
    assert row["reproduction"]["holds"] is True
    assert json.loads(json.dumps(rows)) == rows
    assert {row["room"] for row in rows} == {"supernet"}


def test_the_results_that_are_committed_can_be_read_and_took_three_minutes_at_most() -> None:
    for key in reproductions():
        last = result(key)
        if last is not None:
            assert last["key"] == key
            assert last["seconds"] <= SECONDS, f"{key} took {last['seconds']:.0f} s"


# ----------------------------------------------------------------------------------- across


def square_on_one_thread(number: int) -> tuple[int, int, int]:
    return number**2, torch.get_num_threads(), os.getpid()


def test_cases_run_in_their_order_each_on_one_thread() -> None:
    results = across(square_on_one_thread, [3, 1, 2], workers=2)
    assert [square for square, _, _ in results] == [9, 1, 4]
    assert {threads for _, threads, _ in results} == {1}
    assert os.getpid() not in {pid for _, _, pid in results}


def test_a_single_case_needs_no_process() -> None:
    assert across(square_on_one_thread, [3])[0][2] == os.getpid()
