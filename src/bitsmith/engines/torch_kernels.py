"""PyTorch's int8 CPU kernels. The only file that touches them.

``torch.ops.quantized.*`` on quantized tensors, packed for oneDNN, are what runs: the same oneDNN kernels exist on
plain uint8 tensors (``torch.ops.onednn.*``), but set up their primitive at every call, some 8 microseconds each, a
third of MobileNetV2's time (``benchmarks/torch_engine.py kernels``), and the only way from quantized tensors to plain
ones that a file knows, ``int_repr``, copies byte by byte. The plain ones are taken where the others have no form:
layers with float results, and in a file convolutions of more than 100 groups that a process that loads it would pack
for FBGEMM to compute something else (``integer/pairs.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import Grid, IntFormat
from ..integer.laws import AveragePool, zero_point
from ..integer.pairs import ONEDNN_GROUPS, is_exact_in_pairs

POINTWISE = {"sigmoid": [], "hardswish": [], "leaky_relu": [0.01], "elu": [1.0, 1.0, 1.0], "celu": [1.0]}  # options


@dataclass(frozen=True)
class Stored:
    """An activation's grid as the kernels take it: unsigned bytes. ``low`` and ``high`` are its codes' ends."""

    scale: float
    zero_point: int
    low: int
    high: int

    @classmethod
    def of(cls, grid: Grid) -> Stored:
        """Signed codes move up by 128, zero point and all."""
        assert isinstance(grid.format, IntFormat)
        shift = 128 if grid.format.signed else 0
        low, high = grid.format.qmin + shift, grid.format.qmax + shift
        return cls(float(grid.scale), zero_point(grid) + shift, low, high)

    @property
    def fills_byte(self) -> bool:
        """Whether the kernels' own saturation is the grid's."""
        return (self.low, self.high) == (0, 255)

    def real(self, code: int) -> float:
        """The number that a code stands for."""
        return (code - self.zero_point) * self.scale

    def __str__(self) -> str:
        return f"scale={self.scale:.6g}, zero_point={self.zero_point}"


@dataclass(frozen=True)
class LayerCodes:
    """A layer's parameters: centred int8 codes, scales (one, or one per output channel), and the float bias."""

    weight: Tensor
    scale: Tensor
    bias: Tensor | None

    @property
    def per_channel(self) -> bool:
        """Whether every output channel has its own scale."""
        return self.scale.ndim > 0

    def tensor(self) -> Tensor:
        """The weight as a quantized tensor."""
        if not self.per_channel:
            return torch._make_per_tensor_quantized_tensor(self.weight, float(self.scale), 0)
        zeros = torch.zeros(self.scale.shape, dtype=torch.int64)
        return torch._make_per_channel_quantized_tensor(self.weight, self.scale.double(), zeros, 0)


@contextmanager
def packing(engine: str) -> Iterator[None]:
    """Pack for ``engine`` where torch has it; no warnings about quantized tensors, which the user never meets."""
    before = torch.backends.quantized.engine
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if engine in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = engine
        try:
            yield
        finally:
            torch.backends.quantized.engine = before


class QuantizedConv(nn.Module):
    """Convolution of 1 to 3 dimensions, or transposed convolution, with its activation: codes in, codes out."""

    def __init__(self, layer: Any, codes: LayerCodes, output: Stored, *, relu: bool = False) -> None:
        super().__init__()
        self.rank, self.relu, self.output = layer.weight.ndim - 2, relu, output
        self.transposed = type(layer).__name__.startswith("ConvTranspose")
        self.describe = describe_conv(layer)
        geometry = [list(layer.stride), list(layer.padding)]
        if self.transposed:
            geometry.append(list(layer.output_padding))
        name = f"conv{'_transpose' if self.transposed else ''}{self.rank}d"
        self.repacks_alike = not self.transposed and not is_for_onednn_alone(layer, codes)  # where a file is loaded
        for_fbgemm = self.transposed or is_exact_in_pairs(layer, codes.weight)  # 2.13's transposed oneDNN kernels err
        with packing("fbgemm" if for_fbgemm else "onednn"):
            prepack = getattr(torch.ops.quantized, f"{name}_prepack")
            self.packed = prepack(codes.tensor(), codes.bias, *geometry, list(layer.dilation), layer.groups)
        self.kernel = getattr(torch.ops.quantized, name + ("_relu" if relu and not self.transposed else ""))

    def forward(self, x: Tensor) -> Tensor:
        """Run the kernel."""
        return self.kernel(x, self.packed, self.output.scale, self.output.zero_point)  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        kind = "ConvTranspose" if self.transposed else "ConvReLU" if self.relu else "Conv"
        return f"Quantized{kind}{self.rank}d"

    def extra_repr(self) -> str:
        """The geometry in torch's own words, with the output's grid in the middle."""
        return self.describe.format(str(self.output))


