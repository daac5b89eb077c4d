"""``prepare`` and ``convert`` of a model that can be captured: its user runs the LayerGraph, statistics stream."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calibrate.calibrate import rechunk
from ..calibrate.streamed import calibrate_streamed
from ..calibrate.watching import WatchingQuantizer
from ..capture import copy_graph
from ..capture.inputs import Arguments, positional, sample_count
from ..capture.ops import quantizer_of
from ..errors import CalibrationError, NonFiniteError
from ..flow import finish
from ..model import QuantizedModel
from ..place.place import Placed, moved
from ..recipe import Recipe
from ..targets import Target


class PreparedGraph(nn.Module):
    """A model whose Quantizers watch; called like the model, it computes what the float model computes.

    Run the calibration batches through it, then ``bitsmith.convert`` it. Only statistics and the inputs of the first
    ``noise_samples`` samples are kept, however many batches run. ``merge`` takes in the statistics of another process.
    """

    def __init__(
        self, graph: fx.GraphModule, placed: Placed, recipe: Recipe, target: Target, *,
        signature: inspect.Signature, notes: list[str], seconds: dict[str, float], noise_samples: int,
        quantizer: type[WatchingQuantizer],
    ) -> None:  # fmt: skip
        super().__init__()
        self.graph, self.placed, self.recipe, self.target = graph, placed, recipe, target
        self.signature, self.notes, self.seconds = signature, notes, seconds
        self.noise_samples = noise_samples
        self.samples = 0
        self.kept: list[Arguments] = []
        self.watchers: dict[str, WatchingQuantizer] = {}
        for node in graph.graph.nodes:
            place = quantizer_of(node)
            if place is not None and node.meta.get("observe"):
                watcher = quantizer(place.spec, non_negative=place.non_negative)
                watcher.watch()
                self.watchers[str(node.target)] = watcher
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float model's outputs; every value that will be quantized is watched on the way."""
        chunks = self._chunks(positional(self.signature, args, kwargs))
        results = [self._run(chunk) for chunk in chunks]
        if len(results) > 1:
            flat = [torch.cat(parts) for parts in zip(*results)]
        else:
            flat = results[0]
        rest = iter(flat)
        outputs = fx.map_arg(_output(self.graph).args[0], lambda _: next(rest))
        return self.graph.graph._codegen.process_outputs(outputs)

    def __deepcopy__(self, memo: dict[int, Any]) -> PreparedGraph:
        """Another one that has seen the same; the two go on apart."""
        twin = copy.copy(self)
        memo[id(self)] = twin
        twin._modules = {"graph": copy_graph(self.graph)}
        twin.placed = moved(self.placed, self.graph, twin.graph)
        twin.watchers = copy.deepcopy(self.watchers, memo)
        twin.kept, twin.notes, twin.seconds = [*self.kept], [*self.notes], {**self.seconds}
        return twin

    def get_extra_state(self) -> dict[str, Any]:
        """What was seen, for a state_dict."""
        watched = {name: watcher.watched() for name, watcher in self.watchers.items()}
        return {"samples": self.samples, "kept": [*self.kept], "watched": watched}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from what was seen."""
        if self.watchers.keys() != state["watched"].keys():
            raise CalibrationError("this state is of another model or recipe: other values were watched")
        for name, watcher in self.watchers.items():
            watcher.resume(state["watched"][name])
        self.samples, self.kept = int(state["samples"]), [*state["kept"]]

    def merge(self, other: PreparedGraph) -> None:
        """Take in what another copy of this prepared model saw, as if its batches had come after these."""
        if self.watchers.keys() != other.watchers.keys():
            raise CalibrationError("only two preparations of the same model by the same recipe can be merged")
        for name, watcher in self.watchers.items():
            watcher.merge(other.watchers[name])
        self.kept += other.kept
        self.samples += other.samples

    def convert(self, memory: int, shifts: Mapping[str, Tensor] | None = None) -> QuantizedModel:
        """The QuantizedModel; the prepared model is used up. ``shifts`` are added to biases, by their layers' nodes."""
        if not self.samples:
            raise CalibrationError("no batch was run: call the prepared model on calibration batches, then convert it")
        watchers = {id(self.graph.get_submodule(name)): watcher for name, watcher in self.watchers.items()}
        log = calibrate_streamed(
            self.graph, self.placed, watchers, self.kept, self.target, samples=self.samples, memory=memory,
            noise_samples=self.noise_samples, steps=self.recipe.steps, shifts=shifts,
        )  # fmt: skip
        self.samples, self.kept = 0, []
        return finish(self.graph, self.recipe, self.target, self.placed, log, self.notes, self.seconds, self.signature)

    def _chunks(self, arguments: Arguments) -> list[Arguments]:
        """Pieces as the walk would cut them, so that both see the same numbers to the bit."""
        fakes = [node.meta.get("val") for node in _output(self.graph).all_input_nodes]
        if all(isinstance(v, Tensor) and v.ndim and isinstance(v.shape[0], torch.SymInt) for v in fakes):
            return rechunk(self.graph, [arguments])
        return [arguments]

    def _run(self, chunk: Arguments) -> list[Tensor]:
        if sum(map(sample_count, self.kept)) < self.noise_samples:
            self.kept.append(torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().clone(), chunk))
        with torch.no_grad():
            values = _Watch(self).run(*torch.utils._pytree.tree_leaves(chunk), enable_io_processing=False)
        self.samples += sample_count(chunk)
        return [leaf for leaf in torch.utils._pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


class _Watch(fx.Interpreter):
    """Runs the float graph and shows every watched value to its watcher."""

    def __init__(self, prepared: PreparedGraph) -> None:
        super().__init__(prepared.graph)
        self.prepared = prepared

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; behind a place that is observed, watch."""
        value = super().run_node(n)
        if n.op == "call_module" and n.meta.get("observe"):
            try:
                self.prepared.watchers[str(n.target)].observe(value)
            except NonFiniteError as error:
                first = self.prepared.samples
                raise NonFiniteError(
                    f"the value {n.args[0]} holds NaN or infinite values in samples {first} and following of the "
                    "calibration set: look at the float model on these"
                ) from error
        return value


def _output(graph: fx.GraphModule) -> fx.Node:
    found: fx.Node = next(node for node in graph.graph.nodes if node.op == "output")
    return found
