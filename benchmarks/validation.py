"""Choices that the named recipes rest on, made on images that neither calibrate nor judge.

    python -m benchmarks.validation [--recipes int8 fp8] [--nets resnet20 resnet32] [--variants "as it is" ...]
                                    [--samples N] [--calibrating N] [--csv FILE]

The CSV file is added to, so that a table can be made in several runs.

CIFAR-10's first 1,000 training images calibrate, or fewer of them; the next ``--samples`` of them validate; the test
images are not touched. The nets were trained on the validation images, so what counts is agreement with the float
model: of the class, and of the class probabilities (mean Kullback-Leibler divergence, in thousandths of a nat), which
tells variants apart long before classes change.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

import bitsmith as bs
from benchmarks import data, nets
from benchmarks.accuracy import answers, commit
from benchmarks.nets.registry import NORMS
from benchmarks.rows import append
from bitsmith.grid import RangeRule
from bitsmith.recipe import PlacementName
from bitsmith.steps import Gptq, Step

FIELDS = ("net", "recipe", "placement", "variant", "calibration_samples", "validation_samples", "agreement",
          "kl_millinats", "output_sqnr_db", "seed", "commit", "bitsmith")  # fmt: skip
_FEW_BITS = ("w4a8-fast", "w3a8-fast", "w2a8-fast", "w4a4-fast", "w2a4-fast")
_LEARNING = ("w4a8-best", "w3a8-best", "w2a8-best", "w4a4-best", "w2a4-best")


def without(recipe: bs.Recipe, *names: str) -> bs.Recipe:
    """The recipe less some of its steps."""
    return recipe.model_copy(update={"steps": tuple(step for step in recipe.steps if step.name not in names)})


def stepped(recipe: bs.Recipe, step: Step) -> bs.Recipe:
    """The recipe with another form of one of its steps."""
    return recipe.model_copy(update={"steps": tuple(step if s.name == step.name else s for s in recipe.steps)})


def ranged(recipe: bs.Recipe, part: str, rule: str) -> bs.Recipe:
    """The recipe with another range rule for its ``weights`` or ``activations``."""
    spec = getattr(recipe, part).model_copy(update={"range": RangeRule(name=rule)})
    return recipe.model_copy(update={part: spec})


def variants(name: str) -> dict[str, tuple[bs.Recipe, int | None]]:
    """What is compared for a recipe: each variant with the samples that its quantized stream follows."""
    recipe = bs.load_recipe(name)
    chosen: dict[str, tuple[bs.Recipe, int | None]] = {"as it is": (recipe, None)}
    if name in _FEW_BITS:
        return chosen | {"symmetric weights": (with_symmetric_weights(recipe), None)}
    if name in _LEARNING:
        blocks = recipe.step("reconstruct").model_copy(update={"least_samples": 1})
        return {"no blocks learned": (without(recipe, "reconstruct"), None), "blocks": (stepped(recipe, blocks), None)}
    chosen["no bias correction"] = without(recipe, "bias_correction"), None
    if name == "int8":
        chosen["512 samples"] = recipe, 512
    if name == "fp8":
        chosen |= {
            "symmetric gptq": (stepped(recipe, Gptq()), None),
            "no gptq": (without(recipe, "gptq"), None),
            "activations minmax": (ranged(recipe, "activations", "minmax"), None),
            "weights mse": (ranged(recipe, "weights", "mse"), None),
            "1000 samples": (recipe, 1000),
        }
    return chosen


def with_symmetric_weights(recipe: bs.Recipe) -> bs.Recipe:
    """The recipe without zero points of weights."""
    assert recipe.weights is not None
    return recipe.model_copy(update={"weights": recipe.weights.model_copy(update={"symmetric": True})})


def measure(q: bs.QuantizedModel, exact: Tensor, batches: data.Batches) -> dict[str, float]:
    """Agreement with the float model on the validation images."""
    found = answers(q, batches)
    divergence = F.kl_div(found.log_softmax(1), exact.log_softmax(1), reduction="batchmean", log_target=True)
    noise = (found - exact).double().square().mean()
    return {
        "agreement": round(100 * float((found.argmax(1) == exact.argmax(1)).double().mean()), 3),
        "kl_millinats": round(1000 * float(divergence), 4),
        "output_sqnr_db": round(10 * float((exact.double().square().mean() / noise).log10()), 2),
    }


def rows(net: str, names: list[str], wanted: list[str] | None, samples: int, calibrating: int) -> Any:
    """Every variant of the recipes on one net, under the placements ``fx`` and ``layerwise``; few bits as they are."""
    model, calibration, _, _ = nets.load(net)
    calibration = calibration[: -(-calibrating // len(calibration[0][0]))]
    images, labels = data.cifar10("train")
    held = slice(1000, 1000 + samples)
    batches = data.batches(data.normalized(images[held], *NORMS[net]), labels[held], 250)
    exact = answers(model, batches)
    for name in names:
        placements: tuple[PlacementName, ...] = ("runtime",) if name in _FEW_BITS + _LEARNING else ("fx", "layerwise")
        for placement in placements:
            for variant, (recipe, noise_samples) in variants(name).items():
                if wanted and variant not in wanted:
                    continue
                q = bs.quantize(model, calibration, recipe, placement=placement, noise_samples=noise_samples)
                yield {
                    "net": net, "recipe": name, "placement": placement, "variant": variant,
                    "calibration_samples": q.report.samples, "validation_samples": samples,
                    **measure(q, exact, batches), "seed": 0, "commit": commit(), "bitsmith": bs.__version__,
                }  # fmt: skip


def main() -> None:
    """Measure and print, and write CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipes", nargs="+", default=["int8", "fp8"], choices=["int8", "fp8", *_FEW_BITS, *_LEARNING]
    )
    parser.add_argument("--nets", nargs="+", default=["resnet20", "resnet32"], choices=list(NORMS))
    parser.add_argument("--variants", nargs="+")
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--calibrating", type=int, default=1000, help="in hundreds")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    for net in options.nets:
        for row in rows(net, options.recipes, options.variants, options.samples, options.calibrating):
            print(f"{net:18}{row['recipe']:10}{row['placement']:11}{row['variant']:24}{row['agreement']:8.2f} %"
                  f"{row['kl_millinats']:9.3f} mnat{row['output_sqnr_db']:7.2f} dB", flush=True)  # fmt: skip
            if options.csv:
                append(options.csv, FIELDS, row)


if __name__ == "__main__":
    main()
