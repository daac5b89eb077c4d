"""Engines of our own making: the quantized model on PyTorch's int8 CPU kernels, and the choice among engines."""

from .torch_build import build_torch
from .torch_script import script

__all__ = ["build_torch", "script"]
