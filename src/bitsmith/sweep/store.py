"""The rows of sweeps, in SQLite: claimed one at a time, written once, never lost."""

from __future__ import annotations

import csv
import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DataError, MissingExtraError
from ..files import atomic_write, prepare_output_dir
from .grid import Configuration

FILE = "sweep.sqlite"
STALE_SECONDS = 60.0  # without a sign of life, a sweep on another machine counts as dead
_SCHEMA = """
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY, status TEXT NOT NULL, model TEXT NOT NULL, seed INTEGER NOT NULL, target TEXT NOT NULL,
    options TEXT NOT NULL, work TEXT NOT NULL, reason TEXT, owner TEXT, seen REAL, attempts INTEGER NOT NULL DEFAULT 0,
    result TEXT, seconds REAL, version TEXT
);
CREATE INDEX IF NOT EXISTS runs_status ON runs (status);
"""
_DESCRIBED = "key, status, model, seed, target, options, work, reason, attempts, result, seconds, version"


class Store:
    """``folder/sweep.sqlite``. Rows are ``pending``, ``running``, ``done``, ``failed`` or ``skipped``.

    Several sweeps may have it open. Each claims rows under its own name and gives signs of life; rows of one that
    was killed become pending again.
    """

    def __init__(self, folder: str | Path, *, create: bool = True) -> None:
        path = Path(folder) / FILE
        if create:
            prepare_output_dir(folder)
        elif not path.is_file():
            raise DataError(f"{str(folder)!r} holds no {FILE}: name the folder that 'bitsmith sweep run' wrote")
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"
        # isolation_level None: every statement is a transaction of its own, on the disk before the next one.
        self._db = sqlite3.connect(path, timeout=60.0, isolation_level=None)
        self._db.row_factory = sqlite3.Row
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            raise DataError(f"{str(path)!r} is not a sweep's store: {error}") from error

    def register(self, configurations: Iterable[Configuration], *, retry_failed: bool = False) -> list[str]:
        """Add what is not there yet; returns the keys. What was skipped before may now be run, and the reverse."""
        keys = []
        self._db.execute("BEGIN IMMEDIATE")
        for c in configurations:
            keys.append(c.key)
            status = "pending" if c.skipped is None else "skipped"
            self._db.execute(
                "INSERT INTO runs (key, status, model, seed, target, options, work, reason) VALUES (?,?,?,?,?,?,?,?) "
                "ON CONFLICT (key) DO UPDATE SET status = excluded.status, reason = excluded.reason "
                "WHERE runs.status = 'skipped' OR (runs.status = 'pending' AND excluded.status = 'skipped') "
                "OR (runs.status = 'failed' AND ?)",
                (c.key, status, c.work["model"]["model"], c.work["seed"], c.work["target"], json.dumps(c.options),
                 json.dumps(c.work), c.skipped, retry_failed),
            )  # fmt: skip
        self._db.execute("COMMIT")
        return keys

    def claim(self) -> tuple[str, dict[str, Any]] | None:
        """The next pending row, which is then this sweep's alone: its key and work."""
        row = self._db.execute(
            "UPDATE runs SET status = 'running', owner = ?, seen = ?, attempts = attempts + 1 WHERE key = "
            "(SELECT key FROM runs WHERE status = 'pending' ORDER BY rowid LIMIT 1) RETURNING key, work",
            (self.owner, time.time()),
        ).fetchall()
        return (row[0]["key"], json.loads(row[0]["work"])) if row else None

    def finish(self, key: str, outcome: dict[str, Any]) -> None:
        """Write a claimed row: ``outcome`` has ``result`` or ``error``, and ``seconds``."""
        error = outcome.get("error")
        self._db.execute(
            "UPDATE runs SET status = ?, reason = ?, result = ?, seconds = ?, version = ?, owner = NULL "
            "WHERE key = ? AND owner = ? AND status = 'running'",
            ("done" if error is None else "failed", error, json.dumps(outcome.get("result")),
             outcome.get("seconds"), __version__, key, self.owner),
        )  # fmt: skip

    def give_back(self, key: str | None = None) -> None:
        """Make this sweep's running rows pending again: one, or all."""
        self._db.execute(
            "UPDATE runs SET status = 'pending', owner = NULL WHERE status = 'running' AND owner = ? "
            "AND (?2 IS NULL OR key = ?2)",
            (self.owner, key),
        )

    def alive(self) -> None:
        """Give a sign of life, and free the rows of sweeps that give none."""
        now = time.time()
        self._db.execute("UPDATE runs SET seen = ? WHERE owner = ?", (now, self.owner))
        for owner, seen in self._db.execute(
            "SELECT owner, max(seen) FROM runs WHERE status = 'running' AND owner != ? GROUP BY owner", (self.owner,)
        ).fetchall():
            if not _lives(owner, now - seen):
                self._db.execute(
                    "UPDATE runs SET status = 'pending', owner = NULL WHERE status = 'running' AND owner = ?", (owner,)
                )

    def counts(self) -> dict[str, int]:
        """How many rows there are of every status."""
        return dict(self._db.execute("SELECT status, count(*) FROM runs GROUP BY status").fetchall())

    def rows(self) -> list[dict[str, Any]]:
        """All rows in the order they were added, flat: options as ``option.NAME``, results by their names."""
        found = []
        for row in self._db.execute(f"SELECT {_DESCRIBED} FROM runs ORDER BY rowid").fetchall():
            flat = {name: row[name] for name in ("key", "status", "model", "seed", "target", "reason", "attempts")}
            work = json.loads(row["work"])
            flat |= _hardware(work["recipe"]) if work["recipe"] else {}
            flat |= {f"option.{name}": value for name, value in json.loads(row["options"]).items()}
            flat |= json.loads(row["result"] or "null") or {}
            found.append({**flat, "seconds": row["seconds"], "version": row["version"]})
        return found

    def recipe(self, key: str) -> dict[str, Any]:
        """The recipe of the one row whose key begins so."""
        found = self._db.execute("SELECT work FROM runs WHERE substr(key, 1, ?) = ?", (len(key), key)).fetchall()
        if len(found) != 1:
            raise DataError(f"{len(found)} rows of the store have a key that begins with {key!r}: give all of it")
        recipe: dict[str, Any] = json.loads(found[0]["work"])["recipe"]
        return recipe

    def close(self) -> None:
        """Close the file."""
        self._db.close()