class QuantizedLinear(nn.Module):
    """Linear layer with its activation: codes in, codes out."""

    def __init__(self, layer: Any, codes: LayerCodes, output: Stored, *, relu: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.relu, self.output = relu, output
        with packing("fbgemm"):  # what a file's process packs linear layers for
            self.packed = torch.ops.quantized.linear_prepack(codes.tensor(), codes.bias)
        self.kernel = torch.ops.quantized.linear_relu if relu else torch.ops.quantized.linear

    def forward(self, x: Tensor) -> Tensor:
        """Run the kernel."""
        return self.kernel(x, self.packed, self.output.scale, self.output.zero_point)  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        return "QuantizedLinearReLU" if self.relu else "QuantizedLinear"

    def extra_repr(self) -> str:
        """Sizes and the output's grid."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.output}"


class Quantize(nn.Module):
    """Float in, codes out."""

    def __init__(self, output: Stored) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Tensor:
        """Quantize per tensor."""
        return torch.quantize_per_tensor(x, self.output.scale, self.output.zero_point, torch.quint8)

    def extra_repr(self) -> str:
        """The grid."""
        return str(self.output)


class Clamp(nn.Module):
    """Codes of fewer than 8 bits end before the byte does."""

    def __init__(self, output: Stored) -> None:
        super().__init__()
        self.low, self.high = output.real(output.low), output.real(output.high)

    def forward(self, x: Tensor) -> Tensor:
        """Clamp codes."""
        return torch.clamp(x, self.low, self.high)


class Binary(nn.Module):
    """Add or multiply codes of any grids."""

    def __init__(self, name: str, output: Stored, *, relu: bool = False) -> None:
        super().__init__()
        self.name, self.relu, self.output = name, relu, output
        self.kernel = getattr(torch.ops.quantized, name + ("_relu" if relu else ""))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Run the kernel."""
        return self.kernel(a, b, self.output.scale, self.output.zero_point)  # type: ignore[no-any-return]

    def _get_name(self) -> str:
        return f"Quantized{self.name.capitalize()}{'ReLU' if self.relu else ''}"

    def extra_repr(self) -> str:
        """The output's grid."""
        return str(self.output)


class QuantizedCat(nn.Module):
    """Concatenate codes of any grids."""

    def __init__(self, dim: int, output: Stored, *, planes: bool) -> None:
        super().__init__()
        self.dim, self.output, self.planes = dim, output, planes

    def forward(self, parts: list[Tensor]) -> Tensor:
        """Run the kernel; images lie channels last, for which it has a faster form."""
        if self.planes:
            parts = [part.contiguous(memory_format=torch.channels_last) for part in parts]
        return torch.ops.quantized.cat(parts, self.dim, self.output.scale, self.output.zero_point)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The axis and the output's grid."""
        return f"dim={self.dim}, {self.output}"


class QuantizedMean(nn.Module):
    """Average pooling: an exact sum of codes, then one rounding. ``window`` None: over all of the plane."""

    def __init__(self, source: Stored, output: Stored, rank: int, window: AveragePool | None, *, keep: bool) -> None:
        super().__init__()
        self.source, self.output, self.rank, self.window, self.keep = source, output, rank, window, keep
        self.pool = getattr(F, f"avg_pool{rank}d")

    def forward(self, x: Tensor) -> Tensor:
        """Sum, scale, quantize."""
        codes = torch.int_repr(x).to(torch.float32)
        if self.source.zero_point:
            codes = codes - self.source.zero_point
        if self.window is None:
            dims = list(range(-self.rank, 0))
            mean = codes.mean(dims, keepdim=self.keep)
        else:
            window = self.window
            mean = self.pool(
                codes, window.kernel, window.stride, window.padding, count_include_pad=window.count_include_pad
            )
        scale, zero_point = self.output.scale, self.output.zero_point
        if self.output == self.source:  # as torch's own pools, which keep the grid, do it
            return torch._make_per_tensor_quantized_tensor((mean + zero_point).round().byte(), scale, zero_point)
        return torch.quantize_per_tensor(mean * self.source.scale, scale, zero_point, torch.quint8)

    def extra_repr(self) -> str:
        """The window and the output's grid."""
        return f"{'global' if self.window is None else self.window}, {self.output}"


class Pointwise(nn.Module):
    """A function of one element that torch has an int8 kernel for, with the options that follow its input."""

    def __init__(self, name: str, output: Stored, options: Sequence[float] = ()) -> None:
        super().__init__()
        self.name, self.output = name, output
        self.kernel = getattr(torch.ops.quantized, name)
        self.options = [float(value) for value in options] + POINTWISE[name][len(options) :]

    def forward(self, x: Tensor) -> Tensor:
        """Run the kernel."""
        grid = self.output.scale, self.output.zero_point
        arguments = (*self.options, False, *grid) if self.name == "leaky_relu" else (*grid, *self.options)
        return self.kernel(x, *arguments)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The function and the output's grid."""
        return f"{self.name}, {self.output}"


def is_for_onednn_alone(layer: Any, codes: LayerCodes) -> bool:
    """Whether a process that loads a file packs a layer for FBGEMM, where it would saturate or be slow."""
    many = not isinstance(layer, nn.Linear) and layer.groups > ONEDNN_GROUPS
    return many and not is_exact_in_pairs(layer, codes.weight)


def describe_conv(layer: Any) -> str:
    """A convolution's geometry in torch's words; ``{}`` stands where the output's grid goes."""
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}, {{}}"
    for name in ("padding", "dilation", "output_padding"):
        value = getattr(layer, name)
        if any(v != (name == "dilation") for v in value):
            text += f", {name}={value}"
    text += f", groups={layer.groups}" if layer.groups != 1 else ""
    return text + (", bias=False" if layer.bias is None else "")
