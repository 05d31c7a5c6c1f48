"""`supple prune` and `supple quantize`: one network made smaller by one technique."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from supple.cli.errors import plain_errors
from supple.errors import SettingError

if TYPE_CHECKING:
    from supple.recipe.compress import Compressed

__all__ = ["COMMANDS", "compressed", "print_compressed", "prune", "quantize"]

Model = Annotated[
    str,
    typer.Argument(
        help="A saved network's folder, a key of supple/models, a transformers class, or "
        "module:callable."
    ),
]
ModelSettings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[SETTING=VALUE]...", help="Settings of the model."),
]
Method = Annotated[
    str,
    typer.Option(
        metavar="KEY[:NAME=VALUE,...]",
        help="The technique and its settings, such as prune/global-mp:sparsity=0.8 or "
        "quantize/awq:bits=4, or a baseline, such as units/fisher or codes/gptq.",
    ),
]
Data = Annotated[
    str,
    typer.Option(
        metavar="KEY[:NAME=VALUE,...]",
        help="The data and its settings, such as digits or images:path=cifar10.",
    ),
]
Steps = Annotated[
    int, typer.Option(help="Training steps: for techniques that train, else afterwards.")
]
Lr = Annotated[float, typer.Option(help="Peak learning rate of these steps.")]
Distill = Annotated[
    float, typer.Option(help="Weight of the given network's outputs as labels, 0 to 1.")
]
Export = Annotated[
    list[str] | None, typer.Option(help="Formats to export to: onnx, pt2 or xml.")
]
Name = Annotated[str | None, typer.Option(help="Name of the run's folder.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder that holds the runs.")]
Seed = Annotated[int, typer.Option(help="Where every random choice starts.")]
Batch = Annotated[int, typer.Option(help="Examples in one batch.")]


@plain_errors
def prune(
    model: Model,
    settings: ModelSettings = None,
    *,
    method: Method,
    data: Data,
    target: Annotated[
        str | None,
        typer.Option(help="What is to be left, such as macs=50% or latency[batch=1]=2ms."),
    ] = None,
    steps: Steps = 0,
    lr: Lr = 1e-3,
    distill: Distill = 0.0,
    batch_size: Batch = 64,
    export: Export = None,
    name: Name = None,
    output: Output = Path("runs"),
    seed: Seed = 0,
) -> None:
    """Prune a network: by a technique at once, or while it trains.

    Everything goes to one folder; the same command goes on where a run was interrupted.
    """
    key, own = _choice(method)
    if target is not None:
        own["target"] = target
    compressed(
        model, settings, key, own, data, steps, lr, distill, batch_size, export, name, output,
        seed, room="prune", baselines=("weights", "units"),
    )  # fmt: skip


@plain_errors
def quantize(
    model: Model,
    settings: ModelSettings = None,
    *,
    method: Method,
    data: Data,
    steps: Steps = 0,
    lr: Lr = 1e-3,
    distill: Distill = 0.0,
    batch_size: Batch = 64,
    export: Export = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="auto, or engines parted by commas: try them on this machine, and write the "
            "network for the fastest."
        ),
    ] = None,
    name: Name = None,
    output: Output = Path("runs"),
    seed: Seed = 0,
) -> None:
    """Quantize a network to few bits: after training, or while it trains.

    Everything goes to one folder; the same command goes on where a run was interrupted.
    """
    key, own = _choice(method)
    compressed(
        model, settings, key, own, data, steps, lr, distill, batch_size, export, name, output,
        seed, room="quantize", baselines=("codes", "qat"),
        engines=engine.split(",") if engine else (),
    )  # fmt: skip


def compressed(
    model: str,
    settings: list[str] | None,
    key: str,
    own: dict[str, Any],
    data: str,
    steps: int,
    lr: float,
    distill: float,
    batch_size: int,
    export: list[str] | None,
    name: str | None,
    output: Path,
    seed: int,
    *,
    room: str,
    baselines: Sequence[str] = (),
    engines: Sequence[str] = (),
) -> None:
    """Runs a compression of one technique and perhaps fine-tuning, and prints its table."""
    from supple.recipe.baselines import technique_named
    from supple.recipe.compress import run_compression
    from supple.recipe.load import Source, checked_compression

    if key.partition("/")[0] not in (room, *baselines):
        names = ", ".join(f"{one}/..." for one in (room, *baselines))
        raise SettingError(f"--method wants one of {names}, got {key!r}; see supple techniques")
    technique = technique_named(key, own)
    train: dict[str, Any] = {"steps": steps, "lr": lr, "distill": distill}
    if technique.kind == "rule":
        if not steps:
            raise SettingError(f"{key} works while the network trains: give --steps")
        ways: list[Any] = [{"train": {key: own, **train}}]
    elif technique.kind == "transform":
        ways = [{key: own}, *([{"train": train}] if steps else [])]
    else:
        raise SettingError(
            f"{key} is a {technique.kind}; supple {room} takes transforms and rules"
        )
    kind, values = _choice(data)
    told = {
        "name": name or f"{Path(model.rpartition(':')[2]).name}-{key.partition('/')[2]}",
        "seed": seed,
        "output": str(output),
        "model": {model: _assigned(settings or [])},
        "data": {kind: values},
        "batch_size": batch_size,
        "compress": ways,
        "export": export or [],
        "engines": list(engines),
    }
    console = Console()
    recipe = checked_compression(Source("command line", told))
    finished = run_compression(recipe, allow_code=True, console=console)
    print_compressed(finished, console)


def print_compressed(finished: Compressed, console: Console) -> None:
    """Prints what a compression came to: the table, the page, the files."""
    from supple.report.engines import engines_table
    from supple.report.steps import steps_table

    wide = console if console.width >= 110 else Console(width=110)
    wide.print()
    wide.print(steps_table(finished.summary))
    if (engines := finished.summary.engines) is not None:
        wide.print(engines_table(engines.trials, engines.before))
    for label, path in (("report", finished.report), ("network", finished.network)):
        console.print(f"{label:8} {path}", highlight=False, soft_wrap=True)
    for path in finished.files:
        console.print(f"{path.suffix[1:]:8} {path}", highlight=False, soft_wrap=True)


def _choice(text: str) -> tuple[str, dict[str, Any]]:
    """Reads `key:name=value,name=value`."""
    key, _, given = text.partition(":")
    return key, _assigned([part for part in given.split(",") if part])


def _assigned(parts: list[str]) -> dict[str, Any]:
    from supple.recipe.load import parse_value

    found = {}
    for part in parts:
        name, equals, value = part.partition("=")
        if not equals or not name:
            raise SettingError(f"got {part!r}, wants NAME=VALUE")
        found[name] = parse_value(value)
    return found


COMMANDS = (prune, quantize)
