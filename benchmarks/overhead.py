"""What a size costs beside the same network by itself: forward, training step, entering it.

*Active* is the network inside `net.at(config)`, *extracted* is `net.extract(config)`. Both run
in turn (A B C C B A, see `benchmarks._pairs`), on one thread, at least 200 pairs; a second
extracted network beside the first gives the A/A ratio, which shows how far to trust the others.
What is timed:

- *forward*: `module(images)` in evaluation mode without gradients, the size entered before;
- *forward, entered*: the same, and `at` is entered and left each time;
- *step*: `SizesRun.step` with one size and stock SGD (momentum 0.9): gradients set to none,
  `at` entered, forward, cross-entropy, backward, `at` left, update of the full owners.

Extracted networks take the same ways without `at`, and their SGD holds their own parameters
only. Plans are worked out before (their time is reported by itself).

`python -m benchmarks.overhead` writes `benchmarks/results/overhead.json`, case by case; cases
that were measured with the same code on the same machine are kept (`--fresh` forgets them, and
words choose cases: `python -m benchmarks.overhead vit-96`). Once-for-all's own layers, as its
package has them, take part in a process of their own, with the package in a temporary folder.
Two kinds of cases are measured only when named: `default-axes` (the widest ranges) and `kernel`
(once-for-all with its elastic kernels).
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from benchmarks._pairs import against, alternate
from supple.axes.base import Axis
from supple.axes.depth import Depth
from supple.axes.heads import Heads
from supple.axes.width import Width
from supple.cost.measure import device_name
from supple.errors import SuppleWarning
from supple.files import read_json, write_json
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.space import Config
from supple.training.losses import Labels
from supple.training.seeds import generator
from supple.training.step import SizesRun, WholeOnly

HERE = Path(__file__).parent
RESULT = HERE / "results" / "overhead.json"
ENVIRONMENT = Path(tempfile.gettempdir()) / "supple-benchmarks" / "once-for-all"
PEER = "ofa==0.1.0.post202307202001"
PAIRS = 200
BATCH = {32: 32, 96: 8}
SIZES = ("min", "median", "max")
LIMITS = {"forward": {32: 1.05, 96: 1.03}, "step": {32: 1.20, 96: 1.06}}

AXES: dict[str, tuple[Axis, ...]] = {
    # once-for-all's: inner widths and depth
    "mobilenet-v3": (
        Width((1 / 2, 2 / 3, 1.0), where="stages.[1-5].*.expand.0"),
        Width((1 / 2, 2 / 3, 1.0), where="*.squeeze.reduce"),
        Depth((1, 2, 3)),
    ),
    "vit": (Width((0.5, 0.75, 1.0)), Heads(), Depth((6, 9, 12))),
}


def images(pixels: int) -> Tensor:
    """Gives a batch of random images."""
    return torch.randn(BATCH[pixels], 3, pixels, pixels, generator=generator(0, "overhead"))


def model(kind: str, pixels: int) -> nn.Module:
    """Builds a network of realistic size: MobileNetV3 with once-for-all's widths, ViT-Ti."""
    if kind == "mobilenet-v3":
        return build(kind, variant="large", image_size=224, hidden=1280, classes=1000)
    return build(
        kind, image_size=pixels, patch_size=8, dim=192, num_layers=12, num_heads=3, classes=1000
    )


def network(kind: str, pixels: int, default_axes: bool) -> Elastic:
    """Makes it elastic, with axes that a user would choose or with those that go furthest."""
    axes = None if default_axes else AXES[kind]
    return elastic(model(kind, pixels), images(pixels)[:2], axes=axes, verify=False)


