"""Quantized layers: each is the ``torch.nn`` layer of the same name, on grids."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .module import Place, QuantModule, Spec, WeightedModule, is_non_negative, place_of


class _Conv(WeightedModule):
    bias: Tensor | None

    def compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """Convolve."""
        return self._conv_forward(x, weight, self.bias)  # type: ignore[operator, no-any-return]


class QuantConv1d(_Conv, nn.Conv1d):  # type: ignore[misc]
    """``torch.nn.Conv1d`` with its weight, and where asked its input and output, on grids (see QuantConv2d)."""


class QuantConv2d(_Conv, nn.Conv2d):  # type: ignore[misc]
    """``torch.nn.Conv2d`` with its weight, and where asked its input and output, on grids.

    The signature is the float layer's, and so is the state_dict. Keywords: ``weights``, ``inputs``, ``outputs``, each
    a TensorSpec or a recipe; ``recipe`` for weights, bias and inputs at once.

    >>> import torch
    >>> layer = QuantConv2d(3, 8, 3, padding=1, weights="int8")
    >>> _ = layer.load_state_dict(nn.Conv2d(3, 8, 3).state_dict())
    >>> layer(torch.zeros(1, 3, 4, 4)).shape
    torch.Size([1, 8, 4, 4])
    """


class QuantConv3d(_Conv, nn.Conv3d):  # type: ignore[misc]
    """``torch.nn.Conv3d`` with its weight, and where asked its input and output, on grids (see QuantConv2d)."""


class _ConvTranspose(WeightedModule):
    channel_axis = 1

    def compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """Convolve, transposed."""
        layer: Any = self
        rank = weight.ndim - 2
        padding = layer._output_padding(
            x, args[0] if args else None, layer.stride, layer.padding, layer.kernel_size, rank, layer.dilation
        )
        function: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
        y: Tensor = function(x, weight, layer.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)
        return y


class QuantConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose1d`` with its weight, and where asked its input and output, on grids."""


class QuantConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose2d`` with its weight, and where asked its input and output, on grids."""


class QuantConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):  # type: ignore[misc]
    """``torch.nn.ConvTranspose3d`` with its weight, and where asked its input and output, on grids."""


class QuantLinear(WeightedModule, nn.Linear):  # type: ignore[misc]
    """``torch.nn.Linear`` with its weight, and where asked its input and output, on grids (see QuantConv2d).

    >>> import torch
    >>> QuantLinear(4, 2, recipe="w8a16")(torch.zeros(3, 4)).shape
    torch.Size([3, 2])
    """

    def compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """Multiply."""
        return F.linear(x, weight, self.bias)


class QuantEmbedding(WeightedModule, nn.Embedding):  # type: ignore[misc]
    """``torch.nn.Embedding`` with its table on a grid (one scale per row, where the recipe has one per channel)."""

    def compute(self, x: Tensor, weight: Tensor, *args: Any) -> Tensor:
        """Look rows up."""
        return F.embedding(
            x, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


class QuantIdentity(QuantModule):
    """Puts a value on a grid: of the model's input, or where no layer does.

    ``outputs`` is a TensorSpec or a recipe; None takes the recipe of the whole model.
    """

    def __init__(self, outputs: Spec = None) -> None:
        super().__init__()
        self.output_quantizer = place_of(True if outputs is None else outputs)

    def forward(self, x: Tensor) -> Tensor:
        """The value on its grid."""
        return x if self.output_quantizer is None else self.output_quantizer(x)


class QuantOutput(QuantModule):
    """Any module with its output on a grid; QuantReLU is one around ``torch.nn.ReLU``."""

    def __init__(self, module: nn.Module, outputs: Place = True) -> None:
        super().__init__()
        self.module = module
        self.output_quantizer = place_of(outputs, non_negative=is_non_negative(module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output on its grid."""
        y = self.module(*args, **kwargs)
        return y if self.output_quantizer is None else self.output_quantizer(y)


class QuantReLU(nn.ReLU, QuantModule):
    """``torch.nn.ReLU`` with its output on a grid: unsigned, from 0. ``outputs`` as in QuantIdentity.

    ``limit`` clips above: 6 makes it a ReLU6.

    >>> import torch
    >>> QuantReLU(limit=6.0)(torch.tensor([-1.0, 9.0]))
    tensor([0., 6.])
    """

    def __init__(self, inplace: bool = False, *, limit: float | None = None, outputs: Spec = None) -> None:
        super().__init__(inplace)
        self.limit = limit
        self.output_quantizer = place_of(True if outputs is None else outputs, non_negative=True)

    def forward(self, input: Tensor) -> Tensor:
        """The positive part on its grid."""
        y = super().forward(input) if self.limit is None else F.hardtanh(input, 0.0, self.limit, self.inplace)
        return y if self.output_quantizer is None else self.output_quantizer(y)
