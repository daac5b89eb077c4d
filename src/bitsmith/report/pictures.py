"""What a report's plots show beyond its table: histograms with their grids, ranges of channels, local noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, fx, nn

from ..calibrate.noise import Noise
from ..calibrate.switched import FLOAT, Switched, Values
from ..capture.inputs import Arguments
from ..capture.ops import quantizer_of
from ..grid import Grid, IntFormat
from ..place.layers import QuantLayer
from ..place.plan import layer_name

if TYPE_CHECKING:
    from ..model import QuantizedModel

_BINS = 80
_MOST_VALUES = 1 << 20  # of a tensor, in its histogram; extremes and clipping count all
_MOST_CHANNELS = 256


class Histogram(BaseModel):
    """Values of one tensor, and the grid that they are put on."""

    model_config = ConfigDict(extra="forbid")

    tensor: str = Field(description="layer, or what reads an activation")
    kind: Literal["weight", "activation"]
    layers: list[str] = Field(default=[], description="the layer, or those that read the activation")
    bits: int
    least: float = Field(description="of all values")
    greatest: float
    low: float = Field(description="least value on the grid; of grids per channel the least of all")
    high: float = Field(description="greatest value on the grid")
    step: float | None = Field(default=None, description="between codes; per channel their median; None: small floats")
    clipped: float = Field(default=0.0, description="share of values beyond the grid's ends, 0 to 1")
    counts: list[int] = Field(default=[], description="values in equal bins from least to greatest")


class ChannelRanges(BaseModel):
    """Least and greatest weight of every output channel, and what each channel's grid reaches."""

    model_config = ConfigDict(extra="forbid")

    layer: str
    channels: int = Field(description="all of them; the lists hold at most 256, evenly drawn")
    least: list[float]
    greatest: list[float]
    low: list[float] = Field(description="least value on the channel's grid")
    high: list[float]


class Pictures(BaseModel):
    """The data of the plots."""

    model_config = ConfigDict(extra="forbid")

    samples: int = Field(default=0, description="that activations were looked at with")
    weights: list[Histogram] = []
    activations: list[Histogram] = []
    channels: list[ChannelRanges] = []
    local_sqnr_db: dict[str, float] = Field(
        default={}, description="at a layer's output, when all before it is float: what the layer itself adds"
    )


def take_pictures(
    q: nn.Module, batch: Arguments | None = None, floats: Mapping[str, nn.Module] | None = None
) -> Pictures:
    """Histograms and ranges of a quantized model; with one ``batch`` those of activations and local noise too.

    ``floats`` are layers with the weights that they had before a step changed them, by name. Without them local
    noise is left out where weights were changed, since their own error cannot be seen any more.

    >>> import bitsmith as bs
    >>> q = bs.quantize(nn.Sequential(nn.Linear(4, 2)), [torch.randn(32, 4)])
    >>> pictures = take_pictures(q, ((torch.randn(8, 4),), {}))
    >>> [h.tensor for h in pictures.weights], [h.tensor for h in pictures.activations]
    (['0'], ['input of 0'])
    """
    known = dict(floats or {})
    pictures = Pictures()
    with torch.no_grad():
        for name, layer in _layers(q).items():
            if layer.weight_quantizer is not None and layer.weight_quantizer.grid is not None:
                weight = getattr(known.get(name, layer.layer), "weight", layer.weight).detach()
                grid = layer.weight_quantizer.grid
                pictures.weights.append(_histogram(name, "weight", [name], weight, grid))
                if grid.axis is not None and grid.group_size is None:
                    pictures.channels.append(_channel_ranges(name, weight, grid))
        graph = getattr(q, "graph", None)
        if batch is not None and isinstance(graph, fx.GraphModule):
            _look(q, graph, batch, known, pictures)  # type: ignore[arg-type]
    return pictures


def _layers(q: nn.Module) -> dict[str, QuantLayer]:
    root = getattr(q, "graph", q)
    root = root if isinstance(root, nn.Module) else q
    return {name: module for name, module in root.named_modules() if isinstance(module, QuantLayer)}


