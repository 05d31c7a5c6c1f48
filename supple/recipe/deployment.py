"""The deploy stages: one for each size, from the supernet to files that were checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import supple
from supple.cost.count import count
from supple.cost.measure import with_batch
from supple.errors import BudgetError, CheckpointError
from supple.files import checksum, read_tensors, write_tensors
from supple.recipe.bench import Bench
from supple.recipe.latency import latency_inputs, prediction
from supple.recipe.schema import Budget
from supple.recipe.stage import Outcome, Record, RunFolder, written_once
from supple.space import Config
from supple.study.front import Front
from supple.study.objectives import goes_down
from supple.technique import from_settings
from supple.training.batches import example_of
from supple.training.seeds import generator

__all__ = [
    "FULL",
    "best_within",
    "choose",
    "config_of",
    "deploy_size",
    "measured",
    "read_example",
    "save_example",
]

FULL, EXAMPLE = "full", "example.safetensors"


def choose(bench: Bench, front: Front, budget: Budget) -> Config:
    """Picks the best evaluated size within a budget.

    Args:
        bench: The run's parts.
        front: What the search found.
        budget: The bounds.

    Raises:
        BudgetError: No size meets them; the message names the nearest.
    """
    try:
        return best_within(bench, front, budget.where)
    except BudgetError as error:
        raise type(error)(f"budget {budget.name!r}: {error}") from error


def best_within(bench: Bench, front: Front, where: Mapping[str, str]) -> Config:
    """The evaluated size within bounds that does best on the validation set.

    Args:
        bench: The run's parts.
        front: What the search found.
        where: Bounds by cost or figure.

    Raises:
        BudgetError: No size meets them; the message names the nearest.
    """
    if goes_down(bench.target):
        return front.best(where=where, minimize=bench.target)
    return front.best(where=where, maximize=bench.target)


def deploy_size(
    bench: Bench,
    run: RunFolder,
    name: str,
    config: Config,
    train: Record,
    *,
    where: dict[str, str] | None = None,
) -> Record:
    """Extracts a size, judges it on the test set, compresses, measures, saves and exports it.

    Args:
        bench: The run's parts, trained.
        run: The run's folder.
        name: `"full"` or the budget's name.
        config: The size.
        train: The training stage.
        where: The budget.

    Returns:
        The stage's record: `config`, `elastic` and perhaps `compressed` (figures on the test
        set), `costs`, `latency`, `spread`, `memory`, `device`, `file_bytes`, `files`, and
        where a latency model was used `predicted` (`seconds`, and its `error`).

    Raises:
        ExportError: A format refused the network (the message names the operator), or the
            written file computes something else.
    """
    deploy = bench.recipe.deploy
    inputs = {
        "train": train.digest,
        "config": dict(config),
        "where": where or {},
        "compress": [choice.model_dump(mode="json") for choice in deploy.compress],
        "export": list(deploy.export),
        "recalibration_batches": bench.recipe.search.recalibration_batches,
        "metric": bench.metric,
        **latency_inputs(bench.recipe),
    }

    def work(folder: Path) -> Outcome:
        bench.recalibrate(config)
        module = bench.net.extract(config).eval()
        figures = {"elastic": _test(bench, module)}
        if deploy.compress:
            module = _compressed(bench, module)
            figures["compressed"] = _test(bench, module)
        args, kwargs = _inputs(bench)
        supple.save(module, folder / "network")
        save_example(bench, folder)
        weights = [path for path in sorted((folder / "network").rglob("*")) if path.is_file()]
        made_from = {path.name: checksum(path.read_bytes()) for path in weights}
        files = [
            written_once(
                folder / f"network.{form}",
                made_from,
                lambda path: supple.export(module, path, args, kwargs),
            )
            for form in deploy.export
        ]
        result = {"config": dict(config), "where": where or {}, **figures}
        result |= measured(module, args, kwargs)
        predicted = None if deploy.compress else prediction(bench, config)
        if predicted is not None:
            result["predicted"] = predicted
        result["file_bytes"] = sum(
            path.stat().st_size for path in weights if path.suffix == ".safetensors"
        )
        result["files"] = [str(path.relative_to(run.path)) for path in files]
        beside = [path.with_suffix(".bin") for path in files if path.suffix == ".xml"]
        return Outcome(result, (*weights, *files, *beside))

    return run.perform(f"deploy/{name}", inputs, work)


def config_of(record: Record) -> Config:
    """The size that a deploy stage deployed."""
    return Config(record.result["config"])


def save_example(bench: Bench, folder: Path) -> None:
    """Writes one test example beside a network, for whoever wants to run or export it.

    Args:
        bench: The run's parts.
        folder: Where `example.safetensors` goes.
    """
    write_example(folder, *_inputs(bench))


def write_example(folder: Path, args: Sequence[Tensor], kwargs: Mapping[str, Tensor]) -> Path:
    """Writes one example beside a network, for whoever wants to run or export it.

    Args:
        folder: Where `example.safetensors` goes.
        args: Inputs by position.
        kwargs: Inputs by name.

    Returns:
        The file.
    """
    named = {str(place): tensor for place, tensor in enumerate(args)} | dict(kwargs)
    write_tensors(folder / EXAMPLE, named)
    return folder / EXAMPLE


def read_example(network: Path) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Reads the example beside or inside a network's folder.

    Args:
        network: The folder of a saved network.

    Returns:
        `args` and `kwargs`.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    places = (network.parent / EXAMPLE, network / EXAMPLE)
    found = next((path for path in places if path.exists()), None)
    if found is None:
        raise CheckpointError(
            f"{network} has no {EXAMPLE} in it or beside it; tell what the network is given, "
            "such as --input 1x3x32x32"
        )
    tensors, _ = read_tensors(found)
    positions = sorted((name for name in tensors if name.isdigit()), key=int)
    args = tuple(tensors.pop(name) for name in positions)
    return args, tensors


def _test(bench: Bench, module: nn.Module) -> dict[str, float]:
    return bench.task.evaluate(module, bench.splits.test.batches())


def _compressed(bench: Bench, module: nn.Module) -> nn.Module:
    """Applies the recipe's transforms in their order."""
    for index, choice in enumerate(bench.recipe.deploy.compress):
        transform = from_settings(choice.key, choice.settings)
        module = transform.apply(
            module,
            calibration=bench.calibration,
            loss=bench.task.loss,
            generator=generator(bench.recipe.seed, "compress", index),
        )
    return module.eval()


def _inputs(bench: Bench) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One example, as the deployed network will see it."""
    args, kwargs = example_of(bench.splits.test.example(1))
    return with_batch(1, args, kwargs)


def measured(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Counts and measures a network on one example: costs, latency, memory, device."""
    found = supple.measure(module, args, kwargs)
    assert found.latency is not None
    return {
        "costs": count(module, args, kwargs),
        "latency": found.latency.median,
        "spread": found.latency.spread,
        "memory": found.memory,
        "device": found.device,
    }
