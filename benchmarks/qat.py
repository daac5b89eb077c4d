"""Quantization-aware training: what a step costs beside the float step, and what accuracy training gives back.

    python -m benchmarks.qat step [--kinds moving-average lsq] [--frozen] [--batch 128] [--device cuda] [--csv FILE]
    python -m benchmarks.qat accuracy [--rows w4a4 w2a4 po2] [--epochs N] [--held-out] [--device cuda] [--csv FILE]

``step`` times one optimizer step of ResNet-20 with 8-bit weights per channel and 8-bit activations, and that of the
float model beside it, alternately. ``accuracy`` trains from a pretrained checkpoint on the 10,000 training images of
the shared data and judges the exported file on the 10,000 test images. ``--held-out`` is how options were chosen: it
trains on 9,000 of them and judges the other 1,000.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from benchmarks import data, nets
from benchmarks.accuracy import commit
from benchmarks.nets import top1
from benchmarks.nets.registry import NORMS
from bitsmith.qat import Distillation

HELD_OUT = 1000


@dataclass(frozen=True)
class Training:
    """How one row is trained."""

    net: str
    recipe: str
    target: str = "onnxruntime"
    start: str = "float"  # or "ptq": from what bitsmith.quantize gives
    kind: str = "auto"
    epochs: int = 12
    lr: float = 1e-3
    scale_lr: float = 1.0  # of the quantizers, in units of lr
    optimizer: str = "adam"
    weight_decay: float = 0.0
    labels: float = 0.0  # weight of the cross entropy beside the distillation
    temperature: float = 1.0
    mixed: float = 0.0  # share of inputs that are a mean of two images, with random weights
    batch: int = 128
    freeze_bn: int | None = None
    seed: int = 0


ROWS = {
    "w4a4": Training("resnet20", "w4a4-fast", start="ptq", epochs=36, lr=2e-4, temperature=3.0, mixed=1.0),
    "w2a4": Training("resnet20", "w2a4-fast", start="ptq", epochs=6, lr=1e-3),
    "po2": Training("shufflenetv2_x0_5", "int8-tensor-po2", "tda4vm", epochs=1, lr=3e-5),
}


def augmented(images: Tensor, norm: Any, batch: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch of batches (indices, inputs): random crops of images with a black border, random flips."""
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in norm)
    count, side = len(images), images.shape[-1]
    order = torch.randperm(count, generator=generator)
    for index in order.split(batch):
        padded = F.pad(images[index], (4, 4, 4, 4))
        top, left = torch.randint(9, (2, len(index)), generator=generator)
        flip = torch.rand(len(index), generator=generator) < 0.5
        rows = torch.arange(side) + top[:, None]
        columns = torch.arange(side) + left[:, None]
        columns = torch.where(flip[:, None], columns.flip(1), columns)
        x = padded[torch.arange(len(index))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
        yield index, (x.permute(0, 3, 1, 2).float() / 255 - mean) / std


def mixed(x: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """A share of images mixed with others, where a teacher that knows the training images by heart has more to say.

    Source: Beyer et al., A good teacher is patient and consistent (arXiv 2106.05237), section 3.
    """
    weight = torch.rand(len(x), generator=generator).view(-1, 1, 1, 1)
    weight[torch.rand(len(x), generator=generator) >= share] = 1.0
    return weight * x + (1 - weight) * x[torch.randperm(len(x), generator=generator)]


def train(p: nn.Module, options: Training, images: Tensor, labels: Tensor, device: str, report: Callable[[int], None]):
    """Train in place: Adam or SGD, cosine to 0, from the float model's answers and, where asked, from the labels."""
    generator = torch.Generator().manual_seed(options.seed)
    scales = {id(v) for q in p.quantizers() for v in q.parameters()}
    groups = [
        {"params": [v for v in p.parameters() if id(v) not in scales], "weight_decay": options.weight_decay},
        {"params": [v for v in p.parameters() if id(v) in scales], "lr": options.lr * options.scale_lr},
    ]
    if options.optimizer == "adam":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(groups, lr=options.lr, weight_decay=0.0)
    else:
        optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
    total = options.epochs * math.ceil(len(images) / options.batch)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    schedule = bs.QATSchedule(options.epochs, freeze_bn=options.freeze_bn)
    schedule.attach(p)
    for epoch in range(options.epochs):
        p.train()
        for index, x in augmented(images, NORMS[options.net], options.batch, generator):
            x = mixed(x, options.mixed, generator)
            z = p(x.to(device))
            loss = p.penalty()
            if options.labels:
                loss = loss + options.labels * F.cross_entropy(z, labels[index].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
        schedule.step()
        report(epoch)


@dataclass(frozen=True)
class Row:
    """One trained model."""

    net: str
    checkpoint: str
    recipe: str
    target: str
    training: str
    trained_samples: int
    judged_samples: int
    float_top1: float
    ptq_top1: float
    simulated_top1: float
    deployed_top1: float
    file_class_agreement: float
    train_s: float
    train_cpu_s: float  # processor time, all threads together
    threads: int
    seed: int
    commit: str
    bitsmith: str


def accuracy(options: Training, *, held_out: bool, device: str) -> Row:
    """Train one row and judge it."""
    model, calibration, test, info = nets.load(options.net)
    images, labels = (torch.from_numpy(v) for v in data.cifar10("train"))
    images, labels = images.permute(0, 3, 1, 2), labels.long()
    if held_out:
        x = data.normalized(images[-HELD_OUT:].permute(0, 2, 3, 1).numpy(), *NORMS[options.net])
        test = data.batches(x, labels[-HELD_OUT:], 250)
        images, labels = images[:-HELD_OUT], labels[:-HELD_OUT]
    q = bs.quantize(model, calibration, options.recipe, target=options.target)
    start, processor = time.perf_counter(), time.process_time()
    teacher = Distillation(model, temperature=options.temperature)
    if options.start == "ptq":
        p = bs.prepare_qat(q, kind=options.kind, teacher=teacher)
    else:
        p = bs.prepare_qat(
            model, options.recipe, target=options.target, calibration=calibration, kind=options.kind, teacher=teacher
        )
    p.to(device)

    def report(epoch: int) -> None:
        p.eval()
        seconds = time.perf_counter() - start
        line = f"  epoch {epoch + 1}: {seconds:.0f} s"
        if held_out:
            with torch.no_grad():
                z, t = (torch.cat([m(x.to(device)) for x, _ in test]) for m in (p, teacher.teacher))
                between = [mixed(x, 1.0, torch.Generator().manual_seed(0)).to(device) for x, _ in test]
                z_mixed, t_mixed = (torch.cat([m(x) for x in between]) for m in (p, teacher.teacher))
            agree, agree_mixed = (
                100 * float((a.argmax(1) == b.argmax(1)).double().mean()) for a, b in ((z, t), (z_mixed, t_mixed))
            )
            line += f", held out: loss {_divergence(z, t):.4f}, same class as float {agree:.2f} %; "
            line += f"mixed: {_divergence(z_mixed, t_mixed):.4f}, {agree_mixed:.2f} %"
        print(line, flush=True)

    if held_out:
        report(-1)
    train(p, options, images, labels, device, report)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    trained = bs.convert(p.to("cpu"))
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        simulated = torch.cat([p.eval()(x) for x, _ in test])
        narrow = any(layer.input_bits != 8 for layer in trained.report.layers)
        run = bs.deploy(bs.export_onnx(trained, Path(folder, "m.onnx"), style="qcdq" if narrow else "qdq"))
        deployed = torch.cat([run(x) for x, _ in test])
    judged = torch.cat([y for _, y in test])
    percent = lambda a, b: round(100 * float((a == b).double().mean()), 3)  # noqa: E731
    return Row(
        options.net, info.checkpoint, options.recipe, options.target, _text(options), len(images), len(judged),
        round(top1(model, test), 2), round(top1(q, test), 2), percent(simulated.argmax(1), judged),
        percent(deployed.argmax(1), judged), percent(simulated.argmax(1), deployed.argmax(1)), round(seconds, 1),
        round(processor, 1),
        torch.get_num_threads(), options.seed, commit(), bs.__version__,
    )  # fmt: skip


def _divergence(z: Tensor, t: Tensor) -> float:
    return float(F.kl_div(z.log_softmax(1), t.log_softmax(1), reduction="batchmean", log_target=True))


def _text(options: Training) -> str:
    named = {k: v for k, v in asdict(options).items() if k not in ("net", "recipe", "target", "seed")}
    return " ".join(f"{k}={v}" for k, v in named.items())


def step(kinds: list[str], *, frozen: bool, batch: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Median seconds of a training step, float and quantized alternately."""
    model, calibration, _, info = nets.load("resnet20")
    x, y = (torch.cat(parts)[:batch].to(device) for parts in zip(*calibration))
    runs: dict[str, Callable[[], None]] = {"float": _stepper(model.train().to(device), x, y)}
    for kind in kinds:
        p = bs.prepare_qat(model, "int8", calibration=calibration[:1], kind=kind).to(device)
        runs[kind] = _stepper(p, x, y)
        if frozen:
            f = bs.prepare_qat(model, "int8", calibration=calibration[:1], kind=kind).to(device)
            f.freeze_norms()
            f.freeze_ranges()
            runs[f"{kind}, all frozen"] = _stepper(f, x, y)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - begin)
    medians = {name: float(torch.tensor(values[2:]).median()) for name, values in times.items()}
    return [
        {
            "net": "resnet20", "checkpoint": info.checkpoint, "batch": batch, "step": name,
            "median_ms": round(1e3 * s, 2),
            "times_float": round(s / medians["float"], 3), "repeats": repeats - 2, "threads": torch.get_num_threads(),
            "device": device, "seed": 0, "commit": commit(), "bitsmith": bs.__version__,
        }
        for name, s in medians.items()
    ]  # fmt: skip


def _stepper(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def main() -> None:
    """Measure, print, and keep the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "accuracy"])
    parser.add_argument("--kinds", nargs="+", default=["moving-average", "lsq"])
    parser.add_argument("--frozen", action="store_true", help="also with norms and ranges frozen")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--held-out", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    for field in fields(Training):
        if field.name not in ("net", "recipe", "target", "batch"):
            parser.add_argument(
                f"--{field.name.replace('_', '-')}", type=type(field.default) if field.default is not None else int
            )
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    if options.what == "step":
        rows = step(
            options.kinds, frozen=options.frozen, batch=options.batch, repeats=options.repeats, device=options.device
        )
        for row in rows:
            print(f"{row['step']:28}{row['median_ms']:9.2f} ms{row['times_float']:8.3f} x float", flush=True)
    else:
        for name in options.rows:
            given = {k: v for k in asdict(ROWS[name]) if k != "batch" and (v := getattr(options, k, None)) is not None}
            training = replace(ROWS[name], **given)
            print(name, _text(training), flush=True)
            row = asdict(accuracy(training, held_out=options.held_out, device=options.device))
            print(row, flush=True)
            rows.append(row)
    if options.csv is not None:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        with options.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
