"""What a reader of a report should look at, in words, each with what would help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from .diagnosis import diagnose, remedy
from .render import listed

if TYPE_CHECKING:
    from ..evaluate.job import JobResult

_WEAK_DB = 15.0  # at a layer
_CLIPPED = 0.01  # share of a tensor's values
_LOST_POINTS = 1.0  # of top-1
_LOUDER_DB = 6.0  # weights against activations: twice the amplitude


class Warning(BaseModel):
    """What is wrong or was lost, and what would help."""

    model_config = ConfigDict(extra="forbid")

    what: str
    remedy: str


def warnings_for(result: JobResult) -> list[Warning]:
    """Warnings of a whole job, the worst first.

    >>> from bitsmith.evaluate.job import JobResult
    >>> from bitsmith.report.model import LayerReport, Report
    >>> weak = LayerReport(name="fc", type="Linear", weight_bits=2, weight_sqnr_db=5.0, sqnr_db=6.0)
    >>> found = warnings_for(JobResult(report=Report(layers=[weak], output_sqnr_db=6.0)))
    >>> found[0].what
    "layer 'fc' keeps 6.0 dB of signal to noise"
    """
    found = [*_certificate(result), *_accuracy(result), *_layers(result), *_clipping(result), *_speed(result)]
    return found


def _certificate(result: JobResult) -> list[Warning]:
    if result.passed:
        return []
    verdict = str((result.certificate or {}).get("verdict", "the certificate failed"))
    return [Warning(what=verdict, remedy="do not deploy the file: run 'bitsmith verify' with this engine's version")]


def _accuracy(result: JobResult) -> list[Warning]:
    report = result.report
    if report.chance_level:
        what, _, help_ = diagnose(report).partition(". ")
        return [Warning(what=what, remedy=help_)]
    exact, final = result.metrics.get("float"), result.metrics.get("deployed") or result.metrics.get("simulated")
    if exact is None or final is None or exact.top1 is None or final.top1 is None:
        return []
    lost = exact.top1 - final.top1
    if lost < _LOST_POINTS:
        return []
    return [Warning(what=f"top-1 is {lost:.2f} points below the float model", remedy=_more_accuracy(result))]


def _more_accuracy(result: JobResult) -> str:
    found = result.sensitivity
    if found is not None and found.proposal.overrides:
        return f"keep {listed(found.proposal.layers)} in {found.proposal.keep}: the overrides are below"
    if found is not None and found.weights_only_db is not None and found.activations_only_db is not None:
        if found.weights_only_db < found.activations_only_db - _LOUDER_DB:
            return "the weights lose most: use gptq or learned rounding, or more bits for them"
        if found.activations_only_db < found.weights_only_db - _LOUDER_DB:
            return "the activations lose most: use range mse or auto, or more bits for them"
    return "bitsmith.sensitivity says which layers cost most; a recipe with gptq or learned rounding loses less"


def _layers(result: JobResult) -> list[Warning]:
    by_sqnr = sorted((layer.sqnr_db, layer.name, layer) for layer in result.report.layers if layer.sqnr_db is not None)
    weak = [(sqnr, layer) for sqnr, _, layer in by_sqnr if sqnr < _WEAK_DB]
    found = [
        Warning(what=f"layer {layer.name!r} keeps {sqnr:.1f} dB of signal to noise", remedy=remedy(layer))
        for sqnr, layer in weak[:3]
    ]
    if rest := [layer.name for _, layer in weak[3:]]:
        more = f"{len(rest)} more layers keep less than {_WEAK_DB:g} dB: {listed(rest)}"
        found.append(Warning(what=more, remedy="sort the table of layers by SQNR: where it falls first is the cause"))
    return found


def _clipping(result: JobResult) -> list[Warning]:
    pictures = result.pictures
    if pictures is None:
        return []
    clipped = [h for h in (*pictures.weights, *pictures.activations) if h.clipped > _CLIPPED]
    names = [f"{h.tensor} ({h.clipped:.1%})" for h in sorted(clipped, key=lambda h: -h.clipped)]
    if not names:
        return []
    help_ = "its range rule gives rare values up for finer steps; range minmax or auto keeps them if accuracy suffers"
    return [Warning(what=f"values beyond the grid in {listed(names)}", remedy=help_)]


def _speed(result: JobResult) -> list[Warning]:
    slow = [batch for batch, times in result.latency.items() if times["quantized"].ratio < 1.0]
    coverage = result.report.coverage
    if not slow or coverage.is_checked_elsewhere:
        return []
    cause = f"in float run {listed(coverage.float_layers)}: " if coverage.float_layers else ""
    packed = any(not x.integer and 0 < (x.weight_bits or 0) <= 4 for x in result.report.layers)
    store = "keep 4-bit weights in bytes (--opset 20, or export_onnx with pack_int4=False), " if packed else ""
    help_ = f"{cause}{store}give them 8 bits and placement runtime, or try another engine (deploy with engine='auto')"
    return [Warning(what=f"the file is slower than the float one at batch {', '.join(slow)}", remedy=help_)]
