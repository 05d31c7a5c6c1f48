"""What benchmarks of many small runs share: cells in processes of their own, kept as they end.

A *cell* is one arm on one network with one seed. It runs in a process of its own, so that its
peak of memory is its own and a crash is a cell's, and prints its figures as JSON, last. Cells
that a result file holds are not run again, as long as the settings are the same.
"""

from __future__ import annotations

import json
import os
import subprocess
import sysconfig
import time
import venv
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supple.cost.measure import device_name
from supple.files import read_json, write_json

HERE = Path(__file__).parent
WORKERS = 2

Cell = dict[str, Any]


@dataclass
class Cells:
    """The cells of a benchmark, and the file that holds them.

    Args:
        benchmark: Its name, also the file's.
        setting: What all cells have in common; cells of another setting are dropped.
        packages: Packages of peers, with their versions.
        failed: Peers that did not install, and what pip said.
    """

    benchmark: str
    setting: Mapping[str, Any]
    packages: list[str] = field(default_factory=list)
    failed: Mapping[str, str] = field(default_factory=dict)
    found: dict[str, Cell] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = read_json(self.path) if self.path.exists() else {}
        if known.get("setting") == json.loads(json.dumps(self.setting)):
            self.found = known["cells"]

    @property
    def path(self) -> Path:
        """The result file."""
        return HERE / "results" / f"{self.benchmark}.json"

    def fill(self, missing: Mapping[str, Callable[[], Cell]]) -> None:
        """Runs cells, one per core, and writes the file after each.

        Args:
            missing: What runs each, by name.
        """
        with ThreadPoolExecutor(WORKERS) as pool:
            running = {pool.submit(run): name for name, run in missing.items()}
            for done in as_completed(running):
                self.found[running[done]] = done.result()
                print(running[done], self.found[running[done]], flush=True)
                self.write()

    def write(self) -> None:
        """Writes the file."""
        write_json(
            self.path,
            {
                "benchmark": self.benchmark,
                "command": f"python -m benchmarks.{self.benchmark}",
                "machine": device_name(),
                "packages": self.packages,
                "not installed": dict(self.failed),
                "setting": dict(self.setting),
                "cells": self.found,
            },
        )


def run_cell(python: str | Path, module: str, *words: object) -> Cell:
    """Runs a cell in a process of one thread.

    Args:
        python: The interpreter.
        module: Of `benchmarks`, whose last printed line is the cell's figures.
        *words: Its arguments.

    Returns:
        The figures, whether it ran, and if not, why.
    """
    command = [str(python), "-W", "ignore", "-m", f"benchmarks.{module}", *map(str, words)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=HERE.parent, env=settings, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"ran": False, "why": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    found: Cell = json.loads(done.stdout.strip().splitlines()[-1])
    return {"ran": True, **found, "date": time.strftime("%Y-%m-%d")}


def environment(name: str, packages: Mapping[str, list[str]]) -> tuple[Path, dict[str, str]]:
    """Makes an environment of a benchmark's own, which sees this one's packages.

    Args:
        name: Of its folder in `benchmarks/.envs`.
        packages: What to install, by tool, with options of pip where it needs any.

    Returns:
        Its Python, and for each tool that does not install what pip said.
    """
    folder = HERE / ".envs" / name
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        own = sysconfig.get_path("purelib", vars={"base": str(folder)})
        (Path(own) / "zz_supple.pth").write_text(sysconfig.get_path("purelib") + "\n")
    failed: dict[str, str] = {}
    for tool, wanted in packages.items():
        command = [str(python), "-m", "pip", "install", "--quiet", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            failed[tool] = (done.stderr.strip().splitlines() or ["killed"])[-1]
    return python, failed
