"""Latency of files side by side: interleaved medians, and the ratio to a baseline.

    python -m benchmarks.latency --file float onnxruntime a.onnx --file theirs onnxruntime b.onnx \\
        --file ours onnxruntime c.onnx --file ours-ov openvino c.onnx --baseline theirs [--csv rows.csv]

Every round visits every file in turn, in an order that rotates; a visit is a few unmeasured runs, then
measured ones, and counts as the median of these. A file's latency is the median over rounds. Its ratio is
the median over rounds of (baseline's visit / its own visit), so that what else runs on the machine touches
both: above 1 is faster than the baseline. OpenVINO gets a model reshaped to the batch, as its users do;
onnxruntime takes the file as it is. On CPUs with bfloat16 instructions, engine `openvino` runs float layers
in bfloat16, which is its default, and `openvino-f32` keeps them in float32.
"""

from __future__ import annotations

import argparse
import csv
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import numpy as np

Run = Callable[[], object]
Clock = Callable[[], float]


@dataclass(frozen=True)
class Entry:
    """A file, the engine that runs it (a key of `ENGINES`), and what the table calls it."""

    label: str
    engine: str
    path: Path


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds for a whole batch. `ratio` is None without a baseline."""

    label: str
    engine: str
    file: str
    batch: int
    threads: int
    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    ratio: float | None
    baseline: str
    rounds: int


def onnxruntime_run(path: Path, batch: int, threads: int) -> Run:
    """Return a function that runs the ONNX file once in onnxruntime on random inputs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
    feeds = {}
    for x in session.get_inputs():
        if x.type not in types:
            raise TypeError(f"{path}: input {x.name!r} is {x.type}; only float inputs are measured")
        feeds[x.name] = random_input(path, x.name, x.shape, batch, types[x.type])
    return lambda: session.run(None, feeds)


def openvino_run(path: Path, batch: int, threads: int, precision: str | None = None) -> Run:
    """Return a function that runs the ONNX or IR file once in OpenVINO, its float layers in `precision`."""
    import openvino as ov

    core = ov.Core()
    model = core.read_model(path)
    feeds = {}
    for x in model.inputs:
        shape = [None if size.is_dynamic else size.get_length() for size in x.partial_shape]
        feeds[x.any_name] = random_input(path, x.any_name, shape, batch, np.float32)
    model.reshape({name: list(value.shape) for name, value in feeds.items()})
    config = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        config["INFERENCE_PRECISION_HINT"] = precision
    request = core.compile_model(model, "CPU", config).create_infer_request()
    return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)


ENGINES: dict[str, Callable[[Path, int, int], Run]] = {
    "onnxruntime": onnxruntime_run,
    "openvino": openvino_run,
    "openvino-f32": partial(openvino_run, precision="f32"),
}


def random_input(path: Path, name: str, shape: Sequence, batch: int, dtype: type) -> np.ndarray:
    """Return seeded normal values; the first dimension becomes `batch`, any other must be known."""
    if not shape:
        raise ValueError(f"{path}: input {name!r} has no batch dimension")
    first, *rest = shape
    if isinstance(first, int) and first != batch:
        raise ValueError(f"{path}: input {name!r} has the fixed batch {first}, not {batch}")
    if not all(isinstance(size, int) for size in rest):
        raise ValueError(f"{path}: input {name!r} has more than its batch dynamic: {list(shape)}")
    return np.random.default_rng(0).standard_normal((batch, *rest)).astype(dtype)


def visit(run: Run, warm: int, seconds: float, clock: Clock = time.perf_counter) -> float:
    """Run `warm` times unmeasured (other engines' threads may spin), then for `seconds`; median in ms of `clock`."""
    for _ in range(warm):
        run()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = clock()
        run()
        times.append(clock() - start)
    return 1000 * median(times)


