"""The rows of benchmarks/brevitas_table.yaml beside those that Brevitas 0.13.4 reaches with the same options.

    bitsmith sweep run benchmarks/brevitas_table.yaml --output brevitas-table
    python -m benchmarks.brevitas_table brevitas-table --reference FILE --csv benchmarks/results/brevitas-table.csv

FILE holds Brevitas' rows under the names of its options in short (model, backend, w, a, w_gran, scale, fmt, graph_eq,
bias_corr, gpfq, gptq, qronos, act_order, lround, top1, agree). The sweep goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks import nets
from benchmarks.accuracy import commit
from benchmarks.data import Batches
from bitsmith.sweep import Store

SWITCHES = {"bias_corr": "bias-corr", "gpfq": "gpfq", "gptq": "gptq", "qronos": "qronos", "act_order": "gpxq-act-order"}
NAMES = ("net", "backend", "weights", "activations", "granularity", "scale", "format", "equalization", *SWITCHES,
         "learned_round")  # fmt: skip
FIELDS = (*NAMES, "float_top1", "ours", "brevitas", "difference", "our_agreement", "brevitas_agreement", "our_sqnr_db",
          "brevitas_sqnr_db", "equalized", "seconds", "commit", "bitsmith")  # fmt: skip


def resnet20() -> nn.Module:
    """The trained network."""
    return nets.load("resnet20").model


def resnet32() -> nn.Module:
    """The trained network."""
    return nets.load("resnet32").model


def calibration() -> Batches:
    """The first 1,000 training images."""
    return nets.load("resnet20").calibration


def test() -> Batches:
    """All 10,000 test images."""
    return nets.load("resnet20").test


def ours(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a row of the store is of."""
    option = lambda name, default: default if row.get(f"option.{name}") is None else row[f"option.{name}"]  # noqa: E731
    return (
        row["model"].rpartition(":")[2], option("target-backend", "fx"), option("weight-bit-width", 8),
        option("act-bit-width", 8), option("weight-quant-granularity", "per_channel"),
        option("scale-factor-type", "float_scale"), option("quant-format", "int"),
        int(option("graph-eq-iterations", 0)), *(bool(option(name, False)) for name in SWITCHES.values()),
        option("learned-round", ""),
    )  # fmt: skip


def theirs(row: dict[str, str]) -> tuple[Any, ...]:
    """What a row of Brevitas is of."""
    return (
        row["model"], row["backend"], int(row["w"]), int(row["a"]), row["w_gran"], row["scale"], row["fmt"],
        int(row["graph_eq"]), *(row[name] == "True" for name in SWITCHES), row["lround"],
    )  # fmt: skip


def main() -> None:
    """Print the table, and write it where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("store", type=Path)
    parser.add_argument("--reference", type=Path, nargs="+", required=True)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    known: dict[tuple[Any, ...], dict[str, str]] = {}
    for path in args.reference:
        with path.open(newline="") as file:
            known |= {theirs(row): row for row in csv.DictReader(file)}
    rows = [_beside(row, known.get(ours(row))) for row in Store(args.store).rows() if row["status"] == "done"]
    for row in rows:
        print(*(f"{row[name]}" for name in ("net", "backend", "weights", "activations", "ours", "brevitas",
                                            "difference")), sep="\t")  # fmt: skip
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


def _beside(row: dict[str, Any], brevitas: dict[str, str] | None) -> dict[str, Any]:
    top1 = None if brevitas is None else float(brevitas["top1"])
    return {
        **dict(zip(NAMES, ours(row))), "float_top1": row["float_top1"], "ours": row["top1"], "brevitas": top1,
        "difference": None if top1 is None else round(row["top1"] - top1, 2),
        "our_agreement": row["agreement"], "brevitas_agreement": brevitas and brevitas["agree"],
        "our_sqnr_db": round(row["sqnr_db"], 2), "brevitas_sqnr_db": brevitas and brevitas["logit_sqnr_db"],
        "equalized": "equalize: equalized" in row["notes"], "seconds": row["seconds"], "commit": commit(),
        "bitsmith": row["version"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
