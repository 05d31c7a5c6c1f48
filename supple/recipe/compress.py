"""Runs a recipe that makes one trained network smaller: step by step, all in one folder.

Each step is a stage (`supple.recipe.stage`) whose folder holds the network that came out, so
that an interrupted run goes on where it was. After each step the network is judged on the test
set and measured.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.optim import Optimizer

import supple
from supple.cost.measure import device_name, with_batch
from supple.data.base import Splits
from supple.deploy.engines import Trial, deploy
from supple.errors import SettingError
from supple.files import write_text
from supple.masks import MaskSet
from supple.recipe.baselines import technique_named
from supple.recipe.bench import (
    data_prints,
    load_splits,
    missing_extras,
    print_of,
    source_of,
    threads,
)
from supple.recipe.deployment import measured, write_example
from supple.recipe.dump import recipe_text
from supple.recipe.models import ModelSource
from supple.recipe.schema import Choice, Compression, Step, Tune
from supple.recipe.stage import Outcome, Record, RunFolder, written_once
from supple.recipe.supernet import training_settings
from supple.recipe.tasks import Task, task_of
from supple.report.engines import Engines
from supple.report.steps import StepsSummary, write_steps
from supple.technique import Rule, Transform
from supple.training.batches import example_of, run_model
from supple.training.companion import Companion, CompanionRule
from supple.training.losses import logits_of, soft_cross_entropy
from supple.training.seeds import generator
from supple.training.step import module_of

__all__ = ["Compressed", "run_compression"]

NETWORK, DEPLOYED = "network", "deployed"


@dataclass(frozen=True)
class Compressed:
    """What a run came to.

    Args:
        folder: The run's folder.
        summary: Its figures, step by step.
        report: The page.
        network: The folder of the network that came out.
        files: What it was exported to.
    """

    folder: Path
    summary: StepsSummary
    report: Path
    network: Path
    files: tuple[Path, ...]


def run_compression(
    recipe: Compression,
    *,
    allow_code: bool = False,
    console: Console | None = None,
    progress: bool = True,
) -> Compressed:
    """Runs a recipe from a trained network to a smaller one, its files and their report.

    Everything goes to `<output>/<name>`. A step that was finished from the same inputs is taken
    from its record.

    Args:
        recipe: The recipe.
        allow_code: Whether `module:callable` may be run.
        console: Where steps are announced; nowhere by default.
        progress: Whether progress bars are shown.

    Returns:
        Folder, figures, page and files.

    Raises:
        SuppleError: Something can't be done; the message says what would do.
    """
    missing_extras(recipe.export)
    run = RunFolder(Path(recipe.output) / recipe.name)
    told = console or Console(quiet=True)
    with run.claimed(), threads(recipe.threads):
        write_text(run.path / "recipe.yaml", recipe_text(recipe))
        work = _Work.of(recipe, run, allow_code, progress)
        steps = [_Line.said(told, "start", recipe.model.key, work.start)]
        for index, step in enumerate(recipe.compress):
            name, what = _named(index, step)
            do = functools.partial(work.step, name, step, index, steps[-1])
            steps.append(_Line.said(told, name, what, do))
        exported = work.export(steps[-1])
        engines = work.deploy(steps[0], steps[-1]) if recipe.engines else None
        summary = _summary(work, steps, exported, engines)
        report, *_ = write_steps(summary, run.path)
    files = tuple(run.path / name for name in exported.result["files"])
    return Compressed(run.path, summary, report, steps[-1].record.folder / NETWORK, files)


@dataclass(frozen=True)
class _Line:
    """A finished step, as it is told."""

    name: str
    what: str
    record: Record

    @classmethod
    def said(cls, console: Console, name: str, what: str, work: Callable[[], Record]) -> _Line:
        console.print(f"[bold]{escape(name):8}[/bold] {escape(what)}", highlight=False)
        record = work()
        figures = ", ".join(f"{k} {v:.4g}" for k, v in record.result["figures"].items())
        took = "from the earlier run" if record.reused else f"{record.seconds:.1f} s"
        console.print(
            f"         [green]✓[/green] [dim]{figures}, {took}[/dim]", highlight=False
        )
        return cls(name, what, record)


def _named(index: int, step: Step) -> tuple[str, str]:
    """Name of a step's stage, and what to say of it."""
    if step.technique is not None:
        return f"{index + 1}-{step.technique.key.replace('/', '-')}", _told(step.technique)
    assert step.train is not None
    train = step.train
    length = f"{train.epochs} epochs" if train.epochs else f"{train.steps} steps"
    rule = _told(train.technique) + ", " if train.technique is not None else ""
    return f"{index + 1}-train", f"{rule}{length}"


