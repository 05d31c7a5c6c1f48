"""`supple.X` is the right thing, whatever was imported before it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import supple
from tests.guards import ROOT

HOMES = dict(supple._HOME, technique="supple.technique", techniques="supple.technique")
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "supple").rglob("*.py")
    if path.stem != "__main__"
)

CHECK = """
import importlib, json, sys
modules, homes = json.loads(sys.argv[1]), json.loads(sys.argv[2])
import supple
def check():
    for name, home in homes.items():
        value = getattr(supple, name)
        assert value is getattr(sys.modules[home], name), f"supple.{name} is {value}"
        assert callable(value), f"supple.{name} is {value}"
if not modules:
    for name in reversed(homes):
        getattr(supple, name)
    check()
for module in modules:
    importlib.import_module(module)
for name in homes:
    getattr(supple, name)
check()
"""


def _run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(json.dumps, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([], id="names first"),
        pytest.param(MODULES, id="all modules first"),
        pytest.param(MODULES[::-1], id="all modules first, backwards"),
    ],
)
def test_public_names_are_right_after_every_import_order(order: list[str]) -> None:
    done = _run(CHECK, order, HOMES)
    assert done.returncode == 0, done.stderr


def test_no_public_name_is_also_the_name_of_a_module() -> None:
    # Importing `supple.x` binds `x` in the package, so a function of that name would be lost.
    # `technique` is safe because `supple/__init__.py` itself imports that module, once, first.
    folder = Path(supple.__file__).parent
    modules = {path.stem for path in folder.iterdir() if path.suffix in ("", ".py")}
    assert modules & set(supple.__all__) == {"technique"}


def test_every_public_name_is_listed_and_found() -> None:
    assert sorted(supple.__all__) == sorted([*HOMES, "__version__"])
    assert set(supple.__all__) <= set(dir(supple))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'elastik'"):
        _ = supple.elastik


def test_importing_supple_loads_no_heavy_package() -> None:
    code = "import sys, supple; supple.techniques(); print(sorted(sys.modules))"
    done = _run(code)
    assert done.returncode == 0, done.stderr
    heavy = {"torch", "numpy", "transformers", "optuna", "pymoo", "rich", "typer", "pydantic"}
    assert not heavy & set(eval(done.stdout))
