"""The torch engine and its TorchScript files against float eager and torch.ao's own int8 models, in one run.

    python -m benchmarks.torch_engine speed [--nets resnet18 mobilenet_v2] [--batch 1 8] [--clock wall] [--csv rows.csv]
    python -m benchmarks.torch_engine kernels [--csv rows.csv]
    python -m benchmarks.torch_engine accuracy [--csv rows.csv]

`speed`: every entry visited in turns (`benchmarks.latency.interleave`); `faster` is the median over rounds of float
eager's visit over its own, `against` the same of torch.ao's entry of the same kind (scripted file, loaded for the same
kernels). `--clock processor` counts processor time, of one thread, for machines that others use too. `kernels`: all
convolutions of a network, one after the other, on torch's packed kernels and on those for plain bytes. `accuracy`: on
how many of CIFAR-10's 10,000 test images the engine's class is the simulation's.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

import bitsmith as bs
from benchmarks.latency import interleave
from benchmarks.nets import load

Run = Callable[[], object]
NETS = ("resnet18", "mobilenet_v2")
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


@dataclass(frozen=True)
class Row:
    """One line of the table; milliseconds for a whole batch."""

    net: str
    batch: int
    threads: int
    label: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    min_ms: float
    faster: float
    against: float | None
    baseline: str
    rounds: int
    clock: str = "wall"


def torch_ao(net: nn.Module, samples: list[Tensor], kernels: str) -> nn.Module:
    """torch.ao's FX workflow with its default configuration for `kernels`."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = kernels
    prepared = prepare_fx(net, get_default_qconfig_mapping(kernels), (samples[0],))
    for x in samples:
        prepared(x)
    return convert_fx(prepared)


def loaded(path: Path, kernels: str, *, frozen: bool) -> nn.Module:
    """A TorchScript file, packed for `kernels`."""
    torch.backends.quantized.engine = kernels
    file = torch.jit.load(str(path)).eval()
    torch.backends.quantized.engine = "x86"
    return torch.jit.freeze(file) if frozen else file


def prepared(name: str, folder: Path) -> Callable[[], tuple[dict[str, Callable[..., object]], dict[str, str]]]:
    """Quantizes one network once; what it returns packs everything anew, since oneDNN keeps the first shape's kernels.

    That gives what is measured, and which entry of torch.ao's each of ours is held against.
    """
    net, calibration, _, _ = load(name)
    samples = [x[:8] for x, _ in calibration][:2]
    q = bs.quantize(net, samples, target="torch")
    path = bs.export_torchscript(q, folder / f"{name}.pt")
    theirs = {kernels: torch_ao(net, samples, kernels) for kernels in ("x86", "onednn")}
    for kernels, model in theirs.items():
        torch.backends.quantized.engine = kernels
        torch.jit.save(torch.jit.script(model), str(folder / f"{name}-{kernels}.pt"))
    torch.backends.quantized.engine = "x86"

    def entries() -> tuple[dict[str, Callable[..., object]], dict[str, str]]:
        models: dict[str, Callable[..., object]] = {"float eager": net, "engine torch": bs.deploy(q, "torch")}
        against = {"engine torch": "torch.ao eager x86"}
        for kernels, model in theirs.items():
            models[f"torch.ao eager {kernels}"] = model
            for kind, frozen in ((kernels, False), (f"{kernels} frozen", True)):
                models[f"torch.ao file {kind}"] = loaded(folder / f"{name}-{kernels}.pt", kernels, frozen=frozen)
                models[f"our file {kind}"] = loaded(path, kernels, frozen=frozen)
                against[f"our file {kind}"] = f"torch.ao file {kind}"
        return models, against

    return entries


def speed(
    nets: list[str], batches: list[int], threads: int, rounds: int, seconds: float, clock: str = "wall"
) -> list[Row]:
    """All rows of `speed`."""
    rows = []
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for name in nets:
            entries = prepared(name, Path(folder))
            for batch in batches:
                x = torch.randn(batch, 3, 224, 224)
                models, against = entries()
                runs: list[Run] = [partial(model, x) for model in models.values()]
                visits = dict(zip(models, interleave(runs, rounds, seconds, warm=4, clock=CLOCKS[clock])))
                for label, times in visits.items():
                    baseline = against.get(label, "")
                    other = median(b / v for b, v in zip(visits[baseline], times)) if baseline else None
                    q1, middle, q3 = quantiles(times, n=4, method="inclusive")
                    faster = median(f / v for f, v in zip(visits["float eager"], times))
                    numbers = (round(v, 3) for v in (middle, q1, q3, min(times), faster))
                    ratio = other and round(other, 3)
                    rows.append(Row(name, batch, threads, label, *numbers, ratio, baseline, len(times), clock))
                    print(row_text(rows[-1]), flush=True)
    return rows


