"""Calibration from statistics that streamed while the user ran the model; the walk does the rest on kept samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from ..capture.inputs import Arguments
from ..errors import CalibrationError
from ..grid import Grid, Quantizer
from ..place.layers import QuantLayer
from ..place.place import Placed
from ..steps import Step
from ..targets import Target
from .calibrate import set_weight_grids
from .layer_steps import LayerSteps
from .stages import Stage, stage_name
from .walk import Walk, WalkLog
from .watching import WatchingQuantizer


class _StreamedWalk(Walk):
    """A walk that takes its ranges from ``watchers``, by the id of the Quantizer that each stood for."""

    watchers: dict[int, WatchingQuantizer]

    def start_statistic(self, stage: Stage) -> Any:
        """Nothing: the watchers have seen it."""
        return None

    def _solve(self, quantizer: Quantizer, stage: Stage) -> Grid:
        try:
            return self.watchers[id(quantizer)].solve(
                non_negative=quantizer.non_negative, unsigned_codes=self.target.unsigned_codes
            )
        except CalibrationError as error:
            raise CalibrationError(f"no range for the output of {stage_name(stage)}: {error}") from error


class _KnownBiases(LayerSteps):
    """Adds shifts that are known to biases, at their layers' turn: the float stream never sees them."""

    def __init__(self, walk: Walk, steps: Sequence[Step], shifts: Mapping[str, Tensor]) -> None:
        self.shifts = shifts
        super().__init__(walk, [step for step in steps if step.stage != "bias"])
        self.means = {node: means for node, means in self._output_means().items() if node.name in shifts}

    def _correct(self, node: fx.Node, layer: QuantLayer) -> tuple[None, Tensor]:
        assert layer.bias is not None
        shift = self.shifts[node.name].to(layer.bias)
        layer.bias.data.add_(shift)
        return None, shift + self._clamp_bias(node, layer)


def calibrate_streamed(
    graph: fx.GraphModule, placed: Placed, watchers: dict[int, WatchingQuantizer], chunks: list[Arguments],
    target: Target, *, samples: int, memory: int, noise_samples: int, steps: tuple[Any, ...],
    shifts: Mapping[str, Tensor] | None = None,
) -> WalkLog:  # fmt: skip
    """Set the grid of every Quantizer; ``chunks`` are the leading samples, ``samples`` how many were seen in all.

    ``shifts``, by the names of layers' nodes, are added to their biases in place of what a step on biases would find.

    The result is that of ``calibrate`` on all samples: the walk's quantized stream follows the leading ones only,
    and its ranges are those of the same statistics.
    """
    set_weight_grids(placed, target)
    walk = _StreamedWalk(graph, chunks, placed.groups, target, memory=memory, noise_samples=noise_samples, steps=steps)
    walk.watchers = watchers
    if shifts is not None:
        walk.steps = _KnownBiases(walk, steps, shifts)
    log = walk.run()
    log.samples = samples
    return log
