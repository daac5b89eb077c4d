"""Quantization in steps that the user drives: prepare, run batches, convert; by hand with stubs where it must be."""

from .fuse import fuse_modules
from .modules import BY_HAND, assigned, keep_to_marks, quantize_by_hand, structure
from .steps import convert, prepare, with_module_recipes
from .stubs import DeQuantStub, FloatFunctional, QuantStub
from .swap import LayerMapping, has_stubs

__all__ = [
    "BY_HAND",
    "DeQuantStub",
    "FloatFunctional",
    "LayerMapping",
    "QuantStub",
    "assigned",
    "convert",
    "fuse_modules",
    "has_stubs",
    "keep_to_marks",
    "prepare",
    "quantize_by_hand",
    "structure",
    "with_module_recipes",
]
