"""Ways to train one network for every size, side by side at equal numbers of passes.

Two tasks, each a *cell* per method and seed:

- `cifar`: a MobileNetV3-like network from scratch on 10,000 CIFAR-10 images of 16 x 16 pixels,
  three seeds, 3,600 forward-backward passes of 64 images;
- `llama`: a pretrained Llama of 5.5 M parameters fine-tuned on WikiText, one seed, 240 passes
  of eight blocks of 64 tokens.

All methods have the same network, data, order, optimizer and number of passes (forwards of
frozen teachers are extra, and show in the seconds). Five sizes of a nested chain from the
smallest to the largest are scored on the test set, with recalibrated statistics. *Alone* trains
each of them by itself, with a quarter of the passes: as many steps as a method with four passes
per step makes. A method that suggests a learning-rate schedule keeps it, the others have a
cosine; the peak rate is the same for all. A pass of sortednet is of a quarter of a batch: its
micro-steps share one. Techniques that make another network than the sizes compared here are
not in the table: supertickets (sparse masks), sorted-llama (depths only), lighthubert (masked
frames), controllable-multitask (several tasks).

`python -m benchmarks.supernet` measures the cells that are missing, one per core at a time,
writes `benchmarks/results/supernet.json` after each, and a picture per task into `docs/images`.
Words choose cases: `python -m benchmarks.supernet cifar bignas`.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from cycler import cycler
from matplotlib.colors import TABLEAU_COLORS
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn import functional as F

from supple.axes.depth import Depth
from supple.axes.width import Width
from supple.cost.measure import device_name
from supple.data.base import Dataset, Splits, find, load
from supple.errors import SuppleError, SuppleWarning
from supple.files import read_json, write_json
from supple.models.base import build
from supple.network import Elastic, elastic
from supple.space import Config
from supple.supernet.base import PhasedSampler, nested_chain
from supple.technique import from_settings
from supple.training.loop import train
from supple.training.recalibrate import recalibrate
from supple.training.seeds import generator, kept

HERE = Path(__file__).parent
RESULT = HERE / "results" / "supernet.json"
IMAGES = HERE.parent / "docs" / "images"
ALONE = "alone"
SIZES = 5
RECALIBRATION = 20

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A network, its data, and the methods that can train it.

    Args:
        passes: Forward and backward passes that a method may make.
        seeds: One cell each.
        lr: Peak learning rate of AdamW.
        metric: What is scored; `perplexity` is better when lower.
        methods: Name in the table -> settings, and how many passes a step makes.
    """

    passes: int
    seeds: tuple[int, ...]
    lr: float
    metric: str
    methods: Mapping[str, tuple[str, Settings, float]]


SHARED: dict[str, tuple[str, Settings, float]] = {
    "bignas": ("supernet/bignas", {}, 4),
    "deps": ("supernet/deps", {}, 2.33),
    "elasticvit": ("supernet/elasticvit", {}, 4),
    "shiftnas": ("supernet/shiftnas", {}, 2),
    "few-shot-nas-gm": ("supernet/few-shot-nas-gm", {"repeats": 5}, 4),
    "mixture-of-supernets": ("supernet/mixture-of-supernets", {}, 1),
    "balanced-supernets": ("supernet/balanced-supernets", {"where": "*depth"}, 1),
    "pa-da": ("supernet/pa-da", {}, 1),
    "sortednet": ("supernet/sortednet", {"micro_steps": 4}, 4),
    "variant": ("supernet/variant", {}, 1),
}
FROM_SCRATCH: dict[str, tuple[str, Settings, float]] = {
    "once-for-all": ("supernet/once-for-all", {}, 2.08),
    "efficienttdnn": ("supernet/efficienttdnn", {}, 1),
}
PRETRAINED: dict[str, tuple[str, Settings, float]] = {
    "instatune": ("supernet/instatune", {}, 2),
    "llama-nas": ("supernet/llama-nas", {}, 1.5),
    "autodistil": ("supernet/autodistil", {}, 4),
    "vit-resnas": ("supernet/vit-resnas", {}, 1),
}
TASKS = {
    "cifar": Task(
        passes=3600,
        seeds=(0, 1, 2),
        lr=3e-3,
        metric="accuracy",
        methods=SHARED | FROM_SCRATCH,
    ),
    "llama": Task(
        passes=240,
        seeds=(0,),
        lr=3e-4,
        metric="perplexity",
        methods=SHARED | PRETRAINED,
    ),
}


# --- tasks ------------------------------------------------------------------------------------


@cache
def data(task: str) -> Splits:
    """Loads a task's data."""
    if task == "cifar":
        found = load(
            "images",
            path="cifar10",
            size=16,
            mean=(0.491, 0.482, 0.447),
            std=(0.247, 0.243, 0.262),
            batch_size=64,
        )
        return Splits(
            train=found.train.first(10_000),
            validation=found.validation.first(2000),
            test=found.test,
            classes=10,
        )
    return load(
        "text",
        path="text/wikitext2-valid.txt",
        tokenizer=find("llama-tiny"),
        length=64,
        batch_size=8,
        test=0.2,
    )


