"""A quantized checkpoint and its network description as a Program: what the chip computes, to the bit.

Both files become a graph like the one that quantizing a model ends in, with all activations at ``2**-7`` (as
ai8x-training sees them), which the executor of ``bitsmith.integer`` then runs by the chip's law.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..errors import CheckpointError
from ..grid import Grid, IntFormat, Quantizer, TensorSpec
from ..integer.max78000 import BIAS_UNIT, WIDE_BITS
from ..integer.program import Program
from ..place.layers import QuantLayer
from ..targets import Target, get_target
from .network import BINARY, INPUT, STOP, Network, NetworkError, NetworkLayer

ACTIVATION_SCALE = 2.0**-7
WIDE_SCALE = 2.0**-14
_ATEN: Any = torch.ops.aten
_ELTWISE = {"add": _ATEN.add.Tensor, "sub": _ATEN.sub.Tensor, "or": torch.bitwise_or, "xor": torch.bitwise_xor}
_DTYPES = {8: torch.int8, 32: torch.int32}


@dataclass
class ChipProgram:
    """A network on the chip: codes in, codes out. ``nodes`` is the value that each layer writes, by its sequence."""

    program: Program
    nodes: dict[int, fx.Node]
    widths: dict[int, int]

    def __call__(self, codes: Tensor) -> Tensor:
        """The last layer's codes (int8, or int32 where it is wide) for input codes of -128 to 127."""
        return self.layers(codes, keep=False)[next(reversed(self.nodes))]

    def layers(self, codes: Tensor, *, keep: bool = True) -> dict[int, Tensor]:
        """The codes that each layer writes, by its sequence number; with ``keep=False`` of the last layer only."""
        flat = codes.ndim == 3  # a signal: to the chip an image one pixel wide
        with torch.no_grad():
            real = codes.to(torch.float32) * ACTIVATION_SCALE
            values = self.program.run(real.unsqueeze(3) if flat else real, keep=keep)
        found = {n: values[node].to(_DTYPES[self.widths[n]]) for n, node in self.nodes.items() if node in values}
        return {n: v.squeeze(3) if flat and v.ndim == 4 and v.shape[3] == 1 else v for n, v in found.items()}


def chip_program(
    state: Mapping[str, Tensor], network: Network, target: str | Target = "max78000",
    carrier: Literal["float", "integer"] = "float",
) -> ChipProgram:  # fmt: skip
    """The program of a quantized ``state_dict`` and the network description that goes with it.

    Weights are taken in stored order, one for each layer of the description that has weights, as the network loader
    takes them. Raises NetworkError or CheckpointError where they do not fit together, naming the layer.

    >>> from .devices import MAX78000
    >>> from .network import parse_network
    >>> layers = [{"processors": 1, "out_offset": 0, "op": "conv2d", "kernel_size": "1x1", "pad": 0}]
    >>> network = parse_network({"arch": "net", "dataset": "data", "layers": layers}, MAX78000)
    >>> run = chip_program({"conv.op.weight": torch.full((1, 1, 1, 1), 64.0)}, network)
    >>> run(torch.tensor([[[[-3, 5]]]]))
    tensor([[[[-1,  3]]]], dtype=torch.int8)
    """
    builder = _Builder(state, network)
    graph = builder.build()
    return ChipProgram(Program(graph, get_target(target), carrier), builder.nodes, builder.widths)


