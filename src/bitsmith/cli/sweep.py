"""``bitsmith sweep``: many configurations, in a store that survives."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

from .app import app

if TYPE_CHECKING:
    from ..sweep import Sweep
    from ..sweep.local import Engine

sweep = typer.Typer(no_args_is_help=True, help="Run many configurations; a killed sweep goes on where it was.")
app.add_typer(sweep, name="sweep")
Folder = Annotated[Path, typer.Argument(metavar="DIR", help="The folder that 'sweep run' wrote")]


@sweep.command()
def run(
    grid: Annotated[Path, typer.Argument(metavar="GRID.YAML", help="models, seeds, grid or runs, constraints")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder of the store, which sweeps may share")],
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Processes here, or a Ray cluster")] = "local",
    address: Annotated[str | None, typer.Option(help="Ray: the cluster's address [default: a local one]")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="One thread each [default: the cores]")] = None,
    gpus: Annotated[float, typer.Option(min=0.0, help="Ray: GPUs of each worker, fractions too")] = 0.0,
    device: Annotated[str, typer.Option(help="Local: where all workers compute, such as cuda:0")] = "cpu",
    retries: Annotated[int, typer.Option(min=0, help="How often to try again when a worker dies")] = 2,
    retry_failed: Annotated[bool, typer.Option(help="Run rows again that failed before")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run and what skipped, and end")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress")] = False,
) -> None:
    """Run every configuration of GRID.YAML that the store does not have yet."""
    from ..sweep import load_sweep, run_sweep

    if engine == "local" and (address is not None or gpus):
        raise typer.BadParameter("--address and --gpus go with --engine ray")
    if engine == "ray" and device != "cpu":
        raise typer.BadParameter("--device goes with --engine local: give --gpus, and Ray assigns the devices")
    read = load_sweep(grid)
    if dry_run:
        print(_plan(read, output))
        return
    counts = run_sweep(
        read, output, _engine(engine, workers or os.cpu_count() or 1, address, gpus, retries, device),
        retry_failed=retry_failed, watch=_progress(quiet),
    )  # fmt: skip
    print(_line(counts))
    if counts.get("failed"):
        print(
            f"note: 'bitsmith sweep show {output}' says why rows failed; --retry-failed runs them again",
            file=sys.stderr,
        )


@sweep.command()
def show(
    folder: Folder,
    once: Annotated[bool, typer.Option(help="Print the table once, also on a terminal")] = False,
) -> None:
    """Show the rows, live on a terminal until all are finished."""
    from ..sweep import Store

    store = Store(folder, create=False)
    console = Console()
    if once or not console.is_terminal:
        console.print(_table(store.rows()))
        return
    with Live(console=console, auto_refresh=False) as live:
        while True:
            rows = store.rows()
            begun = [
                row for row in rows if row["status"] not in ("pending", "skipped")
            ]  # the news, where all is too much
            live.update(_table((begun or rows)[-max(console.height - 8, 1) :], store.counts()), refresh=True)
            if not store.counts().keys() & {"pending", "running"}:
                return
            time.sleep(1.0)


@sweep.command()
def best(
    folder: Folder,
    recipe: Annotated[str | None, typer.Option(metavar="KEY", help="Print this row's recipe as YAML instead")] = None,
) -> None:
    """Show the best configuration for each class of hardware."""
    from ..recipe import Recipe
    from ..sweep import Store, best_rows

    store = Store(folder, create=False)
    if recipe is not None:
        print(Recipe.model_validate(store.recipe(recipe)).to_yaml(), end="")
        return
    Console().print(_table(best_rows(store.rows())))


@sweep.command()
def export(
    folder: Folder,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .csv or .parquet file")],
) -> None:
    """Write all rows as CSV or Parquet."""
    from ..sweep import Store, export_rows

    export_rows(Store(folder, create=False).rows(), output)


@sweep.command()
def report(
    folder: Folder,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The page [default: DIR/report.html]")] = None,
    cost: Annotated[
        str,
        typer.Option(help="What accuracy is plotted against: bits (of a product), bytes, seconds or another column"),
    ] = "bits",
) -> None:
    """Write a page with accuracy against bits, and all rows."""
    from ..sweep import Store
    from ..sweep.view import write_sweep_page

    print(write_sweep_page(Store(folder, create=False).rows(), output or folder / "report.html", cost=cost))


def _plan(read: Sweep, output: Path) -> str:
    """What a sweep has to do, beside what its store has, and the reasons of what is skipped."""
    from ..sweep import Store
    from ..sweep.store import FILE

    rows = Store(output, create=False).rows() if (output / FILE).is_file() else []
    finished = {row["key"] for row in rows if row["status"] in ("done", "failed")}
    distinct = {one.key: one for one in read.configurations()}.values()
    skipped = Counter(one.skipped for one in distinct if one.skipped is not None)
    there = sum(one.key in finished for one in distinct)
    lines = [f"{len(distinct) - there - skipped.total()} to run, {there} finished, {skipped.total()} skipped"]
    return "\n".join([*lines, *(f"skipped {count}: {reason}" for reason, count in skipped.most_common())])


def _engine(name: str, workers: int, address: str | None, gpus: float, retries: int, device: str) -> Engine:
    if name == "ray":
        from ..sweep.ray_engine import RayEngine

        return RayEngine(workers, address, gpus, retries)
    from ..sweep.local import LocalEngine

    return LocalEngine(workers, retries, device)


def _progress(quiet: bool) -> Any:
    """Say how far it is and how long it still takes, on a terminal only."""
    start, first = time.monotonic(), -1

    def watch(counts: dict[str, int]) -> None:
        nonlocal first
        if quiet or not sys.stderr.isatty():
            return
        done = counts.get("done", 0) + counts.get("failed", 0)
        first = done if first < 0 else first
        left = counts.get("pending", 0) + counts.get("running", 0)
        pace = (time.monotonic() - start) / (done - first) if done > first else 0.0
        rest = f", about {pace * left:.0f} s left" if pace and left else ""
        print(f"\r\033[K{_line(counts)}{rest}", end="" if left else "\n", file=sys.stderr, flush=True)

    return watch


def _line(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in sorted(counts))


def _table(rows: list[dict[str, Any]], counts: dict[str, int] | None = None) -> Table:
    """Rows as a table for terminals."""
    from ..sweep.view import view

    seen = view(rows)
    table = Table(*(seen[0] if seen else ["no rows"]), caption=_line(counts) if counts else None)
    for row in seen:
        table.add_row(*(_cell(value) for value in row.values()))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.2f}" if isinstance(value, float) else str(value).replace("[", "\\[")
