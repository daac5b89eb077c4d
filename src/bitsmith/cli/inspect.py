"""``bitsmith verify`` and ``bitsmith targets``: looking at what is there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from . import options as o
from .app import NOT_CERTIFIED, app


@app.command()
def verify(
    folder: Annotated[
        Path, typer.Argument(help="What 'bitsmith quantize' wrote, or the model's file in it", metavar="FOLDER")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print the certificate as JSON")] = False,
    quiet: o.Quiet = False,
) -> None:
    """Check that the file in FOLDER computes what was measured.

    Exit status 3 when it does not compute the same.
    """
    from ..errors import VerificationError
    from ..evaluate.progress import progress_callback
    from ..report.render import certificate_line, certificate_table
    from ..verify import verify_folder

    file = folder if folder.is_file() else None
    with progress_callback(False if quiet else None, "verifying"):
        certificate = verify_folder(folder if file is None else file.parent)
    if file is not None and certificate.file != file.name:
        raise VerificationError(f"{file} has no certificate: the one in its folder is about {certificate.file}")
    data = certificate.model_dump(mode="json")
    if as_json:
        typer.echo(json.dumps(data, indent=2))
    else:
        console = Console()
        console.print(certificate_table(data), certificate_line(data), sep="\n")
    if not certificate.passed:
        raise typer.Exit(NOT_CERTIFIED)


@app.command()
def targets(
    name: Annotated[str | None, typer.Argument(help="Show everything about this one")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the targets' data as JSON")] = False,
) -> None:
    """List the devices and runtimes that models are made for."""
    from ..report.render import target_view, targets_table
    from ..targets import get_target, list_targets

    chosen = [get_target(entry) for entry in ([name] if name else list_targets())]
    if as_json:
        typer.echo(json.dumps([target.model_dump(mode="json") for target in chosen], indent=2))
    elif name:
        Console().print(target_view(chosen[0]))
    else:
        Console().print(targets_table(chosen))
