"""Progress bars that say what is done and how long it still takes; silent where nobody watches."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")
_WIDTH = 30


def progress(items: Iterable[T], what: str, *, total: int | None = None, enabled: bool | None = None) -> Iterator[T]:
    """``items``, with a bar on standard error; ``enabled`` None shows it only on a terminal.

    >>> list(progress([1, 2, 3], "counting", enabled=False))
    [1, 2, 3]
    """
    if not _wanted(enabled):
        yield from items
        return
    if total is None and hasattr(items, "__len__"):
        total = len(cast(Sized, items))
    with _bar() as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)


@contextmanager
def progress_callback(enabled: bool | None = None) -> Iterator[Callable[[int, int, str], None] | None]:
    """A function ``(done, total, what)`` that moves a bar, for work that reports; None where silent."""
    if not _wanted(enabled):
        yield None
        return
    with _bar() as bar:
        task = bar.add_task("", total=None)

        def show(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what[:_WIDTH])

        yield show


def _wanted(enabled: bool | None) -> bool:
    return sys.stderr.isatty() if enabled is None else enabled


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn(f"{{task.description:<{_WIDTH}}}", markup=False),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