def interleave(
    runs: Sequence[Run], rounds: int, seconds: float, warm: int = 3, clock: Clock = time.perf_counter
) -> list[list[float]]:
    """Visit each of `runs` once a round, in a rotating order; return the visits in ms, one list for each."""
    visits: list[list[float]] = [[] for _ in runs]
    for turn in range(rounds):
        for place in range(len(runs)):
            which = (place + turn) % len(runs)
            visits[which].append(visit(runs[which], warm, seconds, clock))
    return visits


def measure(
    entries: Sequence[Entry],
    batch: int,
    threads: int = 2,
    rounds: int = 9,
    seconds: float = 0.15,
    baseline: str | None = None,
) -> list[Row]:
    """Measure all `entries` at one batch size; ratios are to the entry whose label is `baseline`."""
    labels = [entry.label for entry in entries]
    if len(set(labels)) < len(labels):
        raise ValueError(f"labels must differ: {', '.join(labels)}")
    if baseline is not None and baseline not in labels:
        raise ValueError(f"no file is called {baseline!r}, the baseline; there are {', '.join(labels)}")
    if rounds < 2:
        raise ValueError(f"at least 2 rounds make quartiles, not {rounds}")
    runs = [ENGINES[entry.engine](entry.path, batch, threads) for entry in entries]
    visits = interleave(runs, rounds, seconds)
    against = None if baseline is None else visits[labels.index(baseline)]
    return [_row(e, v, against, batch, threads, baseline or "") for e, v in zip(entries, visits)]


def _row(
    entry: Entry, visits: list[float], against: list[float] | None, batch: int, threads: int, baseline: str
) -> Row:
    q1, middle, q3 = quantiles(visits, n=4, method="inclusive")
    ratio = None if against is None else median(b / v for b, v in zip(against, visits))
    return Row(
        label=entry.label,
        engine=entry.engine,
        file=entry.path.name,
        batch=batch,
        threads=threads,
        median_ms=round(middle, 4),
        q1_ms=round(q1, 4),
        q3_ms=round(q3, 4),
        min_ms=round(min(visits), 4),
        ratio=None if ratio is None else round(ratio, 4),
        baseline=baseline,
        rounds=len(visits),
    )


def table(rows: Sequence[Row]) -> str:
    """Return the rows as aligned text."""
    wide = max(len("file"), *(len(row.label) for row in rows))
    names = f"{'batch':>5s} {'ms':>8s} {'quartiles':>17s} {'min':>8s} {'ratio':>6s}"
    lines = [f"{'file':{wide}s}  {'engine':12s} {names}"]
    for row in rows:
        ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
        spread = f"{row.q1_ms:.2f} to {row.q3_ms:.2f}"
        numbers = f"{row.batch:5d} {row.median_ms:8.3f} {spread:>17s} {row.min_ms:8.3f} {ratio:>6s}"
        lines.append(f"{row.label:{wide}s}  {row.engine:12s} {numbers}")
    return "\n".join(lines)


def write_csv(rows: Sequence[Row], path: Path) -> None:
    """Append the rows to a CSV file; a new file begins with the column names."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(Row)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[Entry]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", nargs=3, action="append", required=True, metavar=("LABEL", "ENGINE", "PATH"))
    parser.add_argument("--baseline", help="the label that ratios are to (default: the first file)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.15, help="measured time of one visit")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(argv)
    for label, engine, path in args.file:
        if engine not in ENGINES:
            parser.error(f"engine of {label} is {engine!r}; there are {', '.join(ENGINES)}")
        if not Path(path).is_file():
            parser.error(f"no file {path} (for {label})")
    return args, [Entry(label, engine, Path(path)) for label, engine, path in args.file]


def main(argv: list[str] | None = None) -> None:
    """Measure the files named on the command line; print a table for each batch size."""
    args, entries = parse(argv)
    for batch in args.batch:
        baseline = args.baseline or entries[0].label
        try:
            rows = measure(entries, batch, args.threads, args.rounds, args.seconds, baseline)
        except (ValueError, TypeError) as error:
            sys.exit(f"latency: {error}")
        print(table(rows), end="\n\n", flush=True)
        if args.csv:
            write_csv(rows, args.csv)


if __name__ == "__main__":
    main()
