"""Algorithms that change weights and biases to lose less; visitors of the walk, one file each."""

from __future__ import annotations

from ..steps import Step
from .gptq import GptqStep
from .visit import LayerStep

_LAYER_STEPS = {"gptq": GptqStep}


def layer_step(step: Step) -> LayerStep:
    """The visitor that carries out a step of stage ``weights``."""
    return _LAYER_STEPS[step.name](step)  # type: ignore[arg-type]
