"""Quantized layers to write a model with: the float layers' signatures and state_dicts, and specs by keyword."""

from ..calibrate.watching import WatchingQuantizer, WeightQuantizer
from .attention import QuantMultiheadAttention
from .calibrate import calibrate
from .layers import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantEmbedding,
    QuantIdentity,
    QuantLinear,
    QuantOutput,
    QuantReLU,
)
from .module import QuantModule
from .recurrent import QuantLSTM

__all__ = [
    "QuantConv1d",
    "QuantConv2d",
    "QuantConv3d",
    "QuantConvTranspose1d",
    "QuantConvTranspose2d",
    "QuantConvTranspose3d",
    "QuantEmbedding",
    "QuantIdentity",
    "QuantLSTM",
    "QuantLinear",
    "QuantModule",
    "QuantMultiheadAttention",
    "QuantOutput",
    "QuantReLU",
    "WatchingQuantizer",
    "WeightQuantizer",
    "calibrate",
]
