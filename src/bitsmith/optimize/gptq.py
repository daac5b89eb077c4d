"""GPTQ: round weights column by column, each time letting the columns to come make up for the error.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1; symbols as there. The asymmetric objective of Li et al.,
GPTAQ (arXiv 2504.02692), |W x - Q x'| for quantized inputs x', is that of GPTQ for the weights W* that follow W x best
(``aligned``): here these are found for all columns at once, and then rounded.
"""

from __future__ import annotations

from torch import Tensor

from ..steps import Gptq
from .column_steps import ColumnStep, aligned
from .feedback import Damped, Feedback


class GptqStep(ColumnStep[Gptq]):
    """GPTQ on what a layer reads in one of the streams."""

    name = "gptq"

    def __init__(self, options: Gptq) -> None:
        super().__init__(options, streams=("quantized", "float") if options.asymmetric else (options.inputs,))

    def prepare(self, w: Tensor, h: Tensor, g: Tensor | None, damping: float, notes: list[str]) -> Feedback:
        """Equation (3): the error of column i over [H^-1]_ii, spread by the row of H^-1 that is left."""
        damped = Damped.of(h, damping, notes)
        return gptq(w if g is None else aligned(w, damped, g), damped)


def gptq(w: Tensor, h: Damped) -> Feedback:
    """What the shared loop needs for GPTQ: ``w`` is (groups, columns, rows)."""
    return Feedback(start=w, passes=h.passes(), target=w)
