"""Times of training quantizers, forward and backward, against a copy and against PyTorch's and Brevitas' own.

    python -m benchmarks.qat_kernels [--elements 8388608] [--rounds 15] [--threads 2] [--brevitas PYTHON] [--csv FILE]

All contenders quantize the same activations to 8 unsigned bits per tensor behind a ReLU, which the quantizers named
"with ReLU" do themselves; the others are timed without one. They are timed by turns, round after round; the median of
each is printed, in milliseconds, with its ratio to one clone. Memory is kept between rounds (glibc hands it back to the
system in a way that differs from run to run, which costs more than a kernel). ``--brevitas`` names the interpreter of
an environment that has Brevitas (see benchmarks/README.md); it runs in a process of its own, by turns with the others.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.accuracy import commit
from benchmarks.kernels import interleaved
from bitsmith.grid import Grid, IntFormat, TensorSpec
from bitsmith.qat.quantizers import make_quantizer

SCALE = 0.02
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_MMAP_THRESHOLD_": "1000000000"}


def ours(kind: str, *, frozen: bool = False) -> nn.Module:
    """A training quantizer of ours that stands for a ReLU too."""
    spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=False)
    quantizer = make_quantizer(kind, spec, non_negative=True)
    quantizer.initialize(Grid(IntFormat(8, signed=False), torch.tensor(SCALE)))
    if frozen:
        quantizer.freeze()
    return quantizer


def formula() -> Callable[[Tensor], Tensor]:
    """LSQ as one writes it, a new tensor for every operation."""
    scale = nn.Parameter(torch.tensor(SCALE))

    def call(x: Tensor) -> Tensor:
        v = (x / scale).clamp(0, 255)
        return ((v.round() - v).detach() + v) * scale

    return call


def torch_moving_average() -> Callable[[Tensor], Tensor]:
    """The fused operator under ``torch.ao``'s quantization-aware training: it observes and quantizes."""
    on = torch.ones(1, dtype=torch.long)
    low, high, scale = torch.zeros(1), torch.full((1,), SCALE * 255), torch.full((1,), SCALE)
    zero = torch.zeros(1, dtype=torch.int32)
    return lambda x: torch.fused_moving_avg_obs_fake_quant(x, on, on, low, high, scale, zero, 0.01, 0, 255, -1)


def torch_learnable() -> Callable[[Tensor], Tensor]:
    """PyTorch's operator for step sizes that learn."""
    scale, zero = nn.Parameter(torch.tensor([SCALE])), nn.Parameter(torch.zeros(1))
    return lambda x: torch._fake_quantize_learnable_per_tensor_affine(x, scale, zero, 0, 255, 1.0)


def brevitas(python: str, elements: int, threads: int) -> Callable[[], object]:
    """A process that runs one step of Brevitas' activation quantizer for every line that it reads."""
    command = [python, "-m", "benchmarks.rivals.brevitas_quantizer", str(elements), str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def step() -> object:
        assert process.stdin is not None
        assert process.stdout is not None
        print("step", file=process.stdin, flush=True)
        if not process.stdout.readline():
            raise SystemExit(f"Brevitas did not run under {python}: see its message above")
        return None

    step()
    return step


def contenders(elements: int) -> dict[str, Callable[[], object]]:
    """Forward and backward of each, on the same values and gradients."""
    x = torch.randn(elements).requires_grad_()
    gradient = torch.randn(elements)

    def step(function: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def call() -> None:
            x.grad = None
            function(x).backward(gradient)

        return call

    return {
        "clone": lambda: x.detach().clone(),
        "ReLU alone": step(torch.relu),
        "bitsmith frozen, with ReLU": step(ours("moving-average", frozen=True)),
        "bitsmith moving average, with ReLU": step(ours("moving-average")),
        "bitsmith LSQ, with ReLU": step(ours("lsq")),
        "bitsmith PACT, with ReLU": step(ours("pact")),
        "torch.fake_quantize_per_tensor_affine": step(
            lambda x: torch.fake_quantize_per_tensor_affine(x, SCALE, 0, 0, 255)
        ),
        "torch.fused_moving_avg_obs_fake_quant": step(torch_moving_average()),
        "torch learnable step size": step(torch_learnable()),
        "LSQ as a formula": step(formula()),
    }


def main() -> None:
    """Measure, print the table, and write it as CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 23)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--brevitas", metavar="PYTHON")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    if any(name not in os.environ for name in KEEP_MEMORY):  # read when a process starts
        os.execve(
            sys.executable, [sys.executable, "-m", "benchmarks.qat_kernels", *sys.argv[1:]], os.environ | KEEP_MEMORY
        )
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    all_contenders = contenders(arguments.elements)
    if arguments.brevitas:
        all_contenders["Brevitas"] = brevitas(arguments.brevitas, arguments.elements, arguments.threads)
    times = interleaved(all_contenders, arguments.rounds)
    print(f"{arguments.elements:,} floats, {arguments.threads} threads, median of {arguments.rounds}")
    for name, milliseconds in times.items():
        print(f"  {name:40s} {milliseconds:8.2f} ms {milliseconds / times['clone']:6.2f} x")
    if arguments.csv is not None:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("contender", "elements", "threads", "milliseconds", "clones", "torch", "seed", "commit"))
            for name, milliseconds in times.items():
                row = name, arguments.elements, arguments.threads, f"{milliseconds:.3f}"
                writer.writerow((*row, f"{milliseconds / times['clone']:.2f}", torch.__version__, 0, commit()))


if __name__ == "__main__":
    main()
