"""Rows of the result files, which long measurements add to one by one."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def append(path: Path, fields: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a CSV file; a new file begins with the names of the columns."""
    new = not path.exists()
    with path.open("a", newline="") as handle:
        writer = csv.DictWriter(handle, fields, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)
