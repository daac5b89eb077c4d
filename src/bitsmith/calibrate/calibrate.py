"""Find every grid of a placed graph: weights first, then one walk for activations and biases."""

from __future__ import annotations

import re
from functools import partial
from operator import itemgetter
from pathlib import Path

import torch
from torch import Tensor, fx

from ..capture.inputs import Arguments, sample_count, tensors_of
from ..capture.ops import module_of
from ..errors import CalibrationError, NonFiniteError
from ..grid.spec import RangeRule
from ..integer.pairs import raised_for_pairs
from ..place.layers import QuantLayer
from ..place.macs import elements_of
from ..place.place import Placed
from ..place.plan import layer_name
from ..ranges import weight_grid
from ..steps import Step
from ..targets import Target
from .auto_range import weight_axis
from .remembered import RememberingWalk, Seen
from .walk import Progress, Walk, WalkLog

_CHUNK_BYTES = 4 << 20  # of the largest activation of a chunk: it should stay in cache
_MIN_CHUNK = 4


def calibrate(
    graph: fx.GraphModule, placed: Placed, batches: list[Arguments], target: Target, *, memory: int,
    noise_samples: int = 128, steps: tuple[Step, ...] = (), progress: Progress | None = None,
    resume: Path | None = None, seen: Seen | None = None,
) -> WalkLog:  # fmt: skip
    """Set the grid of every Quantizer in ``graph``; returns what the walk measured.

    ``seen`` holds what other walks over the same float graph and batches saw: ``FloatStatistics.of``.
    """
    set_weight_grids(placed, target)
    chunks = rechunk(graph, batches)
    walk = Walk if seen is None else partial(RememberingWalk, seen=seen)
    return walk(
        graph, chunks, placed.groups, target, memory=memory, noise_samples=noise_samples,
        steps=steps, progress=progress, resume=resume,
    ).run()  # fmt: skip


def set_weight_grids(placed: Placed, target: Target) -> None:
    """The grid of every weight, from the weights alone."""
    raised: list[float] = []
    for node in placed.layers:
        layer = module_of(node)
        if not isinstance(layer, QuantLayer) or layer.weight_quantizer is None:
            continue
        spec = layer.weight_quantizer.spec
        axis = weight_axis(layer, spec)
        if spec.range.name == "auto":  # until the walk has seen what the layer reads
            spec = spec.model_copy(update={"range": RangeRule()})
        try:
            grid = weight_grid(layer.weight.detach(), spec, axis)
        except (NonFiniteError, CalibrationError) as error:
            raise type(error)(f"weight of {layer_name(node)!r}: {error}") from error
        if target.law == "torch":
            found, grid = grid, raised_for_pairs(layer.layer, layer.weight, grid, power_of_two=spec.scale == "po2")
            raised += [] if grid is found else [float((grid.scale / found.scale).max())]
        layer.weight_quantizer.set_grid(grid)
    if raised:
        placed.notes.append(
            f"weight scales raised in {len(raised)} depthwise layers, {max(raised):.3g} times at most: torch's kernels "
            "for more than 100 groups add products in pairs, in 16 bits, which must not saturate"
        )


def rechunk(graph: fx.GraphModule, batches: list[Arguments]) -> list[Arguments]:
    """Cut batches so that the largest activation of a chunk stays in cache; batches of a fixed size stay whole."""
    placeholders = [n.meta.get("val") for n in graph.graph.nodes if n.op == "placeholder"]
    tensors = [v for v in placeholders if isinstance(v, Tensor) and v.ndim]
    if not tensors or not all(isinstance(v.shape[0], torch.SymInt) for v in tensors):
        return batches
    largest = max((elements_of(n) for n in graph.graph.nodes), default=1) * 4
    size = max(_MIN_CHUNK, _CHUNK_BYTES // max(largest, 1))
    chunks: list[Arguments] = []
    for batch in batches:
        count = sample_count(batch)
        same = all(t.ndim and t.shape[0] == count for t in tensors_of(batch))
        if not same or count <= size:
            chunks.append(batch)
            continue
        pieces = -(-count // size)
        for index in range(pieces):  # of equal size, as near as may be
            piece = slice(index * count // pieces, (index + 1) * count // pieces)
            chunks.append(torch.utils._pytree.tree_map_only(Tensor, itemgetter(piece), batch))
    return chunks


def parse_memory(memory: str | int) -> int:
    """Bytes from ``"2GB"``, ``"512MiB"`` or a number.

    >>> parse_memory("2GB")
    2000000000
    """
    if isinstance(memory, int):
        size = memory
    else:
        match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([KMGT]?)(i?)B?\s*", memory, re.IGNORECASE)
        if match is None:
            raise CalibrationError(f"memory={memory!r} is not a size: write for example '2GB' or '512MiB'")
        number, unit, binary = match.groups()
        size = int(float(number) * (1024 if binary else 1000) ** ("KMGT".index(unit.upper()) + 1 if unit else 0))
    if size <= 0:
        raise CalibrationError(f"memory={memory!r} leaves no room: write a positive size, such as '2GB' or '512MiB'")
    return size