def sized(net: Elastic, size: str) -> Config:
    """Gives the smallest config, the one of all middle choices, or the largest."""
    if size == "median":
        middle = {site.name: site.choices[len(site.choices) // 2] for site in net.space.sites}
        return net.space.config(middle)
    return net.space.smallest() if size == "min" else net.space.largest()


def forward(module: nn.Module, batch: Tensor) -> Callable[[], None]:
    """Gives a function that runs one forward."""

    def run() -> None:
        with torch.no_grad():
            module(batch)

    return run


def step(
    net: Elastic | nn.Module, module: nn.Module, batch: Tensor, config: Config | None = None
) -> Callable[[], Any]:
    """Gives a function that does one training step at a size, or of a plain module."""
    module.train()
    labels = torch.arange(len(batch))
    run = SizesRun(
        net,
        SGD(module.parameters(), lr=1e-3, momentum=0.9),
        WholeOnly(config),
        Labels(lambda output, pair: F.cross_entropy(output, pair[1])),
    )
    return lambda: run.step((batch, labels))


def measure(net: Elastic, config: Config, pixels: int) -> dict[str, Any]:
    """Measures one size of a network."""
    batch = images(pixels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SuppleWarning)
        subs = {name: net.extract(config).eval() for name in ("extracted", "again")}
    net.eval()
    row: dict[str, Any] = {"batch": BATCH[pixels], "places": entered_tensors(net, config)}
    row |= costs_of_entering(net, config)
    runs = {name: forward(sub, batch) for name, sub in subs.items()}
    with net.at(config):
        times = alternate({"active": forward(net.module, batch), **runs}, PAIRS)
    row["forward"] = against(times, "active", "extracted")
    row["forward_aa"] = against(times, "extracted", "again")

    def entered() -> None:
        with net.at(config), torch.no_grad():
            net.module(batch)

    times = alternate({"active": entered, "extracted": runs["extracted"]}, PAIRS)
    row["forward_entered"] = against(times, "active", "extracted")
    contenders = {name: step(sub, sub, batch) for name, sub in subs.items()}
    times = alternate({"active": step(net, net.module, batch, config), **contenders}, PAIRS)
    row["step"] = against(times, "active", "extracted")
    row["step_aa"] = against(times, "extracted", "again")
    return row


def entered_tensors(net: Elastic, config: Config) -> int:
    """Counts the tensors that stand in place of others inside `at`."""

    def shadowed() -> int:
        return sum(
            isinstance(value, Tensor)
            for part in net.module.modules()
            for value in vars(part).values()
        )

    before = shadowed()
    with net.at(config):
        return shadowed() - before


def costs_of_entering(net: Elastic, config: Config, repeats: int = 30) -> dict[str, float]:
    """Times `at` by itself, a plan worked out anew, and `extract`: medians in milliseconds."""

    def entering() -> None:
        with net.at(config):
            pass

    def planning() -> None:
        net._plans.pop(config, None)
        net.plan(config)

    def extracting() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SuppleWarning)
            net.extract(config)

    return {
        "at_ms": _median_ms(entering, repeats),
        "plan_ms": _median_ms(planning, repeats),
        "extract_ms": _median_ms(extracting, 5),
    }


def _median_ms(run: Callable[[], None], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


# --- once-for-all -----------------------------------------------------------------------------


def install_peer() -> str:
    """Installs once-for-all's package for this benchmark alone; gives pip's log on failure."""
    if (ENVIRONMENT / "ofa").is_dir():
        return ""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    done = subprocess.run(
        [*command, "--target", str(ENVIRONMENT), PEER],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr if done.returncode else ""


def measure_peer(pixels: int, size: str, kernel: bool) -> dict[str, Any]:
    """Measures a size of once-for-all's own network in a process of its own."""
    log = install_peer()
    if log:
        return {"failed": log}
    paths = os.pathsep.join([str(HERE.parent), str(ENVIRONMENT)])
    arguments = [str(pixels), str(SIZES.index(size)), str(int(kernel)), str(PAIRS)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks._once_for_all", *arguments],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        return {"failed": done.stderr[-4000:]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row | {"batch": BATCH[pixels]}


# --- all cases --------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """Yields the name of each case and what measures it."""
    for size in SIZES:
        for pixels in BATCH:
            for kind in AXES:
                for default in (False, True):
                    name = f"{kind}{'-default-axes' if default else ''}-{pixels}-{size}"
                    yield name, lambda k=kind, p=pixels, d=default, s=size: _ours(k, p, d, s)
            for kernel in (False, True):
                name = f"once-for-all{'-kernel' if kernel else ''}-{pixels}-{size}"
                yield name, lambda p=pixels, s=size, k=kernel: measure_peer(p, s, k)


def _ours(kind: str, pixels: int, default_axes: bool, size: str) -> dict[str, Any]:
    net = network(kind, pixels, default_axes)
    return measure(net, sized(net, size), pixels)


def stamp() -> dict[str, str]:
    """Says what figures depend on: the code, the machine, the versions."""
    root = HERE.parent
    own = ("overhead", "_pairs", "_once_for_all")
    names = ["supple/plan.py", *(f"benchmarks/{name}.py" for name in own)]
    code = hashlib.sha256(b"".join((root / name).read_bytes() for name in names)).hexdigest()
    python = ".".join(map(str, sys.version_info[:3]))
    return {
        "code": code[:12],
        "device": device_name(),
        "versions": f"Python {python}, torch {torch.__version__}, {PEER}",
    }


def main(arguments: list[str]) -> None:
    """Measures the cases that are missing, prints and writes each."""
    torch.set_num_threads(1)
    now = stamp()
    figures: dict[str, Any] = {**now, "command": "python -m benchmarks.overhead", "cases": {}}
    if RESULT.exists() and "--fresh" not in arguments:
        before = read_json(RESULT)
        if all(before.get(key) == value for key, value in now.items()):
            figures["cases"] = before["cases"]
    words = [word for word in arguments if not word.startswith("-")]
    for name, run in cases():
        asked = all(kind in words or kind not in name for kind in ("default-axes", "kernel"))
        if name in figures["cases"] or not asked or not all(word in name for word in words):
            continue
        row = run()
        figures["cases"][name] = row | {"date": time.strftime("%Y-%m-%d %H:%M")}
        write_json(RESULT, figures)
        print(f"{name}: {_line(row)}", flush=True)


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed'].strip().splitlines()[-1]}"
    kinds = [k for k in ("forward", "forward_entered", "step") if k in row]
    parts = [f"{k.replace('_', ', ')} {row[k]['ratio']:.3f}" for k in kinds]
    alike = f"A/A {row['forward_aa']['ratio']:.3f} and {row['step_aa']['ratio']:.3f}"
    return f"{', '.join(parts)} ({alike})"


if __name__ == "__main__":
    main(sys.argv[1:])
