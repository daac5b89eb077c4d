"""Formats, grids, and the pure functions that map tensors onto them."""

from .formats import FP8_E4M3, FP8_E5M2, FloatFormat, Format, IntFormat
from .functional import centred_codes, dequantize, fake_quantize, quantize
from .grid import Grid
from .quantizer import Quantizer
from .spec import RangeRule, TensorSpec

__all__ = [
    "FP8_E4M3",
    "FP8_E5M2",
    "FloatFormat",
    "Format",
    "Grid",
    "IntFormat",
    "Quantizer",
    "RangeRule",
    "TensorSpec",
    "centred_codes",
    "dequantize",
    "fake_quantize",
    "quantize",
]
