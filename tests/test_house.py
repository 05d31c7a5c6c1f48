"""The house: what stands beside the package is complete and agrees with it."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import tomllib
from importlib.metadata import distributions
from typing import Any

import pytest

from tests.guards import ROOT, imports

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
DISTRIBUTIONS = {"yaml": "pyyaml", "PIL": "pillow", "sklearn": "scikit-learn"}
TARGETS = [
    "setup",
    "demo",
    "test",
    "test-all",
    "check",
    "lint",
    "types",
    "reproduce",
    "bench",
    "docs",
    "size",
]
STANDARD = __import__("sys").stdlib_module_names


def _name(requirement: str) -> str:
    return re.split(r"[\s<>=!~\[;]", requirement)[0].lower().replace("_", "-")


def _pins() -> dict[str, str]:
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    return {_name(name): version for name, version in pins.items()}


def test_the_lock_file_holds_exact_versions_and_no_address() -> None:
    lines = (ROOT / "requirements.lock").read_text("utf-8").splitlines()
    assert all(re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line) for line in lines)
    assert not [line for line in lines if "://" in line]
    assert _pins()["torch"] == "2.13.0"


def test_the_lock_file_is_what_is_installed() -> None:
    installed = {
        _name(one.metadata["Name"]): one.version.partition("+")[0] for one in distributions()
    }
    differing = {
        name: (version, installed.get(name))
        for name, version in _pins().items()
        if installed.get(name) != version
    }
    assert not differing


@pytest.mark.parametrize(
    "group",
    ["dependencies", "onnx", "openvino", "postgres", "ray", "dashboard", "serve", "hub", "dev"],
)
def test_every_requirement_is_locked(group: str) -> None:
    project = PROJECT["project"]
    wanted = project["dependencies"]
    if group != "dependencies":
        wanted = project["optional-dependencies"][group]
    assert {_name(one) for one in wanted} <= set(_pins())


def test_the_package_requires_what_it_imports() -> None:
    project = PROJECT["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    known = {_name(one) for group in groups for one in group}
    used = {
        name.partition(".")[0]
        for path in (ROOT / "supple").rglob("*.py")
        for _, name in imports(ast.parse(path.read_text("utf-8")))
    }
    outside = used - set(STANDARD) - {"supple"}
    needed = {DISTRIBUTIONS.get(name, name).lower().replace("_", "-") for name in outside}
    assert needed <= known, f"not in pyproject.toml: {needed - known}"


@pytest.mark.parametrize("target", TARGETS)
def test_the_makefile_has_the_targets_that_are_promised(target: str) -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", target],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_fast_demo_and_one_reproduction_are_passed_on() -> None:
    def commands(*arguments: str) -> str:
        command = ["make", "--dry-run", *arguments]
        clean = {k: v for k, v in os.environ.items() if k not in ("FAST", "K", "MAKEFLAGS")}
        return subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, env=clean
        ).stdout

    assert "supple run recipes/digits.yaml --fast" in commands("demo", "FAST=1")
    assert "--fast" not in commands("demo")
    assert "supple reproduce supernet/bignas" in commands("reproduce", "K=supernet/bignas")


def test_contributing_is_short() -> None:
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) < 120


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: p.stem)
def test_python_in_the_documentation_compiles(page: Any) -> None:
    for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
        compile(block, str(page), "exec")


def test_python_in_the_readme_compiles_and_is_about_twenty_lines() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(block, "README.md", "exec")
    assert len(block.splitlines()) <= 24


@pytest.mark.slow
def test_the_documentation_builds_strictly(tmp_path: Any) -> None:
    command = [".venv/bin/mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "techniques" / "supernet" / "bignas.html").exists()
