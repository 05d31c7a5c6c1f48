from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from supple.errors import SettingError
from supple.technique import Study
from supple.testing.mutant import defaulted, own_methods, survives


@dataclass(frozen=True, kw_only=True)
class Base(Study):
    def run(self) -> int:
        """Gives what `score` gives."""
        return self.score()

    def score(self) -> int:
        """Gives the default."""
        return 0


@dataclass(frozen=True, kw_only=True)
class Idea(Base):
    distinguishing: ClassVar[str] = "score"
    steps: int = 1

    def score(self) -> int:
        return 7

    @classmethod
    def examples(cls) -> list[Idea]:
        return [cls()]


def test_the_default_stands_in_the_method_s_place_inside_the_block_only() -> None:
    assert Idea().run() == 7
    with defaulted(Idea):
        assert Idea().run() == 0
    assert Idea().run() == 7
    with pytest.raises(ZeroDivisionError), defaulted(Idea):
        1 / Idea().run()
    assert Idea().run() == 7


def test_own_methods_leave_out_settings_and_what_serves_checks() -> None:
    assert own_methods(Idea) == ["score"]
    assert own_methods(Base) == ["run", "score"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "must name a method of its own, got ''"),
        ("run", "must name a method of its own, got 'run'"),
        ("examples_of_its_own", "overrides a base's"),
    ],
)
def test_what_distinguishes_must_override_a_base(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Idea, "distinguishing", name)
    monkeypatch.setattr(Idea, "examples_of_its_own", lambda self: [], raising=False)
    with pytest.raises(SettingError, match=message), defaulted(Idea):
        pytest.fail("the block must not run")


def _test_file(tmp_path: Path, body: str) -> Path:
    # Each needs a name of its own: pytest imports a module of one name once.
    path = tmp_path / f"test_{tmp_path.name}.py"
    path.write_text(
        f"import sys\nIdea = sys.modules['{__name__}'].Idea\ndef test_idea():\n    {body}\n",
        encoding="utf-8",
    )
    return path


def test_a_test_of_the_idea_fails_without_it(tmp_path: Path) -> None:
    assert not survives(Idea, _test_file(tmp_path, "assert Idea().run() == 7"))
    assert Idea().run() == 7


def test_a_test_of_nothing_survives(tmp_path: Path) -> None:
    assert survives(Idea, _test_file(tmp_path, "assert isinstance(Idea().run(), int)"))


def test_a_file_without_tests_is_no_proof(tmp_path: Path) -> None:
    path = tmp_path / "test_nothing.py"
    path.write_text("", encoding="utf-8")
    with pytest.raises(SettingError, match="could not be run"):
        survives(Idea, path)
