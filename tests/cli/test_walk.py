"""The walk through `supple inspect` in the docs gives what the docs say."""

import re
import sys
from pathlib import Path

from typer.testing import CliRunner

from supple.cli.main import app

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "your-model.md"


def walk() -> tuple[str, list[str]]:
    """The module of the walk, and what its commands print."""
    text = PAGE.read_text().partition("## A walk through")[2]
    code = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    return code, re.findall(r"```console\n\$ supple [^\n]*\n(.*?)```", text, re.S)


def inspect(*words: str) -> str:
    result = CliRunner().invoke(app, ["inspect", "my_module:build", *words])
    return result.output


def test_the_walk_prints_what_the_page_says(tmp_path: Path, monkeypatch) -> None:
    code, (refused, fixed, freed) = walk()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = tmp_path / "my_module.py"
    module.write_text(code)
    words = ("--input", "2x16:int", "--no-verify")
    assert inspect() == refused
    assert plain(inspect(*words))[: len(plain(fixed))] == plain(fixed)
    module.write_text(
        code.replace("(batch, length, 12, 64)", "(batch, length, self.heads, -1)")
        .replace("reshape(batch, length, 768)", "flatten(2)")
        .replace("self.out = ", "self.heads = width // 64\n        self.out = ")
    )
    monkeypatch.delitem(sys.modules, "my_module")
    assert plain(inspect(*words))[: len(plain(freed))] == plain(freed)


def plain(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.strip().splitlines()]
