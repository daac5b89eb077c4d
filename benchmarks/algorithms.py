"""What each post-training algorithm gives back: top-1 and agreement with the float model, simulated.

    python -m benchmarks.algorithms [--nets resnet20 ...] [--rows "w4a8 gptq" ...] [--draws N] [--quick]
                                    [--csv FILE] [--resume FOLDER]

The CSV file is added to, so that a table can be made in several runs. Rows with several draws are calibrated with as
many sets of images: the first 1,000 training images, then seeded draws from the other 9,000; of the ImageNet sample and
of the keywords, seeded draws of 100, and the other 900 judge. Mean and standard deviation are over the draws, the
float model's top-1 too. Seconds are those of the steps and of all of ``quantize``, first draw. Beside rows that
Brevitas 0.13.4 was measured on (same weights, images and machine, another day) stand its numbers.
``--quick`` judges 1,000 samples after one draw. A row of your own is a line in ``ROWS``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import torch
from torch import Tensor

import bitsmith as bs
from benchmarks import nets
from benchmarks.accuracy import answers, commit
from benchmarks.rows import append
from benchmarks.validation import with_symmetric_weights
from bitsmith.grid import RangeRule
from bitsmith.recipe import PlacementName, bits_recipe
from bitsmith.steps import Equalize, Gpfq, Gptq, LearnedRounding, Qronos, Step

FIELDS = ("net", "row", "placement", "steps", "draws", "calibration_samples", "judged_samples", "float_top1", "top1",
          "top1_std", "agreement", "agreement_std", "step_s", "quantize_s", "threads", "brevitas_top1",
          "brevitas_agreement", "brevitas_step_s", "seed", "commit", "bitsmith")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A recipe under a placement, calibrated with ``draws`` sets of samples."""

    recipe: bs.Recipe
    placement: PlacementName = "fx"
    draws: int = 1


def plain(weight_bits: int, activation_bits: int, *steps: Step | str, draws: int = 1) -> Row:
    """Weights per channel, activations per tensor, all layers alike, batch norms folded; then ``steps``."""
    return Row(bits_recipe(weight_bits, activation_bits, steps=("fold_batch_norm", *steps)), draws=draws)


def _per_tensor(*steps: Step | str) -> Row:
    """8 bits with one scale per tensor, weights too, the weights' range that with the least squared error."""
    recipe = bits_recipe(8, 8, granularity="tensor", steps=("fold_batch_norm", *steps))
    assert recipe.weights is not None
    weights = recipe.weights.model_copy(update={"range": RangeRule(name="mse")})
    return Row(recipe.model_copy(update={"weights": weights}), "runtime")


def _rounding(weight_bits: int, draws: int) -> dict[str, Row]:
    """The rounding algorithms, each with bias correction, at one width of weights."""
    steps: dict[str, Step] = {
        "gptq": Gptq(act_order=False),
        "gptq, act order": Gptq(act_order=True),
        "gpfq": Gpfq(),
        "qronos": Qronos(),
        "gptq, 11 scales": Gptq(scales=11),
        "gpfq, 1 scale": Gpfq(scales=1),
        "qronos, 1 scale": Qronos(scales=1),
    }
    name = f"w{weight_bits}a8"
    rows = {
        f"{name} nearest": plain(weight_bits, 8, draws=draws),
        f"{name} bias correction": plain(weight_bits, 8, "bias_correction", draws=draws),
    }
    return rows | {
        f"{name} {key}": plain(weight_bits, 8, s, "bias_correction", draws=draws) for key, s in steps.items()
    }


def _by_effort(*names: str, draws: int = 3) -> dict[str, Row]:
    """Recipes by widths and effort; behind a slash stands where to place quantizers, behind a comma how weights lie."""
    rows = {}
    for name in names:
        named, _, placement = name.partition("/")
        recipe = bs.load_recipe(named.removesuffix(", symmetric"))
        recipe = recipe if named == recipe.name else with_symmetric_weights(recipe)
        rows[name] = Row(recipe, cast("PlacementName", placement or "runtime"), draws)
    return rows


def _learned() -> dict[str, Row]:
    recipe = bits_recipe(4, 8, steps=("fold_batch_norm", LearnedRounding(), "bias_correction"))
    return {"w4a8 learned rounding": Row(recipe, "layerwise")}


_CIFAR = ("w4a8-fast", "w4a8-fast, symmetric", "w4a8-best", "w3a8-fast", "w3a8-fast, symmetric", "w3a8-best",
          "w2a8-fast", "w2a8-fast, symmetric", "w2a8-best", "w4a4-fast", "w4a4-fast, symmetric", "w4a4-best",
          "w4a4-fast/fx", "w4a4-best/fx", "w2a4-fast", "w2a4-best")  # fmt: skip
_SMALL = ("w4a8-fast", "w4a8-fast, symmetric", "w4a8-best")

ROWS: dict[str, dict[str, Row]] = {
    "resnet20": _rounding(4, 3) | _rounding(3, 1) | _rounding(2, 1) | _learned() | _by_effort(*_CIFAR),
    "resnet32": _rounding(4, 1) | _rounding(3, 1) | _by_effort("w4a8-best", "w4a4-best", draws=1),
    "shufflenetv2_x0_5": _by_effort(*_SMALL),
    "dscnn_kws": _by_effort(*_SMALL),
    "mcunet_in4": _by_effort(*_SMALL),
    "mobilenet_v1_025": _by_effort(*_SMALL)
    | {
        "w8a8 per tensor": _per_tensor("bias_correction"),
        "w8a8 per tensor, equalize": _per_tensor(Equalize(merge_bias=True), "bias_correction"),
        "w8a8 per tensor, equalize for noise": _per_tensor(Equalize(objective="noise"), "bias_correction"),
        "w8a8 per tensor, equalize for noise, clips traded": _per_tensor(
            Equalize(objective="noise", clips="trade"), "bias_correction"
        ),
        "w8a8 per tensor, equalize for noise, gptq": _per_tensor(
            Equalize(objective="noise"), Gptq(damping="auto"), "bias_correction"
        ),
    },
}

