"""Cutting a graph into blocks: runs of stages between points where a single quantized value is alive.

What BRECQ (arXiv 2102.05426) reconstructs at a time, found in the graph instead of by module names: a residual
block, a unit of a split net, a half of a transformer layer. Values that quantization does not touch (a mask, a
position, a size) may pass by such a point: they are the same in both streams.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ..capture.ops import op_of, quantizer_of
from .stages import Stage


@dataclass
class Block:
    """Stages with what they read from before and what is read of them behind.

    ``sources`` are the values that come through quantized layers (one, or none at the start of the graph; a single
    layer may read several), ``sides`` are exact ones, ``ends`` what is alive behind the block: one value, except at
    the end of a graph with several outputs.
    """

    stages: list[Stage]
    sources: list[fx.Node] = field(default_factory=list)
    sides: list[fx.Node] = field(default_factory=list)
    ends: list[fx.Node] = field(default_factory=list)

    @property
    def nodes(self) -> list[fx.Node]:
        """All nodes in the order in which they run."""
        return [node for stage in self.stages for node in stage.nodes]

    @property
    def layers(self) -> list[Stage]:
        """The stages that hold a layer with weights."""
        return [stage for stage in self.stages if stage.layer is not None]

    @property
    def name(self) -> str:
        """The longest module path that its layers have in common, or their names."""
        names = [str(stage.compute.target) for stage in self.layers if stage.compute is not None]
        if not names:
            return str(self.stages[-1].end.name)
        parts = [name.split(".") for name in names]
        shared = next((i for i, column in enumerate(zip(*parts)) if len(set(column)) > 1), len(parts[0]))
        prefix = ".".join(parts[0][:shared])
        return prefix or (names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}")


def cut_into_blocks(graph: fx.GraphModule, stages: list[Stage], layers: int = 1) -> list[Block]:
    """The stages in blocks of as few layers as the graph allows, neighbours joined while they have ``layers`` or less.

    Every stage is in exactly one block, in the order of the graph.
    """
    alive = _alive(graph, stages)
    batch = batch_size(graph)
    exact = _exact(graph, stages)
    cuts = [i + 1 for i, values in enumerate(alive[1:-1]) if _is_cut([v for v in values if v not in exact], batch)]
    blocks: list[Block] = []
    for start, stop in zip([0, *cuts], [*cuts, len(stages)]):
        block = Block(stages[start:stop])
        if blocks and len(blocks[-1].layers) + len(block.layers) <= layers:
            blocks[-1].stages += block.stages
        else:
            blocks.append(block)
    return _with_edges(blocks, alive, exact)


def cut_by_layer(graph: fx.GraphModule, stages: list[Stage]) -> list[Block]:
    """Every stage as a block of its own."""
    return _with_edges([Block([stage]) for stage in stages], _alive(graph, stages), _exact(graph, stages))


def _with_edges(blocks: list[Block], alive: list[list[fx.Node]], exact: set[fx.Node]) -> list[Block]:
    """Blocks that know what they read and what is read of them."""
    position = 0
    for block in blocks:
        inside = set(block.nodes)
        read = dict.fromkeys(i for stage in block.stages for i in stage.inputs if i not in inside)
        block.sources = [value for value in read if value not in exact]
        block.sides = [value for value in read if value in exact]
        position += len(block.stages)
        block.ends = [value for value in alive[position] if value in inside and value not in exact]
    return blocks


def batch_size(graph: fx.GraphModule) -> Any:
    """The symbol of the leading dimension; None where the graph takes batches of one size only."""
    for node in graph.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.ndim:
            return value.shape[0] if isinstance(value.shape[0], torch.SymInt) else None
    return None


def has_samples(value: Any, batch: Any) -> bool:
    """Whether the leading dimension of a value (as the graph's ``meta`` has it) counts samples."""
    return isinstance(value, Tensor) and value.ndim > 0 and (batch is None or str(value.shape[0]) == str(batch))


def _alive(graph: fx.GraphModule, stages: list[Stage]) -> list[list[fx.Node]]:
    """Before each stage, and after the last, the values that later stages or the outputs read."""
    made = {node: 0 for node in graph.graph.nodes if node.op == "placeholder"}
    made |= {stage.end: index + 1 for index, stage in enumerate(stages)}
    last_read: dict[fx.Node, int] = {}
    for index, stage in enumerate(stages):
        last_read.update(dict.fromkeys(stage.inputs, index))
    output = next(node for node in graph.graph.nodes if node.op == "output")
    last_read.update(dict.fromkeys(output.all_input_nodes, len(stages)))
    return [[n for n in made if made[n] <= i <= last_read.get(n, -1)] for i in range(len(stages) + 1)]


def _exact(graph: fx.GraphModule, stages: list[Stage]) -> set[fx.Node]:
    """Values that are the same in the float and in the quantized stream: no Quantizer or layer on their way."""
    exact = {node for node in graph.graph.nodes if node.op == "placeholder"}
    for stage in stages:
        touched = any(quantizer_of(n) is not None or op_of(n).role == "compute" for n in stage.nodes)
        if not isinstance(stage.end.meta.get("val"), Tensor | list | tuple) or (
            not touched and all(source in exact for source in stage.inputs)
        ):
            exact.add(stage.end)  # sizes are exact wherever they come from
    return exact


def _is_cut(values: list[fx.Node], batch: Any) -> bool:
    return len(values) == 1 and has_samples(values[0].meta.get("val"), batch)
