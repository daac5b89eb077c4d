"""A compute layer with its weight and bias on grids."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ..grid import Quantizer


class QuantLayer(nn.Module):
    """A layer whose parameters pass through Quantizers on their way into it.

    ``layer`` is the user's own module type (convolution, linear, embedding ...) with float parameters;
    ``weight_quantizer`` and ``bias_quantizer`` may be None, which leaves that parameter in float.
    """

    layer: nn.Module
    weight_quantizer: Quantizer | None
    bias_quantizer: Quantizer | None

    def __init__(
        self, layer: nn.Module, weight_quantizer: Quantizer | None, bias_quantizer: Quantizer | None = None
    ) -> None:
        super().__init__()
        self.layer = layer
        self.weight_quantizer = weight_quantizer
        self.bias_quantizer = bias_quantizer

    @property
    def weight(self) -> Tensor:
        """The float weight."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The float bias, if the layer has one."""
        bias = getattr(self.layer, "bias", None)
        return bias if isinstance(bias, Tensor) else None

    def quantized_parameters(self) -> dict[str, Tensor]:
        """Weight and bias as the target will see them, in float."""
        parameters = {"weight": self.weight if self.weight_quantizer is None else self.weight_quantizer(self.weight)}
        if self.bias is not None:
            parameters["bias"] = self.bias if self.bias_quantizer is None else self.bias_quantizer(self.bias)
        return parameters

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's own function with quantized parameters."""
        return functional_call(self.layer, self.quantized_parameters(), args, kwargs)
