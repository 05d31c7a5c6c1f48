"""`supple inspect`, `supple extract` and `supple export`: single networks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from supple.cli.errors import plain_errors
from supple.errors import SettingError, nearest

if TYPE_CHECKING:
    from torch import nn

__all__ = ["COMMANDS", "export", "extract", "inspect"]

Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", help="Shape of an input: 2x3x32x32, or name=2x16:int."),
]


@plain_errors
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="A key of supple/models, a transformers class, or module:callable."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SETTING=VALUE]...", help="Settings of the model."),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(help="Of a transformers class: a JSON file, JSON text, or a folder."),
    ] = None,
    inputs: Inputs = None,
    axis: Annotated[
        list[str] | None, typer.Option(help="Only these axes, such as width.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Verify random sizes on the model.")] = True,
    meta: Annotated[
        bool, typer.Option(help="Build without weights; for models larger than memory.")
    ] = False,
) -> None:
    """Print the sites of any model, and what is fixed and why."""
    import torch

    import supple
    from supple.recipe.axes import axes_of
    from supple.recipe.models import example_inputs, model_source

    source = model_source(model, _model_settings(settings, config), allow_code=True)
    with torch.device("meta") if meta else contextlib.nullcontext():
        built = source.build(0)
    if inputs:
        args, kwargs = _parsed(inputs)
    else:
        args, kwargs = example_inputs(built, source.settings)
    axes = axes_of(dict.fromkeys(axis)) if axis else None
    net = supple.elastic(built, args, kwargs, axes=axes, verify=verify)
    console = Console()
    console.print(str(net.space), markup=False, highlight=False, soft_wrap=True)
    took = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in net.seconds.items())
    state = "verified on the model" if net.verified else "proved, not verified"
    console.print(f"\n{state} ({took})", highlight=False)


@plain_errors
def extract(
    run: Annotated[Path, typer.Argument(help="The folder of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the network.")],
    where: Annotated[
        list[str] | None, typer.Option(help='A budget, such as "params <= 20 k".')
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="The size as JSON; sites left out are full.")
    ] = None,
) -> None:
    """Cut a network out of a trained run, by budget or by size, and save it."""
    import supple
    from supple.recipe.deployment import best_within, save_example
    from supple.recipe.run import reopen

    if (where is None) == (config is None):
        raise SettingError("extract wants either --where (a budget) or --config (a size)")
    bounds = _bounds(where or [])
    bench, front = reopen(run, allow_code=True)
    if config is not None:
        chosen = bench.net.space.config(supple.Config.from_json(config))
    elif front is None:
        raise SettingError(f"{run} was not searched yet, so it has no front; give --config")
    else:
        chosen = best_within(bench, front, bounds)
    bench.recalibrate(chosen)
    module = bench.net.extract(chosen).eval()
    supple.save(module, output)
    save_example(bench, output)
    figures = bench.task.evaluate(module, bench.splits.test.batches())
    told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    Console().print(f"{output}: {chosen.to_json()}", highlight=False, soft_wrap=True)
    Console().print(f"on the test set: {told}", highlight=False, soft_wrap=True)


@plain_errors
def export(
    network: Annotated[Path, typer.Argument(help="The folder of a saved network.")],
    file: Annotated[
        Path,
        typer.Argument(
            help="Where to: .onnx, .pt2 or .xml; with --format or --engine a folder."
        ),
    ],
    inputs: Inputs = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="compressed-tensors: a folder with the codes of a quantized transformers "
            "model, for transformers, vLLM and others."
        ),
    ] = None,
    dynamic_batch: Annotated[
        bool, typer.Option(help="Leave the batch size open in the file.")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(
            help="auto, or engines parted by commas: try them on this machine, and write the "
            "network for the fastest."
        ),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads that engines may use; by default 1.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Batch that engines are tried with.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest difference of outputs, over their largest magnitude."),
    ] = None,
) -> None:
    """Export a saved network; a file that others run is run, and its outputs compared."""
    from torch import nn

    import supple
    from supple.cost.measure import with_batch
    from supple.recipe.deployment import read_example

    module = supple.load(network, allow_code=True)
    if not isinstance(module, nn.Module):
        raise SettingError(
            f"{network} holds an elastic network; cut a size out with `supple extract`"
        )
    if format is not None:
        given = {
            "--input": inputs,
            "--dynamic-batch": dynamic_batch,
            "--engine": engine,
            "--threads": threads is not None,
            "--batch": batch,
            "--tolerance": tolerance,
        }
        _written_as(format, module, file, [name for name, value in given.items() if value])
        return
    if threads is not None and engine is None:
        raise SettingError(
            "--threads is how many an engine may use, and a file is written for any: add "
            "--engine, or leave it out"
        )
    args, kwargs = _parsed(inputs) if inputs else read_example(network)
    if batch is not None or (dynamic_batch and not inputs):
        args, kwargs = with_batch(2 if batch is None else batch, args, kwargs)
    if engine is not None:
        if dynamic_batch:
            raise SettingError("engines are tried with one batch: leave out --dynamic-batch")
        count = 1 if threads is None else threads
        _deployed(module.eval(), file, args, kwargs, engine, count, tolerance)
        return
    written = supple.export(
        module.eval(), file, args, kwargs, dynamic_batch=dynamic_batch, tolerance=tolerance
    )
    Console().print(
        f"{written}: its outputs equal the network's", highlight=False, soft_wrap=True
    )


def _written_as(format: str, module: nn.Module, folder: Path, given: Sequence[str]) -> None:
    """Writes the weights alone: nothing is run."""
    from supple.deploy.compressed_tensors import save_compressed_tensors

    if format != "compressed-tensors":
        raise SettingError(
            f"there is no format {format!r}{nearest(format, ['compressed-tensors'])}; it is "
            "compressed-tensors, and others are chosen by the file's ending"
        )
    if given:
        raise SettingError(f"--format writes weights and runs nothing: leave out {given[0]}")
    save_compressed_tensors(module, folder)
    Console().print(
        f"{folder}: for transformers' from_pretrained, vLLM and others; put the tokenizer's "
        "files beside them",
        highlight=False,
        soft_wrap=True,
    )


def _deployed(
    module: nn.Module,
    folder: Path,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    engine: str,
    threads: int,
    tolerance: float | None,
) -> None:
    """Tries the engines, and prints what came of each."""
    from supple.deploy.engines import TOLERANCE, deploy
    from supple.report.engines import engines_table

    trials = deploy(
        module,
        folder,
        args,
        kwargs,
        engines=None if engine == "auto" else engine.split(","),
        threads=threads,
        tolerance=TOLERANCE if tolerance is None else tolerance,
    )
    console = Console()
    console.print(engines_table(trials))
    console.print(
        f"{folder}: for {trials[0].engine}; run it with supple.deploy.engines.load",
        highlight=False,
        soft_wrap=True,
    )


def _model_settings(settings: list[str] | None, config: str | None) -> dict[str, Any]:
    """Settings from `name=value` words, and the model's configuration."""
    from supple.recipe.load import parse_value

    found: dict[str, Any] = {}
    for text in settings or []:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"a setting is written name=value, got {text!r}")
        found[name] = parse_value(value)
    if config is None:
        return found
    if Path(config).is_dir():
        return found | {"folder": config}
    inline = config.lstrip().startswith("{")
    return found | {"config": parse_value(config) if inline else config}


def _parsed(inputs: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    from supple.recipe.models import parse_input

    found = [parse_input(text) for text in inputs]
    args = tuple(tensor for name, tensor in found if name is None)
    return args, {name: tensor for name, tensor in found if name is not None}


def _bounds(texts: Sequence[str]) -> dict[str, str]:
    bounds = {}
    for text in texts:
        found = re.fullmatch(r"\s*(\S.*?)\s*((?:<=|>=|<|>).+)", text)
        if found is None:
            raise SettingError(f'a budget is written "params <= 20 k", got {text!r}')
        bounds[found[1]] = found[2]
    return bounds


COMMANDS = (inspect, extract, export)
