"""The ``bitsmith`` command and its exit status."""

from __future__ import annotations

import os
from typing import Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from ..errors import BitsmithError
from .ai8x import run

FAILED = 1
NOT_CERTIFIED = 3
INTERRUPTED = 130
_INTERRUPTED = "interrupted: no half file was left; a sweep, and a run with --resume, go on where they were"


class _Teaching(TyperGroup):
    """Bitsmith's errors and Ctrl-C are one message on standard error; ``BITSMITH_DEBUG=1`` lets errors through."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BitsmithError as error:
            if os.environ.get("BITSMITH_DEBUG"):
                raise
            message = Text("error: ", style="bold red").append(str(error), style="not bold default")
            Console(stderr=True, soft_wrap=True).print(message)
            raise typer.Exit(FAILED) from error
        except KeyboardInterrupt as error:
            Console(stderr=True, soft_wrap=True).print(Text(_INTERRUPTED))
            raise typer.Exit(INTERRUPTED) from error


app = typer.Typer(
    name="bitsmith",
    cls=_Teaching,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Turn a trained PyTorch model into a verified fixed-point model for a named target.",
    epilog=(
        "Exit status: 0 done, 1 an error (its message says what to do; BITSMITH_DEBUG=1 adds a traceback), "
        "2 wrong usage, 3 the file failed its certificate, 130 interrupted."
    ),
)


def _pass_on(command: str, text: str) -> None:
    """Add a command that parses its arguments itself: reached only through `app`, since `main` is faster."""

    @app.command(command, help=text, add_help_option=False, context_settings=_UNPARSED)
    def call(context: typer.Context) -> None:
        raise typer.Exit(run(command, context.args))


_UNPARSED = {"allow_extra_args": True, "ignore_unknown_options": True}
_pass_on("ai8x", "Quantize a checkpoint of ai8x-training for MAX78000 or MAX78002.")
_pass_on("ai8x-inspect", "Show and check a checkpoint that is quantized for MAX78000 or MAX78002.")

from . import demo, doctor, inspect, quantize, sweep  # noqa: E402, F401  (they register their commands on app)
