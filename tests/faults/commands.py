"""A small recipe from the command line, in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from supple.cli.main import app
from tests.recipe.small_recipe import SMALL

__all__ = ["refused", "run"]


def run(folder: Path, *overrides: str) -> Result:
    """`supple run` without baselines, whose runs go to a folder."""
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(SMALL)
    words = ["run", str(recipe), *overrides, "compare={alone: false, cut: false}"]
    return CliRunner().invoke(app, [*words, "-o", str(folder), "--quiet"])


def refused(result: Result, *words: str) -> str:
    """Asserts a clean refusal in one line that says these words; returns the line."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert result.stderr.rstrip().endswith(errors[0]), result.stderr
    assert "Traceback" not in result.output
    for word in words:
        assert word in errors[0]
    return errors[0]