# Top-1, agreement with float and seconds in the algorithm of Brevitas 0.13.4 on ResNet-20.
BREVITAS: dict[str, tuple[float, float, float | None]] = {
    "w4a8 nearest": (89.24, 92.89, None),
    "w4a8 bias correction": (91.08, 95.63, None),
    "w4a8 gptq": (91.59, 97.79, 15.739),
    "w4a8 gptq, act order": (91.55, 97.6, 17.392),
    "w4a8 gpfq": (91.52, 97.3, 48.861),
    "w4a8 qronos": (91.68, 98.02, 48.765),
    "w4a8 learned rounding": (91.24, 97.05, 89.164),  # 100 iterations a layer
    "w3a8 nearest": (86.86, 89.06, None),
    "w3a8 gptq": (90.65, 95.09, 18.736),
    "w4a4-fast/fx": (67.26, 68.46, 17.238),
    "w4a4-fast": (82.53, 84.82, None),  # layerwise, its best placement
}


Draw = tuple[nets.Benchmark, Tensor]
"""A network with what calibrates and judges it, and its float answers."""


def load(net: str, number: int, quick: bool) -> Draw:
    """The network with its ``number``-th choice of samples; ``quick``: judged on 1,000 at most."""
    loaded = nets.load(net, number)
    if quick:
        loaded = loaded._replace(test=loaded.test[: max(1, 1000 // len(loaded.test[0][0]))])
    return loaded, answers(loaded.model, loaded.test)


def percent(hits: Tensor) -> float:
    """The share of True."""
    return 100 * float(hits.double().mean())


def measure(net: str, name: str, draws: list[Draw], resume: Path | None = None) -> dict[str, Any]:
    """One row of the table, over as many ``draws`` as it has; ``resume`` is a folder for what is learned."""
    row = ROWS[net][name]
    draws = draws[: row.draws]
    float_top1, top1, agreement, seconds, reports = [], [], [], [], []
    for number, (loaded, exact) in enumerate(draws):
        start = time.perf_counter()
        q = bs.quantize(
            loaded.model, loaded.calibration, row.recipe, placement=row.placement,
            resume=None if resume is None else resume / f"{net} {name.replace('/', ' ')} {number}",
        )  # fmt: skip
        seconds.append(time.perf_counter() - start)
        reports.append(q.report)
        labels = torch.cat([y for _, y in loaded.test])
        classes = answers(q, loaded.test).argmax(1)
        float_top1.append(percent(exact.argmax(1) == labels))
        top1.append(percent(classes == labels))
        agreement.append(percent(classes == exact.argmax(1)))
    brevitas = dict(zip(("brevitas_top1", "brevitas_agreement", "brevitas_step_s"), BREVITAS.get(name, ())))
    spread = [stdev(values) if len(values) > 1 else 0.0 for values in (top1, agreement)]
    return {
        "net": net, "row": name, "placement": row.placement, "steps": " ".join(map(str, row.recipe.steps)),
        "draws": len(draws), "calibration_samples": reports[0].samples, "judged_samples": len(labels),
        "float_top1": round(mean(float_top1), 2),
        "top1": round(mean(top1), 3), "top1_std": round(spread[0], 3),
        "agreement": round(mean(agreement), 3), "agreement_std": round(spread[1], 3),
        "step_s": round(sum(entry.seconds for entry in reports[0].steps), 2),
        "quantize_s": round(seconds[0], 2), "threads": torch.get_num_threads(),
        **(brevitas if net == "resnet20" else {}), "seed": 0, "commit": commit(), "bitsmith": bs.__version__,
    }  # fmt: skip


def main() -> None:
    """Measure and print, and add to a CSV file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--rows", nargs="+")
    parser.add_argument("--draws", type=int, default=3, help="at most so many")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--resume", type=Path, help="folder in which a run that is killed leaves what it has learned")
    options = parser.parse_args()
    if unknown := set(options.rows or ()) - {name for net in options.nets for name in ROWS[net]}:
        parser.error(f"no row of these networks: {', '.join(sorted(unknown))}")
    for net in options.nets:
        chosen = [name for name in ROWS[net] if not options.rows or name in options.rows]
        most = max((ROWS[net][name].draws for name in chosen), default=0)
        draws = [load(net, number, options.quick) for number in range(min(most, 1 if options.quick else options.draws))]
        for name in chosen:
            r = measure(net, name, draws, options.resume)
            print(f"{net:18}{name:52}{r['placement']:10}{r['float_top1']:7.2f}{r['top1']:8.2f} +-{r['top1_std']:5.2f}"
                  f"{r['agreement']:8.2f} +-{r['agreement_std']:5.2f}{r['step_s']:8.2f} s{r['quantize_s']:8.2f} s",
                  flush=True)  # fmt: skip
            if options.csv:
                append(options.csv, FIELDS, r)


if __name__ == "__main__":
    main()