class _Builder:
    """Adds one layer after the other to an fx graph."""

    def __init__(self, state: Mapping[str, Tensor], network: Network) -> None:
        self.state, self.network = state, network
        self.root, self.graph = nn.Module(), fx.Graph()
        self.root.codes = _quantizer(8, ACTIVATION_SCALE)
        self.root.wide = _quantizer(WIDE_BITS, WIDE_SCALE)
        self.nodes: dict[int, fx.Node] = {}
        self.widths: dict[int, int] = {}

    def build(self) -> fx.GraphModule:
        """The graph of the whole network."""
        value = self._codes(self._note(self.graph.placeholder("input")))
        values = {INPUT: value}
        weights = self._weights()
        for layer in execution_order(self.network):
            sources = (
                [value] if layer.in_sequences is None else [self._written(values, layer, n) for n in layer.in_sequences]
            )
            value = self._layer(layer, sources, weights.get(layer.sequence))
            self.nodes[layer.sequence] = values[layer.sequence] = value
            self.widths[layer.sequence] = layer.output_width
        self.graph.output(value)
        return fx.GraphModule(self.root, self.graph)

    @staticmethod
    def _written(values: dict[int, fx.Node], layer: NetworkLayer, sequence: int) -> fx.Node:
        if sequence not in values:
            raise NetworkError(f"layer {layer.sequence} reads layer {sequence}, which has not run by then")
        return values[sequence]

    def _weights(self) -> dict[int, str]:
        """The checkpoint's key of the weight of each layer that has one."""
        keys = [key for key in self.state if key.rpartition(".")[2] == "weight"]
        readers = [layer for layer in self.network.layers if layer.reads_weights]
        if len(keys) < len(readers):
            raise NetworkError(
                f"the network description has {len(readers)} layers with weights, but the checkpoint holds {len(keys)}"
            )
        found = {layer.sequence: key for layer, key in zip(readers, keys)}
        for layer in self.network.layers:
            if layer.weight_source is not None and not layer.bypass:
                found[layer.sequence] = found[layer.weight_source]
        return found

    # One layer

    def _layer(self, layer: NetworkLayer, sources: list[fx.Node], weight: str | None) -> fx.Node:
        if layer.streaming and layer.output_width != 8:
            raise NetworkError(f"layer {layer.sequence}: a streaming layer has outputs of 8 bits")
        if layer.eltwise is None and len(sources) > 1:
            sources = [self._codes(self._call(_ATEN.cat.default, sources, 1))]
        if layer.eltwise is not None and len(sources) != layer.operands:
            raise NetworkError(
                f"layer {layer.sequence}: {layer.eltwise!r} has {layer.operands} operands, but reads {len(sources)} "
                "layers: give as many `in_sequences`"
            )
        sources = [self._reshape(layer, source, weight) for source in sources]
        if layer.pool_first or layer.eltwise is None:
            sources = [self._pool(layer, source) for source in sources]
        value = sources[0]
        if layer.eltwise is not None:
            value = self._codes(self._call(_ELTWISE[layer.eltwise], *sources))
            value = value if layer.pool_first else self._pool(layer, value)
        if layer.op == "none" or layer.bypass:
            if layer.activation is not None or layer.output_width != 8:
                raise NetworkError(f"layer {layer.sequence}: a layer without weights has no activation and 8 bits")
            return value
        assert weight is not None
        return self._convolution(layer, value, weight)

    def _reshape(self, layer: NetworkLayer, value: fx.Node, weight: str | None) -> fx.Node:
        if layer.in_dim is None or layer.op == "linear":
            return value
        channels = -1 if weight is None else self._input_channels(layer, self.state[weight])
        return self._codes(self._call(_ATEN.reshape.default, value, [-1 if weight else 1, channels, *layer.in_dim]))

    @staticmethod
    def _input_channels(layer: NetworkLayer, weight: Tensor) -> int:
        return weight.shape[0] if layer.op == "convtranspose2d" else weight.shape[1] * layer.groups

    def _pool(self, layer: NetworkLayer, value: fx.Node) -> fx.Node:
        if layer.pooling is None:
            return value
        kernel, stride, dilation = map(list, (layer.pool, layer.pool_stride, layer.pool_dilation))
        if layer.pooling == "max":
            return self._codes(self._call(_ATEN.max_pool2d.default, value, kernel, stride, [0, 0], dilation))
        if dilation != [1, 1]:
            raise NetworkError(f"layer {layer.sequence}: average pooling with `pool_dilation` is not simulated")
        if layer.op != "conv1d":
            return self._codes(self._call(_ATEN.avg_pool2d.default, value, kernel, stride))
        line = self._codes(self._call(_ATEN.squeeze.dim, value, 3))  # along one dimension averages never round
        line = self._codes(self._call(_ATEN.avg_pool1d.default, line, kernel[:1], stride[:1]))
        return self._codes(self._call(_ATEN.unsqueeze.default, line, 3))

    def _convolution(self, layer: NetworkLayer, value: fx.Node, key: str) -> fx.Node:
        if layer.output_width != 8 and layer.activation is not None:
            raise NetworkError(f"layer {layer.sequence}: `output_width` must be 8 where there is an activation")
        if layer.op == "linear":
            value = self._codes(self._call(_ATEN.flatten.using_ints, value, 1))
        name = f"layer{layer.sequence}"
        self.root.add_module(name, self._quant_layer(layer, key))
        result = self._note(self.graph.call_module(name, (value,)))
        if layer.activation == "relu":
            result = self._call(_ATEN.relu.default, result)
        if layer.output_width != 8:
            return self._note(self.graph.call_module("wide", (result,)))
        result = self._codes(result)
        return self._codes(self._call(_ATEN.abs.default, result)) if layer.activation == "abs" else result

    def _quant_layer(self, layer: NetworkLayer, key: str) -> QuantLayer:
        prefix = key.rpartition(".")[0]
        owner = prefix.rpartition(".")[0] or prefix
        weight = self.state[key].detach().to(torch.int64)
        stored_bits = int(_scalar(self.state, f"{owner}.weight_bits", 0) or 8)
        bits = stored_bits if layer.quantization is None else layer.quantization
        _check_weights(weight, bits, key)
        shift = int(
            _scalar(self.state, f"{owner}.output_shift", 0) if layer.output_shift is None else layer.output_shift
        )
        total = shift + 8 - abs(bits)
        if not -15 <= total <= 15:
            raise CheckpointError(
                f"{owner!r}: output_shift {shift} with {abs(bits)}-bit weights shifts by {total}, not -15 to 15"
            )
        wide = layer.output_width != 8
        scale = WIDE_SCALE / ACTIVATION_SCALE if wide else 2.0 ** (total - 7)
        module = _module(layer, weight, key)
        shaped = weight.unsqueeze(3) if layer.op == "conv1d" else weight
        parameters = {"weight": shaped.to(torch.float64) * scale}
        bias = self.state.get(f"{prefix}.bias")
        if bias is not None:
            codes = torch.floor(bias.detach().double() / 2.0 ** (stored_bits - 1))
            if bool(((codes < -128) | (codes > 127)).any()):
                raise CheckpointError(f"{prefix}.bias divided by 2**{stored_bits - 1} must lie within -128 and 127")
            parameters["bias"] = codes * (BIAS_UNIT * ACTIVATION_SCALE * scale)
        for name, value in parameters.items():
            setattr(module, name, nn.Parameter(value.float(), requires_grad=False))
        return QuantLayer(
            module,
            _quantizer(2 if bits == BINARY else bits, scale),
            None if bias is None else _quantizer(8, BIAS_UNIT * ACTIVATION_SCALE * scale),
        )

    # Nodes

    def _call(self, function: Any, *args: Any) -> fx.Node:
        return self._note(self.graph.call_function(function, args))

    def _codes(self, value: fx.Node) -> fx.Node:
        return self._note(self.graph.call_module("codes", (value,)))

    @staticmethod
    def _note(node: fx.Node) -> fx.Node:
        node.meta["val"] = torch.empty(())  # a tensor; its shape follows from the input
        return node


