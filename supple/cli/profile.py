"""`supple profile`: what this device is like, and how fast a network's sizes are on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from supple.cli.errors import plain_errors
from supple.cli.networks import Inputs
from supple.errors import CheckpointError, SettingError

if TYPE_CHECKING:
    from supple.cost.profile import DeviceProfile
    from supple.network import Elastic

__all__ = ["COMMANDS", "profile"]


@plain_errors
def profile(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|RECIPE]",
            help="A recipe's YAML file, a key of supple/models, a transformers class, or "
            "module:callable: its latency is modelled, too.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SETTING=VALUE]...", help="Settings of the model or recipe."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where the device profile goes.")
    ] = Path("device.json"),
    latency: Annotated[
        Path | None,
        typer.Option(help="Where the latency model goes; by default beside the profile."),
    ] = None,
    samples: Annotated[
        int, typer.Option(help="How many sizes of the model are measured, at least 12.")
    ] = 40,
    batch: Annotated[
        int | None,
        typer.Option(help="Batch size of the latency model; the inputs' by default."),
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads to measure with.")] = 1,
    config: Annotated[
        str | None,
        typer.Option(help="Of a transformers class: a JSON file, JSON text, or a folder."),
    ] = None,
    inputs: Inputs = None,
    fast: Annotated[
        bool, typer.Option("--fast", help="Coarser: seconds, not a minute.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")] = False,
) -> None:
    """Measure this device: operators, channel counts that pay, numbers of threads.

    With a model or a recipe it also measures some of its sizes and fits a model that predicts
    the latency of all others, and says how wrong it is. Other programs disturb the figures.
    """
    from supple.cost.profile import profile_device

    latency = latency or out.with_name(f"{out.stem}-latency.json")
    for path in (out, latency) if model else (out,):
        _check_place(path)
    console, net = Console(), _network(model, settings or [], config, inputs)
    with _bar(quiet) as progress:
        found = profile_device(
            threads=threads,
            fast=fast,
            model=None if net is None else net.module,
            args=() if net is None else net.args,
            kwargs={} if net is None else net.kwargs,
            progress=progress,
        )
    found.save(out)
    _tell(console, found, out)
    if net is not None:
        _fit(console, net, found, latency, samples, batch, quiet)


def _check_place(path: Path) -> None:
    """Refuses a place that can't be written before a minute is spent on it."""
    if path.is_dir() or path.suffix != ".json":
        raise SettingError(f"a profile is written to a file that ends in .json, got {path}")
    if path.parent.exists() and not path.parent.is_dir():
        raise CheckpointError(f"can't write {path}: {path.parent} is no folder")


def _network(
    model: str | None, settings: list[str], config: str | None, inputs: list[str] | None
) -> Elastic | None:
    """The elastic network of a model or a recipe; not verified, since weights don't matter."""
    if model is None:
        return None
    if model.endswith((".yaml", ".yml")):
        from supple.recipe.bench import build, gather
        from supple.recipe.load import load_recipe

        return build(gather(load_recipe(Path(model), settings), allow_code=True), failed={}).net
    import supple
    from supple.cli.networks import _model_settings, _parsed
    from supple.recipe.models import example_inputs, model_source

    source = model_source(model, _model_settings(settings, config), allow_code=True)
    built = source.build(0)
    args, kwargs = _parsed(inputs) if inputs else example_inputs(built, source.settings)
    return supple.elastic(built, args, kwargs, verify=False)


@contextlib.contextmanager
def _bar(quiet: bool) -> Iterator[Any]:
    """A progress bar on stderr: one line for each part of the work."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    shown = Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True)
    tasks: dict[str, Any] = {}

    def progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = shown.add_task(what, total=total)
        shown.update(tasks[what], completed=done)

    with shown:
        yield progress


def _tell(console: Console, found: DeviceProfile, out: Path) -> None:
    from supple.quantity import show

    def line(name: str, text: str) -> None:
        console.print(f"[bold]{name:9}[/bold] {text}", highlight=False, soft_wrap=True)

    line("device", f"{found.device}, torch {found.torch_version}")
    for kind in ("conv", "matmul"):
        line(kind, f"up to {show(found.rate(kind))}MAC/s")
    line("memory", f"up to {show(8 * found.rate('copy'), 'B')}/s in a copy, read and written")
    least = min(table.seconds.min() for table in found.operators.values())
    line("overhead", f"{show(float(least), 's')} for the smallest operator")
    for kind, divisor in found.divisors.items():
        verdict = (
            f"multiples of {divisor.divisor} channels pay"
            if divisor.divisor > 1
            else "no multiple of channels pays"
        )
        line("channels", f"{kind}: {verdict}")
    if found.thread_times:
        console.print()
        console.print(_threads_table(found))
    console.print(f"{out}: the device profile", highlight=False, soft_wrap=True)


def _threads_table(found: DeviceProfile) -> Table:
    from supple.quantity import show

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("threads", justify="right")
    for times in found.thread_times:
        table.add_column(f"batch {times.batch}", justify="right")
    for number in found.thread_times[0].seconds:
        cells = [
            show(times.seconds[number], "s") + (" best" if number == times.best else "     ")
            for times in found.thread_times
        ]
        table.add_row(str(number), *cells)
    table.caption = f"seconds a forward: {found.thread_times[0].work}"
    table.caption_justify = "left"
    return table


def _fit(
    console: Console,
    net: Elastic,
    found: DeviceProfile,
    path: Path,
    samples: int,
    batch: int | None,
    quiet: bool,
) -> None:
    from supple.cost.latency import fit

    with _bar(quiet) as progress:
        model = fit(
            net, found, samples=samples, batch=batch, threads=found.threads, progress=progress
        )
    model.save(path)
    space = net.space
    console.print()
    console.print(str(model), highlight=False, soft_wrap=True)
    console.print(
        f"smallest size {model.text(space.smallest())}, largest {model.text(space.largest())}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"{path}: the latency model", highlight=False, soft_wrap=True)


COMMANDS = (profile,)
