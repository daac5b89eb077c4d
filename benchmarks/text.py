"""Weights of language models at 4 and 3 bits: what GPTQ and Qronos take back of what nearest rounding loses.

    python -m benchmarks.text [--nets stories minilm] [--csv FILE]

Activations stay float. stories260K: nats per token over stories 400 to 699, weights by groups of 32 inputs, calibrated
on the first 49,152 tokens of stories 0 to 399. MiniLM: 100 x Spearman's rank correlation on STS-B's test pairs, weights
per channel or by groups of 32, calibrated on the 256 longest first sentences of its dev pairs. Since only weights are
quantized, these are put into the float model, which then reads texts at their own lengths.
"""

from __future__ import annotations

import argparse
import copy
import csv
import time
from collections.abc import Callable
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
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.place.layers import QuantLayer
from bitsmith.steps import Gptq, Qronos, Step

FIELDS = ("net", "bits", "group", "step", "metric", "found", "float", "taken_back", "quantize_s", "commit", "bitsmith")
STEPS: dict[str, tuple[Step, ...]] = {
    "nearest": (), "gptq": (Gptq(),), "gptq, 11 scales": (Gptq(scales=11),), "qronos": (Qronos(),),
}  # fmt: skip


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


NETS = {"stories": (stories, "nats/token", (32,)), "minilm": (minilm, "100 x Spearman", (None, 32))}


def rows(name: str) -> Any:
    """Every width, granularity and step on one net."""
    build, metric, groups = NETS[name]
    model, calibration, judge = build()
    exact = judge(model)
    for bits in (4, 3):
        for group in groups:
            kind = {"granularity": "channel"} if group is None else {"granularity": "group", "group_size": group}
            lost = None
            for step, steps in STEPS.items():
                recipe = bs.Recipe(weights=TensorSpec(format=IntFormat(bits), **kind), steps=steps)
                start = time.perf_counter()
                q = bs.quantize(model, calibration, recipe)
                seconds = time.perf_counter() - start
                found = judge(with_weights(model, q))
                lost = found - exact if lost is None else lost
                yield {
                    "net": name, "bits": bits, "group": group or "channel", "step": step, "metric": metric,
                    "found": round(found, 4), "float": round(exact, 4),
                    "taken_back": round(1 - (found - exact) / lost, 3), "quantize_s": round(seconds, 1),
                    "commit": commit(), "bitsmith": bs.__version__,
                }  # fmt: skip


def main() -> None:
    """Measure and print, and write CSV where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    done = []
    for name in options.nets:
        for r in rows(name):
            done.append(r)
            print(f"{name:9}{r['bits']} bits {r['group']!s:8} {r['step']:16}{r['found']:9.4f} {r['metric']} (float "
                  f"{r['float']:.4f}), takes back {r['taken_back']:.0%}", flush=True)  # fmt: skip
    if options.csv:
        with options.csv.open("w", newline="") as handle:
            writer = csv.DictWriter(handle, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(done)


if __name__ == "__main__":
    main()
