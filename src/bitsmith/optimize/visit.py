"""What a step sees of a layer at its turn in the walk, and what it leaves behind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from ..grid import Grid
from ..place.layers import QuantLayer

Stream = Literal["float", "quantized"]


@dataclass(frozen=True)
class LayerVisit:
    """One layer with all that it reads.

    ``inputs(stream)`` yields the layer's input chunk by chunk, as the float model has it or as it arrives through
    the quantized layers before it; both have the same samples in the same order. Its grids are set; ``input_grid`` is
    that of its input, where there is one. What a step adds to ``notes`` is in the report.
    """

    name: str
    layer: QuantLayer
    inputs: Callable[[Stream], Iterator[Tensor]]
    input_grid: Grid | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class StepLog:
    """What a step did to a layer: the squared error of the layer's output before and after.

    ``undone`` says that the error grew and the layer was put back as it was; ``skipped`` why it was left alone.
    """

    step: str
    layer: str
    before: float = 0.0
    after: float = 0.0
    seconds: float = 0.0
    undone: bool = False
    skipped: str = ""
    note: str = ""


class LayerStep(ABC):
    """A step that changes the parameters of one layer at a time."""

    name: str
    needs_float_inputs = False  # whether it asks for ``inputs("float")``

    @abstractmethod
    def refusal(self, layer: QuantLayer) -> str:
        """Why this step leaves a layer alone; empty where it applies."""

    @abstractmethod
    def run(self, visit: LayerVisit) -> tuple[float, float]:
        """Change the layer's weight in place; the squared error of its output with nearest rounding, and now."""
