"""Language models: weights at 4 and 3 bits by GPTQ and Qronos, and weights and activations at 8 bits, static.

    python -m benchmarks.text [--nets stories minilm] [--bits 4 3 8] [--csv FILE]

The CSV file is added to, so that a table can be made in several runs.

At 4 and 3 bits activations stay float. stories260K: nats per token over stories 400 to 699, weights by groups of 32
inputs, calibrated on the first 49,152 tokens of stories 0 to 399. MiniLM: 100 x Spearman's rank correlation on STS-B's
test pairs, weights per channel or by groups of 32, calibrated on the 256 longest first sentences of its dev pairs. The
quantized weights are put into the float model, which then reads texts at their own lengths.

At 8 bits the recipe is ``int8`` (simulated), with and without activation equalization in front of its other steps;
``taken_back`` is then of the loss without it. The first 32 calibration samples are used, for MiniLM 64. Texts are
padded to the length of the graph, which no result depends on: attention looks back only, or is masked.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import bitsmith as bs
from benchmarks.accuracy import commit
from benchmarks.data import data_file
from benchmarks.nets.llama import LONGEST, Llama
from benchmarks.nets.sentence_encoder import SentenceEncoder
from benchmarks.rows import append
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.place.layers import QuantLayer
from bitsmith.recipe import load_recipe
from bitsmith.steps import EqualizeActivations, Gptq, Qronos, Step

FIELDS = ("net", "bits", "group", "step", "metric", "found", "float", "taken_back", "seed", "samples", "run",
          "quantize_s", "commit", "bitsmith")  # fmt: skip
STEPS: dict[str, tuple[Step, ...]] = {
    "nearest": (), "gptq": (Gptq(),), "gptq, 1 scale": (Gptq(scales=1),), "qronos": (Qronos(),),
}  # fmt: skip
EQUALIZE = EqualizeActivations()


class Padded(nn.Module):
    """A quantized model with a fixed number of tokens, for texts up to that length."""

    def __init__(self, model: nn.Module, length: int, by_token: bool) -> None:
        super().__init__()
        self.model, self.length, self.by_token = model, length, by_token

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.model(F.pad(ids, (0, self.length - ids.shape[1])))
        return found[:, : ids.shape[1]] if self.by_token else found


def with_weights(model: nn.Module, q: bs.QuantizedModel) -> nn.Module:
    """The float model with the weights of the quantized one; a weight that is tied in it is tied no more."""
    model = copy.deepcopy(model)
    for name, module in q.graph.named_modules():
        if isinstance(module, QuantLayer):
            weight = module.quantized_parameters()["weight"].detach()
            model.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    return model.eval()


def weights_of(checkpoint: str) -> dict[str, Tensor]:
    """A checkpoint as float32."""
    return {key: value.float() for key, value in load_file(data_file(checkpoint)).items()}


def stories() -> tuple[nn.Module, list[Tensor], Callable[[nn.Module], float]]:
    """Model, calibration batches and nats per token."""
    weights = weights_of("stories260k_llama.safetensors")
    model = Llama()
    model.load_state_dict(weights | {"output.weight": weights["tok_embeddings.weight"]})
    model.eval()
    with np.load(data_file("stories260k_tokens.npz")) as file:
        tokens, offsets = torch.from_numpy(file["tokens"].astype(np.int64)), file["offsets"]
    texts = sorted((tokens[offsets[i] : offsets[i + 1]][:LONGEST] for i in range(400, 700)), key=len)

    def nats(m: nn.Module) -> float:
        total, count = 0.0, 0
        with torch.no_grad():
            for text in texts:
                total += float(F.cross_entropy(m(text[None, :-1])[0], text[1:], reduction="sum"))
                count += len(text) - 1
        return total / count

    return model, list(tokens[: 96 * LONGEST].view(-1, LONGEST).split(16)), nats


def minilm() -> tuple[nn.Module, list[Tensor], Callable[[nn.Module], float]]:
    """Model, calibration batches and 100 x Spearman."""
    weights = weights_of("minilm_l6_v2_fp16.safetensors")
    model = SentenceEncoder()
    model.load_state_dict({key: value for key, value in weights.items() if not key.startswith("pooler.")})
    model.eval()
    with np.load(data_file("stsb_minilm_tokens.npz")) as file:
        sides = [torch.from_numpy(file[f"test_{side}"].astype(np.int64)) for side in "ab"]
        dev, scores = torch.from_numpy(file["dev_a"].astype(np.int64)), file["test_score"]

    def vectors(m: nn.Module, ids: Tensor) -> Tensor:
        lengths = (ids != 0).sum(1)
        found = torch.empty(len(ids), 384)
        for length in lengths.unique():
            index = (lengths == length).nonzero()[:, 0]
            found[index] = m(ids[index, :length])
        return found

    def spearman(m: nn.Module) -> float:
        with torch.no_grad():
            cosine = (vectors(m, sides[0]) * vectors(m, sides[1])).sum(1).numpy()
        return 100 * float(np.corrcoef(ranks(cosine), ranks(scores))[0, 1])

    lengths = (dev != 0).sum(1)
    chosen = dev[lengths.argsort(descending=True)][:256, : int(lengths.max())]
    return model, list(chosen.split(32)), spearman


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[inverse]


# how to build and judge, the metric, granularities of few bits, tokens of the graph at 8 bits
NETS = {
    "stories": (stories, "nats/token", (32,), LONGEST),
    "minilm": (minilm, "100 x Spearman", (None, 32), 48),
}  # fmt: skip


def rows(name: str, widths: list[int]) -> Iterator[dict[str, Any]]:
    """Every width, granularity and step on one net."""
    build, metric, groups, length = NETS[name]
    model, calibration, judge = build()
    exact = judge(model)

    def measured(recipe: bs.Recipe, batches: list[Tensor], usable: Callable[[bs.QuantizedModel], nn.Module]) -> Any:
        start = time.perf_counter()
        q = bs.quantize(model, batches, recipe)
        seconds = time.perf_counter() - start
        found = judge(usable(q))
        shared = {"metric": metric, "found": round(found, 4), "float": round(exact, 4), "seed": "none",
                  "samples": sum(map(len, batches)), "run": "simulated", "quantize_s": round(seconds, 1),
                  "commit": commit(), "bitsmith": bs.__version__}  # fmt: skip
        return (found - exact) * (1 if metric == "nats/token" else -1), shared

    def taken_back(loss: float, lost: float) -> float | str:
        return round(1 - loss / lost, 3) if lost > 0 else ""  # nearest rounding may even gain

    for bits, group in ((bits, group) for bits in widths if bits < 8 for group in groups):
        kind = {"granularity": "channel"} if group is None else {"granularity": "group", "group_size": group}
        lost = None
        for step, steps in STEPS.items():
            if group is None and step == "gptq, 1 scale":  # the default there
                continue
            recipe = bs.Recipe(weights=TensorSpec(format=IntFormat(bits), **kind), steps=steps)
            loss, shared = measured(recipe, calibration, lambda q: with_weights(model, q))
            lost = loss if lost is None else lost
            yield {"net": name, "bits": bits, "group": group or "channel", "step": step,
                   "taken_back": taken_back(loss, lost), **shared}  # fmt: skip
    lost, int8 = None, load_recipe("int8")
    few = [F.pad(batch, (0, length - batch.shape[1])) for batch in calibration[:2]]
    for step, more in (("int8", ()), ("int8, equalize", (EQUALIZE,))) if 8 in widths else ():
        recipe = int8.model_copy(update={"steps": (*int8.steps[:1], *more, *int8.steps[1:])})
        loss, shared = measured(recipe, few, lambda q: Padded(q, length, name == "stories"))
        lost = loss if lost is None else lost
        yield {"net": name, "bits": 8, "group": "channel", "step": step,
               "taken_back": taken_back(loss, lost), **shared}  # fmt: skip


def main() -> None:
    """Measure and print, and add to a CSV file where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 8], choices=[4, 3, 8])
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    for name in options.nets:
        for r in rows(name, options.bits):
            print(f"{name:9}{r['bits']} bits {r['group']!s:8} {r['step']:16}{r['found']:9.4f} {r['metric']} (float "
                  f"{r['float']:.4f}), taken back: {r['taken_back']}", flush=True)  # fmt: skip
            if options.csv:
                append(options.csv, FIELDS, r)


if __name__ == "__main__":
    main()
