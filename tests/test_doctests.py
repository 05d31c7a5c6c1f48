"""The examples in docstrings of the package run and give what they show."""

from __future__ import annotations

import doctest
import importlib

import pytest

from supple.technique import ROOMS
from tests.guards import ROOT

# Techniques' own examples are run by conformance, within its budget of time.
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "supple").rglob("*.py")
    if ">>> " in path.read_text("utf-8")
    and (path.parent.name not in ROOMS or path.stem.startswith(("_", "base")))
)


def test_modules_with_examples_are_found() -> None:
    assert {"supple.errors", "supple.testing.reproduce"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_show(name: str) -> None:
    told: list[str] = []
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    tests = [one for one in doctest.DocTestFinder().find(module) if one.examples]
    for one in tests:
        runner.run(one, out=told.append)
    assert tests, f"{name} has an example that doctest doesn't find"
    assert not runner.failures, "".join(told)
