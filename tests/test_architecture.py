"""The picture in docs/architecture.md, the import contracts and the code agree."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

import supple
from supple.technique import ROOMS
from tests.guards import ROOT, parsed

# `net.costs` prices configurations with closed forms that know networks; `net.save` and
# `net.verify` likewise import what is built on networks inside the method.
UPWARDS = {("network", "cost")}


def picture(text: str) -> list[list[str]]:
    """Reads the layers off the picture, highest first; each is a list of modules."""
    (block,) = re.findall(r"```text\n(┌.*?)```", text, re.DOTALL)
    lines = re.findall(r"^│ (.*?) *│$", block, re.MULTILINE)
    return [re.split(r" [|·] ", line) for line in lines]


def contract() -> list[list[str]]:
    """Reads the layers of the import contract, highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (layers,) = [
        one["layers"]
        for one in settings["tool"]["importlinter"]["contracts"]
        if one["type"] == "layers"
    ]
    return [re.findall(r"\w+", layer) for layer in layers]


def imported(path: Path) -> set[str]:
    """Gives the modules or rooms of Supple that a file imports when it runs."""
    tree = parsed(path, path.stat().st_mtime_ns)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    homes = {f"supple.{name}": home for name, home in supple._HOME.items()}
    return {
        homes.get(name, name).split(".")[1]
        for name in names
        if name.startswith("supple.") and name != "supple.__version__"
    }


def edges() -> set[tuple[str, str]]:
    """Gives who imports whom, as pairs of modules or rooms directly below the package."""
    found = set()
    for path in (ROOT / "supple").rglob("*.py"):
        source = path.relative_to(ROOT / "supple").parts[0].removesuffix(".py")
        if source != "__init__":
            found |= {(source, target) for target in imported(path) if target != source}
    return found


@pytest.fixture(scope="module")
def layers() -> list[list[str]]:
    return picture((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8"))


def test_the_picture_shows_the_layers_of_the_import_contract(layers: list[list[str]]) -> None:
    assert [sorted(layer) for layer in layers] == [sorted(layer) for layer in contract()]


def test_the_picture_shows_every_room_once(layers: list[list[str]]) -> None:
    shown = [name for layer in layers for name in layer]
    assert len(shown) == len(set(shown))
    there = {
        path.stem
        for path in (ROOT / "supple").iterdir()
        if (path.suffix == ".py" and path.stem != "__init__") or (path / "__init__.py").exists()
    }
    assert there <= set(shown)


def test_the_code_imports_only_downwards_in_the_picture(layers: list[list[str]]) -> None:
    height = {name: -row for row, layer in enumerate(layers) for name in layer}
    found = edges()
    assert ("training", "space") in found  # the test sees imports at all
    upwards = {(a, b) for a, b in found if height[a] < height[b]}
    assert upwards <= UPWARDS


def test_rooms_of_techniques_never_import_one_another() -> None:
    assert not {(a, b) for a, b in edges() if a in ROOMS and b in ROOMS}


def test_the_picture_has_one_row_for_all_rooms_of_techniques(layers: list[list[str]]) -> None:
    assert sorted(ROOMS) in [sorted(layer) for layer in layers]


def test_an_upward_import_would_be_seen(tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from supple.cli.main import main\n"
        "def f():\n    from supple.deploy import export\n"
        "import supple.space\n",
        encoding="utf-8",
    )
    assert imported(file) == {"deploy", "space"}
