"""The quantized model as plain tensor arithmetic: quantize, clamp, dequantize, and float layers between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..capture.ops import module_of, quantizer_of
from ..errors import ExportError
from ..grid import Grid, IntFormat, Quantizer, quantize
from ..grid.kernels import broadcast
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from .torch_graph import GraphCopy


class QuantizeClampDequantize(nn.Module):
    """One activation's quantizer in plain operators."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        if not isinstance(grid.format, IntFormat):
            raise ExportError(f"TorchScript files and the torch engine hold integers, not {grid.format}")
        if grid.group_size is not None or grid.axis is not None:
            raise ExportError("activations with a scale per channel or group have no form in TorchScript files")
        self.low, self.high = grid.format.qmin, grid.format.qmax
        self.zero_point = 0 if grid.zero_point is None else int(grid.zero_point)
        self.register_buffer("scale", grid.scale.detach().clone())

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Quantize, clamp, dequantize."""
        codes = torch.clamp(torch.round(x / self.scale) + self.zero_point, self.low, self.high)
        return (codes - self.zero_point) * self.scale


class DequantizedParameter(nn.Module):
    """Stored codes, read as real numbers."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, value: Tensor, grid: Grid) -> None:
        super().__init__()
        if not isinstance(grid.format, IntFormat):
            raise ExportError(f"TorchScript files hold integers, not weights of {grid.format}")
        codes = quantize(value.detach(), grid)
        blocks, scale, zero = broadcast(codes, grid)
        self.blocks = list(blocks.shape)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", torch.zeros_like(scale) if zero is None else zero.float())

    def forward(self) -> Tensor:
        """The parameter."""
        codes = self.codes.float().reshape(self.blocks)
        return ((codes - self.zero_point) * self.scale).reshape(self.codes.shape)


class QcdqLayer(nn.Module):
    """A convolution, linear or embedding layer whose parameters are stored as integers."""

    def __init__(self, quantized: QuantLayer) -> None:
        super().__init__()
        self.run = _function(quantized.layer)
        self.weight = _parameter(quantized.weight, quantized.weight_quantizer)
        self.bias = None if quantized.bias is None else _parameter(quantized.bias, quantized.bias_quantizer)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's function on its dequantized parameters."""
        return self.run(x, self.weight(), None if self.bias is None else self.bias())


class FloatParameter(nn.Module):
    """A parameter that stays float."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = nn.Parameter(value.detach().clone(), requires_grad=False)

    def forward(self) -> Tensor:
        """The parameter."""
        return self.value


def _parameter(value: Tensor, quantizer: Quantizer | None) -> nn.Module:
    if quantizer is None:
        return FloatParameter(value)
    return DequantizedParameter(value, quantizer.require_grid())


def _function(layer: nn.Module) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The layer as a function of input, weight and bias."""
    options: Any = layer
    if isinstance(layer, nn.Linear):
        return F.linear
    if isinstance(layer, nn.Embedding):
        return lambda x, w, b: F.embedding(x, w, options.padding_idx)
    rank = options.weight.ndim - 2
    if type(layer).__name__.startswith("ConvTranspose"):
        transposed = getattr(F, f"conv_transpose{rank}d")
        return lambda x, w, b: transposed(
            x, w, b, options.stride, options.padding, options.output_padding, options.groups, options.dilation
        )
    conv = getattr(F, f"conv{rank}d")
    return lambda x, w, b: conv(x, w, b, options.stride, options.padding, options.dilation, options.groups)


def build_qcdq(q: QuantizedModel) -> fx.GraphModule:
    """The simulation's float form as a module of plain operators: flat tensors in, a tensor or a tuple of them out."""
    new = GraphCopy(q.graph)
    for node in q.graph.graph.nodes:
        quantizer = quantizer_of(node)
        if node.op == "output":
            break
        if node.op == "placeholder":
            new.placeholder(node)
        elif quantizer is not None:
            if quantizer.spec.dynamic:
                raise ExportError("TorchScript files hold fixed scales; this model's are found at run time")
            module = QuantizeClampDequantize(quantizer.require_grid())
            new.values[node] = new.call(node.name, module, new.values[node.args[0]])
        elif isinstance(layer := module_of(node), QuantLayer):
            operand = node.args[0]
            assert isinstance(operand, fx.Node)
            new.values[node] = new.call(str(node.target), QcdqLayer(layer), new.values[operand])
        else:
            new.values[node] = new.float_operator(node, new.values.__getitem__)
    return new.finish(new.values.__getitem__)
