"""One step of Brevitas' 8-bit activation quantizer, forward and backward, for every line on stdin.

    python -m benchmarks.rivals.brevitas_quantizer ELEMENTS THREADS

``QuantReLU`` with its defaults, whose scale has been taken from values and learns. Needs the environment that
benchmarks/README.md names; ``benchmarks.qat_kernels --brevitas`` starts it.
"""

from __future__ import annotations

import sys
import warnings

import torch

warnings.filterwarnings("ignore")  # Brevitas warns about its own imports


def main() -> None:
    """Collect statistics first, as training does, then wait for lines."""
    from brevitas.nn import QuantReLU

    elements, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    quantizer = QuantReLU(bit_width=8, collect_stats_steps=3)
    small = torch.randn(1 << 12)
    for _ in range(5):
        quantizer(small)
    x, gradient = torch.randn(elements).requires_grad_(), torch.randn(elements)
    for _ in sys.stdin:
        x.grad = None
        quantizer(x).backward(gradient)
        print("done", flush=True)


if __name__ == "__main__":
    main()
