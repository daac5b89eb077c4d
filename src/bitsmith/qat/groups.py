"""Which quantizers of a quantized graph share a scale, told from the graph itself."""

from __future__ import annotations

from torch import fx

from ..capture.ops import quantizer_of
from ..grid import Grid, Quantizer
from ..place.place import ScaleGroup


def groups_of(graph: fx.GraphModule) -> list[ScaleGroup]:
    """Quantizers whose grids hold one scale tensor: the whole grid is one under a concat, the scale under an add."""
    found: dict[int, dict[int, Quantizer]] = {}
    for node in graph.graph.nodes:
        quantizer = quantizer_of(node)
        if quantizer is not None and quantizer.scale is not None:
            found.setdefault(quantizer.scale.data_ptr(), {})[id(quantizer)] = quantizer
    groups = []
    for members in (list(group.values()) for group in found.values()):
        if len(members) > 1:
            grids = [member.require_grid() for member in members]
            groups.append(ScaleGroup("cat" if all(_equal(grid, grids[0]) for grid in grids) else "add", members))
    return groups


def _equal(grid: Grid, other: Grid) -> bool:
    zeros = [0 if g.zero_point is None else int(g.zero_point) for g in (grid, other)]
    return grid.format == other.format and zeros[0] == zeros[1]
