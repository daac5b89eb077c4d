"""The command line: it parses, calls and prints; everything else is in the library."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

__all__ = ["app", "main"]


class _Package(ModuleType):
    """``bitsmith.cli.app`` is the Typer object although a file bears its name: importing the file does not hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name == "app" and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] in (["ai8x"], ["ai8x-inspect"]):  # without the imports of the other commands: a tenth of the time
        from .ai8x import run

        sys.exit(run(sys.argv[1], sys.argv[2:]))
    from .app import app

    app()


def __getattr__(name: str) -> Any:
    if name != "app":
        raise AttributeError(f"module 'bitsmith.cli' has no attribute {name!r}")
    from .app import app

    return app
