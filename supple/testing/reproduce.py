"""Reproductions: short experiments that show a paper's central claim, and that can fail.

The reproduction of `supernet/bignas` is the file `reproductions/supernet/bignas.py` beside the
package. It defines

    ON = BigNAS()                 # the technique
    OFF = SortedNet()             # the same with the idea switched off: its baseline
    SEEDS = (0, 1, 2)             # optional, these are the default
    DATA = ("cifar10/train.parquet",)   # optional: files below SUPPLE_DATA that it reads

    def claims(method, seeds):    # run twice: with ON, then with OFF in its place
        ours = across(partial(accuracy, method), seeds)
        baseline = across(partial(accuracy, OFF), seeds)
        yield Claim("the smallest size gains from the sandwich", ours, baseline,
                    threshold=0.01, unit="accuracy")

and a docstring that tells the paper's claim, what the baseline is and why it is fair (same
data, same steps, tuned the same way), where the thresholds come from and, where the claim does
not hold, the likely reason. `ours` and `baseline` hold one figure per seed, paired by seed. A
claim **holds** where the mean of the paired effects exceeds the threshold by more than the
effects spread (their sample standard deviation), it does **not** where it falls short by more,
and is **undecided** in between, so that a claim of "no worse than by 0.015" has the threshold
-0.015. All arms and seeds together take at most three minutes on two cores. The threshold is
committed before the first full run.

The whole reproduction holds where every claim does, and not all of them do with `OFF` in the
place of `ON`: an experiment that can't fail shows nothing. `run_reproduction(key)` writes the
result to `reproductions/results/<room>/<name>.json`, with the hashes of technique, reproduction
and data. A result is *stale* once one of these has changed; comments, docstrings and layout
don't count as change.

In JSON `holds` is true, false or null (undecided).
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

from supple.errors import SettingError, nearest
from supple.files import checksum, read_json, write_json
from supple.technique import ROOMS, Technique, technique, techniques

__all__ = [
    "Claim",
    "across",
    "listing",
    "reproductions",
    "result",
    "run_reproduction",
    "stale",
    "stale_keys",
    "status",
    "verdict",
]

SEEDS = (0, 1, 2)
"""Seeds of a reproduction that names none."""

_Case = TypeVar("_Case")
_Figure = TypeVar("_Figure")


@dataclass(frozen=True)
class Claim:
    """One comparison that a paper makes, with our figures.

    Args:
        name: What is claimed, as a sentence.
        ours: The technique's figure for each seed.
        baseline: The baseline's figure for the same seeds, in the same order.
        threshold: The effect (ours minus baseline, or the reverse where lower is better) that
            must be exceeded, in the figures' unit; negative for "no worse than by so much".
        better: Whether higher or lower figures are better.
        unit: Unit of the figures, such as `"accuracy"` or `"s"`.
        exact: Whether the figures depend on no seed, so that one of each is enough.
        details: Anything else worth keeping, such as figures by size; JSON-able.

    Example:
        >>> claim = Claim("small sizes gain", (0.91, 0.92, 0.90), (0.85, 0.87, 0.86))
        >>> round(claim.effect, 3), claim.holds
        (0.05, True)
    """

    name: str
    ours: Sequence[float]
    baseline: Sequence[float]
    threshold: float = 0.0
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    exact: bool = False
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.ours) != len(self.baseline):
            raise SettingError(
                f"claim '{self.name}' needs one figure of ours and of the baseline per seed, "
                f"got {len(self.ours)} and {len(self.baseline)}"
            )
        if len(self.ours) < (1 if self.exact else 3):
            raise SettingError(
                f"claim '{self.name}' has {len(self.ours)} seeds; fewer than 3 can't tell its "
                "spread (exact=True where nothing is random)"
            )

    @property
    def effects(self) -> tuple[float, ...]:
        """The paired effects, one per seed; positive where ours is better."""
        sign = 1.0 if self.better == "higher" else -1.0
        return tuple(sign * (a - b) for a, b in zip(self.ours, self.baseline, strict=True))

    @property
    def effect(self) -> float:
        """The mean of the paired effects."""
        return statistics.fmean(self.effects)

    @property
    def spread(self) -> float:
        """The sample standard deviation of the paired effects; 0 for an exact claim."""
        return 0.0 if self.exact else statistics.stdev(self.effects)

    @property
    def holds(self) -> bool | None:
        """Whether the effect exceeds the threshold by more than its spread; None: undecided."""
        margin = self.effect - self.threshold
        if margin > self.spread:
            return True
        return False if margin < -self.spread or self.exact else None

    def to_dict(self) -> dict[str, Any]:
        """Gives everything, in JSON's types."""
        return {
            **dataclasses.asdict(self),
            "ours": [float(figure) for figure in self.ours],
            "baseline": [float(figure) for figure in self.baseline],
            "effect": self.effect,
            "spread": self.spread,
            "holds": self.holds,
        }


