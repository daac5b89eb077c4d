"""``bitsmith ai8x`` and ``bitsmith ai8x-inspect``, which parse their arguments themselves."""

from __future__ import annotations


def run(command: str, words: list[str]) -> int:
    """The exit status of one of the two commands."""
    if command == "ai8x":
        from ..ai8x.command import main
    else:
        from ..ai8x.inspect_command import main
    return main(words)
