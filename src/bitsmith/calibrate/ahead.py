"""Samples that only ranges look at: they go through the float graph before the walk, one chunk at a time.

Layer by layer for all samples is what comparing the two streams needs. The samples that the quantized stream does not
follow need no such order: chunk by chunk their activations stay in cache and are never kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..place.macs import elements_of
from ..ranges import activation_statistic
from .auto_range import AutoStatistic
from .stages import Stage

if TYPE_CHECKING:
    from .walk import Walk


def empty_statistic(stage: Stage, samples: int) -> Any:
    """A statistic for the range that is watched at the end of a stage, of which ``samples`` will be seen."""
    assert stage.quantizer is not None
    value = stage.end.meta.get("val")
    per_sample = elements_of(stage.end) if isinstance(value, Tensor) else 0
    spec, count = stage.quantizer.spec, max(per_sample * samples, 1)
    return AutoStatistic(spec, count) if spec.range.name == "auto" else activation_statistic(spec, count)


def observe_ahead(walk: Walk) -> dict[int, Any]:
    """Statistics of what the chunks behind those of the quantized stream hold, by the identity of their stage.

    They are merged with those of the leading chunks, which the result does not depend on; rules that are tried on
    values (``auto``) need the walk's order, and then nothing is done ahead.
    """
    rest = range(walk.quantized_chunks, len(walk.chunks))
    started = {id(stage): walk.start_statistic(stage) for stage in walk.stages} if rest else {}
    statistics = {stage: statistic for stage, statistic in started.items() if statistic is not None}
    if not statistics or any(isinstance(statistic, AutoStatistic) for statistic in statistics.values()):
        return {}
    last = {source.name: stage for stage in walk.stages for source in stage.inputs}
    for chunk in rest:
        if walk.progress is not None:
            walk.progress(0, len(walk.stages), f"ranges: {walk.samples_of(chunk)}")
        walk.load_inputs(chunk)
        for stage in walk.stages:
            value = walk.execute("float", stage, chunk)
            if id(stage) in statistics:
                walk.observe(statistics[id(stage)], value, stage, chunk)
            walk.store.put(("float", stage.end.name, chunk), value)
            for source in stage.inputs:
                if last[source.name] is stage:
                    walk.store.forget(("float", source.name, chunk))
        for node in [*last, *(stage.end.name for stage in walk.stages)]:  # outputs, and inputs that nobody reads
            walk.store.forget(("float", node, chunk))
    return statistics