def _told(choice: Choice) -> str:
    given = ", ".join(f"{name}={value}" for name, value in choice.settings.items())
    return f"{choice.key}({given})"


@dataclass(frozen=True, kw_only=True)
class _ZerosKept(CompanionRule):
    """Plain training in which weights that are zero stay zero."""

    def attach(self, net: Any, optimizer: Optimizer, *, steps: int, **_: Any) -> Companion:
        MaskSet.of_zeros(module_of(net)).attach(optimizer)
        return Companion(optimizer, steps)


@dataclass
class _Work:
    """What the steps work on; the network itself is loaded when a step needs it."""

    recipe: Compression
    run: RunFolder
    splits: Splits
    task: Task
    source: ModelSource
    progress: bool
    held: tuple[str, nn.Module] | None = None

    @classmethod
    def of(cls, recipe: Compression, run: RunFolder, allow_code: bool, progress: bool) -> _Work:
        splits = load_splits(recipe)
        source = source_of(recipe, splits, allow_code)
        return cls(recipe, run, splits, task_of(splits.train.example()), source, progress)

    @functools.cached_property
    def calibration(self) -> list[Any]:
        """The training batches that transforms may look at."""
        return list(islice(self.splits.train.epoch(0), self.recipe.calibration_batches))

    @property
    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """One example, as the deployed network will see it."""
        return with_batch(1, *example_of(self.splits.test.example(1)))

    def start(self) -> Record:
        """The network as it was given."""
        recipe = self.recipe
        inputs = {
            "seed": recipe.seed,
            "model": recipe.model.model_dump(mode="json"),
            "model_files": [print_of(path) for path in self.source.files],
            "data": recipe.data.model_dump(mode="json"),
            "data_files": data_prints(recipe.data),
            "batch_size": recipe.batch_size,
            "threads": recipe.threads,
        }
        return self._perform("start", inputs, lambda folder: self._original())

    def _original(self) -> nn.Module:
        return self.source.build(self.recipe.seed).eval()

    def step(self, name: str, step: Step, index: int, before: _Line) -> Record:
        """One step, from the network that the step before left."""
        inputs = {
            "before": before.record.digest,
            "step": step.model_dump(mode="json"),
            "calibration_batches": self.recipe.calibration_batches,
        }

        def work(folder: Path) -> nn.Module:
            model = self._network(before.record)
            if step.technique is not None:
                return self._transformed(model, step.technique, index)
            assert step.train is not None
            return self._trained(model, step.train, folder)

        return self._perform(name, inputs, work)

    def _transformed(self, model: nn.Module, choice: Choice, index: int) -> nn.Module:
        transform = technique_named(choice.key, choice.settings)
        assert isinstance(transform, Transform)
        return transform.apply(
            model,
            calibration=self.calibration,
            loss=self.task.loss,
            generator=generator(self.recipe.seed, "compress", index),
        )

    def _trained(self, model: nn.Module, tune: Tune, folder: Path) -> nn.Module:
        choice = tune.technique
        rule = None if choice is None else technique_named(choice.key, choice.settings)
        net: Any = model
        if rule is None and tune.keep_zeros:
            rule = _ZerosKept()
        if isinstance(rule, CompanionRule):
            net = rule.wrap(model, *example_of(self.splits.train.example(2)))
        elif rule is not None:
            raise SettingError(
                f"{rule.key} trains a supernet; a step of a compression trains one network, "
                "with techniques such as prune/hesso"
            )
        supple.train(
            net,
            self.splits.train,
            self._loss(tune),
            method=rule if isinstance(rule, Rule) else None,
            epochs=tune.epochs or 1,
            steps=tune.steps,
            lr=tune.lr,
            checkpoint=folder / "checkpoint",
            checkpoint_every=tune.checkpoint_every,
            progress=self.progress,
            seed=self.recipe.seed,
            **training_settings(tune),
        )
        assert isinstance(rule, CompanionRule | None)
        return model if rule is None else rule.finished(net)

    def _loss(self, tune: Tune) -> Callable[[Any, Any], Tensor]:
        """The task's loss, mixed with what the network given at the start says."""
        if not tune.distill:
            return self.task.loss
        teacher = copy.deepcopy(self._network(self.run.records["start"]))
        teacher.eval().requires_grad_(False)
        weight, labels = tune.distill, self.task.loss

        def mixed(output: Any, batch: Any) -> Tensor:
            said = logits_of(run_model(teacher, batch))
            taught = soft_cross_entropy(logits_of(output), said)
            return (1 - weight) * labels(output, batch) + weight * taught

        return mixed

    def export(self, last: _Line) -> Record:
        """Writes the network that came out in the formats that were asked for."""
        inputs = {"before": last.record.digest, "export": list(self.recipe.export)}

        def work(folder: Path) -> Outcome:
            args, kwargs = self.example
            files = [
                written_once(
                    folder / f"network.{form}",
                    inputs,
                    lambda path: supple.export(self._network(last.record), path, args, kwargs),
                )
                for form in self.recipe.export
            ]
            beside = [path.with_suffix(".bin") for path in files if path.suffix == ".xml"]
            told = [str(path.relative_to(self.run.path)) for path in files]
            return Outcome({"files": told}, (*files, *beside))

        return self.run.perform("export", inputs, work)

    def deploy(self, first: _Line, last: _Line) -> Engines:
        """Tries the engines that were asked for, and writes the network for the fastest.

        The network as it was given is tried, too, to tell how much faster it became.
        """
        engines, threads = self.recipe.engines, self.recipe.threads or 1
        inputs = {
            "before": last.record.digest,
            "engines": list(engines),
            "threads": threads,
            "device": device_name(threads=threads),
        }
        chosen = None if "auto" in engines else engines

        def tried(line: _Line, place: Path) -> list[Trial]:
            network, (args, kwargs) = self._network(line.record), self.example
            return deploy(network, place, args, kwargs, engines=chosen, threads=threads)

        def work(folder: Path) -> Outcome:
            place = folder / DEPLOYED
            trials = tried(last, place)
            with tempfile.TemporaryDirectory() as beside:
                before = tried(first, Path(beside) / DEPLOYED)
            files = tuple(path for path in sorted(place.rglob("*")) if path.is_file())
            result = {"trials": [vars(one) for one in trials]}
            return Outcome(result | {"before": [vars(one) for one in before]}, files)

        found = self.run.perform("deploy", inputs, work).result
        trials, before = ([Trial(**one) for one in found[key]] for key in ("trials", "before"))
        return Engines(tuple(trials), tuple(before))

    def _perform(
        self, name: str, inputs: Mapping[str, Any], make: Callable[[Path], nn.Module]
    ) -> Record:
        """Makes a network, saves, judges and measures it."""

        def work(folder: Path) -> Outcome:
            module = make(folder).eval()
            supple.save(module, folder / NETWORK)
            self.held = (name, module)
            files = [p for p in sorted((folder / NETWORK).rglob("*")) if p.is_file()]
            weights = [p for p in files if p.suffix == ".safetensors"]
            files.append(write_example(folder, *self.example))
            figures = self.task.evaluate(module, self.splits.test.batches())
            result = {
                "figures": figures,
                "zeros": _zeros(module),
                **measured(module, *self.example),
                "file_bytes": sum(path.stat().st_size for path in weights),
            }
            return Outcome(result, tuple(files))

        return self.run.perform(name, inputs, work)

    def _network(self, record: Record) -> nn.Module:
        if self.held is None or self.held[0] != record.name:
            module = supple.load(record.folder / NETWORK, model=self._structure())
            self.held = (record.name, module)
        return self.held[1]

    def _structure(self) -> nn.Module | None:
        """What a file does not tell: the structure of a network of the user's own code."""
        return self._original() if ":" in self.recipe.model.key else None


def _zeros(module: nn.Module) -> float:
    """Share of the weights (tensors of at least two dimensions) that are exactly zero."""
    weights = [p for p in module.parameters() if p.dim() > 1]
    total = sum(p.numel() for p in weights)
    return sum(int((p == 0).sum()) for p in weights) / total if total else 0.0


def _summary(
    work: _Work, steps: list[_Line], exported: Record, engines: Engines | None
) -> StepsSummary:
    lines = [
        {"name": line.name, "what": line.what, "seconds": line.record.seconds}
        | line.record.result
        for line in steps
    ]
    return StepsSummary(
        name=work.recipe.name,
        metric=work.task.metric,
        tests=work.splits.test.examples,
        steps=tuple(lines),
        files=tuple(exported.result["files"]),
        engines=engines,
        device=steps[0].record.result["device"],
        recipe=recipe_text(work.recipe),
    )