def row_text(row: Row) -> str:
    against = "" if row.against is None else f"{row.against:6.3f} x {row.baseline}"
    return (
        f"{row.net:13s} {row.batch:2d}  {row.label:28s} {row.median_ms:8.3f} ms ({row.q1_ms:.2f} to {row.q3_ms:.2f})"
        f" {row.faster:6.2f} x float  {against}"
    )


def convolutions(name: str, batch: int) -> tuple[Run, Run]:
    """All convolutions of a network on packed kernels and on plain ones, each on random codes of its own shape."""
    from bitsmith.engines.torch_kernels import LayerCodes, QuantizedConv, Stored
    from bitsmith.engines.torch_plain import PlainLayer

    net, shapes = load(name).model, []
    convs = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_pre_hook(lambda m, args: shapes.append((m, args[0].shape))) for m in convs]
    net(torch.randn(batch, 3, 224, 224))
    for hook in hooks:
        hook.remove()
    grid, packed, plain = Stored(0.02, 0, 0, 255), [], []
    for conv, shape in shapes:
        weight = torch.randint(-127, 128, conv.weight.shape, dtype=torch.int8)
        codes = LayerCodes(weight, torch.rand(len(weight)) + 0.1, torch.randn(len(weight)))
        x = torch.quantize_per_tensor(torch.rand(shape), 0.02, 0, torch.quint8)
        x = x.contiguous(memory_format=torch.channels_last)
        packed.append((QuantizedConv(conv, codes, grid, relu=True), x))
        plain.append((torch.jit.script(PlainLayer(conv, codes, grid, grid, relu=True)).on_bytes, x.int_repr()))
    return (lambda: [f(x) for f, x in packed]), (lambda: [f(x) for f, x in plain])


def kernels(nets: list[str], batches: list[int], threads: int, rounds: int, seconds: float) -> list[Row]:
    """All rows of `kernels`."""
    rows = []
    torch.set_num_threads(threads)
    with torch.no_grad():
        for name in nets:
            for batch in batches:
                packed, plain = interleave(convolutions(name, batch), rounds, seconds)
                for label, times in (("packed", packed), ("plain", plain)):
                    q1, middle, q3 = quantiles(times, n=4, method="inclusive")
                    ratio = median(b / v for b, v in zip(packed, times))
                    numbers = [round(v, 3) for v in (middle, q1, q3, min(times))]
                    rows.append(Row(name, batch, threads, label, *numbers, 0.0, round(ratio, 3), "packed", len(times)))
                    print(row_text(rows[-1]), flush=True)
    return rows


@dataclass(frozen=True)
class Agreement:
    """How often an engine answers as the simulation does."""

    net: str
    target: str
    images: int
    same_class: float
    equal_to_the_bit: float
    top1_simulation: float
    top1_engine: float


def accuracy() -> list[Agreement]:
    """All rows of `accuracy`."""
    net, calibration, test, _ = load("resnet20")
    rows = []
    for target in ("torch", "onnxruntime"):
        q = bs.quantize(net, [x for x, _ in calibration], target=target)
        deployed = bs.deploy(q, "torch")
        pairs = [(q(x), deployed(x), y) for x, y in test]
        simulation, engine, labels = (torch.cat([pair[i] for pair in pairs]) for i in range(3))
        classes = simulation.argmax(1), engine.argmax(1)
        shares = [
            100 * float(t.double().mean())
            for t in (classes[0] == classes[1], simulation == engine, classes[0] == labels, classes[1] == labels)
        ]
        rows.append(Agreement("resnet20", target, len(labels), *shares))
        print(rows[-1], flush=True)
    return rows


def write_csv(rows: list, path: Path) -> None:
    """Write the rows, with the column names first."""
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, [field.name for field in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def main(argv: list[str] | None = None) -> None:
    """Run one of the three tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("speed", "kernels", "accuracy"))
    parser.add_argument("--nets", nargs="+", default=list(NETS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.12, help="measured time of one visit")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="processor takes one thread")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")  # torch.ao and torch.jit announce their end at every call
    if args.clock == "processor" and (args.table != "speed" or args.threads != 1):
        parser.error("--clock processor goes with speed --threads 1: threads that wait spin, and count")
    if args.table == "accuracy":
        rows: list = accuracy()
    elif args.table == "speed":
        rows = speed(args.nets, args.batch, args.threads, args.rounds, args.seconds, args.clock)
    else:
        rows = kernels(args.nets, args.batch, args.threads, args.rounds, args.seconds)
    if args.csv:
        write_csv(rows, args.csv)


if __name__ == "__main__":
    main()
