"""Any model, side by side: which tools halve which families, and in how many seconds.

`python -m benchmarks.any_model` takes every family of `tests/zoo` through Supple and its peers
(`benchmarks/_peers.py`), one process each, and writes `benchmarks/results/any_model.json`. The
peers are installed into `benchmarks/.envs/peers`, an environment of their own that sees this
one's packages; a peer that does not install is left out, with pip's words for it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import _cells
from supple.cost.measure import device_name
from supple.files import read_json, write_json
from tests.zoo import ZOO

HERE = Path(__file__).parent
RESULT = HERE / "results" / "any_model.json"
PEERS = {  # tool: its package, and what that needs beside what is here already
    "torch-pruning": ["torch-pruning==1.6.1"],
    "torch-pruning with head counts": ["torch-pruning==1.6.1"],
    "only-train-once": ["only-train-once==3.0.1", "graphviz", "pydot", "pyparsing"],
    "modelopt": [
        "nvidia-modelopt==0.47.0", "omegaconf", "antlr4-python3-runtime==4.9.3", "pulp",
        "nvidia-ml-py", "ninja", "torchprofile",
    ],
}  # fmt: skip


def environment() -> tuple[Path, dict[str, str]]:
    """Gives the peers' Python, and for each tool that does not install what pip said."""
    wanted = {tool: ["--no-deps", *packages] for tool, packages in PEERS.items()}
    return _cells.environment("peers", wanted)


def run(python: Path, tool: str, families: list[str]) -> dict[str, dict[str, Any]]:
    """Takes families through one tool."""
    command = [str(python), "-W", "ignore", "-m", "benchmarks._peers", tool, *families]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    found: dict[str, dict[str, Any]] = {}
    with subprocess.Popen(
        command, cwd=HERE.parent, env=settings, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"family"'):
                row = json.loads(line)
                family = row.pop("family")
                found[family] = row
                said = "works" if row["works"] else row["why"]
                print(f"{tool:32}{family:26}{said[:90]}", flush=True)
    return found


def table(result: dict[str, Any]) -> Table:
    """Families by tool: what part of the parameters is left, or a dash."""
    tools = list(result["tools"])
    drawn = Table("family", *tools)
    for family in result["families"]:
        cells = [result["tools"][tool].get(family, {"works": False}) for tool in tools]
        drawn.add_row(family, *(f"{c['left']:.0%}" if c["works"] else "-" for c in cells))
    works = [sum(r["works"] for r in rows.values()) for rows in result["tools"].values()]
    drawn.add_section()
    drawn.add_row(f"of {len(result['families'])}", *map(str, works))
    return drawn


def main(chosen: list[str]) -> None:
    """Runs tools on all families, adds their figures to the file and prints the table.

    Args:
        chosen: Names of tools; empty for all.
    """
    python, failed = environment()
    families = list(ZOO)
    result: dict[str, Any] = {
        "benchmark": "any_model",
        "command": "python -m benchmarks.any_model",
        "date": date.today().isoformat(),
        "machine": device_name(),
        "packages": sorted({p for packages in PEERS.values() for p in packages if "==" in p}),
        "not installed": failed,
        "families": families,
        "tools": {},
    }
    every = ["supple", *(tool for tool in PEERS if tool not in failed)]
    for tool in chosen or every:
        found = {tool: run(python, tool, families)}
        kept = read_json(RESULT) if chosen and RESULT.exists() else result
        known = kept["tools"] if kept["families"] == families else {}
        result["tools"] = {
            name: (known | found)[name] for name in every if name in known | found
        }
        write_json(RESULT, result)
    Console().print(table(result))


if __name__ == "__main__":
    main(sys.argv[1:])
