"""Algorithms that change weights and biases to lose less; visitors of the walk, one file each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..steps import Step
from .gpfq import GpfqStep
from .gptq import GptqStep
from .learned_rounding import LearnedRoundingStep
from .qronos import QronosStep
from .visit import LayerStep

_LAYER_STEPS: dict[str, Callable[[Any], LayerStep]] = {
    "gptq": GptqStep,
    "gpfq": GpfqStep,
    "qronos": QronosStep,
    "learned_rounding": LearnedRoundingStep,
}


def layer_step(step: Step) -> LayerStep:
    """The visitor that carries out a step of stage ``weights``."""
    return _LAYER_STEPS[step.name](step)
