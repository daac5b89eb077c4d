"""Rules about weights, activations and data: D17 to D19, D27 and D29; D28, the triage, is in ``triage.py``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import fx

from ..capture.ops import layer_of, op_of
from ..prepare.weights import out_range
from .rule import Note, rule
from .subject import Seen, Subject
from .triage import better_recipe, training_call

_OUTLIER = 16.0  # the largest weight over the mean magnitude
_CHANNEL_RATIO = 256.0
_TAIL, _TAIL_SHARE = 4.0, 0.9999
_FEW, _GOOD = 10, 50


def _layers(subject: Subject) -> Iterator[tuple[fx.Node, Any]]:
    """Convolutions and linear layers, batch norms folded in."""
    for node in subject.folded.graph.nodes:
        if node.op == "call_module" and op_of(node).name in ("conv", "linear", "conv_transpose"):
            yield node, layer_of(node)


@rule("D17", "weights have no outliers, channels similar ranges", "graph")
def weight_ranges(subject: Subject) -> Iterator[Note]:
    """One scale serves the largest weight and must still tell the small ones apart."""
    per_tensor = "channel" not in subject.target.granularities
    for node, layer in _layers(subject):
        magnitudes = layer.weight.detach().abs()
        typical = float(magnitudes.mean())
        largest = float(magnitudes.max())
        if typical > 0 and largest / typical > _OUTLIER:
            yield Note(
                "warning", node, f"its largest weight is {largest / typical:.0f} times the mean magnitude: at 8 bits "
                f"most others get {max(1, round(127 * typical / largest))} of 127 steps",
                f"range rule 'mse' for weights, or {better_recipe(subject.target)}",
            )  # fmt: skip
        ranges = out_range(layer)
        alive = ranges[ranges > 0]
        ratio = float(alive.max() / alive.min()) if len(alive) else 1.0
        if ratio > _CHANNEL_RATIO and per_tensor:
            yield Note(
                "warning", node, f"channel ranges differ by {ratio:,.0f} to 1, and {subject.target.name} has one scale "
                "for all: the smallest channels round to zero",
                f"step 'equalize' in the recipe, or training: {training_call(subject.target)}",
            )  # fmt: skip
        elif ratio > _CHANNEL_RATIO:
            yield Note(
                "note", node, f"channel ranges differ by {ratio:,.0f} to 1: keep a weight scale for each channel",
                "recipe 'int8', not 'int8-tensor'",
            )  # fmt: skip


@rule("D18", "activations have no heavy tails", "calibration")
def activation_tails(subject: Subject) -> Iterator[Note]:
    """A few large values (in attention, behind layer norms) take the range, and the rest is rounded coarsely."""
    for node in subject.folded.graph.nodes:
        seen = subject.seen.get(node.name)
        if seen is None or op_of(node).role == "move" or op_of(node).name == "batch_norm":
            continue
        usual = seen.quantile(_TAIL_SHARE)
        if usual > 0 and seen.largest / usual > _TAIL:
            lost = math.log2(seen.largest / usual)
            yield Note(
                "warning", node, f"its largest value {seen.largest:.3g} is {seen.largest / usual:.1f} times what 99.99 "
                f"% stay below ({usual:.3g}): a range without clipping loses {lost:.1f} bits",
                "activation range rule 'percentile' or 'mse', step 'equalize_activations', or 16 bits for its reader",
            )  # fmt: skip


@rule("D19", "biases fit their accumulators", "calibration")
def bias_overflow(subject: Subject) -> Iterator[Note]:
    """A bias is added in steps of s_x * s_w: tiny scales make it a number that does not fit."""
    po2 = subject.device is not None and subject.device.po2
    for node, layer in _layers(subject):
        source = node.args[0]
        seen = subject.seen.get(source.name) if isinstance(source, fx.Node) else None
        if seen is None or layer.bias is None or not seen.largest:
            continue
        largest = _largest_code(layer, seen)
        if largest >= 2 ** (subject.target.bias_bits - 1) * subject.target.bias_unit:
            yield Note(
                "error", node, f"its bias is {largest:,.0f} steps of s_x * s_w, more than {subject.target.bias_bits} "
                "bits hold: its weights or inputs are nearly zero", "remove dead channels",
            )  # fmt: skip
        elif po2 and largest >= 2**15:
            yield Note(
                "warning", node, f"its bias is {largest:,.0f} steps of s_x * s_w; 8-bit layers here add it in 16 "
                "bits", "16 bits for this layer, or equalize: both raise s_x * s_w",
            )  # fmt: skip


def _largest_code(layer: Any, seen: Seen) -> float:
    weight = out_range(layer)
    floor = weight.max() * 2.0**-16  # nearly dead channels get their scales raised
    scale = seen.largest / 127 * weight.clamp(min=float(floor) or 1.0) / 127
    return float((layer.bias.detach().abs().double() / scale).max())


@rule("D27", "there are enough calibration samples", "calibration")
def calibration_size(subject: Subject) -> Iterator[Note]:
    """Ranges from a few samples miss what others hold."""
    if subject.samples < _GOOD:
        yield Note(
            "warning", "calibration", f"{subject.samples} samples: "
            + ("ranges will miss most of what the model meets" if subject.samples < _FEW else "usual are 50 to 1000"),
            "give at least 50, better some hundred, drawn from all classes",
        )  # fmt: skip


@rule("D29", "the file keeps the rules of TI's import", "file")
def file_contract(subject: Subject) -> Iterator[Note]:
    """What TIDL's import would refuse, found on the file itself."""
    from ..targets.tidl_contract import check_tidl

    assert subject.file is not None
    assert subject.device is not None
    for violation in check_tidl(subject.file, subject.device):
        yield Note(
            "error", subject.file.name, violation,
            f"bs.export_onnx(bs.quantize(model, data, target={subject.target.name!r}), path) writes files that do",
        )  # fmt: skip
