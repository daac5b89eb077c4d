"""``bitsmith demo``: the main job on a small network that comes with the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import options as o
from .app import app
from .quantize import finish, hushed, say


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for all results")] = Path("demo-out"),
    recipe: o.Recipe = "int8",
    target: o.Target = "onnxruntime",
    latency: o.Latency = True,
    sensitivity: o.Sensitivity = False,
    quiet: o.Quiet = False,
) -> None:
    """Run the whole job on a small digits network."""
    from ..demo import digits, digits_net, one_thread
    from ..evaluate import ArrayData
    from ..evaluate.job import Job, JobSettings, check_settings, run_job

    settings = check_settings(
        JobSettings(recipe=recipe, target=target, latency=latency, sensitivity=sensitivity, latency_seconds=1.0),
        files=True,
    )
    train, test = digits()
    job = Job(
        digits_net(),
        calibration=ArrayData(*train, name="digits, 1,000 training images"),
        validation=ArrayData(*test, name="digits, 797 test images"),
        settings=settings,
        show_progress=None,
        say=say,
    )
    with one_thread():
        result = run_job(hushed(job, quiet), output)
    finish(result)
