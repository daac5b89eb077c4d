"""One row per quantized module of torch.ao: the function that makes Bitsmith's module of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from ..errors import MigrationError
from ..grid import Grid
from .functions import convert_functions
from .names import quantized_modules
from .pieces import CONVOLUTIONS, Dequantize, Functional, conv, grid_of, linear, on_grid, quantize_to, watcher, weighted

Convert = Callable[[Any, str], nn.Module]


def output_grid(module: Any) -> Grid:
    """The grid that a quantized module writes to; torch.ao's kernels write quint8."""
    return grid_of(module.scale, module.zero_point)


def _conv(rank: int, transposed: bool, activation: type[nn.Module] | None, module: Any, where: str) -> nn.Module:
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{rank}d")
    weight, bias = module.weight(), module.bias()
    more: dict[str, Any] = {"output_padding": module.output_padding} if transposed else {}
    layer = conv(
        kind, weight, module.stride, module.padding, module.dilation, module.groups,
        padding_mode=module.padding_mode, **more,
    )  # fmt: skip
    return weighted(
        CONVOLUTIONS[kind], layer, weight, bias, where, output=output_grid(module),
        activation=activation() if activation else None,
    )  # fmt: skip


def _linear(activation: Callable[[Any], nn.Module] | None, module: Any, where: str) -> nn.Module:
    act = activation(module) if activation else None
    return linear(module.weight(), module.bias(), output_grid(module), act, where)


def _functional(module: Any, where: str) -> nn.Module:
    functional = Functional()
    functional.output_quantizer = watcher(output_grid(module))
    return functional


def _norm(kind: Callable[[Any], nn.Module], module: Any, where: str) -> nn.Module:
    """A normalization, in float between its input's grid and its own."""
    layer = kind(module)
    state = {k: v for k, v in module.state_dict().items() if k in layer.state_dict()}
    layer.load_state_dict(state, strict=False)
    return on_grid(layer.eval().requires_grad_(False), output_grid(module))


def _batch_norm(kind: type[nn.Module], relu: bool, module: Any, where: str) -> nn.Module:
    layer = kind(module.num_features, eps=module.eps)
    layer.load_state_dict(module.state_dict(), strict=False)
    layer.eval().requires_grad_(False)
    return on_grid(nn.Sequential(layer, nn.ReLU()) if relu else layer, output_grid(module))


def _prelu(module: Any, where: str) -> nn.Module:
    layer = nn.PReLU(module.weight.numel())
    layer.weight = nn.Parameter(module.weight.dequantize().reshape(-1), requires_grad=False)
    return on_grid(layer, output_grid(module))


def _activation(make: Callable[[Any], nn.Module], module: Any, where: str) -> nn.Module:
    return on_grid(make(module), output_grid(module))


TABLE: dict[str, Convert] = {
    "Quantize": lambda m, where: quantize_to(grid_of(m.scale, m.zero_point, m.dtype)),
    "DeQuantize": lambda m, where: Dequantize(),
    "QFunctional": _functional,
    **{f"Conv{n}d": partial(_conv, n, False, None) for n in (1, 2, 3)},
    **{f"ConvReLU{n}d": partial(_conv, n, False, nn.ReLU) for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": partial(_conv, n, True, None) for n in (1, 2, 3)},
    "Linear": partial(_linear, None),
    "LinearReLU": partial(_linear, lambda m: nn.ReLU()),
    "LinearLeakyReLU": partial(_linear, lambda m: nn.LeakyReLU(m.negative_slope)),
    "LinearTanh": partial(_linear, lambda m: nn.Tanh()),
    "BatchNorm2d": partial(_batch_norm, nn.BatchNorm2d, False),
    "BatchNorm3d": partial(_batch_norm, nn.BatchNorm3d, False),
    "BNReLU2d": partial(_batch_norm, nn.BatchNorm2d, True),
    "BNReLU3d": partial(_batch_norm, nn.BatchNorm3d, True),
    "LayerNorm": partial(_norm, lambda m: nn.LayerNorm(m.normalized_shape, m.eps, m.elementwise_affine)),
    "GroupNorm": partial(_norm, lambda m: nn.GroupNorm(m.num_groups, m.num_channels, m.eps, m.affine)),
    "InstanceNorm1d": partial(_norm, lambda m: nn.InstanceNorm1d(m.num_features, m.eps, affine=m.affine)),
    "InstanceNorm2d": partial(_norm, lambda m: nn.InstanceNorm2d(m.num_features, m.eps, affine=m.affine)),
    "InstanceNorm3d": partial(_norm, lambda m: nn.InstanceNorm3d(m.num_features, m.eps, affine=m.affine)),
    "PReLU": _prelu,
    "Hardswish": partial(_activation, lambda m: nn.Hardswish()),
    "Sigmoid": lambda m, where: on_grid(nn.Sigmoid(), grid_of(m.output_scale, m.output_zero_point)),
    "LeakyReLU": partial(_activation, lambda m: nn.LeakyReLU(m.negative_slope)),
    "ELU": partial(_activation, lambda m: nn.ELU(m.alpha)),
    "Softmax": partial(_activation, lambda m: nn.Softmax(m.dim)),
    "ReLU6": lambda m, where: nn.ReLU6(),  # keeps the grid of what it reads
    "MaxPool2d": lambda m, where: nn.MaxPool2d(
        m.kernel_size, m.stride, m.padding, m.dilation, ceil_mode=m.ceil_mode
    ),
    "Dropout": lambda m, where: nn.Identity(),
}  # fmt: skip


def convert_module(name: str, module: nn.Module, where: str) -> nn.Module:
    """Bitsmith's form of one quantized module."""
    if (make := TABLE.get(name)) is None:
        raise MigrationError(
            f"{where or 'the model'}: torch.ao's quantized {name} cannot be migrated; known are "
            f"{', '.join(TABLE)}. Leave that module in float, or quantize the float model with bitsmith.quantize"
        )
    return make(module, where or "the model")


def replacements(model: nn.Module) -> dict[int, nn.Module]:
    """What ``copy.deepcopy`` should put in the place of torch.ao's modules, by identity."""
    return {id(module): convert_module(name, module, where) for where, name, module in quantized_modules(model)}


def converted(model: nn.Module) -> nn.Module:
    """A copy of a statically quantized model with Bitsmith's modules in it."""
    memo: dict[int, Any] = dict(replacements(model))
    copied: nn.Module = copy.deepcopy(model, memo)
    if isinstance(copied, torch.fx.GraphModule):
        convert_functions(copied)
    return copied.eval().requires_grad_(False)