def execution_order(network: Network) -> list[NetworkLayer]:
    """Layers in the order in which they run: by sequence number, unless ``next_sequence`` says otherwise."""
    by_number = {layer.sequence: layer for layer in network.layers}
    order: list[NetworkLayer] = []
    positions = sorted(by_number)
    number = positions[0] if positions else None
    while number is not None:
        if number not in by_number or by_number[number] in order:
            raise NetworkError(f"`next_sequence` leads to layer {number}, which is not there or has run already")
        layer = by_number[number]
        order.append(layer)
        later = [n for n in positions if n > number]
        number = layer.next_sequence if layer.next_sequence is not None else (later[0] if later else None)
        if number == STOP:
            break
    return order


def _quantizer(bits: int, scale: float) -> Quantizer:
    quantizer = Quantizer(TensorSpec(format=IntFormat(bits), scale="po2"))
    quantizer.set_grid(Grid(IntFormat(bits), torch.tensor(scale)))
    return quantizer


def _scalar(state: Mapping[str, Tensor], key: str, default: float) -> float:
    value = state.get(key)
    if value is None:
        return default
    if value.numel() != 1:
        raise CheckpointError(f"{key!r} must hold one number, not {value.numel()}")
    return float(value.reshape(()))


def _check_weights(weight: Tensor, bits: int, key: str) -> None:
    if weight.ndim < 2:
        raise CheckpointError(f"{key!r} has one dimension: it belongs to a batch norm, which has to be folded first")
    if bits == BINARY:
        if not bool((weight.abs() == 1).all()):
            raise CheckpointError(f"{key!r}: binary weights are -1 or 1")
        return
    if bits not in (1, 2, 4, 8):
        raise CheckpointError(f"{key!r}: weights have 1, 2, 4 or 8 bits, not {bits}")
    low, high = int(weight.min()), int(weight.max())
    if low < -(1 << (bits - 1)) or high >= 1 << (bits - 1):
        raise CheckpointError(
            f"{key!r} reaches from {low} to {high}, which is more than {bits} bits hold: is the checkpoint quantized?"
        )


def _module(layer: NetworkLayer, weight: Tensor, key: str) -> nn.Module:
    """The torch layer with the description's geometry and the weight's channels; signals are images one pixel wide."""
    dims = {"linear": 2, "conv1d": 3, "conv2d": 4, "convtranspose2d": 4}[layer.op]
    if weight.ndim != dims or tuple(weight.shape[2:]) != layer.kernel_size[: dims - 2]:
        raise CheckpointError(
            f"{key!r} has shape {tuple(weight.shape)}, which is no {layer.op} with kernel {layer.kernel_size} "
            f"(layer {layer.sequence} of the network description)"
        )
    with torch.device("meta"):  # the parameters come from the checkpoint
        if layer.op == "linear":
            return nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        if layer.op == "convtranspose2d":
            return nn.ConvTranspose2d(
                weight.shape[0], weight.shape[1] * layer.groups, layer.kernel_size, stride=layer.stride,
                padding=layer.padding, output_padding=layer.output_padding, groups=layer.groups, bias=False,
                dilation=layer.dilation,
            )  # fmt: skip
        return nn.Conv2d(
            weight.shape[1] * layer.groups, weight.shape[0], layer.kernel_size, stride=layer.stride,
            padding=layer.padding, dilation=layer.dilation, groups=layer.groups, bias=False,
        )  # fmt: skip
