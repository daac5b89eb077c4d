"""The recipe's steps at their turn in the walk: each visits a layer, and is undone where it does harm."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn

from ..capture.ops import quantizer_of
from ..errors import CalibrationError
from ..grid import Grid
from ..optimize import batch_norm, layer_step
from ..optimize.accumulator import clamp_bias
from ..optimize.batch_norm import ChannelMoments
from ..optimize.bias_correction import ChannelMean, correct_bias
from ..optimize.visit import LayerStep, LayerVisit, StepLog, Stream
from ..place.layers import QuantLayer
from ..place.plan import layer_name
from ..steps import ColumnByColumn, Step
from .bias import set_bias_grid
from .stages import Stage
from .state import State

if TYPE_CHECKING:
    from .walk import Walk


class LayerSteps:
    """Runs the steps that change weights and biases, on what the walk has at hand."""

    def __init__(self, walk: Walk, steps: Sequence[Step]) -> None:
        self.walk = walk
        self.rounding: list[LayerStep] = [layer_step(step) for step in steps if step.stage == "weights"]
        bits = [step.accumulator_bits for step in steps if isinstance(step, ColumnByColumn)]
        self.accumulator_bits = bits[0] if bits else None
        self.calls = Counter(id(s.layer.layer) for s in walk.stages if s.layer is not None)
        self.owners = Counter(id(p) for _, p in walk.graph.named_parameters(remove_duplicate=False))
        self.log: list[StepLog] = []
        self.correction = next((step.name for step in steps if step.stage == "bias"), None)
        self.means = self._output_means() if self.correction else {}

    @property
    def needs_float_inputs(self) -> bool:
        """Whether the float stream's inputs of a layer must be kept until the quantized stream has passed it."""
        return any(step.needs_float_inputs for step in self.rounding)

    def is_shared(self, layer: QuantLayer) -> bool:
        """Whether another call reads the same parameters: they must not be changed for what one call sees."""
        return self.calls[id(layer.layer)] > 1

    def _output_means(self) -> dict[fx.Node, dict[str, Any]]:
        """For each layer with a bias of its own the means (and variances) of both streams at its output."""
        kind = ChannelMoments if self.correction == "reestimate_batch_norm" else ChannelMean
        layers = {s.compute: s.layer for s in self.walk.stages if s.compute is not None and s.layer is not None}
        axes = {
            node: -1 if isinstance(layer.layer, nn.Linear) else 1
            for node, layer in layers.items()
            if layer.bias is not None and not self.is_shared(layer)
        }
        return {node: {"float": kind(axis), "quantized": kind(axis)} for node, axis in axes.items()}

    def observe(self, node: fx.Node, stream: str, value: Tensor) -> None:
        """Take the mean of a layer's output, where its bias will be corrected."""
        if node in self.means:
            self.means[node][stream].update(value)

    def round_weights(self, stage: Stage) -> None:
        """The steps that round the weights of a stage's layer."""
        node, layer = stage.compute, stage.layer
        if node is None or layer is None or layer.weight_quantizer is None:
            return
        for step in self.rounding:
            log = StepLog(step.name, layer_name(node))
            log.skipped = "its weights are shared by several calls" if self.is_shared(layer) else step.refusal(layer)
            if not log.skipped:
                visit = LayerVisit(log.layer, layer, partial(self._inputs, stage, node), _input_grid(node))
                log = self._resume_or_run(step, visit, log, stage)
            elif self.accumulator_bits is not None and not isinstance(layer.layer, nn.Embedding):
                raise CalibrationError(
                    f"accumulator_bits={self.accumulator_bits} cannot be kept in layer {log.layer!r}: {log.skipped}; "
                    "exclude it by an override, or drop accumulator_bits"
                )
            self.log.append(log)

    def _resume_or_run(self, step: LayerStep, visit: LayerVisit, log: StepLog, stage: Stage) -> StepLog:
        """One step on one layer, or what an earlier run with the same resume folder made of it."""
        resume, piece, state = self.walk.resume, f"layer-{len(self.log):03}", State([stage])
        assert stage.compute is not None
        if resume is not None and (saved := resume.load(piece)) is not None:
            state.take(saved[0])
            set_bias_grid(visit.layer, stage.compute, self.walk.target.bias_unit)
            return StepLog(**saved[1])
        self._run(step, visit, log, stage.compute)
        if resume is not None:
            resume.save(piece, state.tensors(), asdict(log))
        return log

    def _run(self, step: LayerStep, visit: LayerVisit, log: StepLog, node: fx.Node) -> None:
        """One step on one layer; where the error of the layer's output has grown, the layer is put back."""
        start = time.perf_counter()
        weight, quantizer = self._own_weight(visit.layer), visit.layer.weight_quantizer
        assert quantizer is not None
        original, grid = weight.detach().clone(), quantizer.require_grid()
        log.before, log.after = step.run(visit)
        if not log.after <= log.before:
            weight.data.copy_(original)
            quantizer.set_grid(grid)
            log.undone = True
        elif quantizer.scale is not grid.scale:
            set_bias_grid(visit.layer, node, self.walk.target.bias_unit)
        log.note = "; ".join(visit.notes)
        log.seconds = time.perf_counter() - start

    def _own_weight(self, layer: QuantLayer) -> Tensor:
        """A layer's weight, a copy of its own where it is tied to that of another layer, which must not change."""
        if self.owners[id(layer.weight)] > 1:
            layer.layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        return layer.weight

    def _inputs(self, stage: Stage, node: fx.Node, stream: Stream) -> Iterator[Tensor]:
        """What a layer reads in a stream, chunk by chunk."""
        head, source = stage.nodes[: stage.nodes.index(node)], node.args[0]
        assert isinstance(source, fx.Node)
        for chunk in range(self.walk.quantized_chunks):
            env = self.walk.inputs(stream, stage, chunk)
            self.walk.run_nodes(stream, head, env, chunk)
            yield env[source]

    def correct_bias(self, stage: Stage) -> bool:
        """Take a layer's mean error out of its bias; its corrected outputs are kept, so that it runs only once."""
        walk, node, layer = self.walk, stage.compute, stage.layer
        if node is None or layer is None or node not in self.means:
            return False
        means = self.means[node]
        head = stage.nodes[: stage.nodes.index(node) + 1]
        for chunk in range(walk.quantized_chunks):
            value = walk.run_nodes("quantized", head, walk.inputs("quantized", stage, chunk), chunk)
            walk.store.put(("output", node.name, chunk), value)
        gain, shift = self._correct(node, layer)
        shape = (-1,) if means["float"].axis == -1 else (-1, *[1] * (value.ndim - 2))
        for chunk in range(walk.quantized_chunks):
            output = walk.store.get(("output", node.name, chunk))
            output = output if gain is None else output.mul_(gain.view(shape))
            walk.store.put(("output", node.name, chunk), output.add_(shift.view(shape)))
        return True

    def _correct(self, node: fx.Node, layer: QuantLayer) -> tuple[Tensor | None, Tensor]:
        """Change a layer's bias, and under re-estimation its gain; returns what its outputs change by."""
        exact, quantized = self.means[node]["float"], self.means[node]["quantized"]
        if self.correction == "reestimate_batch_norm":
            log = StepLog("reestimate_batch_norm", layer_name(node), skipped=batch_norm.refusal(layer))
            self.log.append(log)
            if not log.skipped:
                gain, shift = batch_norm.match_moments(layer, exact, quantized)
                set_bias_grid(layer, node)
                return gain, shift + self._clamp_bias(node, layer)
        before = layer.quantized_parameters().get("bias")
        shift = correct_bias(layer.layer, exact, quantized)
        if self.walk.target.bias_unit > 1 and before is not None:  # biases in coarse steps: what the step leaves of it
            return None, layer.quantized_parameters()["bias"] - before
        return None, shift + self._clamp_bias(node, layer)

    def _clamp_bias(self, node: fx.Node, layer: QuantLayer) -> Tensor | float:
        """Keep a corrected bias within what the weights leave of a bounded accumulator; what it changes by."""
        bias, grid = layer.bias, _input_grid(node)
        if self.accumulator_bits is None or grid is None or bias is None:
            return 0.0
        before = bias.detach().clone()
        clamp_bias(layer, grid, self.accumulator_bits)
        return bias.detach() - before


def _input_grid(node: fx.Node) -> Grid | None:
    """The grid of what a layer reads."""
    quantizer = quantizer_of(node.args[0])
    return None if quantizer is None else quantizer.grid