def mobilenet(seed: int) -> nn.Module:
    """Builds a network for images of 16 x 16."""
    with kept(seed):
        return build(
            "mobilenet-v3",
            stages=[
                {"channels": 16, "blocks": 2, "expansion": 2, "stride": 2},
                {"channels": 32, "blocks": 3, "expansion": 3, "stride": 2},
            ],
            hidden=64,
            image_size=16,
        )


def network(task: str, seed: int) -> Elastic:
    """Builds a task's elastic network."""
    axes = [Width((0.25, 0.5, 0.75, 1.0)), Depth()]
    if task == "cifar":
        example = data(task).train.example()[0]
        return elastic(mobilenet(seed), example, axes=axes, verify=False)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(find("llama-tiny"))
    axes = [Width((0.25, 0.5, 0.75, 1.0), where="*.mlp.*"), Depth((3, 4, 5, 6))]
    example = data(task).train.example()
    return elastic(model, kwargs={"input_ids": example["input_ids"]}, axes=axes, verify=False)


def loss(output: Any, batch: Any) -> torch.Tensor:
    """Gives the cross-entropy to labels, or to the next tokens."""
    if isinstance(batch, Mapping):
        logits, labels = output.logits[:, :-1], batch["labels"][:, 1:]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    return F.cross_entropy(output, batch[1])


@torch.no_grad()
def score(task: str, module: nn.Module, test: Dataset) -> float:
    """Gives the accuracy, or the perplexity per token."""
    module.eval()
    if task == "cifar":
        right = sum(int((module(x).argmax(1) == y).sum()) for x, y in test.batches())
        return right / test.examples
    losses = [
        loss(module(input_ids=b["input_ids"]), b).item() * len(b["labels"])
        for b in test.batches()
    ]
    return float(torch.tensor(sum(losses) / test.examples).exp())


def sizes(net: Elastic) -> list[Config]:
    """Gives the sizes that are compared, the smallest first."""
    return nested_chain(net.space, SIZES)


# --- cells ------------------------------------------------------------------------------------


def cell(task: str, method: str, seed: int) -> dict[str, Any]:
    """Trains by one method, or each size alone, and scores five sizes."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", SuppleWarning)
    start, used = time.perf_counter(), time.process_time()
    run = _alone if method == ALONE else _together
    row = run(task, method, seed)
    return row | {
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def _together(task: str, method: str, seed: int) -> dict[str, Any]:
    what, splits, net = TASKS[task], data(task), network(task, seed)
    key, settings, each = what.methods[method]
    rule = from_settings(key, settings)
    own = rule.schedule() is not None or isinstance(
        rule.sampler(net.space, generator(0)), PhasedSampler
    )
    history = train(
        net,
        splits.train,
        loss,
        method=rule,
        steps=round(what.passes / each),
        schedule=None if own else "cosine",
        **_common(task, seed),
    )
    scores = []
    for config in sizes(net):
        if net.has_running_statistics():
            recalibrate(net, config, splits.train, batches=RECALIBRATION)
        net.eval()
        with net.at(config):
            scores.append(score(task, net.module, splits.test))
    return {"scores": scores, "passes": history.rows[-1]["passes"]}


def _alone(task: str, method: str, seed: int) -> dict[str, Any]:
    what, splits = TASKS[task], data(task)
    scores, steps = [], what.passes // 4
    chosen = sizes(network(task, seed))
    for config in chosen:
        alone = network(task, seed).extract(config)
        train(alone, splits.train, loss, steps=steps, schedule="cosine", **_common(task, seed))
        scores.append(score(task, alone, splits.test))
    return {"scores": scores, "passes": steps * len(chosen)}


def _common(task: str, seed: int) -> dict[str, Any]:
    """What all trainings of a task have in common."""
    what = TASKS[task]
    shared: dict[str, Any] = {"lr": what.lr, "weight_decay": 0.05, "warmup": 0.03, "clip": 5.0}
    if task == "llama":
        shared["forward"] = lambda model, batch: model(input_ids=batch["input_ids"])
    return shared | {"seed": seed, "log_every": 50, "progress": False}


def missing(words: Sequence[str], figures: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yields the cells that were asked for and are not there, or are of other code."""
    for task, what in TASKS.items():
        for seed, method in itertools.product(what.seeds, (ALONE, *what.methods)):
            old = figures["cells"].get(f"{task}/{method}/{seed}", {})
            asked = all(word in (task, method) for word in words)
            if asked and old.get("code") != code_of(task, method):
                yield task, method, seed


def code_of(task: str, method: str) -> str:
    """Says of which code a cell is: the method's file, its settings, and the task."""
    what = TASKS[task]
    return code(what.methods.get(method, ("", {}, 4)), f"{what.passes} {what.lr}")


