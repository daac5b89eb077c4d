"""Which channels of which layers must be scaled together, followed element by element through the graph.

Every value is accompanied by a tensor of its own shape that says which channel each of its elements came from. Shape
operators act on that tensor as they act on the value, so that slices, concats, shuffles and flattenings need no
rules of their own; an add makes the channels of its operands one; what is not homogeneous (f(sx) = s f(x) for s > 0)
holds its channels at 1.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.inputs import Arguments
from ..capture.ops import aten_name, layer_of, op_of
from .weights import NORMS, Gain, in_channels, out_channels

FIXED = 0  # the channel whose scale is 1

_SHAPE = {"reshape", "transpose", "slice", "cat", "getitem"}
_POOLS = {"max_pool", "avg_pool", "global_avg_pool", "resize_nearest"}
_ELEMENTWISE = {"relu", "leaky_relu", "dropout", "clone", "contiguous", "alias", "detach", "neg", "abs"}
_BY_CONSTANT = {"mul", "div"}  # with a number: homogeneous
_LAYERS = {"conv", "conv_transpose", "linear"}


@dataclass
class Link:
    """A layer between channels: ``reads`` and ``gives`` hold the channel of each input and output feature."""

    layer: nn.Module
    reads: Tensor | None
    gives: Tensor
    callers: list[fx.Node] = field(default_factory=list)


@dataclass
class Clip:
    """A clamp: channels that stay inside ``low .. high`` may be scaled as long as they do."""

    node: fx.Node
    channels: Tensor
    low: float
    high: float


class ChannelFlow(fx.Interpreter):
    """Follows the channels of one batch (of one sample, if the model takes any batch size) through a LayerGraph.

    After ``follow``, ``links`` holds the layers by name, ``clips`` the clamps, ``roots`` the representative of each
    channel: channels with one root have one scale.
    """

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.links: dict[str, Link] = {}
        self.clips: list[Clip] = []
        self.count = 1
        self._channels: dict[fx.Node, Any] = {}
        self._equal: list[tuple[Tensor, Tensor]] = []

    def follow(self, arguments: Arguments) -> ChannelFlow:
        """Run the graph once and resolve which channels are one."""
        args, kwargs = arguments
        with torch.no_grad():
            self.run(*args, *kwargs.values())
        self._fix_tied_weights()
        self.roots = _components(self.count, self._equal)
        return self

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node; its channels are kept beside it."""
        value = super().run_node(n)
        if n.op == "output":
            for source in n.all_input_nodes:
                self._fix(source)
        else:
            self._channels[n] = self._follow(n, value)
        return value

    def _follow(self, n: fx.Node, value: Any) -> Any:
        name = op_of(n).name
        if not isinstance(value, Tensor):
            return self._shaped(n) if name in _SHAPE and isinstance(value, list | tuple) else None
        if n.op in ("placeholder", "get_attr") or not value.is_floating_point():
            return _spread(torch.zeros(1, dtype=torch.long), value, 0)
        found = None
        if name in _LAYERS or isinstance(layer_of(n), NORMS):
            found = self._through_layer(n, value)
        elif name in _SHAPE:
            found = self._shaped(n)
        elif name == "pad":
            found = self._padded(n)
        elif name == "clamp":
            found = self._clipped(n)
        elif aten_name(n) in _ELEMENTWISE or isinstance(layer_of(n), nn.PReLU):
            found = self._channels[n.args[0]]  # type: ignore[index]
        elif name in _POOLS or aten_name(n).startswith(("mean", "pad", "upsample")):
            found = self._pooled(n, value)
        elif aten_name(n) in ("add", "sub") and name in ("add", "other"):
            found = self._joined(n, value)
        elif aten_name(n) in _BY_CONSTANT:
            found = self._scaled(n, value)
        if found is None or found.shape != value.shape:
            for source in n.all_input_nodes:
                self._fix(source)
            found = _spread(torch.zeros(1, dtype=torch.long), value, 0)
        return found

    def nodes_on(self, roots: Tensor) -> list[fx.Node]:
        """The nodes that read or give some of these channels, layers included."""
        found = []
        for node in self._channels:
            sources = [node, *node.all_input_nodes]
            values = [v for s in sources for v in torch.utils._pytree.tree_leaves(self._channels.get(s))]
            if any(
                isinstance(v, Tensor) and bool(torch.isin(self.roots[torch.unique(v)], roots).any()) for v in values
            ):
                found.append(node)
        return found

    # Rules

    def _through_layer(self, n: fx.Node, value: Tensor) -> Tensor | None:
        layer, source = layer_of(n), n.args[0]
        assert layer is not None
        axis = -1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1
        norm = isinstance(layer, NORMS)
        if (norm and (layer.weight is None or layer.weight.ndim != 1)) or value.ndim < 2:
            return None
        gives = value.shape[axis]
        if gives != out_channels(layer):
            return None
        if norm:
            self._fix(source)
            reads = None
        else:
            reads = _per_channel(self._channels[source], axis)  # type: ignore[index]
            if reads is None or len(reads) != in_channels(layer):
                self._fix(source)
                reads = torch.zeros(in_channels(layer), dtype=torch.long)
        link = self.links.get(str(n.target))
        if link is None:
            link = self.links[str(n.target)] = Link(layer, reads, self._new(gives))
        elif reads is not None and link.reads is not None:
            self._equal.append((link.reads, reads))
        link.callers.append(n)
        return _spread(link.gives, value, axis)

    def _shaped(self, n: fx.Node) -> Any:
        """The operator itself, on the channels."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        sources = iter(n.all_input_nodes)
        given = {id(self.env[s]): self._channels.get(s) for s in sources}
        swap = lambda v: given[id(v)] if given.get(id(v)) is not None else v  # noqa: E731
        is_leaf = lambda v: id(v) in given  # noqa: E731
        args, kwargs = torch.utils._pytree.tree_map(swap, (args, kwargs), is_leaf=is_leaf)
        try:
            return n.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, TypeError):  # not defined for integers
            return None

    def _padded(self, n: fx.Node) -> Tensor | None:
        """Zeros belong to the channel beside them; a channel of zeros alone is free to take any scale."""
        source = self._channels[n.args[0]]  # type: ignore[index]
        padded: Tensor = torch.nn.functional.pad(source, self.fetch_args_kwargs_from_env(n)[0][1], value=-1)
        if padded.ndim < 2:
            return None
        others = [d for d in range(padded.ndim) if d != 1]
        highest = padded.amax(others)
        lowest = torch.where(padded < 0, self.count, padded).amin(others)
        if bool(((highest >= 0) & (lowest != highest)).any()):
            return None  # padded along an axis on which channels differ
        free = highest < 0
        highest[free] = self._new(int(free.sum()))
        return _spread(highest, padded, 1)

    def _clipped(self, n: fx.Node) -> Tensor | None:
        args = (*n.args, None, None)
        low = args[1] if args[1] is not None else n.kwargs.get("min", n.kwargs.get("min_val"))
        high = args[2] if args[2] is not None else n.kwargs.get("max", n.kwargs.get("max_val"))
        if aten_name(n) == "relu6":
            low, high = 0.0, 6.0
        bounds = [-torch.inf if low is None else low, torch.inf if high is None else high]
        if not all(isinstance(b, int | float) for b in bounds) or bounds[0] > 0 or bounds[1] <= 0:  # type: ignore[operator]
            return None
        channels: Tensor = self._channels[n.args[0]]  # type: ignore[index]
        per_channel = _per_channel(channels, 1)
        if per_channel is None:
            return None
        self.clips.append(Clip(n, per_channel, float(bounds[0]), float(bounds[1])))  # type: ignore[arg-type]
        return channels

    def _pooled(self, n: fx.Node, value: Tensor) -> Tensor | None:
        """Means, maxima and copies of elements of one channel."""
        channels = self._channels[n.args[0]]  # type: ignore[index]
        if aten_name(n) == "mean" and len(n.args) > 1:
            dims, keep = n.args[1], bool(n.args[2]) if len(n.args) > 2 else bool(n.kwargs.get("keepdim", False))
            low, high = channels.amin(dims, keepdim=keep), channels.amax(dims, keepdim=keep)
            return low if bool((low == high).all()) else None
        per_channel = _per_channel(channels, 1)
        return None if per_channel is None or len(per_channel) != value.shape[1] else _spread(per_channel, value, 1)

    def _joined(self, n: fx.Node, value: Tensor) -> Tensor | None:
        """A sum: what is added has one scale."""
        operands = [a for a in n.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr"]
        if len(operands) != 2:
            return None
        a, b = (torch.broadcast_to(self._channels[o], value.shape) for o in operands)
        differ = a != b
        self._equal.append((a[differ], b[differ]))
        return a

    def _scaled(self, n: fx.Node, value: Tensor) -> Tensor | None:
        """A product with what has scale 1: a number, a constant, or a gate, which is then held at 1."""
        operands = [a for a in n.args[:2] if isinstance(a, fx.Node) and isinstance(self.env.get(a), Tensor)]
        activations = [a for a in operands if a.op != "get_attr"]
        if not activations or (aten_name(n) == "div" and n.args[0] is not activations[0]):
            return None
        for constant in operands:
            if constant not in activations and self.env[constant].shape == value.shape[-1:]:
                return self._through_gain(n, constant, activations[0], value)
        main = max(activations, key=lambda a: (self.env[a].numel(), int(self._channels[a].amax())))
        for gate in activations:
            if gate is not main:
                self._fix(gate)
        if len(activations) == 2 and activations[0] is activations[1]:
            return None
        channels: Tensor = self._channels[main].broadcast_to(value.shape)
        return channels

    def _through_gain(self, n: fx.Node, constant: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
        """A constant per feature gives the channels of its product, as the weight of a norm does."""
        self._fix(source)
        name = str(constant.target)
        if name not in self.links:
            self.links[name] = Link(Gain(self.env[constant]), None, self._new(value.shape[-1]))
        self.links[name].callers.append(n)
        return _spread(self.links[name].gives, value, -1)

    # Channels

    def _fix_tied_weights(self) -> None:
        """Layers that share their weight with another module, as an embedding and a last layer do, stay as they are."""
        owners = Counter(p.data_ptr() for m in self.module.modules() for p in m._parameters.values() if p is not None)
        for link in self.links.values():
            if owners[link.layer.weight.data_ptr()] > 1:  # type: ignore[operator]
                for channels in (link.reads, link.gives):
                    if channels is not None:
                        self._equal.append((channels, torch.full_like(channels, FIXED)))

    def _new(self, count: int) -> Tensor:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def _fix(self, node: Any) -> None:
        """Hold the channels of a value at scale 1."""
        channels = self._channels.get(node)
        for leaf in channels if isinstance(channels, list | tuple) else [channels]:
            if isinstance(leaf, Tensor):
                found = torch.unique(leaf)
                self._equal.append((found, torch.full_like(found, FIXED)))


def _spread(channels: Tensor, value: Tensor, axis: int) -> Tensor:
    """Channels along one axis of a value, the same along all others; no memory is taken for these."""
    if not value.ndim:
        return channels.reshape(())
    shape = [1] * value.ndim
    shape[axis] = len(channels)
    return channels.view(shape).expand(value.shape)


def _per_channel(channels: Any, axis: int) -> Tensor | None:
    """The channel at each index along ``axis``, where the others do not matter."""
    if not isinstance(channels, Tensor) or channels.ndim < 2:
        return None
    others = [d for d in range(channels.ndim) if d != axis % channels.ndim]
    low, high = channels.amin(others), channels.amax(others)
    return low if bool((low == high).all()) else None


def _components(count: int, equal: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The least channel that each channel is tied to.

    >>> _components(5, [(torch.tensor([3]), torch.tensor([1])), (torch.tensor([4]), torch.tensor([3]))])
    tensor([0, 1, 2, 1, 1])
    """
    roots = torch.arange(count)
    if not equal:
        return roots
    pairs = torch.unique(torch.stack([torch.cat([a.flatten() for a, _ in equal]),
                                      torch.cat([b.flatten() for _, b in equal])]), dim=1)  # fmt: skip
    while True:
        least = roots[pairs].amin(0)
        lowered = roots.clone()
        for side in pairs:
            lowered.scatter_reduce_(0, roots[side], least, "amin")
        lowered = lowered[lowered]
        if torch.equal(lowered, roots):
            return roots
        roots = lowered
