"""Layers that train as they will run: folded weights on their grid, batch statistics still learning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..calibrate.bias import bias_limit, fitting_scale
from ..grid import Grid, IntFormat, fake_quantize
from .oscillation import OscillationTracker, codes, damping_loss
from .quantizers import TrainingQuantizer

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LEAST_FACTOR = 1e-20  # of a batch norm that is divided by; below, the channel is constant


class _Freezable(nn.Module):
    """A module with a batch norm whose statistics can be frozen; whether they are is in the state_dict."""

    norm_frozen = False

    def get_extra_state(self) -> Tensor:
        """Whether statistics are frozen; a Python flag, since reading a tensor makes a GPU wait."""
        return torch.tensor(self.norm_frozen)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the flag of a state_dict."""
        self.norm_frozen = bool(state)


class TrainedLayer(_Freezable):
    """A layer whose weight, with the batch norm behind it folded in, passes through a TrainingQuantizer.

    With ``s = gamma / sqrt(running_var + eps)`` the file will hold the weight ``Q(s W)`` and the bias
    ``beta + (b - running_mean) s``. That is what runs in eval mode, and in train mode once the norm is frozen. While
    its statistics learn, the convolution gets ``Q(s W) / s``, and its result goes through the batch norm: the layer
    sees the quantization error of the folded weight, normalized by the statistics of the batch. The division is one of
    the weight, so that a step costs one convolution and no pass over the activations more than in float.

    Source: Krishnamoorthi, Quantizing deep convolutional networks (arXiv 1806.08342), section 3.2.2; the same function
    as the fused modules of torch's own quantization-aware training, which divide the convolution's result.

    ``inputs`` holds the quantizer of what the layer reads, where its bias will be integers of scale ``s_x * s_w``.
    """

    layer: nn.Module
    norm: nn.Module | None
    weight_quantizer: TrainingQuantizer | None

    def __init__(
        self, layer: nn.Module, norm: nn.Module | None, weight_quantizer: TrainingQuantizer | None, *,
        bias_bits: int | None = None, bias_unit: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layer, self.norm, self.weight_quantizer = layer, norm, weight_quantizer
        self.bias_bits, self.bias_unit = bias_bits, bias_unit
        self.oscillation: OscillationTracker | None = None
        self._seen: int | None = None  # version of the weight that the tracker last saw
        self.inputs: tuple[TrainingQuantizer, ...] = ()  # in a tuple: it is a module of the graph, not of this layer

    @property
    def is_normalizing(self) -> bool:
        """Whether outputs are normalized by the statistics of their batch."""
        return self.norm is not None and self.training and not self.norm_frozen

    def folded(self, *, exact: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the batch norm in them, in float; ``exact``: computed in float64, as for a file."""
        layer, norm = cast(Any, self.layer), cast(Any, self.norm)
        bias = getattr(layer, "bias", None)
        if norm is None:
            return layer.weight, bias
        dtype = torch.float64 if exact else layer.weight.dtype
        factor = self._factor(dtype)
        offset = norm.running_mean.to(dtype) if bias is None else norm.running_mean.to(dtype) - bias
        shift = -offset * factor if norm.bias is None else norm.bias - offset * factor
        weight = layer.weight.to(dtype) * self._per_output(factor)
        return weight.to(layer.weight.dtype), shift.to(layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """The layer, and the norm behind it, on quantized parameters."""
        if self.is_normalizing:
            return self._normalize(self._run(x, self._unfolded_weight(), getattr(self.layer, "bias", None)))
        weight, bias = self.folded(exact=not self.training)
        if not self.training and (wide := self._grid_for(bias)) is not None:
            return self._run(x, fake_quantize(weight, wide), self._quantized_bias(bias))
        return self._run(x, self.quantized(weight), self._quantized_bias(bias))

    def quantized(self, weight: Tensor) -> Tensor:
        """A folded weight on its grid; where oscillations are tracked, those that are frozen at their codes."""
        quantizer = self.weight_quantizer
        if quantizer is None:
            return weight
        if self.oscillation is not None and (grid := quantizer.grid) is not None:
            version = cast(Tensor, self.layer.weight)._version  # an optimizer step changes it
            if self.training and version != self._seen:
                self.oscillation.observe(codes(weight, grid))
                self._seen = version
            weight = self.oscillation.hold(weight, grid)
        return cast(Tensor, quantizer(weight))

    def damping_loss(self) -> Tensor:
        """How far weights are from the middle of their codes; only weights move by it."""
        quantizer = self.weight_quantizer
        weight = cast(Tensor, self.layer.weight)
        if self.norm is not None:
            weight = weight * self._per_output(self._factor(weight.dtype).detach())
        grid = None if quantizer is None else quantizer.grid
        return weight.new_zeros(()) if grid is None else damping_loss(weight, grid)

    def bias_grid(self) -> Grid | None:
        """The grid of the bias, ``s_x * s_w``; None where it stays float."""
        if not self.inputs or self.bias_bits is None or self.weight_quantizer is None:
            return None
        inputs, weights = self.inputs[0].grid, self.weight_quantizer.grid
        if inputs is None or weights is None or weights.group_size is not None:
            return None
        if not (isinstance(inputs.format, IntFormat) and isinstance(weights.format, IntFormat)):
            return None
        scale = weights.scale
        if isinstance(self.layer, _TRANSPOSED) and scale.ndim:  # one for each output channel of a group
            scale = scale.repeat(self.layer.groups)
        scale = inputs.scale * scale * self.bias_unit
        return Grid(IntFormat(self.bias_bits), scale, None, 0 if scale.ndim else None)

    def _quantized_bias(self, bias: Tensor | None) -> Tensor | None:
        grid = None if bias is None else self.bias_grid()
        if bias is None or grid is None or self.bias_bits is None:
            return bias
        scale = torch.maximum(grid.scale, bias.detach().abs() / bias_limit(self.bias_bits))  # see _grid_for
        return fake_quantize(bias, replace(grid, scale=scale, axis=0))

    def _grid_for(self, bias: Tensor | None) -> Grid | None:
        """The weight's grid where the file will have a wider one, for a bias that would not fit its integers."""
        if bias is None or self.bias_bits is None or self.weight_quantizer is None or self.bias_grid() is None:
            return None
        grid, po2 = self.weight_quantizer.require_grid(), self.weight_quantizer.spec.scale == "po2"
        scale = fitting_scale(grid.scale, bias, self.inputs[0].require_grid().scale, self.bias_bits, power_of_two=po2)
        return None if scale is None else replace(grid, scale=scale)

    def _factor(self, dtype: torch.dtype) -> Tensor:
        """gamma / sqrt(running_var + eps), per output channel."""
        norm = cast(Any, self.norm)
        factor: Tensor = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
        return factor if norm.weight is None else norm.weight * factor

    def _per_output(self, factor: Tensor) -> Tensor:
        """A number for each output channel, in the shape of the weight."""
        weight = cast(Tensor, self.layer.weight)
        if isinstance(self.layer, _TRANSPOSED):  # (in, out / groups, *kernel)
            per_group = factor.view(self.layer.groups, 1, -1).expand(-1, weight.shape[0] // self.layer.groups, -1)
            return per_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
        return factor.view(-1, *[1] * (weight.ndim - 1))

    def _unfolded_weight(self) -> Tensor:
        """``Q(s W) / s``."""
        weight = cast(Tensor, self.layer.weight)
        if self.weight_quantizer is None:
            return weight
        factor = self._factor(weight.dtype)
        alive = torch.where(factor.detach().abs() < _LEAST_FACTOR, torch.ones_like(factor), factor)
        shaped = self._per_output(alive)
        return self.quantized(weight * shaped) / shaped

    def _normalize(self, x: Tensor) -> Tensor:
        """The batch norm of a convolution's output, or of a linear layer's, whose features are last."""
        norm = cast(Any, self.norm)
        if not isinstance(self.layer, nn.Linear):
            return cast(Tensor, norm(x))
        return cast(Tensor, norm(x.flatten(0, -2)).view_as(x))

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        if isinstance(layer, _CONV):
            return cast(Tensor, layer._conv_forward(x, weight, bias))
        if isinstance(layer, _TRANSPOSED):
            return _conv_transpose(layer, x, weight, bias)
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return cast(Tensor, functional_call(layer, parameters, (x,)))


class FreezableNorm(_Freezable):
    """A batch norm that no layer takes in; once ``norm_frozen`` it keeps its statistics in train mode too."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """The batch norm."""
        norm = cast(Any, self.norm)
        if not self.norm_frozen:
            return cast(Tensor, norm(x))
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)


def _conv_transpose(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[weight.ndim - 3]
    options = layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    return cast(Tensor, function(x, weight, bias, *options))