def code(method: tuple[str, Settings, float], budget: object) -> str:
    """Gives a digest of a method's file and settings, and of the budget it was run with."""
    key, settings, each = method
    file = HERE.parent / "supple" / f"{key.replace('-', '_')}.py"
    content = file.read_bytes() if key else b""
    text = f"{budget} {sorted(settings.items())} {each}"
    return hashlib.sha256(text.encode() + content).hexdigest()[:12]


# --- what is shown ----------------------------------------------------------------------------


def summary(figures: Mapping[str, Any], task: str) -> list[dict[str, Any]]:
    """Gives a row per method: mean score and spread over seeds by size, and its cost."""
    rows = []
    for method in (ALONE, *TASKS[task].methods):
        cells = [
            figures["cells"][f"{task}/{method}/{seed}"]
            for seed in TASKS[task].seeds
            if "scores" in figures["cells"].get(f"{task}/{method}/{seed}", {})
        ]
        if cells:
            by_size = list(zip(*(each["scores"] for each in cells), strict=True))
            rows.append(
                {
                    "method": method,
                    "seeds": len(cells),
                    "scores": [statistics.fmean(column) for column in by_size],
                    "spread": [
                        statistics.stdev(column) if len(column) > 1 else 0.0
                        for column in by_size
                    ],
                    "passes": cells[0]["passes"],
                    "seconds": statistics.median(each["cpu_seconds"] for each in cells),
                }
            )
    return rows


def shown(task: str, value: float) -> str:
    """Writes a score as text."""
    return f"{100 * value:.1f}" if TASKS[task].metric == "accuracy" else f"{value:.1f}"


def table(figures: Mapping[str, Any], task: str) -> Table:
    """Gives the table of a task."""
    macs = figures["macs"][task]
    named = Table(
        "method",
        *(f"{value / 1e6:.2f} M" for value in macs),
        "mean",
        "passes",
        "seconds",
        title=f"{task}: {TASKS[task].metric} by MACs",
    )
    for row in summary(figures, task):
        mean = statistics.fmean(row["scores"])
        named.add_row(
            row["method"],
            *(shown(task, value) for value in row["scores"]),
            shown(task, mean),
            f"{row['passes']:,}",
            f"{row['seconds']:.0f}",
        )
    return named


def picture(figures: Mapping[str, Any], task: str) -> Figure:
    """Draws the score of each method minus that of the sizes trained alone, by MACs."""
    figure = Figure(figsize=(8.4, 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(linestyle=["-", "--"]) * cycler(color=list(TABLEAU_COLORS)))
    rows = {row["method"]: row for row in summary(figures, task)}
    base = rows.pop(ALONE)["scores"]
    scale = 100 if TASKS[task].metric == "accuracy" else 1
    for method, row in rows.items():
        gaps = [scale * (a - b) for a, b in zip(row["scores"], base, strict=True)]
        axes.plot(figures["macs"][task], gaps, marker="o", ms=4, lw=1.4, label=method)
    axes.axhline(0, color="black", lw=0.8)
    if scale == 1:
        axes.set_yscale("symlog", linthresh=10)  # one method is far off the others
    axes.set_xscale("log")
    axes.set_xlabel("multiply-accumulates")
    unit = ", points" if scale == 100 else ""
    axes.set_ylabel(f"{TASKS[task].metric} less that of each size alone{unit}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    return figure


def main(words: list[str]) -> None:
    """Measures what is missing, writes and shows all."""
    figures: dict[str, Any] = {"cells": {}, "macs": {}}
    if RESULT.exists() and "--fresh" not in words:
        figures |= read_json(RESULT)
    figures |= {"command": "python -m benchmarks.supernet", "device": device_name()}
    words = [word for word in words if not word.startswith("-")]
    jobs = list(missing(words, figures))
    for task in {task for task, *_ in jobs}:
        net = network(task, 0)
        figures["macs"][task] = [float(m) for m in net.costs(sizes(net))["macs"]]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context) as pool:
        running = {pool.submit(cell, *job): job for job in jobs}
        for done in as_completed(running):
            task, method, seed = running[done]
            try:
                row = done.result()
            except SuppleError as error:
                row = {"failed": str(error)}
            figures["cells"][f"{task}/{method}/{seed}"] = row | {"code": code_of(task, method)}
            figures["tables"] = {name: summary(figures, name) for name in figures["macs"]}
            write_json(RESULT, figures)
            scores = " ".join(shown(task, value) for value in row.get("scores", ()))
            print(f"{task} {method} {seed}: {scores or row['failed']}", flush=True)
    for task in figures["macs"]:
        Console().print(table(figures, task))
        IMAGES.mkdir(exist_ok=True)
        picture(figures, task).savefig(IMAGES / f"supernet-{task}.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
