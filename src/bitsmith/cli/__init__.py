"""The command line: it parses, calls and prints; everything else is in the library."""

from .app import app, main

__all__ = ["app", "main"]
