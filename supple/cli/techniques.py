"""`supple techniques`, `reproduce`, `check`, `version`: what there is, and whether it holds."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from supple.cli.errors import plain_errors

__all__ = ["COMMANDS", "check", "reproduce", "techniques", "version"]


@plain_errors
def techniques(
    room: Annotated[str | None, typer.Option(help="Only this room, such as prune.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="A list of objects, for programs.")
    ] = False,
) -> None:
    """List every technique, its paper, and whether its reproduction holds."""
    from supple.testing.reproduce import listing

    rows = listing(room)
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    names, console = ("key", "title", "paper", "status"), Console()
    widths = {name: max((len(row[name]) for row in rows), default=0) for name in names}
    left = console.width - sum(widths.values()) + widths["title"] - 3 * len(names)
    for name in names:
        widest = max(8, left) if name == "title" else max(len(name), widths[name])
        table.add_column(name, no_wrap=True, overflow="ellipsis", max_width=widest)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    console.print(table)


@plain_errors
def reproduce(
    key: Annotated[
        str | None,
        typer.Argument(help="A technique's key; without one, all that are stale or not tried."),
    ] = None,
) -> None:
    """Run the reproduction of a paper's claim again. Exit code 1 where one does not hold."""
    from supple.testing.reproduce import reproductions, run_reproduction, status, verdict

    console = Console()
    results: list[dict[str, Any]] = []
    wanted = [k for k in reproductions() if status(k) in ("stale", "not tried")]
    if key is None and not wanted:
        console.print("all results are up to date; name a key to run its reproduction again")
    for each in [key] if key is not None else wanted:
        console.print(f"[bold]{each}[/bold]", highlight=False)
        tell = _indented(console)
        results.append(run_reproduction(each, tell=tell))
        tell(f"holds: {verdict(results[-1]['holds'])} ({results[-1]['seconds']:.0f} s)")
    if any(result["holds"] is False for result in results):
        raise typer.Exit(1)


@plain_errors
def check(key: Annotated[str, typer.Argument(help="A technique's key.")]) -> None:
    """Run the conformance checks of one technique. Exit code 1 where one fails."""
    from supple.technique import technique
    from supple.testing.checks import yield_checks

    console, failed = Console(), 0
    for each in yield_checks(technique(key)):
        problem = _problem(each)
        failed += problem is not None
        mark = "[green]✓[/green]" if problem is None else "[red]✗[/red]"
        console.print(f"{mark} {each.name}", highlight=False)
        if problem is not None:
            console.print(f"    {problem}", markup=False, highlight=False)
    if failed:
        raise typer.Exit(1)


@plain_errors
def version() -> None:
    """Print the version, and those of what it stands on."""
    from importlib.metadata import version as installed

    import supple

    typer.echo(f"supple {supple.__version__}")
    for package in ("torch", "transformers", "optuna", "pymoo"):
        typer.echo(f"{package} {installed(package)}")


def _problem(check: Any) -> str | None:
    """Why a check fails, or None; one that is declared skipped must fail."""
    try:
        check.run()
    except Exception as error:
        failure = str(error).strip() or type(error).__name__
        return None if check.reason else failure
    if check.reason:
        return f"is declared skipped ({check.reason}) and passes: remove the skip"
    return None


def _indented(console: Console) -> Any:
    def tell(line: str) -> None:
        console.print(f"  {line}", markup=False, highlight=False)

    return tell


COMMANDS = (techniques, reproduce, check, version)
