"""The result of a quantization: a module that computes what the target computes."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from .capture.inputs import Arguments, positional
from .errors import DataError
from .integer.program import Program
from .recipe import Recipe
from .report.model import Report
from .targets import Target


class QuantizedModel(nn.Module):
    """Simulates the target's arithmetic; called like the float model it came from.

    ``graph`` holds the Quantizers and QuantLayers, ``recipe`` and ``report`` say what was done. Where the target
    runs an operator in integers, the simulation holds exactly those integers; ``integer_executor()`` computes the
    same with integer tensors alone.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        recipe: Recipe,
        target: Target,
        report: Report,
        signature: inspect.Signature,
    ) -> None:
        super().__init__()
        self.graph = graph
        self.recipe = recipe
        self.target = target
        self.report = report
        self.signature = signature
        self._program: Program | None = None
        self.eval()

    @property
    def program(self) -> Program:
        """The compiled simulation; compiled at its first use and after a move to another device."""
        if self._program is None:
            self._program = Program(self.graph, self.target)
        return self._program

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The simulated outputs, in float."""
        args, kwargs = self.arguments(args, kwargs)
        return self.program(*args, **kwargs)

    def arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Checked arguments, in the order in which the model was captured."""
        args, kwargs = positional(self.signature, args, kwargs)
        self._check_inputs(args, kwargs)
        return args, kwargs

    def restructure(self, outputs: tuple[Tensor, ...]) -> Any:
        """Flat output tensors in the structure that the model returns."""
        output = self.graph.graph.output_node()
        rest, leaves = iter(outputs), torch.utils._pytree.tree_leaves(output.args[0])
        flat = [next(rest) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
        return self.graph.graph._codegen.process_outputs(flat)

    def captured(self) -> QuantizedModel:
        """The model as a graph: itself. What is quantized dynamically becomes one when a file is made of it."""
        return self

    def integer_executor(self) -> Program:
        """The model in integer tensors alone: the oracle that simulation and files are held against."""
        return Program(self.graph, self.target, carrier="integer")

    def _check_inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A wrong input is told in the model's own words, not those of an operator deep inside."""
        placeholders = self.graph.graph.find_nodes(op="placeholder")
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        if len(leaves) != len(placeholders):
            wanted = [n.name for n in placeholders]
            raise DataError(
                f"the model was captured with inputs {wanted}, but {len(leaves)} values were given; optional "
                "inputs are captured where example or calibration batches have them by name, {'x': ..., 'mask': ...}"
            )
        for node, value in zip(placeholders, leaves):
            expected = node.meta.get("val")
            if not isinstance(expected, Tensor) or not isinstance(value, Tensor):
                continue
            if value.dtype != expected.dtype:
                found, wanted_type = (str(d).removeprefix("torch.") for d in (value.dtype, expected.dtype))
                raise DataError(f"input {node.name!r} is {found}, but the model was captured with {wanted_type}")
            fixed = [(i, d) for i, d in enumerate(expected.shape) if isinstance(d, int)]
            if value.ndim != expected.ndim or any(value.shape[i] != d for i, d in fixed):
                shape = ["any" if isinstance(d, torch.SymInt) else d for d in expected.shape]
                raise DataError(f"input {node.name!r} has shape {list(value.shape)}, but the model takes {shape}")

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedModel:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._program = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_program": None}