def _look(
    q: QuantizedModel, graph: fx.GraphModule, batch: Arguments, floats: dict[str, nn.Module], pictures: Pictures
) -> None:
    """Add what one float run shows: the values that Quantizers meet, and what each layer adds of its own."""
    switched = Switched(graph, floats)
    values = switched.run(batch, FLOAT)
    pictures.samples = len(next(leaf for leaf in torch.utils._pytree.tree_leaves(batch) if isinstance(leaf, Tensor)))
    seen = set()
    for node in graph.graph.nodes:
        quantizer = quantizer_of(node)
        if quantizer is None or quantizer.grid is None or not isinstance(values[node], Tensor):
            continue
        readers = [layer_name(user) for user in node.users if user in switched.layers]
        key = (id(quantizer), node.args[0])
        if key not in seen:
            seen.add(key)
            name = f"input of {', '.join(readers)}" if readers else f"output of {_source(node)}"
            pictures.activations.append(_histogram(name, "activation", readers, values[node], quantizer.grid))
    changed = any(step.stage in ("weights", "blocks") for step in q.recipe.steps)
    if not changed or floats:
        pictures.local_sqnr_db = _local(switched, values)


def _local(switched: Switched, values: Values) -> dict[str, float]:
    found = {}
    for node in switched.layers:
        noise = Noise()
        if isinstance(values[node], Tensor):
            noise.update(values[node], switched.local(values, node))
        if noise.signal and noise.error and noise.db is not None:
            found[layer_name(node)] = noise.db
    return found


def _source(node: fx.Node) -> str:
    source: Any = node.args[0]
    while source.op == "call_function" and source.all_input_nodes and len(source.all_input_nodes) == 1:
        source = source.all_input_nodes[0]
    return layer_name(source) if isinstance(source, fx.Node) else str(source)


def _ends(grid: Grid) -> tuple[Tensor, Tensor]:
    """Least and greatest value on each channel's grid."""
    if isinstance(grid.format, IntFormat):
        zero = 0 if grid.zero_point is None else grid.zero_point
        return (grid.format.qmin - zero) * grid.scale, (grid.format.qmax - zero) * grid.scale
    high = grid.format.max_value * grid.scale
    return -high, high


def _histogram(name: str, kind: Any, layers: list[str], value: Tensor, grid: Grid) -> Histogram:
    low, high = _ends(grid)
    value = value.detach().float()
    shown = (low, high)
    if grid.axis is not None and grid.group_size is None and low.ndim:
        shape = [-1 if i == grid.axis % value.ndim else 1 for i in range(value.ndim)]
        shown = (low.view(shape), high.view(shape))
    half = grid.scale / 2 if isinstance(grid.format, IntFormat) else 0 * grid.scale
    if grid.group_size is None:
        half = half.view(shown[0].shape) if half.ndim else half
        clipped = float(((value < shown[0] - half) | (value > shown[1] + half)).float().mean())
    else:
        clipped = 0.0
    least, greatest = (float(v) for v in torch.aminmax(value))
    flat = value.flatten()
    flat = flat[:: max(1, -(-flat.numel() // _MOST_VALUES))]
    counts = torch.histc(flat, _BINS, least, greatest) if greatest > least else torch.tensor([float(flat.numel())])
    return Histogram(
        tensor=name, kind=kind, layers=layers, bits=grid.format.bits, least=least, greatest=greatest,
        low=float(low.min()), high=float(high.max()), clipped=clipped, counts=counts.int().tolist(),
        step=float(grid.scale.median()) if isinstance(grid.format, IntFormat) else None,
    )  # fmt: skip


def _channel_ranges(name: str, weight: Tensor, grid: Grid) -> ChannelRanges:
    axis = grid.axis or 0
    rows = weight.detach().float().movedim(axis, 0).flatten(1)
    low, high = (end.expand(len(rows)) for end in _ends(grid))
    every = torch.linspace(0, len(rows) - 1, min(len(rows), _MOST_CHANNELS)).round().long()
    return ChannelRanges(
        layer=name, channels=len(rows), least=rows.amin(1)[every].tolist(), greatest=rows.amax(1)[every].tolist(),
        low=low[every].tolist(), high=high[every].tolist(),
    )  # fmt: skip
