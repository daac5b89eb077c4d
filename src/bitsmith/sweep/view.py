"""A sweep's rows for people: the columns that differ or measure something, options in one column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import DataError

_COLUMNS = {
    "model": "model", "target": "target", "placement": "placement", "weight_bits": "w", "activation_bits": "a",
    "format": "numbers", "per_channel": "per channel", "power_of_two": "po2", "seed": "seed", "status": "status",
    "float_top1": "float", "top1": "top-1", "mean": "mean", "sqnr_db": "SQNR dB", "bytes": "bytes", "short": "key",
}  # fmt: skip
_ONLY_WHERE_DIFFERENT = {"model", "target", "placement", "format", "seed", "float_top1", "status"}
_IN_COLUMNS = {"weight-bit-width", "act-bit-width", "weight-quant-granularity", "scale-factor-type", "target-backend",
               "quant-format"}  # fmt: skip
OPTIONS = "options or reason"


def view(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The store's rows with short names; every row has the same columns.

    >>> row = {"key": "0123456789", "status": "done", "top1": 91.0, "option.gptq": False, "weight_bits": 4}
    >>> view([row, {**row, "key": "9876543210", "top1": 91.5, "option.gptq": True}])[1]
    {'w': 4, 'top-1': 91.5, 'key': '98765432', 'options or reason': 'gptq'}
    """
    rows = [{**row, "short": row["key"][:8]} for row in rows]
    shown = [name for name in _COLUMNS if any(row.get(name) is not None for row in rows)]
    shown = [name for name in shown if name not in _ONLY_WHERE_DIFFERENT or _differs(rows, name)]
    options = {name for row in rows for name in row if name.startswith("option.")}
    named = [n for n in sorted(options) if n.removeprefix("option.") not in _IN_COLUMNS and _differs(rows, n)]
    return [
        {_COLUMNS[name]: row.get(name) for name in shown} | {OPTIONS: row.get("reason") or _options(row, named)}
        for row in rows
    ]


def write_sweep_page(rows: list[dict[str, Any]], path: str | Path, *, cost: str = "bits") -> Path:
    """A page that plots accuracy against ``cost``, any column of numbers, and lists the rows.

    ``bits`` is the width of a product: that of the weight times that of the activation.
    """
    from ..report.page import write_pareto

    found = [{**row, "bits": _product(row)} for row in rows]
    if not any(isinstance(row.get(cost), int | float) for row in found):
        raise DataError(
            f"no row has a number called {cost!r}: use bits, weight_bits, activation_bits, bytes or seconds"
        )
    value = "top1" if any(row.get("top1") is not None for row in rows) else "sqnr_db"
    names = {"top1": "top-1", "sqnr_db": "SQNR dB", "bits": "w x a bits"}
    x, y = names.get(cost, cost.replace("_", " ")), names[value]
    drawn = [
        {"configuration": _label(seen), **_worded(seen), x: row.get(cost), "reason": row.get("reason")}
        for row, seen in zip(found, view([{**row, "reason": None} for row in rows]))
    ]
    exact = {row["float_top1"] for row in rows if row.get("float_top1") is not None} if value == "top1" else set()
    return write_pareto(
        drawn, path, cost=x, value=y, label="configuration", title="Sweep",
        float_value=exact.pop() if len(exact) == 1 else None,
    )  # fmt: skip


def _product(row: dict[str, Any]) -> int | None:
    weights, activations = row.get("weight_bits"), row.get("activation_bits")
    return None if weights is None or activations is None else int(weights * activations)


def _label(seen: dict[str, Any]) -> str:
    """A row in a few words: what it differs in from others."""
    words = [str(seen[name]) for name in ("model", "target", "placement") if seen.get(name) is not None]
    words.append(f"W{seen.get('w')}A{seen.get('a')}{' float' if seen.get('numbers') == 'float' else ''}")
    words += ["per tensor"] if seen.get("per channel") is False else []
    words += ["po2"] if seen.get("po2") else []
    words += [f"seed {seen['seed']}"] if "seed" in seen else []
    return ", ".join([*words, seen[OPTIONS]] if seen[OPTIONS] else words)


def _worded(seen: dict[str, Any]) -> dict[str, Any]:
    """Truth values as words; options are in the label."""
    words = {name: ("no", "yes")[value] if isinstance(value, bool) else value for name, value in seen.items()}
    return {name: value for name, value in words.items() if name != OPTIONS}


def _differs(rows: list[dict[str, Any]], name: str) -> bool:
    return len({str(row.get(name)) for row in rows}) > 1


def _options(row: dict[str, Any], names: list[str]) -> str:
    """Options in words; switches that are off are not said."""
    given = {name.removeprefix("option."): row[name] for name in names if row.get(name) not in (None, False)}
    return ", ".join(name if value is True else f"{name} {value}" for name, value in given.items())
