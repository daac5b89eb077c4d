"""Calibration from statistics that streamed while the user ran the model; the walk does the rest on kept samples."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..capture.inputs import Arguments
from ..errors import CalibrationError
from ..grid import Grid, Quantizer
from ..place.place import Placed
from ..targets import Target
from .calibrate import set_weight_grids
from .stages import Stage
from .walk import Walk, WalkLog, stage_name
from .watching import WatchingQuantizer


class _StreamedWalk(Walk):
    """A walk that takes its ranges from ``watchers``, by the id of the Quantizer that each stood for."""

    watchers: dict[int, WatchingQuantizer]

    def _start_statistic(self, stage: Stage) -> Any:
        return None

    def _solve(self, quantizer: Quantizer, stage: Stage) -> Grid:
        try:
            return self.watchers[id(quantizer)].solve(
                non_negative=quantizer.non_negative, unsigned_codes=self.target.unsigned_codes
            )
        except CalibrationError as error:
            raise CalibrationError(f"no range for the output of {stage_name(stage)}: {error}") from error


def calibrate_streamed(
    graph: fx.GraphModule, placed: Placed, watchers: dict[int, WatchingQuantizer], chunks: list[Arguments],
    target: Target, *, samples: int, memory: int, noise_samples: int, steps: tuple[Any, ...],
) -> WalkLog:  # fmt: skip
    """Set the grid of every Quantizer; ``chunks`` are the leading samples, ``samples`` how many were seen in all.

    The result is that of ``calibrate`` on all samples: the walk's quantized stream follows the leading ones only,
    and its ranges are those of the same statistics.
    """
    set_weight_grids(placed, target)
    walk = _StreamedWalk(graph, chunks, placed.groups, target, memory=memory, noise_samples=noise_samples, steps=steps)
    walk.watchers = watchers
    log = walk.run()
    log.samples = samples
    return log
