"""The best configuration for each class of hardware."""

from __future__ import annotations

from typing import Any

CLASS = ("model", "target", "placement", "format", "per_channel", "power_of_two", "weight_bits", "activation_bits")


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows that need the same of the hardware, the one with the highest accuracy, over seeds the mean.

    Accuracy is top-1, else the outputs' signal-to-noise ratio, which also decides between equals. ``runs`` is added to
    the row, and, where there are several, their ``mean``.

    >>> row = dict.fromkeys(CLASS, 8) | {"status": "done", "sqnr_db": None}
    >>> best = best_rows([{**row, "key": k, "seed": 0, "top1": t} for k, t in (("a", 90.0), ("b", 91.0))])
    >>> [(row["key"], row["runs"]) for row in best]
    [('b', 1)]
    """
    groups: dict[tuple[Any, ...], dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        if row["status"] != "done" or _score(row) is None:
            continue
        kind = tuple(row.get(name) for name in CLASS)
        options = sorted((name, str(value)) for name, value in row.items() if name.startswith("option."))
        recipe = row.get("recipe")  # what differs in neither differs in its seed
        configuration = str((recipe, options)) if recipe or options else row["key"]
        groups.setdefault(kind, {}).setdefault(configuration, []).append(row)
    best = []
    for configurations in groups.values():
        runs = max(configurations.values(), key=_mean)
        mean = {"mean": round(_mean(runs)[0], 3)} if len(runs) > 1 else {}
        first: dict[str, Any] = max(runs, key=_order)
        best.append({**first, **mean, "runs": len(runs)})
    return sorted(best, key=lambda row: tuple(str(row.get(name)).rjust(8) for name in CLASS))


def _score(row: dict[str, Any]) -> float | None:
    score = row["top1"] if row.get("top1") is not None else row.get("sqnr_db")
    return None if score is None else float(score)


def _order(row: dict[str, Any]) -> tuple[float, float]:
    return _score(row) or 0.0, float(row.get("sqnr_db") or 0.0)


def _mean(runs: list[dict[str, Any]]) -> tuple[float, ...]:
    return tuple(sum(values) / len(runs) for values in zip(*map(_order, runs)))
