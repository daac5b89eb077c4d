"""From a calibrated and compiled model to its Report."""

from __future__ import annotations

import math
from statistics import median

from torch import fx

from ..calibrate.auto_range import describe
from ..calibrate.noise import Noise
from ..calibrate.walk import WalkLog
from ..capture.ops import layer_of, module_of, op_of, quantizer_of
from ..grid import Grid
from ..integer.program import EXACT_FLOAT, Program
from ..optimize.visit import StepLog
from ..place.layers import QuantLayer
from ..place.macs import macs_of
from ..place.place import Placed
from ..place.plan import fused_end, layer_name, operands
from ..recipe import Recipe
from ..targets import Target
from .model import Coverage, LayerReport, RangeReport, Report, StepReport


def build_report(
    recipe: Recipe, target: Target, program: Program | None = None, placed: Placed | None = None,
    log: WalkLog | None = None, notes: list[str] | None = None, seconds: dict[str, float] | None = None,
) -> Report:  # fmt: skip
    """The Report of one quantization; without a program only what was asked for."""
    report = Report(recipe=recipe.name, target=target.name, placement=recipe.placement, notes=notes or [])
    if program is None or placed is None:
        return report
    report.seconds = dict(seconds or {})
    nodes = [node for node in program.graph.graph.nodes if op_of(node).role == "compute"]
    quantized = set(placed.layers)
    report.layers = [_layer(node, node in quantized, program, log) for node in nodes]
    report.coverage = _coverage(nodes, report.layers)
    if target.tidl is not None:
        report.coverage.runtime = target.runtime
    if log is not None:
        report.samples = log.samples
        report.output_sqnr_db = _finite(log.output.db)
        report.chance_level = log.output.is_chance
        report.steps = [_step(entry) for entry in log.steps]
        report.notes += _step_notes(report.steps)
        report.ranges = [RangeReport(tensor=c.tensor, rule=c.rule, errors=c.errors) for c in log.ranges]
        report.notes += describe(log.ranges)
        if log.spilled_bytes:
            report.notes.append(f"{log.spilled_bytes / 1e6:.0f} MB of activations went through a temporary file")
    return report


def _step(log: StepLog) -> StepReport:
    return StepReport(
        step=log.step, layer=log.layer, error_before=log.before, error_after=log.after, seconds=log.seconds,
        undone=log.undone, skipped=log.skipped, note=log.note,
    )  # fmt: skip


def _step_notes(steps: list[StepReport]) -> list[str]:
    """Per step a sentence: on how many layers, what it gained, where it was undone or does not apply."""
    notes = []
    for name in dict.fromkeys(entry.step for entry in steps):
        entries = [entry for entry in steps if entry.step == name]
        done = [e for e in entries if not e.skipped and not e.undone]
        kept = [e.error_after / e.error_before for e in done if e.error_before > 0]
        gain = f", output error down to {median(kept):.0%} (median)" if kept else ""
        parts = "blocks" if name == "reconstruct" else "layers"
        notes.append(f"{name}: {len(done)} of {len(entries)} {parts}{gain}")
        if undone := [e for e in entries if e.undone]:
            notes[-1] += f"; undone, since the error grew: {_names(undone)}"
        for note in dict.fromkeys(e.note for e in entries if e.note):
            notes[-1] += f"; {note}: {_names([e for e in entries if e.note == note])}"
        for reason in dict.fromkeys(e.skipped for e in entries if e.skipped):
            notes[-1] += f"; not {_names([e for e in entries if e.skipped == reason])}: {reason}"
    return notes


def _names(entries: list[StepReport]) -> str:
    more = f" and {len(entries) - 4} more" if len(entries) > 4 else ""
    return ", ".join(entry.layer for entry in entries[:4]) + more


def _coverage(nodes: list[fx.Node], layers: list[LayerReport]) -> Coverage:
    both = [layer for layer in layers if layer.weight_bits and layer.input_bits]
    return Coverage(
        total_macs=sum(map(macs_of, nodes)),
        quantized_macs=sum(layer.macs for layer in both),
        integer_macs=sum(layer.macs for layer in layers if layer.integer),
        float_layers=[layer.name for layer in layers if not layer.integer],
    )


def _layer(node: fx.Node, quantized: bool, program: Program, log: WalkLog | None) -> LayerReport:
    layer = layer_of(node)
    report = LayerReport(
        name=layer_name(node),
        type=type(layer).__name__ if layer is not None else op_of(node).name,
        macs=macs_of(node),
    )
    if not quantized:
        report.note = "float: excluded by an override"
        return report
    grids = [q.grid if (q := quantizer_of(source)) is not None else None for source in operands(node)]
    wrapped = module_of(node)
    if isinstance(wrapped, QuantLayer):
        weights = wrapped.weight_quantizer
        report.weight_bits = _bits(weights.grid if weights else None)
        report.weight_sqnr_db = _weight_sqnr(wrapped)
    else:
        report.weight_bits = _bits(grids[-1])
    report.input_bits = _bits(grids[0])
    ends = [q for user in fused_end(node).users if (q := quantizer_of(user)) is not None]
    report.output_bits = _bits(ends[0].grid) if ends else None
    executed = {program._sources.get(step.node, step.node): step.kernel for step in program.steps}
    kernel = executed.get(node, "float")
    report.integer = kernel == op_of(node).name
    if kernel == EXACT_FLOAT:
        report.note = f"{program.target.name} multiplies its codes in float32: exact, at float speed"
    elif not report.integer and report.weight_bits and report.input_bits:
        report.note = f"{program.target.runtime} computes it in float between Q and DQ"
    noise = log.noise.get(node) if log else None
    report.sqnr_db = _finite(noise.db) if noise else None
    return report


def _bits(grid: Grid | None) -> int | None:
    return None if grid is None else grid.format.bits


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _weight_sqnr(layer: QuantLayer) -> float | None:
    if layer.weight_quantizer is None:
        return None
    noise = Noise()
    weight = layer.weight.detach().contiguous()
    noise.update(weight, layer.weight_quantizer(weight))
    return _finite(noise.db)