def verdict(holds: bool | None) -> str:
    """Words a verdict: `"yes"`, `"no"` or `"undecided"`."""
    return "undecided" if holds is None else "yes" if holds else "no"


def across(
    function: Callable[[_Case], _Figure], cases: Iterable[_Case], *, workers: int | None = None
) -> list[_Figure]:
    """Runs a function on several cases at once, each in a process with one thread.

    Args:
        function: Anything that a process can be sent: a function at the top of a module, or a
            `functools.partial` of one.
        cases: Its arguments, such as seeds.
        workers: Processes at a time; as many as there are cores by default.

    Returns:
        The results, in the order of `cases`.
    """
    cases = list(cases)
    count = min(len(cases), workers or len(os.sched_getaffinity(0)))
    if count <= 1:
        return [function(case) for case in cases]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(count, mp_context=context, initializer=_one_thread) as pool:
        return list(pool.map(function, cases))


def reproductions(folder: Path | None = None) -> list[str]:
    """Lists the keys that have a reproduction.

    Args:
        folder: The folder of reproductions; the one beside the package by default.

    Returns:
        Keys, by room.
    """
    folder = folder or _folder()
    return [
        f"{room}/{path.stem.replace('_', '-')}"
        for room in ROOMS
        for path in sorted((folder / room).glob("*.py"))
        if not path.stem.startswith("_")
    ]


