"""Time of `bitsmith ai8x` on a checkpoint, process start to end, beside what ai8x-synthesis' quantize.py costs.

    python -m benchmarks.ai8x [--rounds 9] [--original quantize.py] [--checkpoint cifar10] [--csv FILE]

``--original`` names the script in a checkout of ai8x-synthesis, run in this Python's environment (it needs PyYAML,
colorama, rich and NumPy before 2.4). Without it, a stand-in is timed that imports only PyTorch and PyYAML, loads, runs
the rule of quantization-aware training on every layer with PyTorch, and saves: less than the original does.
"""

from __future__ import annotations

import argparse
import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.accuracy import commit

STAND_IN = """
import sys, torch, yaml
checkpoint = torch.load(sys.argv[1], map_location="cpu", weights_only=False)
state = checkpoint["state_dict"]
new = state.copy()
for key in [key for key in state if key.endswith(".op.weight")]:
    layer, weight, bias = key[: -len(".op.weight")], state[key], state.get(key[:-6] + "bias")
    both = weight.flatten() if bias is None else torch.cat((weight.flatten(), bias))
    shift = torch.floor(torch.log2(1 / torch.quantile(both.abs(), state.get(layer + ".shift_quantile", 1.0))))
    factor = 128 * 2.0 ** shift.clamp(-15, 15)
    new[key] = (factor * weight).add(0.5).floor().clamp(-128, 127)
    if bias is not None:
        new[key[:-6] + "bias"] = (factor * bias).add(0.5).floor().clamp(-128, 127) * 128
    new[layer + ".output_shift"] = -shift
checkpoint["state_dict"] = new
torch.save(checkpoint, sys.argv[2])
"""


def main() -> None:
    """Print the table and write the CSV file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--original", type=Path, help="quantize.py of ai8x-synthesis")
    parser.add_argument("--checkpoint", default="cifar10")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    data = Path(os.environ.get("BITSMITH_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    source = str(data / "ai8x" / "inputs" / f"{arguments.checkpoint}.pth.tar")
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "q.pth.tar"))
        words = [source, output, "--device", "MAX78000"]
        ours = [sys.executable, "-c", "from bitsmith.cli import main; main()", "ai8x", *words]
        rival = ("stand-in for the original", [sys.executable, "-c", STAND_IN, source, output])
        if arguments.original:
            rival = ("the original", [sys.executable, str(arguments.original), *words])
        commands = {"bitsmith ai8x": ours, "bitsmith ai8x -v": [*ours, "-v"], rival[0]: rival[1]}
        seconds = side_by_side(commands, arguments.rounds)
    reference = median(seconds[rival[0]])
    rows = [
        {
            "checkpoint": arguments.checkpoint,
            "program": name,
            "median_s": f"{median(times):.3f}",
            "fastest_s": f"{min(times):.3f}",
            "slowest_s": f"{max(times):.3f}",
            "of_the_original": f"{median(times) / reference:.2f}",
            "rounds": arguments.rounds,
            "commit": commit(),
        }
        for name, times in seconds.items()
    ]
    for row in rows:
        print(f"{row['program']:28} {row['median_s']:>7} s ({row['fastest_s']} to {row['slowest_s']})", end="")
        print(f"  {row['of_the_original']} of {rival[0]}")
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def side_by_side(commands: dict[str, list[str]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every command, one after the other in each round; the first round warms the disk's cache."""
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for index in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
            if index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
