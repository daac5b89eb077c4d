"""Quantization-aware training: a model on the grids of a recipe that trains in its user's own loop."""

from .build import Kinds
from .distillation import Distillation
from .graph import QATGraph
from .oscillation import Oscillation
from .prepare import prepare_qat
from .quantizers import TrainingQuantizer, make_quantizer
from .schedule import QATSchedule

__all__ = [
    "Distillation",
    "Kinds",
    "Oscillation",
    "QATGraph",
    "QATSchedule",
    "TrainingQuantizer",
    "make_quantizer",
    "prepare_qat",
]
