"""Dynamic quantization: weights once, activations at run time, without calibration data."""

from .model import DynamicModel
from .quantize import quantize_dynamic

__all__ = ["DynamicModel", "quantize_dynamic"]
