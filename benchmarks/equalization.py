"""Equalization and splitting beside the same recipe without them: accuracy, and what the gate decided.

    python -m benchmarks.equalization [--nets resnet20 ...] [--settings "W8A8 per tensor" ...]
                                      [--steps equalize ...] [--quick] [--csv FILE]

Each row quantizes with one step more than the first of its setting. Beside the change in top-1 stands its standard
error over the judged samples (the square root of how many changed between right and wrong), and agreement with the
float model and the outputs' noise, in which a real loss shows earlier. A step that the gate has undone leaves the very
same model, which is not judged again. The CSV file is added to row by row. ``--quick`` judges 1,000 samples.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import bitsmith as bs
from benchmarks import nets
from benchmarks.accuracy import answers, commit
from benchmarks.rows import append
from bitsmith.grid import RangeRule
from bitsmith.recipe import bits_recipe
from bitsmith.steps import Equalize, EqualizeActivations, Gptq, SplitChannels, Step

FIELDS = ("net", "setting", "step", "kept", "gate", "judged_samples", "float_top1", "top1", "change", "change_error",
          "agreement", "agreement_change", "sqnr_db", "sqnr_change", "prepare_s", "quantize_s", "threads", "seed",
          "commit", "bitsmith")  # fmt: skip
STEPS: dict[str, Step | None] = {
    "none": None,
    "equalize": Equalize(merge_bias=True),
    "equalize, noise": Equalize(objective="noise"),
    "equalize, noise, clips traded": Equalize(objective="noise", clips="trade"),
    "split, input": SplitChannels(),
    "split, output": SplitChannels(side="output"),
    "equalize_activations": EqualizeActivations(),
}
WITH_CLIPS = ("mcunet_in4", "mobilenet_v1_025")
NETS = ("resnet20", "resnet32", "shufflenetv2_x0_5", "dscnn_kws", *WITH_CLIPS)
WITH_GPTQ = ("resnet20", "shufflenetv2_x0_5", "mobilenet_v1_025")
SETTINGS = ("W8A8 per tensor", "W8A8 per channel", "W4A8 per channel", "W4A8 per channel, GPTQ")


def recipe(setting: str, step: Step | None) -> bs.Recipe:
    """Nearest rounding (or GPTQ) and bias correction, ``step`` before them; per tensor with ranges of least error."""
    before = ("fold_batch_norm",) if step is None else ("fold_batch_norm", step)
    rounding = (Gptq(),) if setting.endswith("GPTQ") else ()
    granularity: Any = "tensor" if "per tensor" in setting else "channel"
    found = bits_recipe(int(setting[1]), 8, granularity=granularity, steps=(*before, *rounding, "bias_correction"))
    if granularity == "channel" or found.weights is None:
        return found
    weights = found.weights.model_copy(update={"range": RangeRule(name="mse")})
    return found.model_copy(update={"weights": weights})


def noise_db(exact: Tensor, found: Tensor) -> float:
    """Signal to noise of all outputs, in dB."""
    return float(10 * torch.log10(exact.square().sum() / (found - exact).square().sum()))


def measure(net: str, loaded: nets.Benchmark, exact: Tensor, setting: str, steps: list[str]) -> Any:
    """The rows of one setting, that without a step first."""
    labels = torch.cat([y for _, y in loaded.test])
    same = lambda scores: 100 * float((scores.argmax(1) == exact.argmax(1)).double().mean())  # noqa: E731
    right = lambda scores: scores.argmax(1) == labels  # noqa: E731
    plain: Tensor | None = None
    for name, step in STEPS.items():
        if ("clips" in name and net not in WITH_CLIPS) or (step is not None and name not in steps):
            continue
        start = time.perf_counter()
        q = bs.quantize(loaded.model, loaded.calibration, recipe(setting, step))
        seconds = time.perf_counter() - start
        gate = next((note for note in q.report.notes if step is not None and note.startswith(f"{step.name}: ")), "")
        kept = step is None or not gate.startswith(f"{step.name}: undone")
        found = plain if plain is not None and not kept else answers(q, loaded.test)
        plain = found if plain is None else plain
        changed = int((right(found) != right(plain)).sum())
        top1, before = (100 * float(right(scores).double().mean()) for scores in (found, plain))
        yield {
            "net": net, "setting": setting, "step": name, "kept": {True: "yes", False: "undone"}[kept] if step else "",
            "gate": gate, "judged_samples": len(labels),
            "float_top1": round(100 * float(right(exact).double().mean()), 2), "top1": round(top1, 2),
            "change": round(top1 - before, 2), "change_error": round(100 * changed**0.5 / len(labels), 2),
            "agreement": round(same(found), 2), "agreement_change": round(same(found) - same(plain), 2),
            "sqnr_db": round(noise_db(exact, found), 2),
            "sqnr_change": round(noise_db(exact, found) - noise_db(exact, plain), 2),
            "prepare_s": round(q.report.seconds["prepare"], 2), "quantize_s": round(seconds, 2),
            "threads": torch.get_num_threads(), "seed": 0, "commit": commit(), "bitsmith": bs.__version__,
        }  # fmt: skip


def main() -> None:
    """Measure and print, and add to a CSV file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=NETS)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    for net in options.nets:
        loaded = nets.load(net)
        if options.quick:
            loaded = loaded._replace(test=loaded.test[: max(1, 1000 // len(loaded.test[0][0]))])
        exact = answers(loaded.model, loaded.test)
        for setting in options.settings:
            if setting.endswith("GPTQ") and net not in WITH_GPTQ:
                continue
            for r in measure(net, loaded, exact, setting, options.steps):
                print(f"{net:18}{setting:24}{r['step']:31}{r['kept']:7}{r['top1']:7.2f}{r['change']:+7.2f}"
                      f" +-{r['change_error']:5.2f}{r['agreement']:8.2f}{r['sqnr_db']:7.2f} dB{r['prepare_s']:7.2f} s"
                      f"{r['quantize_s']:7.2f} s", flush=True)  # fmt: skip
                if options.csv:
                    append(options.csv, FIELDS, r)


if __name__ == "__main__":
    main()
