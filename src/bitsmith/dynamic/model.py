"""The result of dynamic quantization: the user's model with other layers in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import capture
from ..capture.inputs import Arguments, batch_arguments
from ..errors import CaptureError, DataError
from ..model import QuantizedModel
from ..recipe import Recipe
from ..report.model import Report
from ..targets import Target
from .layers import DynamicLayer


class DynamicModel(nn.Module):
    """Simulates what the target computes with integer weights and run-time scales; called like the float model.

    ``model`` is a copy of the float model with dynamic layers in it, ``recipe`` and ``report`` say what was done. It
    needs no graph; files do, and are made from the inputs of its first call, or from ``example_inputs``.
    """

    def __init__(
        self, model: nn.Module, recipe: Recipe, target: Target, report: Report, signature: inspect.Signature
    ) -> None:
        super().__init__()
        self.model = model
        self.recipe, self.target, self.report, self.signature = recipe, target, report, signature
        self.float_bytes = 0  # of the float model's parameters
        self.example_inputs: Arguments | None = None
        self._captured: QuantizedModel | None = None
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The simulated outputs, in float."""
        with torch.no_grad():
            outputs = self.model(*args, **kwargs)
        if self.example_inputs is None and not torch.compiler.is_compiling():
            self.example_inputs = torch.utils._pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
        return outputs

    def dynamic_layers(self) -> Iterator[tuple[str, DynamicLayer]]:
        """The layers that were replaced, with their names in the user's model; the parts of a layer are left out."""
        inside = ""
        for name, module in self.model.named_modules():
            if isinstance(module, DynamicLayer) and not (inside and name.startswith(inside)):
                inside = f"{name}."
                yield name, module

    def set_example(self, batch: Any) -> None:
        """What a graph is captured with: a batch, as for calibration."""
        is_arguments = isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[1], dict)
        self.example_inputs = batch if is_arguments else batch_arguments(self.model, batch)
        self._captured = None

    def example(self) -> Arguments:
        """Arguments that the model takes. Raises DataError where none are known yet."""
        if self.example_inputs is None:
            raise DataError(
                "a file is made from a graph, and a graph from one batch of inputs: run the model once, or pass "
                "example_inputs=batch to quantize_dynamic"
            )
        return self.example_inputs

    def captured(self) -> QuantizedModel:
        """The same computation as a graph, which exporters and certificates read.

        Raises DataError where no inputs are known yet, and CaptureError where torch.export cannot follow the model.
        """
        if self._captured is None:
            try:
                graph = capture(self.model, self.example(), free_length=True, whole_attention=True)
            except CaptureError as error:
                raise CaptureError(
                    f"no file can be made: {error}\n  A file takes plain tensors, no packed sequences. The model runs "
                    "without a graph: call it, or deploy(q, engine='torch')"
                ) from error
            graph.meta["float_bytes"] = self.float_bytes
            self._captured = QuantizedModel(graph, self.recipe, self.target, self.report, self.signature)
        return self._captured

    def _apply(self, fn: Any, recurse: bool = True) -> DynamicModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._captured = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_captured": None}
