"""A recipe of some twenty seconds, and what a run of it has committed at any moment."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from supple.files import read_json

CHECKPOINT_EVERY = 10

RECIPE = f"""\
name: killed
threads: 1
model:
  digits-cnn: {{widths: [16, 24], blocks: [1, 1]}}
data: digits
axes:
  width: {{choices: [0.5, 0.75, 1.0], divisor: 4}}
train:
  supernet/bignas: {{random: 1}}
  steps: 300
  batch_size: 32
  checkpoint_every: {CHECKPOINT_EVERY}
search:
  search/nsga2: {{population: 8}}
  evaluations: 48
  costs: [params]
  recalibration_batches: 4
deploy:
  budgets:
    - {{name: half, params: "<= 12 k"}}
  export: [onnx, pt2]
compare: {{alone: false, cut: false}}
"""


@dataclass(frozen=True)
class Committed:
    """What a run had finished at some moment.

    Args:
        evaluations: Values by config, in the order of the trials.
        interrupted: Configs of the trials that failed.
        running: How many trials are still marked as under evaluation.
        checkpoint: Steps of the last checkpoint, 0 without one.
        exported: When each exported file that was noted as finished was written.
        stages: The record of each finished stage by name, byte by byte.
    """

    evaluations: dict[str, tuple[float, ...]]
    interrupted: tuple[str, ...]
    running: int
    checkpoint: int
    exported: dict[str, int]
    stages: dict[str, str]

    @classmethod
    def of(cls, folder: Path, study: Path | None = None) -> Committed:
        """Looks at a run's folder."""
        complete, interrupted, running = trials(study or folder / "search" / "study.db")
        steps = [int(p.name[5:]) for p in folder.glob("train/checkpoint/step-*")]
        notes = folder.glob("deploy/*/.network.*.json")
        exported = [note.with_name(note.name[1:-5]) for note in notes]
        return cls(
            complete,
            interrupted,
            running,
            max(steps, default=0),
            {str(path): path.stat().st_mtime_ns for path in exported},
            {
                str(done.parent.relative_to(folder)): done.read_text()
                for done in sorted(folder.rglob("done.json"))
            },
        )

    @property
    def stage(self) -> str:
        """The stage that was being computed."""
        order = ("elastic", "train", "search", "deploy/full", "deploy/half")
        return next((s for s in order if s not in self.stages), "report").partition("/")[0]

    def is_kept_in(self, later: Committed) -> None:
        """Asserts that nothing of this was lost or done again."""
        assert list(later.evaluations.items())[: len(self.evaluations)] == list(
            self.evaluations.items()
        )
        assert self.exported.items() <= later.exported.items()
        assert self.stages.items() <= later.stages.items()


def trials(study: Path) -> tuple[dict[str, tuple[float, ...]], tuple[str, ...], int]:
    """Reads a study file: values by config, interrupted configs, how many are running."""
    complete: dict[str, tuple[float, ...]] = {}
    interrupted: list[str] = []
    running = 0
    if not study.exists():
        return complete, (), 0
    with contextlib.closing(sqlite3.connect(study, timeout=30)) as connection:
        tables = connection.execute("SELECT count(*) FROM sqlite_master WHERE name = 'trials'")
        if not tables.fetchone()[0]:
            return complete, (), 0
        rows = connection.execute(
            "SELECT t.trial_id, t.state, a.value_json FROM trials t "
            "LEFT JOIN trial_user_attributes a ON a.trial_id = t.trial_id AND a.key = 'config' "
            "ORDER BY t.number"
        ).fetchall()
        for trial, state, attribute in rows:
            config = json.loads(attribute or "null")
            if state == "COMPLETE":
                values = connection.execute(
                    "SELECT value FROM trial_values WHERE trial_id = ? ORDER BY objective",
                    (trial,),
                )
                assert config not in complete, f"{config} is in two complete trials"
                complete[config] = tuple(value for (value,) in values)
            elif state == "FAIL":
                interrupted.append(config)
            else:
                running += 1
    return complete, tuple(interrupted), running


def outcome(folder: Path) -> dict[str, str]:
    """Hashes of what a finished run made: weights, front, deployed and exported networks."""
    train = read_json(folder / "train" / "done.json")["outputs"]
    front = json.loads((folder / "search" / "front.json").read_text())
    front.pop("study")
    hashes = {"weights": train["weights.safetensors"], "front": json.dumps(front)}
    for path in sorted(folder.glob("deploy/*/network*/weights.safetensors")):
        hashes[f"{path.parents[1].name} network"] = _sha256(path)
    for path in sorted(folder.glob("deploy/*/network.onnx")):
        hashes[f"{path.parent.name} onnx"] = _sha256(path)
    return hashes


def leftovers(folder: Path) -> list[str]:
    """Files that belong to nothing: what was being written when a process died."""
    hidden = [path for path in folder.rglob(".*") if not path.name.endswith(".lock")]
    return [str(p) for p in hidden if not p.name.startswith(".network.")] + [
        str(p) for p in hidden if p.name.startswith(".network.") and p.suffix != ".json"
    ]


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
