"""The best configuration for each class of hardware."""

from __future__ import annotations

from typing import Any

CLASS = ("model", "target", "placement", "per_channel", "power_of_two", "weight_bits", "activation_bits")


def best_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows that need the same of the hardware, the one with the highest accuracy, over seeds the mean.

    Accuracy is top-1, else the outputs' signal-to-noise ratio. ``mean`` and ``runs`` are added to the row.

    >>> row = dict.fromkeys(CLASS, 8) | {"status": "done", "sqnr_db": None}
    >>> best = best_rows([{**row, "key": k, "seed": 0, "top1": t} for k, t in (("a", 90.0), ("b", 91.0))])
    >>> [(row["key"], row["mean"]) for row in best]
    [('b', 91.0)]
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
        first: dict[str, Any] = max(runs, key=_order)
        best.append({**first, "mean": round(_mean(runs), 3), "runs": len(runs)})
    return sorted(best, key=lambda row: tuple(str(row.get(name)).rjust(8) for name in CLASS))


def _score(row: dict[str, Any]) -> float | None:
    score = row["top1"] if row.get("top1") is not None else row.get("sqnr_db")
    return None if score is None else float(score)


def _order(row: dict[str, Any]) -> float:
    return _score(row) or 0.0


def _mean(runs: list[dict[str, Any]]) -> float:
    return sum(map(_order, runs)) / len(runs)
