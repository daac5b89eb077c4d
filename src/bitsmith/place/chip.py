"""A placed graph as the layers of a convolutional accelerator.

A layer of the chip reads one or several values, pools them, combines them element by element, convolves, and applies
an activation function; each part may be missing. This module says which layers a graph becomes:

- pooling and sums are taken up by the convolution that reads them, and else become a layer without weights;
- a convolution with a stride runs with stride 1, and whoever reads it reads every second pixel (pooling of 1 x 1);
- a depthwise convolution becomes a dense one where the chip has none;
- ReLU behind a sum, which only a convolution can do, becomes a 1 x 1 convolution with the identity;
- the operands of a sum lie word by word beside each other: what others read too is copied there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, fx, nn

from ..capture.ops import aten_name, layer_of, module_of, op_of, quantizer_of
from ..targets.target import ChipLimits
from .chip_layer import INPUT, ChipLayer, Operator, Pool, Shape
from .layers import QuantLayer
from .macs import size_of
from .plan import clamp_bounds, fused_end, layer_name, operands

ELEMENTWISE = ("add", "sub", "or", "xor")


@dataclass
class _Value:
    """What a node of the graph is: written by a layer, or still to be computed by whoever reads it."""

    name: str
    shape: Shape
    uses: int
    layer: int | None = None
    sources: list[_Value] = field(default_factory=list)
    pool: Pool | None = None
    eltwise: str | None = None


class Lowering:
    """Turns one graph into ``layers``; ``problems`` says what has no place on the chip, in words."""

    def __init__(self, graph: fx.GraphModule, limits: ChipLimits) -> None:
        self.graph, self.limits = graph, limits
        self.layers: list[ChipLayer] = []
        self.problems: list[str] = []
        self._values: dict[fx.Node, _Value] = {}

    def run(self) -> list[ChipLayer]:
        """All layers, in the order in which they run."""
        inputs = [node for node in self.graph.graph.nodes if node.op == "placeholder"]
        output = next(node for node in self.graph.graph.nodes if node.op == "output")
        if len(inputs) != 1 or len(output.all_input_nodes) != 1:
            self.problems.append(
                f"the model has {len(inputs)} inputs and {len(output.all_input_nodes)} outputs; the chip one of each"
            )
            return []
        for node in self.graph.graph.nodes:
            if node.op != "output":
                if isinstance(node.meta.get("val"), Tensor):  # sizes of tensors are known when the chip is laid out
                    self._lower(node)
            elif node.all_input_nodes[0] in self._values:
                self._written(self._values[node.all_input_nodes[0]])
        return self.layers

    def _lower(self, node: fx.Node) -> None:
        op = op_of(node)
        sources = operands(node) if node.op != "placeholder" else []
        if any(source not in self._values for source in sources):
            return  # what makes it has been told already
        if node.op == "placeholder":
            self._values[node] = _Value(node.name, _shape(node), self._uses(node), INPUT)
        elif quantizer_of(node) is not None or op.name == "reshape":
            self._values[node] = self._values[sources[0]]  # only linear layers read other shapes, in the same order
        elif op.role == "activation":
            self._activation(node, sources[0])
        elif op.name in ("conv", "conv_transpose", "linear"):
            self._convolution(node, self._values[sources[0]])
        elif op.name == "max_pool" or op.name in ("avg_pool", "global_avg_pool"):
            self._pooling(node, self._values[sources[0]])
        elif op.name in ELEMENTWISE:
            self._elementwise(node, [self._values[source] for source in sources])
        elif op.name == "abs":
            self._abs(node, self._values[sources[0]])
        elif op.name == "slice" and aten_name(node) == "slice":
            self._slice(node, self._values[sources[0]])
        elif op.name == "pad":
            self._pad(node, self._values[sources[0]])
        else:
            self._refuse(node, f"the chip has no {aten_name(node) if node.op == 'call_function' else op.name}")

    def _refuse(self, node: fx.Node, reason: str) -> None:
        self.problems.append(f"{layer_name(node)!r}: {reason}")

    def _uses(self, node: fx.Node) -> int:
        """How many operators read a node's value, looking through Quantizers, reshapes and activations."""
        count = 0
        for user in node.users:
            if user.op != "output" and not isinstance(user.meta.get("val"), Tensor):
                continue
            through = (
                quantizer_of(user) is not None or op_of(user).name == "reshape" or op_of(user).role == "activation"
            )
            count += self._uses(user) if through and user.op != "output" else 1
        return count

    def _activation(self, node: fx.Node, source: fx.Node) -> None:
        if op_of(source).role not in ("compute", "activation") and op_of(source).name not in ELEMENTWISE:
            self._refuse(node, "an activation function follows a convolution, a linear layer or a sum; move it there")
            return
        self._values[node] = self._values[source]

    # Layers with weights

    def _convolution(self, node: fx.Node, value: _Value) -> None:
        layer: Any = layer_of(node)
        wrapped, op, source = module_of(node), _operator(layer), operands(node)[0]
        if op is None:
            self._refuse(node, f"the chip has no {type(layer).__name__}")
            return
        if source.meta["val"].ndim != 2 if op == "linear" else _shape(source) != value.shape:
            self._refuse(
                node, f"it reads {list(source.meta['val'].shape[1:])}, but what lies in memory is {value.shape}"
            )
            return
        lowered = ChipLayer(
            layer_name(node), op, [], value.shape, _shape(node), node,
            activation=_activation_of(node), kernel=tuple(getattr(layer, "kernel_size", ())),
            wide=not any(quantizer_of(user) for user in fused_end(node).users), bias=layer.bias is not None,
        )  # fmt: skip
        if isinstance(wrapped, QuantLayer) and wrapped.weight_quantizer is not None:
            lowered.bits = wrapped.weight_quantizer.spec.format.bits
        if op == "linear":
            lowered.flatten = value.shape[1] * value.shape[2] > 1
            lowered.sources = [self._written(value)]
        else:
            if not self._geometry(node, layer, lowered):
                return
            self._read(lowered, value)
        stride = getattr(layer, "stride", (1,)) if op != "convtranspose2d" else (1,)
        self._emit_strided(node, lowered, tuple(stride))

    def _emit_strided(self, node: fx.Node, lowered: ChipLayer, stride: tuple[int, ...]) -> None:
        shape, uses = lowered.written, self._uses(node)
        if all(step == 1 for step in stride):
            self._values[node] = _Value(lowered.name, shape, uses, self._emit(lowered))
            return
        if any(step != stride[0] for step in stride):
            self._refuse(node, f"stride {stride}: strides are the same in both directions")
        sizes = [
            size + 2 * lowered.padding - lowered.dilation * (kernel - 1)
            for size, kernel in zip(lowered.pooled, lowered.kernel)
        ]
        lowered.written = (shape[0], sizes[0], sizes[1] if len(sizes) > 1 else 1)
        inner = _Value(lowered.name, lowered.written, 1, self._emit(lowered))
        every = Pool("max", (1,) * len(stride), stride)
        self._values[node] = _Value(f"{lowered.name}_subsample", shape, uses, None, [inner], every)

    def _geometry(self, node: fx.Node, layer: Any, lowered: ChipLayer) -> bool:
        """Take over kernel, padding, dilation and groups; false where that cannot be."""
        pads = {0} if layer.padding == "valid" else set(layer.padding) if not isinstance(layer.padding, str) else None
        if pads is None:
            pads = {dilation * (kernel - 1) // 2 for dilation, kernel in zip(layer.dilation, layer.kernel_size)}
        if len(pads) != 1 or len(set(layer.dilation)) != 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
            self._refuse(node, "padding and dilation must be the same in all directions, and padding be zeros")
            return False
        lowered.padding, lowered.dilation = pads.pop(), layer.dilation[0]
        if lowered.op == "convtranspose2d":
            lowered.output_padding = layer.output_padding[0]
            if tuple(layer.stride) != (2, 2) or tuple(layer.output_padding) != (1, 1):
                self._refuse(node, "transposed convolutions have stride 2 and output padding 1")
        depthwise = layer.groups > 1 and layer.groups == layer.in_channels == layer.out_channels
        if layer.groups > 1 and not (depthwise and self.limits.depthwise and lowered.op == "conv2d"):
            lowered.dense = True
        else:
            lowered.groups = layer.groups
        return True

    def _read(self, lowered: ChipLayer, value: _Value) -> None:
        """Take up pending pooling, or a pending sum that nobody else reads, into a layer that convolves."""
        rank = len(lowered.kernel)
        if value.layer is None and value.pool is not None and len(value.pool.kernel) == rank:
            lowered.pool, value = value.pool, value.sources[0]
        elif value.layer is None and value.eltwise is not None and value.uses == 1 and rank == 2:
            lowered.eltwise = value.eltwise
            lowered.sources = [self._beside(source) for source in value.sources]
        lowered.read = value.shape
        lowered.sources = lowered.sources or [self._written(value)]

    # Layers without

    def _pooling(self, node: fx.Node, value: _Value) -> None:
        read, written = _shape(operands(node)[0]), _shape(node)
        pool: Pool | str = _pool_of(node, read)
        if isinstance(pool, Pool) and read != value.shape and read == (value.shape[0], 1, value.shape[1]):
            pool, written = Pool(pool.kind, pool.kernel[1:], pool.stride[1:]), (written[0], written[2], 1)
        elif read != value.shape:
            pool = f"it reads {read}, but what lies in memory is {value.shape}"
        if isinstance(pool, Pool) and len(set(pool.stride)) > 1:
            pool = f"pooling stride {pool.stride}: strides are the same in both directions"
        if isinstance(pool, str):
            self._refuse(node, pool)
            return
        source = replace(value, layer=self._written(value), sources=[], pool=None, eltwise=None)
        self._values[node] = _Value(node.name, written, self._uses(node), None, [source], pool)

    def _elementwise(self, node: fx.Node, values: list[_Value]) -> None:
        if any(value.shape != values[0].shape for value in values):
            self._refuse(node, f"its operands have shapes {' and '.join(str(v.shape) for v in values)}, not one shape")
            return
        if node.kwargs.get("alpha", 1) != 1:
            self._refuse(node, f"alpha={node.kwargs['alpha']}: operands are added as they are")
        pending = _Value(node.name, _shape(node), self._uses(node), None, values, None, op_of(node).name)
        self._values[node] = pending
        if _activation_of(node) is None:
            return
        identity = ChipLayer(
            f"{node.name}_identity", "conv2d", [self._beside(value) for value in values], pending.shape, pending.shape,
            eltwise=pending.eltwise, activation="relu", kernel=(1, 1), bits=2, identity=True,
        )  # fmt: skip
        self._values[node] = replace(pending, layer=self._emit(identity), sources=[], eltwise=None)

    def _abs(self, node: fx.Node, value: _Value) -> None:
        layer = self.layers[value.layer] if value.layer is not None and value.layer >= 0 else None
        if layer is None or layer.node is None or layer.activation is not None or value.uses != 1:
            self._refuse(node, "Abs is the activation function of a convolution or linear layer that only it reads")
            return
        layer.activation, layer.wide = "abs", False
        self._values[node] = replace(value, uses=self._uses(node))

    def _slice(self, node: fx.Node, value: _Value) -> None:
        """Every n-th row or column: pooling of 1 x 1; two such in a row are one."""
        given: list[Any] = list(node.args[1:])
        dim, start, _, step = given + [0, 0, None, 1][len(given) :]
        shape, whole = _shape(node), self._values[operands(node)[0]].shape
        every = isinstance(step, int) and not start and 0 < dim < 4 and shape[dim - 1] == -(-whole[dim - 1] // step)
        if not every or (step != 1 and dim == 1):
            self._refuse(node, "it cuts out a part: the chip can only leave out every so many rows and columns")
            return
        if step == 1:
            self._values[node] = value
            return
        stride = (step, 1) if dim == 2 else (1, step)
        source = value
        if value.layer is None and value.pool is not None and value.pool.kernel == (1, 1):
            stride = (stride[0] * value.pool.stride[0], stride[1] * value.pool.stride[1])
            source = value.sources[0]
        source = source if source.layer is not None else replace(source, layer=self._written(source))
        self._values[node] = _Value(node.name, shape, self._uses(node), None, [source], Pool("max", (1, 1), stride))

    def _pad(self, node: fx.Node, value: _Value) -> None:
        """Channels of zeros: a convolution with a piece of the identity."""
        pads = list(node.args[1])  # type: ignore[arg-type]
        before = pads[4] if len(pads) > 4 else 0
        if any(pads[:4]) or len(pads) != 6 or node.meta["val"].ndim != 4 or min(pads) < 0:
            self._refuse(node, "it pads pixels: let the convolution behind it pad, by up to 2")
            return
        layer = ChipLayer(
            node.name, "conv2d", [], value.shape, _shape(node), kernel=(1, 1), bits=2, identity=True, first=before
        )  # fmt: skip
        self._read(layer, value)
        self._values[node] = _Value(node.name, layer.written, self._uses(node), self._emit(layer))

    def _written(self, value: _Value) -> int:
        """The layer that writes a value; one without weights is added where it is still pending."""
        if value.layer is None:
            value.layer = self._pass(value, write_gap=0)
        return value.layer

    def _beside(self, value: _Value) -> int:
        """The layer that writes a value with room for another operand between its words."""
        if value.layer is not None and value.layer != INPUT and value.uses == 1:
            self.layers[value.layer].write_gap = 1
            return value.layer
        return self._pass(value, write_gap=1)

    def _pass(self, value: _Value, write_gap: int) -> int:
        """A layer without weights."""
        if value.layer is not None:
            copy = ChipLayer(f"{value.name}_copy", "none", [value.layer], value.shape, value.shape)
            copy.write_gap = write_gap
            return self._emit(copy)
        if value.eltwise is not None:
            sources = [self._beside(source) for source in value.sources]
        else:
            sources = [self._written(value.sources[0])]
        return self._emit(
            ChipLayer(
                value.name, "none", sources, value.sources[0].shape, value.shape, pool=value.pool,
                eltwise=value.eltwise, write_gap=write_gap,
            )
        )  # fmt: skip

    def _emit(self, layer: ChipLayer) -> int:
        names = {known.name for known in self.layers}
        if layer.name in names:
            count = next(i for i in range(2, len(names) + 3) if f"{layer.name}_{i}" not in names)
            layer.name = f"{layer.name}_{count}"
        self.layers.append(layer)
        return len(self.layers) - 1


def _shape(node: fx.Node) -> Shape:
    sizes = [size_of(size) for size in node.meta["val"].shape[1:]]
    channels, height, width = [*sizes, 1, 1, 1][:3]
    return channels, height, width


def _operator(layer: Any) -> Operator | None:
    kinds: dict[type[nn.Module], Operator] = {
        nn.Conv1d: "conv1d", nn.Conv2d: "conv2d", nn.ConvTranspose2d: "convtranspose2d", nn.Linear: "linear",
    }  # fmt: skip
    return kinds.get(type(layer))


def _activation_of(node: fx.Node) -> str | None:
    """ReLU, or what clamps at 0 from below, behind an operator."""
    end = fused_end(node)
    while end is not node:
        if clamp_bounds(end)[0] == 0.0:
            return "relu"
        end = operands(end)[0]
    return None


def _pool_of(node: fx.Node, shape: Shape) -> Pool | str:
    """Kernel and stride of a pooling node, or why the chip cannot do it."""
    name = op_of(node).name
    rank = node.args[0].meta["val"].ndim - 2  # type: ignore[union-attr]
    kind: Literal["max", "avg"] = "max" if name == "max_pool" else "avg"
    if name == "global_avg_pool":
        return Pool(kind, shape[1 : 1 + rank], (1,) * rank)

    def per_axis(value: Any) -> tuple[int, ...]:
        values = [value] if isinstance(value, int) else list(value)
        return tuple(values * rank if len(values) == 1 else values)

    if aten_name(node).startswith("adaptive"):
        kernel = tuple(size // count for size, count in zip(shape[1:], per_axis(node.args[1])))
        return Pool(kind, kernel, kernel)
    arguments = list(node.args[1:])
    kernel = per_axis(arguments[0])
    stride = per_axis(arguments[1]) if len(arguments) > 1 and arguments[1] else kernel
    padding = per_axis(arguments[2]) if len(arguments) > 2 else (0,) * rank
    dilation = per_axis(arguments[3]) if kind == "max" and len(arguments) > 3 else (1,) * rank
    if any(padding):
        return f"pooling pads by {padding}: the chip pools without padding. Pool 2 x 2 with stride 2 instead"
    if any(step != 1 for step in dilation):
        return "pooling windows are not dilated"
    return Pool(kind, kernel, stride)