def _hardware(recipe: dict[str, Any]) -> dict[str, Any]:
    """What hardware must have for a recipe."""
    weights, activations = recipe["weights"], recipe["activations"]
    spec = weights or activations
    return {
        "placement": recipe["placement"],
        "weight_bits": _bits(weights),
        "activation_bits": _bits(activations),
        "format": "float" if spec["format"]["kind"] == "float" else "int",
        "per_channel": weights is not None and weights["granularity"] != "tensor",
        "power_of_two": spec["scale"] == "po2",
    }


def _bits(spec: dict[str, Any] | None) -> int:
    if spec is None:
        return 32
    format = spec["format"]
    return int(format["bits"] if format["kind"] == "int" else 1 + format["exponent_bits"] + format["mantissa_bits"])


def _started(pid: int) -> str:
    """When a process started, where the system tells: process ids are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "?"


def _lives(owner: str, silent: float) -> bool:
    host, pid, started = owner.rsplit(":", 2)
    if host != socket.gethostname() or started == "?":
        return silent < STALE_SECONDS
    return _started(int(pid)) == started


def export_rows(rows: list[dict[str, Any]], path: str | Path) -> None:
    """Write rows as ``.csv`` or ``.parquet``, whole or not at all."""
    suffix = Path(path).suffix
    if suffix not in (".csv", ".parquet"):
        raise DataError(f"{str(path)!r}: tables are written as .csv or .parquet")
    names = list(dict.fromkeys(name for row in rows for name in row))
    if suffix == ".csv":
        with atomic_write(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, restval="")
            writer.writeheader()
            writer.writerows(rows)
        return
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise MissingExtraError(".parquet needs pyarrow: pip install 'bitsmith[sweep]'") from error
    columns = {}
    for name in names:
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        mixed = len(kinds) > 1 and kinds != {int, float}
        columns[name] = [None if v is None else str(v) for v in values] if mixed else values
    with atomic_write(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
