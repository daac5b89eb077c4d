"""What converted modules are made of: grids that are given, and modules that sit on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..calibrate.watching import WatchingQuantizer
from ..eager.stubs import FloatFunctional
from ..errors import MigrationError
from ..grid import Grid, IntFormat, TensorSpec
from ..nn import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantIdentity,
    QuantLinear,
    QuantOutput,
)
from ..nn.module import WeightedModule

ACTIVATIONS = TensorSpec(format=IntFormat(8, signed=False), symmetric=False)
BARRIER = "dequantized"  # the mark where codes become floats again

_DTYPES = {torch.quint8: IntFormat(8, signed=False), torch.qint8: IntFormat(8)}


def grid_of(scale: float | Tensor, zero_point: int | Tensor, dtype: torch.dtype = torch.quint8) -> Grid:
    """The grid of a quantized tensor's numbers."""
    if dtype not in _DTYPES:
        raise MigrationError(f"values of {dtype} have no integer form here: requantize them to torch.quint8")
    scale = torch.as_tensor(float(scale), dtype=torch.float32)
    return Grid(_DTYPES[dtype], scale, torch.as_tensor(int(zero_point), dtype=torch.int32))


def watcher(grid: Grid) -> WatchingQuantizer:
    """The Quantizer of a value whose grid is known."""
    quantizer = WatchingQuantizer(ACTIVATIONS.model_copy(update={"format": grid.format}))
    quantizer.set_grid(grid)
    return quantizer


def on_grid(module: nn.Module, grid: Grid) -> QuantOutput:
    """Any float module with its output on ``grid``."""
    output = QuantOutput(module)
    output.output_quantizer = watcher(grid)
    return output


def quantize_to(grid: Grid) -> QuantIdentity:
    """Where floats become codes."""
    identity = QuantIdentity()
    identity.output_quantizer = watcher(grid)
    return identity


class Dequantize(nn.Module):
    """Where codes become floats: what follows is not on a grid, also where it could be."""

    def forward(self, x: Tensor) -> Tensor:
        """The same value, with a mark on it."""
        marked: Tensor = torch.ops.bitsmith.mark(x, BARRIER)
        return marked


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor], *rest: Any, **options: Any) -> None:
        super().__init__()
        self.function, self.rest, self.options = function, rest, options

    def forward(self, *operands: Any) -> Tensor:
        """``function(*operands, *rest)``."""
        return self.function(*operands, *self.rest, **self.options)


class Functional(FloatFunctional):
    """A converted QFunctional."""

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """Refused: torch.ao finds the grid of the result when it runs."""
        raise MigrationError(
            "add_scalar and mul_scalar of torch.ao find the grid of their result at run time and cannot be migrated: "
            "write the number into the layer before (its bias or weight), or quantize the float model anew"
        )

    mul_scalar = add_scalar


def weight_grid_of(weight: Tensor, where: str) -> Grid:
    """The grid of a quantized weight: int8, per tensor or per channel."""
    if weight.dtype is not torch.qint8:
        raise MigrationError(f"{where}: a weight of {weight.dtype} cannot be migrated, only int8: {_ANEW}")
    if weight.qscheme() in (torch.per_channel_affine, torch.per_channel_symmetric):
        scale, zero, axis = (
            weight.q_per_channel_scales(),
            weight.q_per_channel_zero_points(),
            weight.q_per_channel_axis(),
        )
    else:
        scale, zero, axis = torch.tensor(weight.q_scale()), torch.tensor(weight.q_zero_point()), None
    if bool(zero.any()):
        raise MigrationError(
            f"{where}: its weight has a zero point other than 0, which no integer kernel takes: {_ANEW}"
        )
    return Grid(IntFormat(8), scale.float(), None, axis)


_ANEW = "quantize the float model with bitsmith.quantize instead"


def weighted(
    quantized: type[WeightedModule], layer: nn.Module, weight: Tensor, bias: Tensor | None, where: str,
    *, output: Grid | None, activation: nn.Module | None = None,
) -> WeightedModule:  # fmt: skip
    """A quantized layer with the settings of ``layer`` and the integers of ``weight``, its output on a grid."""
    grid = weight_grid_of(weight, where)
    layer.weight = nn.Parameter(weight.dequantize().contiguous(), requires_grad=False)
    kept = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
    layer.register_parameter("bias", kept)
    spec = TensorSpec(format=IntFormat(8), granularity="tensor" if grid.axis is None else "channel", axis=grid.axis)
    new = quantized.from_float(layer, weights=spec, activation=activation)
    new.weight_quantizer.set_grid(grid)
    new.output_quantizer = None if output is None else watcher(output)
    return new


CONVOLUTIONS: dict[type[nn.Module], type[WeightedModule]] = {
    nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d, nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
}  # fmt: skip


def conv(
    kind: type[nn.Module], weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
    groups: int, **more: Any,
) -> nn.Module:  # fmt: skip
    """An empty float convolution of the shape of ``weight``."""
    transposed = "Transpose" in kind.__name__
    inputs, outputs = weight.shape[1] * groups, weight.shape[0]
    if transposed:
        inputs, outputs = weight.shape[0], weight.shape[1] * groups
    rank = weight.ndim - 2
    sizes = {"stride": stride, "padding": padding, "dilation": dilation, **more}
    tuples = {
        k: tuple(v)[-rank:] if isinstance(v, Sequence) and not isinstance(v, str) else v for k, v in sizes.items()
    }
    with torch.device("meta"):
        return kind(inputs, outputs, tuple(weight.shape[2:]), groups=groups, **tuples)


def linear(
    weight: Tensor, bias: Tensor | None, output: Grid | None, activation: nn.Module | None, where: str
) -> nn.Module:
    """A linear layer on the integers of ``weight``."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0])
    return weighted(QuantLinear, layer, weight, bias, where, output=output, activation=activation)
