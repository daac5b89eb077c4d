"""One walk over the graph: float and quantized stream side by side, keeping only what is still needed.

At each stage all inputs of all calibration samples are at hand, so ranges are exact and the noise of every layer
is measured on the way. The float stream may run ahead of the quantized one, when tensors that share a scale must
all be seen before the first of them can be quantized.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.inputs import Arguments, sample_count
from ..capture.ops import op_of
from ..errors import CalibrationError, NonFiniteError
from ..grid import Grid, Quantizer, dequantize, quantize
from ..grid.kernels import fake_quantize_
from ..optimize.visit import StepLog, Stream
from ..place.place import ScaleGroup
from ..ranges import activation_grid
from ..steps import Reconstruct, Step
from ..targets import Target
from .ahead import empty_statistic, observe_ahead
from .auto_range import AutoStatistic, RangeChoice, auto_weights, choose_weight_grid
from .bias import set_bias_grid
from .block_steps import BlockSteps, learns_from_minibatches
from .blocks import Block, cut_by_layer, cut_into_blocks
from .groups import join_grids
from .layer_steps import LayerSteps
from .noise import Noise, OutputNoise
from .resume import Resume, fingerprint
from .shift import tie_weight_scale
from .stages import Stage, cut_into_stages, stage_name
from .store import Store

Progress = Callable[[int, int, str], None]  # (stages done, stages in all, what is being done)


@dataclass
class WalkLog:
    """What the walk measured: noise at the end of each stage with a layer, and at the outputs."""

    noise: dict[fx.Node, Noise] = field(default_factory=dict)
    output: OutputNoise = field(default_factory=OutputNoise)
    samples: int = 0
    noise_samples: int = 0
    spilled_bytes: int = 0
    steps: list[StepLog] = field(default_factory=list)
    ranges: list[RangeChoice] = field(default_factory=list)


class Walk:
    """Runs both streams over a placed graph, stage by stage, and sets every Quantizer's grid.

    ``noise_samples`` bounds how many samples the quantized stream follows; ranges always see all of them.
    """

    def __init__(
        self, graph: fx.GraphModule, batches: list[Arguments], groups: list[ScaleGroup], target: Target, *,
        memory: int, noise_samples: int = 128, steps: tuple[Step, ...] = (), progress: Progress | None = None,
        resume: Path | None = None,
    ) -> None:  # fmt: skip
        self.graph, self.target, self.progress = graph, target, progress
        self.chunks = list(batches)
        self.counts = [sample_count(chunk) for chunk in self.chunks]
        self.quantized_chunks = leading_chunks(self.counts, noise_samples)
        self.stages = cut_into_stages(graph)
        self.group_of = {id(q): group for group in groups for q in group.members}
        self.block_steps = BlockSteps(self, next(filter(learns_from_minibatches, steps), None))
        self.steps = LayerSteps(self, [step for step in steps if not learns_from_minibatches(step)])
        self.blocks = self._cut()
        options = repr((steps, self.quantized_chunks))
        self.resume = None if resume is None else Resume(resume, fingerprint(graph, self.chunks, options))
        self._in_place = _overwritable(self.stages)
        self._auto_weights = auto_weights(self.stages)
        self.grids: dict[int, Grid] = {}
        self.statistics: dict[int, Any] = {}
        self.store = Store(memory)
        self.log = WalkLog(samples=sum(self.counts), noise_samples=sum(self.counts[: self.quantized_chunks]))
        self._float_position, self._float_chunks = 0, len(self.chunks)
        self._ahead: dict[int, Any] = {}
        self._rounded: set[int] = set()  # stages whose weights have had their turn
        self._tried: Stage | None = None  # the stage that runs only for what comes after it in its block
        self._uses = {"float": self._count_uses("float"), "quantized": self._count_uses("quantized")}

    def run(self) -> WalkLog:
        """Walk to the end."""
        with torch.no_grad(), self.store:
            self._ahead = observe_ahead(self)
            if self._ahead:
                self._float_chunks = self.quantized_chunks
            for chunk in range(self._float_chunks):
                self.load_inputs(chunk)
            position = 0
            for index, block in enumerate(self.blocks):
                for stage in block.stages:
                    self._run_float_to(self._needed_for(self.stages.index(stage)))
                    self._fix_grids(stage)
                self.block_steps.run(block, index)
                for stage in block.stages:
                    self._report(position, str(stage.end.target))
                    self._run_quantized(stage)
                    position += 1
                self._release("float", self._read_by_steps(block))
            self._measure_outputs()
            self._report(len(self.stages), "done")
            self.log.steps = [*self.block_steps.log, *self.steps.log]
            self.log.spilled_bytes = self.store.spilled_bytes
        return self.log

    def _report(self, done: int, what: str) -> None:
        if self.progress is not None:
            self.progress(done, len(self.stages), what)

    def _cut(self) -> list[Block]:
        """Blocks as the recipe's step wants them; stage by stage where no step looks at blocks."""
        step = self.block_steps.step
        if isinstance(step, Reconstruct):
            return cut_into_blocks(self.graph, self.stages, step.layers)
        return cut_by_layer(self.graph, self.stages)

    # The streams

    def load_inputs(self, chunk: int) -> None:
        """Put the model's inputs where the streams read them."""
        placeholders = [n for n in self.graph.graph.nodes if n.op == "placeholder"]
        for node, value in zip(placeholders, torch.utils._pytree.tree_leaves(self.chunks[chunk])):
            if isinstance(value, Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                raise NonFiniteError(
                    f"calibration input {node.name!r} holds NaN or infinite values in {self.samples_of(chunk)}"
                )
            self.store.put(("float", node.name, chunk), value)
            if chunk < self.quantized_chunks:
                self.store.put(("quantized", node.name, chunk), value)

    def _needed_for(self, index: int) -> int:
        """How far the float stream must be before stage ``index`` can be quantized."""
        quantizer = self.stages[index].quantizer
        group = self.group_of.get(id(quantizer))
        if group is None:
            return index + 1
        members = {id(member) for member in group.members}
        last = max(i for i, s in enumerate(self.stages) if s.observes and id(s.quantizer) in members)
        return max(index, last) + 1

    def _run_float_to(self, position: int) -> None:
        while self._float_position < position:
            stage = self.stages[self._float_position]
            self._float_position += 1
            statistic = self.start_statistic(stage)
            for chunk in range(self._float_chunks):
                value = self.execute("float", stage, chunk)
                if statistic is not None:
                    self.observe(statistic, value, stage, chunk)
                self.store.put(("float", stage.end.name, chunk), value)
            if statistic is not None:
                ahead = self._ahead.get(id(stage))
                self.keep_statistic(stage, statistic if ahead is None else statistic.merge(ahead))
            if isinstance(statistic, AutoStatistic):
                self._choose_range(statistic, stage)
            self._release("float", [source.name for source in stage.inputs])

    def try_out(self, stage: Stage) -> None:
        """Round a stage's weights and run it, so that those of the next can be; it runs again after its block."""
        self.steps.round_weights(stage)
        self._tried = stage
        for chunk in range(self.quantized_chunks):
            self._keep(stage, chunk, self._quantized_value(stage, chunk))
        self._tried = None
        self._rounded.add(id(stage))

    def _quantized_value(self, stage: Stage, chunk: int, *, corrected: bool = False) -> Any:
        value = self.execute("quantized", stage, chunk, corrected=corrected)
        grid = stage.quantizer.grid if stage.quantizer is not None else None
        return value if grid is None else fake_quantize_(value, grid)

    def _keep(self, stage: Stage, chunk: int, value: Any) -> None:
        grid = stage.quantizer.grid if stage.quantizer is not None else None
        if grid is not None and grid.format.bits <= 16 and grid.format.kind == "int":
            value = quantize(value, grid)
        self.store.put(("quantized", stage.end.name, chunk), value)

    def _run_quantized(self, stage: Stage) -> None:
        if id(stage) not in self._rounded:
            self.steps.round_weights(stage)
        corrected = self.steps.correct_bias(stage)
        noise = Noise() if stage.compute is not None and _is_float(stage.end.meta.get("val")) else None
        for chunk in range(self.quantized_chunks):
            value = self._quantized_value(stage, chunk, corrected=corrected)
            if noise is not None:
                noise.update(self.store.get(("float", stage.end.name, chunk)), value)
            self._keep(stage, chunk, value)
        if stage.compute is not None:
            if noise is not None:
                self.log.noise[stage.compute] = noise
            self._release("float", self._read_beside(stage))
            self.store.drop("output", stage.compute.name, self.quantized_chunks)
        self._release("quantized", [source.name for source in stage.inputs])

    def execute(self, stream: str, stage: Stage, chunk: int, *, corrected: bool = False) -> Any:
        """The value of a stage's end before its Quantizer; from the layer's kept output on where there is one."""
        env = self.inputs(stream, stage, chunk)
        borrowed = _storages(env)
        nodes = stage.nodes[:-1] if stage.quantizer is not None else stage.nodes
        value: Any = env[stage.inputs[0]] if stage.inputs and not nodes else None
        if corrected and stage.compute is not None:
            value = env[stage.compute] = self.store.get(("output", stage.compute.name, chunk))
            nodes = nodes[nodes.index(stage.compute) + 1 :]
        if nodes:
            value = self.run_nodes(stream, nodes, env, chunk)
        if stream == "quantized" and stage.quantizer is not None and borrowed & _storages({stage.end: value}):
            value = value.clone()  # a view of what others still read: it is about to be quantized in place
        return value

    def inputs(self, stream: str, stage: Stage, chunk: int) -> dict[fx.Node, Any]:
        return {source: self.read(stream, source, chunk) for source in stage.inputs}

    def run_nodes(self, stream: str, nodes: list[fx.Node], env: dict[fx.Node, Any], chunk: int) -> Any:
        for node in nodes:
            if stream == "float" and chunk == 0 and node in self._auto_weights:
                layer, axis = self._auto_weights[node]
                self.log.ranges.append(choose_weight_grid(str(node.target), layer, axis, env[node.args[0]]))  # type: ignore[index]
            env[node] = self.call(stream, node, env)
            if chunk < self.quantized_chunks and self._tried is None:
                self.steps.observe(node, stream, env[node])  # now: an activation may overwrite it
        return env[nodes[-1]] if nodes else None

    def call(self, stream: str, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """The value of one node in a stream: layers are the user's own in the float one."""
        args = fx.map_arg(node.args, lambda n: env[n])
        kwargs = fx.map_arg(node.kwargs, lambda n: env[n])
        if node.op == "get_attr":
            return getattr(self.graph, str(node.target))
        if node.op == "call_function":
            if node in self._in_place:
                return torch.relu_(args[0])  # type: ignore[arg-type]
            return node.target(*args, **kwargs)  # type: ignore[operator]
        module = self.graph.get_submodule(str(node.target))
        if stream == "float" and hasattr(module, "weight_quantizer"):
            module = module.layer  # type: ignore[assignment]
        return module(*args, **kwargs)

    def read(self, stream: str, node: fx.Node, chunk: int) -> Any:
        """A stored value in real numbers."""
        value = self.store.get((stream, node.name, chunk))
        if stream == "quantized" and node.op == "call_module":
            module = self.graph.get_submodule(str(node.target))
            if isinstance(module, Quantizer) and isinstance(value, Tensor) and not value.is_floating_point():
                return dequantize(value, module.require_grid())
        return value

    # Ranges and noise

    def start_statistic(self, stage: Stage) -> Any:
        """What is to watch the end of a stage; None where nothing is."""
        return empty_statistic(stage, self.log.samples) if stage.observes else None

    def keep_statistic(self, stage: Stage, statistic: Any) -> None:
        """Keep what was seen of all samples for the grid."""
        self.statistics[id(stage.quantizer)] = statistic

    def _choose_range(self, statistic: AutoStatistic, stage: Stage) -> None:
        assert stage.quantizer is not None
        x = self.store.get(("float", stage.end.name, 0))
        with self._naming_range_errors(stage):
            choice = statistic.choose(
                str(stage.end.target), stage.end, x, non_negative=stage.quantizer.non_negative,
                unsigned_codes=self.target.unsigned_codes,
            )  # fmt: skip
        self.log.ranges.append(choice)

    def observe(self, statistic: Any, value: Tensor, stage: Stage, chunk: int) -> None:
        """Show a value to a statistic."""
        try:
            statistic.update(value)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"the output of {stage_name(stage)} holds NaN or infinite values in {self.samples_of(chunk)}: look at "
                "the float model on these; a division, a log or an overflow there makes them"
            ) from error

    def samples_of(self, chunk: int) -> str:
        """Where in the calibration set a chunk lies."""
        first = sum(self.counts[:chunk])
        return f"samples {first} to {first + self.counts[chunk] - 1} of the calibration set"

    def _fix_grids(self, stage: Stage) -> None:
        """The grid of a stage's Quantizer, where it is observed there, and those that its layer's follow from."""
        if stage.observes and stage.quantizer is not None:
            self._fix_grid(stage.quantizer, stage)
        if stage.layer is not None and stage.compute is not None:
            output = None if stage.quantizer is None else stage.quantizer.grid
            tie_weight_scale(stage.layer, stage.compute, output, self.target)
            set_bias_grid(stage.layer, stage.compute, self.target.bias_unit)

    def _fix_grid(self, quantizer: Quantizer, stage: Stage) -> None:
        group = self.group_of.get(id(quantizer))
        if id(quantizer) not in self.grids:
            members = group.members if group else [quantizer]
            grids = [self._solve(member, stage) for member in members]
            joined = join_grids(grids, group.kind) if group else grids
            self.grids.update({id(member): grid for member, grid in zip(members, joined)})
        quantizer.set_grid(self.grids[id(quantizer)])

    def _solve(self, quantizer: Quantizer, stage: Stage) -> Grid:
        statistic = self.statistics.pop(id(quantizer))
        if isinstance(statistic, AutoStatistic):
            return statistic.grid
        with self._naming_range_errors(stage):
            return activation_grid(
                statistic, quantizer.spec, non_negative=quantizer.non_negative,
                unsigned_codes=self.target.unsigned_codes,
            )  # fmt: skip

    @contextmanager
    def _naming_range_errors(self, stage: Stage) -> Iterator[None]:
        try:
            yield
        except CalibrationError as error:
            raise CalibrationError(f"no range for the output of {stage_name(stage)}: {error}") from error

    def _measure_outputs(self) -> None:
        output = next(node for node in self.graph.graph.nodes if node.op == "output")
        for source in output.all_input_nodes:
            for chunk in range(self.quantized_chunks):
                exact = self.store.get(("float", source.name, chunk))
                if isinstance(exact, Tensor) and exact.is_floating_point():
                    self.log.output.update(exact, self.read("quantized", source, chunk))

    # Liveness

    def _count_uses(self, stream: Stream) -> dict[str, int]:
        """How often each value is still to be read: by stages, by the output, and beside the quantized stream."""
        output = next(node for node in self.graph.graph.nodes if node.op == "output")
        readers = [source.name for stage in self.stages for source in stage.inputs]
        readers += [source.name for source in output.all_input_nodes]
        if stream == "float":
            for stage in self.stages:
                readers += self._read_beside(stage)
            for block in self.blocks:
                readers += self._read_by_steps(block)
        return dict(Counter(readers))

    def _read_beside(self, stage: Stage) -> list[str]:
        """Values of the float stream that the quantized one is compared with at a stage."""
        if stage.compute is None:
            return []
        inputs = stage.inputs if self.steps.needs_float_inputs else []
        return [*(source.name for source in inputs), stage.end.name]

    def _read_by_steps(self, block: Block) -> list[str]:
        """Values of the float stream that a step on blocks learns from."""
        if self.block_steps.step is None:
            return []
        return [node.name for node in [*block.sources, *block.ends]]

    def _release(self, stream: str, names: list[str]) -> None:
        for name in names:
            self._uses[stream][name] -= 1
            if self._uses[stream][name] == 0:
                self.store.drop(stream, name, len(self.chunks))


def _overwritable(stages: list[Stage]) -> set[fx.Node]:
    """ReLUs whose input is the fresh result of a layer or an add in their own stage, which nobody else reads."""
    fresh = {"conv", "conv_transpose", "linear", "add", "batch_norm"}
    return {
        node
        for stage in stages
        for before, node in zip(stage.nodes, stage.nodes[1:])
        if op_of(node).name == "relu" and op_of(before).name in fresh
    }


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _storages(values: dict[fx.Node, Any]) -> set[int]:
    """The memory that tensors lie in."""
    return {value.untyped_storage().data_ptr() for value in values.values() if isinstance(value, Tensor)}


def leading_chunks(counts: list[int], samples: int) -> int:
    """How many leading chunks hold at least ``samples`` samples."""
    total = 0
    for index, count in enumerate(counts):
        if total >= samples:
            return index
        total += count
    return len(counts)
