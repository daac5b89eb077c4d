"""The quantizers of quantization-aware training, by name."""

from __future__ import annotations

from ..errors import RecipeError
from ..grid import TensorSpec
from .learned import LearnedClippingQuantizer, LearnedOffsetQuantizer, LearnedStepQuantizer
from .moving_average import MovingAverageQuantizer
from .training_quantizer import TrainingQuantizer

__all__ = ["KINDS", "TrainingQuantizer", "make_quantizer"]

KINDS: dict[str, type[TrainingQuantizer]] = {
    kind.kind: kind
    for kind in (MovingAverageQuantizer, LearnedStepQuantizer, LearnedOffsetQuantizer, LearnedClippingQuantizer)
}


def make_quantizer(
    kind: str, spec: TensorSpec, *, axis: int | None = None, non_negative: bool = False, of_weight: bool = False
) -> TrainingQuantizer:
    """A training quantizer: ``"moving-average"``, ``"lsq"``, ``"lsq+"`` or ``"pact"``.

    ``axis`` is the channel axis of ``spec.granularity`` ``"channel"`` (None: 0 for weights, 1 for activations; a
    ``spec.axis`` overrides it). ``non_negative`` says that no value behind the ReLU in front, if any, is below 0.
    Raises ``RecipeError`` for an unknown kind, widths other than 2 to 16 bits, and combinations without meaning.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> make_quantizer("lsq", TensorSpec(format=IntFormat(4)), non_negative=True).subsumes_relu
    True
    """
    if kind not in KINDS:
        raise RecipeError(f"no training quantizer is called {kind!r}: choose one of {', '.join(KINDS)}")
    return KINDS[kind](spec, axis=axis, non_negative=non_negative, of_weight=of_weight)