def run_reproduction(
    key: str, *, folder: Path | None = None, tell: Callable[[str], None] | None = None
) -> dict[str, Any]:
    """Runs one paper's reproduction, with the idea on and off, and writes the result.

    Args:
        key: The technique, such as `"supernet/bignas"`.
        folder: The folder of reproductions; the one beside the package by default.
        tell: Called with a line of text as each claim is decided.

    Returns:
        The result, as `result(key)` gives it from now on.

    Raises:
        SettingError: There is no such reproduction, it needs data that is missing, or it
            doesn't keep to the form.
        UnknownTechniqueError: There is no such technique.
    """
    folder = folder or _folder()
    tell = tell or _silence
    module = _load(key, folder)
    hashes = _hashes(key, folder, module)
    missing = [name for name, digest in hashes["data"].items() if digest is None]
    if missing:
        raise SettingError(
            f"the reproduction of {key} needs the files {', '.join(missing)}; "
            "set SUPPLE_DATA to the folder that holds them"
        )
    started = time.perf_counter()
    on = _decide(key, module, module.ON, tell)
    middle = time.perf_counter()
    tell("with the idea switched off:")
    off = _decide(key, module, module.OFF, tell)
    ended = time.perf_counter()
    if [claim.name for claim in on] != [claim.name for claim in off]:
        raise SettingError(f"the reproduction of {key} yields other claims when switched off")
    outcome = {
        "key": key,
        "holds": _together(on, off),
        "claims": [
            {**claim.to_dict(), "switched_off": other.to_dict()}
            for claim, other in zip(on, off, strict=True)
        ],
        "switched_off_holds": _all_hold(off),
        "on": repr(module.ON),
        "off": repr(module.OFF),
        "seeds": list(_seeds(module)),
        "seconds": round(ended - started, 1),
        "seconds_on": round(middle - started, 1),
        "hashes": hashes,
        "machine": _machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    write_json(_result_path(key, folder), outcome)
    return outcome


def result(key: str, *, folder: Path | None = None) -> dict[str, Any] | None:
    """Gives the last result of a reproduction.

    Args:
        key: The technique.
        folder: The folder of reproductions; the one beside the package by default.

    Returns:
        What `run_reproduction` wrote, or None where it was never run.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = _result_path(key, folder or _folder())
    return read_json(path) if path.exists() else None


def stale(key: str, *, folder: Path | None = None) -> list[str]:
    """Tells what has changed since a reproduction was last run.

    Args:
        key: The technique.
        folder: The folder of reproductions; the one beside the package by default.

    Returns:
        Some of `"technique"`, `"reproduction"` and names of data files; empty where nothing
        changed or there is no result. Data that is not here is not compared.
    """
    folder = folder or _folder()
    last = result(key, folder=folder)
    if last is None:
        return []
    before, now = last["hashes"], _hashes(key, folder, None, tuple(last["hashes"]["data"]))
    changed = [name for name in ("technique", "reproduction") if before[name] != now[name]]
    changed += [
        name
        for name, digest in now["data"].items()
        if digest is not None and digest != before["data"][name]
    ]
    return changed


def stale_keys(*, folder: Path | None = None) -> list[str]:
    """Lists the keys whose result is stale."""
    return [key for key in reproductions(folder) if stale(key, folder=folder)]


def status(key: str, *, folder: Path | None = None) -> str:
    """Gives a technique's state in one or two words.

    Args:
        key: The technique.
        folder: The folder of reproductions; the one beside the package by default.

    Returns:
        `"reproduced"`, `"not reproduced"` or `"undecided"` by the last result; `"stale"` where
        something changed since; `"not tried"` where there is no result.
    """
    last = result(key, folder=folder)
    if last is None:
        return "not tried"
    if stale(key, folder=folder):
        return "stale"
    words = {"yes": "reproduced", "no": "not reproduced", "undecided": "undecided"}
    return words[verdict(last["holds"])]


def listing(room: str | None = None, *, folder: Path | None = None) -> list[dict[str, Any]]:
    """Describes every technique, as `supple techniques --json` prints it.

    Args:
        room: Only this room.
        folder: The folder of reproductions; the one beside the package by default.

    Returns:
        Mappings with `key`, `room`, `kind`, `title`, `paper`, `requires`, `status`, and
        `reproduction`: None, or a mapping with `holds`, `claims` and `seconds`.
    """
    rows = []
    for key in techniques(room):
        cls = technique(key)
        last = result(key, folder=folder)
        rows.append(
            {
                "key": key,
                "room": key.partition("/")[0],
                "kind": cls.kind,
                "title": cls.card.title,
                "paper": cls.card.paper,
                "requires": list(cls.card.requires),
                "status": status(key, folder=folder),
                "reproduction": last and {name: last[name] for name in _SHOWN},
            }
        )
    return rows


_SHOWN = ("holds", "claims", "seconds")


def _folder() -> Path:
    return Path(__file__).parents[2] / "reproductions"


def _file(key: str, folder: Path) -> Path:
    return folder / f"{key.replace('-', '_')}.py"


def _result_path(key: str, folder: Path) -> Path:
    return folder / "results" / f"{key}.json"


def _load(key: str, folder: Path) -> ModuleType:
    cls = technique(key)
    path = _file(key, folder)
    if not path.exists():
        raise SettingError(
            f"{key} has no reproduction{nearest(key, reproductions(folder))} (no {path})"
        )
    # By a name, not by its file: processes that `across` starts must find it again.
    if str(folder.parent) not in sys.path:
        sys.path.append(str(folder.parent))
    module = importlib.import_module(
        ".".join([folder.name, *path.relative_to(folder).parts])[:-3]
    )
    lacking = [name for name in ("ON", "OFF", "claims") if not hasattr(module, name)]
    if lacking:
        raise SettingError(f"{path} must define {', '.join(lacking)}")
    if not isinstance(module.ON, cls):
        raise SettingError(f"ON in {path} must be {cls.__name__}(...), it is {module.ON!r}")
    return module


def _seeds(module: ModuleType) -> tuple[int, ...]:
    return tuple(getattr(module, "SEEDS", SEEDS))


def _decide(
    key: str, module: ModuleType, method: Any, tell: Callable[[str], None]
) -> list[Claim]:
    claims: list[Claim] = []
    for claim in module.claims(method, _seeds(module)):
        if claim.name in [other.name for other in claims]:
            raise SettingError(f"the reproduction of {key} claims twice: {claim.name}")
        claims.append(claim)
        tell(
            f"{claim.name}: {verdict(claim.holds)} (effect {claim.effect:+.4g} "
            f"± {claim.spread:.2g} {claim.unit}, needs {claim.threshold:g})"
        )
    if not claims:
        raise SettingError(f"the reproduction of {key} yields no claim")
    return claims


def _all_hold(claims: Sequence[Claim]) -> bool | None:
    verdicts = [claim.holds for claim in claims]
    return False if False in verdicts else None if None in verdicts else True


def _together(on: Sequence[Claim], off: Sequence[Claim]) -> bool | None:
    # What also holds with the idea switched off was not shown to come from the idea.
    return None if _all_hold(on) and _all_hold(off) else _all_hold(on)


def _hashes(
    key: str, folder: Path, module: ModuleType | None, data: tuple[str, ...] = ()
) -> dict[str, Any]:
    if module is not None:
        data = tuple(getattr(module, "DATA", ()))
    reproduction = _file(key, folder)
    return {
        "technique": _technique_hash(key),
        "reproduction": _reproduction_hash(reproduction) if reproduction.exists() else "",
        "data": {name: _data_hash(name) for name in data},
    }


def _technique_hash(key: str) -> str:
    """Hashes a technique's file together with the files of its room that it is built on."""
    base = sys.modules[technique(key).__module__]
    files = {Path(str(base.__file__))}
    for parent in technique(key).__mro__:
        if issubclass(parent, Technique) and parent.__module__.startswith(
            f"{base.__name__.rpartition('.')[0]}."
        ):
            files.add(Path(str(sys.modules[parent.__module__].__file__)))
    return checksum({path.name: _code_hash(path) for path in files})


def _reproduction_hash(path: Path) -> str:
    """Hashes a reproduction together with the private files beside it that it imports."""
    files, waiting = {path}, [path]
    while waiting:
        tree = ast.parse(waiting.pop().read_text(encoding="utf-8"))
        words = {
            word
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
            for word in f"{getattr(node, 'module', '')}.{alias.name}".split(".")
        }
        beside = {one for one in path.parent.glob("_*.py") if one.stem in words} - files
        files |= beside
        waiting += sorted(beside)
    return checksum({one.name: _code_hash(one) for one in files})


def _code_hash(path: Path) -> str:
    """Hashes what a Python file does: comments, layout and docstrings don't count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [one for one in node.body if not _is_text(one)] or [ast.Pass()]
    return checksum(repr(_shape(tree)).encode())


def _shape(node: Any) -> Any:
    """Gives a syntax tree as nested tuples, alike in all versions of Python.

    `ast.dump` is not: newer versions add fields, and leave out empty ones.
    """
    if isinstance(node, list):
        return tuple(_shape(one) for one in node)
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _shape(value)) for name, value in ast.iter_fields(node)]
    filled = [(name, value) for name, value in fields if value not in (None, ())]
    return type(node).__name__, *filled


def _is_text(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _data_hash(name: str) -> str | None:
    path = Path(os.environ.get("SUPPLE_DATA") or "nowhere") / name
    if not path.is_file():
        return None
    return _file_hash(path, path.stat().st_size, path.stat().st_mtime_ns)


@functools.cache
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _machine() -> dict[str, Any]:
    import torch

    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _silence(line: str) -> None:
    """Tells nobody."""
