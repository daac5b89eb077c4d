"""The pieces that a model quantized by hand is marked with: where integers begin and end, and arithmetic in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.layers import QuantIdentity
from ..nn.module import Place, QuantModule, place_of


class QuantStub(QuantIdentity):
    """Where float numbers become codes. ``outputs`` is a TensorSpec or a recipe; None takes the recipe of prepare.

    >>> QuantStub()(torch.tensor([0.5]))  # in float, until the model is prepared and converted
    tensor([0.5000])
    """


class DeQuantStub(nn.Module):
    """Where codes become float numbers again.

    >>> DeQuantStub()(torch.tensor([0.5]))
    tensor([0.5000])
    """

    def forward(self, x: Tensor) -> Tensor:
        """The same value; what reads it computes in float."""
        return x


class FloatFunctional(QuantModule):
    """Arithmetic between quantized values, its result on a grid of its own: one FloatFunctional for each place.

    Both operands must be on grids (a number is taken as it is). ``outputs`` as in QuantStub.

    >>> skip = FloatFunctional()
    >>> skip.add(torch.tensor([1.0]), torch.tensor([2.0]))
    tensor([3.])
    """

    def __init__(self, outputs: Place = True) -> None:
        super().__init__()
        self.output_quantizer = place_of(outputs)

    def forward(self, function: Callable[..., Tensor], *operands: Any) -> Tensor:
        """``function(*operands)`` on a grid; the methods below call it."""
        y = function(*operands)
        return y if self.output_quantizer is None else self.output_quantizer(y)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        """x + y."""
        return self(torch.add, x, y)  # type: ignore[no-any-return]

    def add_relu(self, x: Tensor, y: Tensor) -> Tensor:
        """max(x + y, 0), in one integer operator."""
        return self(_add_relu, x, y)  # type: ignore[no-any-return]

    def mul(self, x: Tensor, y: Tensor) -> Tensor:
        """x * y, element by element."""
        return self(torch.mul, x, y)  # type: ignore[no-any-return]

    def matmul(self, x: Tensor, y: Tensor) -> Tensor:
        """x @ y."""
        return self(torch.matmul, x, y)  # type: ignore[no-any-return]

    def cat(self, tensors: list[Tensor] | tuple[Tensor, ...], dim: int = 0) -> Tensor:
        """The tensors one after the other along ``dim``."""
        return self(_cat, dim, *tensors)  # type: ignore[no-any-return]

    def add_scalar(self, x: Tensor, y: float) -> Tensor:
        """x + y with a number."""
        return self(torch.add, x, y)  # type: ignore[no-any-return]

    def mul_scalar(self, x: Tensor, y: float) -> Tensor:
        """x * y with a number."""
        return self(torch.mul, x, y)  # type: ignore[no-any-return]


def _add_relu(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


def _cat(dim: int, *tensors: Tensor) -> Tensor:
    return torch.cat(tensors, dim)
