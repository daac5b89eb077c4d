"""Reading a model: ``torch.export`` first, ``torch.fx`` where that fails."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from ..errors import CaptureError, NonFiniteError
from .exported import export_graph
from .inputs import Arguments
from .normalize import normalize


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[bool]:
    """Run a model in eval mode and restore each module's own mode; yields whether it was in train mode."""
    modes = {module: module.training for module in model.modules()}
    was_training = any(modes.values())
    model.eval()
    try:
        yield was_training
    finally:
        for module, mode in modes.items():
            module.training = mode


def capture(model: nn.Module, arguments: Arguments | Any) -> fx.GraphModule:
    """The LayerGraph of a model: an ``fx.GraphModule`` whose layers are ``torch.nn`` modules under their own names.

    ``arguments`` is ``(args, kwargs)`` of one batch, or a tuple of positional arguments. The model is not changed:
    its weights are copied. Raises CaptureError with the line of the user's code that cannot be read.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    >>> graph = capture(net, (torch.zeros(2, 3, 8, 8),))
    >>> [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")]
    ['0', 'aten.relu.default']
    """
    arguments = _as_arguments(arguments)
    check_finite(model)
    with evaluation_mode(model):
        attempts = ((export_graph, True), (_trace_then_export, True), (export_graph, False))
        failures: list[Exception] = []
        for attempt, dynamic in attempts:
            try:
                graph = attempt(model, arguments, dynamic_batch=dynamic)
            except Exception as error:  # torch raises many types here; all are reported below
                failures.append(error)
            else:
                return normalize(graph)
    raise CaptureError(_explain(model, failures)) from failures[0]


def _as_arguments(arguments: Any) -> Arguments:
    if isinstance(arguments, torch.Tensor):
        return (arguments,), {}
    is_pair = len(arguments) == 2 and isinstance(arguments[0], tuple) and isinstance(arguments[1], dict)
    return arguments if is_pair else (tuple(arguments), {})


def _trace_then_export(model: nn.Module, arguments: Arguments, *, dynamic_batch: bool) -> fx.GraphModule:
    """Symbolic tracing runs plain Python control flow away, after which export has only tensors to follow."""
    return export_graph(fx.symbolic_trace(model), arguments, dynamic_batch=dynamic_batch)


def check_finite(model: nn.Module) -> None:
    """Refuse NaN and infinite weights by name."""
    for name, tensor in model.state_dict().items():
        if (
            isinstance(tensor, torch.Tensor)
            and tensor.is_floating_point()
            and not bool(tensor.isfinite().all())
        ):
            count = int((~tensor.isfinite()).sum())
            raise NonFiniteError(
                f"{name} holds {count} NaN or infinite value(s) of {tensor.numel()}: the checkpoint is damaged or "
                "training diverged; load a good checkpoint before quantizing"
            )


def _explain(model: nn.Module, failures: list[Exception]) -> str:
    """What failed, the user's own source line, and what to change."""
    error = failures[0]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    where = ""
    if frames:
        frame = frames[-1]
        where = f"\n  at {frame.filename}:{frame.lineno}, in {frame.name}:\n    {frame.line}"
    first_line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    remedy = "make forward() a function of tensors that torch.export can follow"
    if "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        remedy = (
            "this branch or size depends on a tensor's values: use torch.where or torch.cond, or fix the choice "
            "before quantizing"
        )
    return (
        f"{type(model).__name__} cannot be read as a graph: {first_line.strip()}{where}\n"
        f"  What to do: {remedy}; or quantize without a graph by recipe placement 'layerwise' (module hooks)."
    )


def _is_library(filename: str) -> bool:
    return any(
        part in filename for part in ("/torch/", "/bitsmith/", "<frozen", "<eval_with_key>", "/contextlib.py")
    )
