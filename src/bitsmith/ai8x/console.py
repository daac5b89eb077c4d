"""How messages and numbers look."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

_COLORS = {"ERROR": 31, "WARNING": 33, "NOTICE": 32}


def tell(kind: str, text: str) -> None:
    """Print a message on standard error, its kind in colour where that is a terminal."""
    prefix = f"\x1b[{_COLORS[kind]}m{kind}:\x1b[0m" if sys.stderr.isatty() else f"{kind}:"
    sys.stdout.flush()
    print(prefix, text, file=sys.stderr)


def listed(names: list[str], most: int = 6) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shortest(value: Any) -> str:
    """A number with the digits that its precision needs, as NumPy up to 2.3 prints it.

    >>> shortest(np.float32(0.1)), shortest(np.float32(2**28)), shortest(np.float32(9.30544e-05)), shortest(108.8)
    ('0.1', '268435460.0', '9.30544e-05', '108.8')
    >>> shortest(np.array([2**22], np.float32))
    '[4194304.]'
    """
    if isinstance(value, (int, float)) and not isinstance(value, np.floating):
        return str(value)
    if np.ndim(value):
        return f"[{np.format_float_positional(value[0], precision=8, trim='.')}]"
    number = value[()]
    if number == 0 or 1e-4 <= abs(number) < 1e16 or not np.isfinite(number):
        return np.format_float_positional(number, trim="0")
    return np.format_float_scientific(number, trim="-")
