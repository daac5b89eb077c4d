"""From a quantized model to modules on PyTorch's int8 kernels.

Every step that the model's Program runs in integers becomes one kernel of ``torch_kernels``; the rest computes in
float between ``dequantize`` and ``quantize``, as in the Program. Codes of up to 8 bits travel as unsigned bytes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from ..capture.ops import aten_name, op_of, quantizer_of
from ..errors import ExportError
from ..grid import Grid, IntFormat
from ..integer.kernels import average_pool_geometry, centred_weight, fits_signed_bytes
from ..integer.program import EXACT_FLOAT
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from ..place.plan import operands
from . import torch_kernels as k
from .torch_graph import GraphCopy
from .torch_plain import QuantizedOnBytes
from .torch_qcdq import QuantizeClampDequantize

# Moves that torch does on quantized tensors; others go through float and back, which changes no code.
_MOVES = {
    "max_pool1d", "max_pool2d", "view", "reshape", "_unsafe_view", "flatten", "squeeze", "unsqueeze", "permute",
    "transpose", "t", "select", "slice", "chunk", "split", "split_with_sizes", "unbind", "narrow", "getitem",
    "upsample_nearest2d", "upsample_nearest3d",
}  # fmt: skip


def build_torch(q: QuantizedModel, *, portable: bool = False) -> fx.GraphModule:
    """The model as a module whose layers run on int8 kernels: flat tensors in, a tensor or a tuple of them out.

    ``portable``: as it must be for a file, which other processes pack anew (see ``torch_kernels``).

    >>> import bitsmith as bs
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1))
    >>> q = bs.quantize(net, [torch.rand(4, 3, 8, 8)], target="torch")
    >>> print(type(build_torch(q).get_submodule("0")).__name__)
    QuantizedConv
    """
    return _Builder(q, portable).build()


class _Builder(GraphCopy):
    """Walks the Program's steps; ``stored`` tells which new values are codes, and on what grid."""

    def __init__(self, q: QuantizedModel, portable: bool) -> None:
        super().__init__(q.graph)
        self.program, self.portable = q.program, portable
        self.stored: dict[fx.Node, k.Stored] = {}
        self._reals: dict[fx.Node, fx.Node] = {}

    def build(self) -> fx.GraphModule:
        """The whole model."""
        for node in self.source.graph.nodes:
            if node.op == "placeholder":
                self.placeholder(node)
        for step in self.program.steps:
            self._step(step.node, step.kernel)
        kernels = (k.QuantizedConv, k.QuantizedLinear, QuantizedOnBytes)
        if not any(isinstance(module, kernels) for module in self.attributes.values()):
            raise ExportError(
                "no layer of this model runs on torch's int8 kernels, which take weights and activations of up to 8 "
                "bits, 8-bit weights without zero points: quantize with recipe 'int8', or use another engine"
            )
        return self.finish(self.real)

    def real(self, node: fx.Node) -> fx.Node:
        """A node's value in real numbers."""
        value = self.values[node]
        if node not in self.stored:
            return value
        if node not in self._reals:
            self._reals[node] = self.graph.call_method("dequantize", (value,))
        return self._reals[node]

    def _step(self, node: fx.Node, kernel: str) -> None:
        quantizer = quantizer_of(node)
        if quantizer is not None:
            self._quantizer(node, quantizer.require_grid(), kernel)
        elif (
            kernel in ("conv", "linear", EXACT_FLOAT)
            and self._is_layer(node)
            and (layer := self._layer(node, None, relu=False)) is not None
        ):
            self.values[node] = layer
        elif kernel == "codes" and self._is_stored(node):
            self._move(node)
        else:
            self.values[node] = self.float_operator(node, self.real)

    def _is_layer(self, node: fx.Node) -> bool:
        return op_of(node).name in ("conv", "linear") and self._is_stored(node)

    def _is_stored(self, node: fx.Node) -> bool:
        return all(source in self.stored for source in operands(node))

    def _quantizer(self, node: fx.Node, grid: Grid, kernel: str) -> None:
        value: Any = node.args[0]
        if not isinstance(grid.format, IntFormat) or grid.format.bits > 8:
            self.values[node] = self.call(node.name, QuantizeClampDequantize(grid), self._result(node))
            return
        output = k.Stored.of(grid)
        if kernel == "codes" and value in self.stored:
            self.values[node], self.stored[node] = self.values[value], output
            return
        result = self._on_codes(node, output)
        if result is None:
            result = self.call(f"quantize_{node.name}", k.Quantize(output), self._result(node))
        if not output.fills_byte:
            result = self.call(f"clamp_{node.name}", k.Clamp(output), result)
        self.values[node], self.stored[node] = result, output

    def _chain(self, node: fx.Node) -> list[fx.Node]:
        """What a Quantizer's step computes besides quantizing, from its end to its operator; may be empty."""
        source = self.program.integer_source(node)
        if source is None:
            return []
        chain: list[fx.Node] = [node.args[0]]  # type: ignore[list-item]
        while chain[-1] is not source:
            chain.append(operands(chain[-1])[0])
        return chain

    def _result(self, node: fx.Node) -> fx.Node:
        """The real value that a Quantizer takes, computed in float where no kernel is."""
        for inner in reversed(self._chain(node)):
            self.values[inner] = self.float_operator(inner, self.real)
        return self.real(node.args[0])  # type: ignore[arg-type]

    def _on_codes(self, node: fx.Node, output: k.Stored) -> fx.Node | None:
        """The int8 kernel of a Quantizer's operator, or None where torch has none."""
        chain = self._chain(node)
        source: fx.Node = chain[-1] if chain else node.args[0]  # type: ignore[assignment]
        name, relu = op_of(source).name, len(chain) > 1
        if not self._is_stored(source) or not operands(source):
            return None
        if not chain:  # torch has int8 kernels for some functions that other runtimes compute in float
            return self._pointwise(source, output) if len(source.users) == 1 else None
        if name in ("conv", "linear", "conv_transpose"):
            return self._layer(source, output, relu=relu)
        inputs = [self.values[n] for n in operands(source)]
        if name in ("add", "mul"):
            return self.call(source.name, k.Binary(name, output, relu=relu), *inputs)
        if name == "cat":
            dim = source.args[1] if len(source.args) > 1 else source.kwargs.get("dim", 0)
            planes = source.meta["val"].ndim == 4
            return self.call(source.name, k.QuantizedCat(dim, output, planes=planes), inputs)  # type: ignore[arg-type]
        if name in ("avg_pool", "global_avg_pool"):
            return self._mean(source, output)
        return self._pointwise(source, output)

    def _layer(self, node: fx.Node, output: k.Stored | None, *, relu: bool) -> fx.Node | None:
        layer = self.source.get_submodule(str(node.target))
        assert isinstance(layer, QuantLayer)
        operand = operands(node)[0]
        source = self.stored[operand]
        geometry: Any = layer.layer
        module: nn.Module
        codes = layer_codes(layer)
        if codes is None or isinstance(getattr(geometry, "padding", 0), str):
            return None
        transposed = isinstance(geometry, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d)
        if transposed and (codes.per_channel or output is None or self.portable):
            return None  # a file's process would pack it for oneDNN, whose transposed kernels err (torch 2.13)
        if output is None or (self.portable and k.is_for_onednn_alone(geometry, codes)):
            module = QuantizedOnBytes(geometry, codes, source, output, relu=relu)
        elif isinstance(geometry, nn.Linear):
            module = k.QuantizedLinear(geometry, codes, output, relu=relu)
        else:
            module = k.QuantizedConv(geometry, codes, output, relu=relu)
        return self.call(str(node.target), module, self.values[operand])

    def _mean(self, node: fx.Node, output: k.Stored) -> fx.Node:
        operand = operands(node)[0]
        value, window = operand.meta["val"], None
        if op_of(node).name == "avg_pool":
            window = average_pool_geometry(node)
        rank = 1 if aten_name(node).endswith("1d") else value.ndim - 2
        keep = node.meta["val"].ndim == value.ndim
        module = k.QuantizedMean(self.stored[operand], output, rank, window, keep=keep)
        return self.call(node.name, module, self.values[operand])

    def _pointwise(self, node: fx.Node, output: k.Stored) -> fx.Node | None:
        name = aten_name(node)
        if name not in k.POINTWISE or node.kwargs:
            return None
        options: Any = node.args[1:]
        return self.call(node.name, k.Pointwise(name, output, options), self.values[operands(node)[0]])

    def _move(self, node: fx.Node) -> None:
        operand = operands(node)[0]
        stored = self.stored[operand]
        if aten_name(node) in _MOVES:
            self.values[node] = self.float_operator(node, self.values.__getitem__)
        else:
            moved = self.float_operator(node, self.real)
            self.values[node] = self.call(f"quantize_{node.name}", k.Quantize(stored), moved)
        self.stored[node] = stored


def layer_codes(layer: QuantLayer) -> k.LayerCodes | None:
    """A layer's integers, its bias in float, on its grid; None where the weight's do not fit signed bytes."""
    assert layer.weight_quantizer is not None
    if not fits_signed_bytes(layer):
        return None
    codes, bias = centred_weight(layer), layer.quantized_parameters().get("bias")
    scale = layer.weight_quantizer.require_grid().scale
    return k.LayerCodes(codes.to(torch.int8), scale, None if bias is None else bias.detach().clone())
