"""From a trained model to the quantized one: its grids and folded weights in the graph that was placed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from ..calibrate.bias import set_bias_grid
from ..capture.ops import module_of
from ..errors import CalibrationError
from ..flow import channels_last, finish
from ..grid import Grid, IntFormat, Quantizer
from ..integer.pairs import raised_for_pairs
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from .layers import FreezableNorm, TrainedLayer
from .quantizers import TrainingQuantizer

if TYPE_CHECKING:
    from .graph import QATGraph


def convert_trained(trained: QATGraph) -> QuantizedModel:
    """The QuantizedModel that ``trained`` simulates in eval mode."""
    template = trained.template.copy()
    with torch.no_grad():
        _fill(template.graph, trained)
    return finish(
        template.graph, trained.recipe, trained.target, template.placed, None, [*trained.notes], {}, trained.signature
    )


def take_parameters(graph: fx.GraphModule, trained: QATGraph) -> None:
    """Write the weights of this moment, batch norms folded in, into a placed graph that has no grids yet."""
    with torch.no_grad():
        for node in graph.graph.nodes:
            layer = module_of(node)
            if isinstance(layer, QuantLayer):
                source = trained.graph.get_submodule(str(node.target))
                assert isinstance(source, TrainedLayer)
                _set_parameters(layer, *source.folded(exact=True))
        _fill_rest(graph, trained)
        channels_last(graph)  # as quantize lays them out, so that ranges are the same to the bit


def _set_parameters(layer: QuantLayer, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    layer.layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        layer.layer.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)


def _fill(graph: fx.GraphModule, trained: QATGraph) -> None:
    """Write what was learned into a placed graph."""
    known: dict[int, Grid] = {}  # one Grid for each quantizer: who shares it is told by identity
    for name, module in list(graph.named_modules(remove_duplicate=False)):
        if not name or name.endswith(("weight_quantizer", "bias_quantizer")):
            continue
        if isinstance(module, Quantizer):
            module.set_grid(_grid(trained, name, known))
    for node in graph.graph.nodes:
        module = module_of(node)
        if isinstance(module, QuantLayer):
            _fill_layer(module, node, trained)
    _fill_rest(graph, trained)


def _grid(trained: QATGraph, path: str, known: dict[int, Grid]) -> Grid:
    quantizer = trained.graph.get_submodule(path)
    assert isinstance(quantizer, TrainingQuantizer)
    if id(quantizer) not in known:
        known[id(quantizer)] = _stored(_required(quantizer, path), unsigned=trained.target.unsigned_codes)
    return known[id(quantizer)]


def _stored(grid: Grid, *, unsigned: bool) -> Grid:
    """The same grid in the codes that the target stores."""
    fmt = grid.format
    if not (unsigned and isinstance(fmt, IntFormat) and fmt.signed):
        return grid
    zero = torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point
    half = 1 << (fmt.bits - 1)
    return dataclasses.replace(
        grid, format=dataclasses.replace(fmt, signed=False), zero_point=(zero + half).to(torch.int32)
    )


def _fill_layer(layer: QuantLayer, node: fx.Node, trained: QATGraph) -> None:
    source = trained.graph.get_submodule(str(node.target))
    assert isinstance(source, TrainedLayer)
    weight, bias = source.folded(exact=True)
    grid = None
    if layer.weight_quantizer is not None and source.weight_quantizer is not None:
        source.weight_quantizer(weight)  # the range of a weight that it follows is that of the last one seen
        grid = _required(source.weight_quantizer, str(node.target))
        weight = weight if source.oscillation is None else source.oscillation.hold(weight, grid)
    _set_parameters(layer, weight, bias)
    if layer.weight_quantizer is None or grid is None:
        return
    if trained.target.law == "torch":
        grid = raised_for_pairs(layer.layer, weight, grid, power_of_two=layer.weight_quantizer.spec.scale == "po2")
    layer.weight_quantizer.set_grid(grid)
    set_bias_grid(layer, node, trained.target.bias_unit)


def _required(quantizer: TrainingQuantizer, path: str) -> Grid:
    if (grid := quantizer.grid) is None:
        raise CalibrationError(f"{path!r} has no range yet: every value it saw was 0; run more training batches")
    return grid


def _fill_rest(graph: fx.GraphModule, trained: QATGraph) -> None:
    """Layers and constants that stay in float."""
    for name, module in graph.named_modules():
        if isinstance(module, QuantLayer | Quantizer) or _inside(graph, name):
            continue
        source = trained.graph if not name else trained.graph.get_submodule(name)
        source = source.norm if isinstance(source, FreezableNorm) else source
        for tensors, others in ((module._parameters, source._parameters), (module._buffers, source._buffers)):
            for key in tensors:
                value = others.get(key, source._parameters.get(key))
                if value is not None:
                    tensors[key] = _like(tensors[key], value)


def _like(old: torch.Tensor | None, value: torch.Tensor) -> torch.Tensor:
    copy = value.detach().clone()
    return nn.Parameter(copy, requires_grad=False) if isinstance(old, nn.Parameter) else copy


def _inside(graph: fx.GraphModule, name: str) -> bool:
    """Whether a path lies within a QuantLayer."""
    parts = name.split(".")
    return any(isinstance(graph.get_submodule(".".join(parts[:i])), QuantLayer) for i in range(1, len(parts)))
