"""Reading a model: ``torch.export`` first, ``torch.fx`` where that fails."""

from __future__ import annotations

import contextlib
import copy
import traceback
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..errors import CaptureError, DataError, NonFiniteError
from .exported import export_graph
from .inputs import Arguments, sample_count, tensors_of
from .marks import handwritten, marking
from .normalize import normalize
from .traced import trace_graph

_CHECKED = 3  # samples that a captured graph is held against its model on
_TOLERANCE = 0.05  # of the largest value

# Wrappers that only hold the user's model -> the attribute that holds it.
_WRAPPERS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}


def copy_graph(graph: fx.GraphModule) -> fx.GraphModule:
    """A deep copy; without the warning about its own internals that torch gives users here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(graph)


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


def capture(
    model: nn.Module, arguments: Arguments | Any, *, free_length: bool = False, whole_attention: bool = False
) -> fx.GraphModule:
    """The LayerGraph of a model: an ``fx.GraphModule`` of ``torch.nn`` layers under their own names.

    ``arguments`` is ``(args, kwargs)`` of one batch, or a tuple of positional arguments. The model is not
    changed: its weights are copied. Raises CaptureError with the line of the user's code that cannot be read,
    and DataError where the model itself does not take the batch. ``free_length``: sequences may have another
    length later, where the model's code allows it; ``whole_attention`` keeps scaled_dot_product_attention whole.

    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    >>> graph = capture(net, (torch.zeros(2, 3, 8, 8),))
    >>> [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")]
    ['0', 'aten.relu.default']
    """
    arguments = _as_arguments(arguments)
    while type(model).__name__ in _WRAPPERS:
        model = getattr(model, _WRAPPERS[type(model).__name__])
    check_finite(model)
    with evaluation_mode(model), marking(model):
        export = partial(export_graph, free_length=free_length)
        attempts = ((export, True), (trace_graph, True), (export, False))
        failures: list[Exception] = []
        for attempt, dynamic in attempts:
            try:
                graph = normalize(attempt(model, arguments, dynamic_batch=dynamic), whole_attention=whole_attention)
                _check_agrees(model, graph, arguments, other_size=dynamic)
            except Exception as error:  # torch raises many types here; all are reported below
                failures.append(error)
            else:
                _note_fixed_batch(graph)
                graph.meta["handwritten"] = handwritten(model)
                return graph
        _check_runs(model, arguments)
    raise CaptureError(_explain(model, failures)) from failures[0]


@contextlib.contextmanager
def _restored_buffers(model: nn.Module) -> Iterator[None]:
    """Undo what a run of the user's model writes into its buffers."""
    kept = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)


def _as_arguments(arguments: Any) -> Arguments:
    if isinstance(arguments, torch.Tensor):
        return (arguments,), {}
    is_pair = len(arguments) == 2 and isinstance(arguments[0], tuple) and isinstance(arguments[1], dict)
    return arguments if is_pair else (tuple(arguments), {})


def _check_agrees(model: nn.Module, graph: fx.GraphModule, arguments: Arguments, *, other_size: bool) -> None:
    """Run both once, with another batch size: numbers that tracing took from the example would show.

    The tolerance is wide, since regions under autocast are captured in full precision.
    """
    count = sample_count(arguments)
    if other_size and all(t.ndim and t.shape[0] == count for t in tensors_of(arguments)):
        size = _CHECKED if count > _CHECKED else max(count - 1, 1)
        arguments = tree_map_only(torch.Tensor, lambda t: t[:size], arguments)

    def run(module: nn.Module) -> list[Any]:
        args, kwargs = tree_map_only(torch.Tensor, torch.clone, arguments)
        return [leaf for leaf in tree_leaves(module(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]

    def agree(left: list[Any], right: list[Any]) -> bool:
        return len(left) == len(right) and all(map(_is_near, left, right))

    with torch.no_grad(), _restored_buffers(model):
        exact = run(model)
        if not agree(exact, run(graph)) and agree(exact, run(model)):  # else the model itself is random
            raise CaptureError(
                "the graph that was read computes something else than the model: forward() turns sizes or "
                "values of the example into Python numbers"
            )


def _is_near(exact: torch.Tensor, found: torch.Tensor) -> bool:
    if exact.shape != found.shape or exact.dtype.is_floating_point != found.dtype.is_floating_point:
        return False
    if not exact.dtype.is_floating_point or not exact.numel() or not bool(exact.isfinite().all()):
        return True  # indices may swap where two scores are nearly equal
    return bool((exact - found).abs().max() <= _TOLERANCE * exact.abs().max())


def _note_fixed_batch(graph: fx.GraphModule) -> None:
    """Say so where the model's own code ties it to the batch size of the example."""
    values = [node.meta.get("val") for node in graph.graph.nodes if node.op == "placeholder"]
    shapes = [value.shape for value in values if isinstance(value, torch.Tensor) and value.ndim]
    if shapes and not any(isinstance(size, torch.SymInt) for shape in shapes for size in shape):
        graph.meta.setdefault("notes", []).append(
            f"the model takes batches of {shapes[0][0]} only: its code turns the batch size into a number "
            "(len(x), int(x.shape[0]), a loop over samples), or it takes **kwargs; x.shape[0] itself may vary"
        )


def _check_runs(model: nn.Module, arguments: Arguments) -> None:
    """A batch that the model itself refuses is no fault of the capture."""
    try:
        with torch.no_grad(), _restored_buffers(model):
            model(*arguments[0], **arguments[1])
    except Exception as error:  # whatever the user's code raises
        given = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors_of(arguments)]
        raise DataError(
            f"{type(model).__name__} itself fails on the first calibration batch, inputs {', '.join(given)}: "
            f"{_first_line(error)}{_user_line(error)}\n"
            "  What to do: give batches of the shape and type that the model was trained on"
        ) from error


def check_finite(model: nn.Module) -> None:
    """Refuse NaN and infinite weights by name."""
    for name, tensor in model.state_dict().items():
        if nn.parameter.is_lazy(tensor):
            raise CaptureError(f"{name} of a lazy layer has no shape yet: run the model once, then quantize")
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        if not bool(tensor.isfinite().all()):
            count = int((~tensor.isfinite()).sum())
            raise NonFiniteError(
                f"{name} holds {count} NaN or infinite value(s) of {tensor.numel()}: the checkpoint is "
                "damaged or training diverged; load a good checkpoint before quantizing"
            )


def _explain(model: nn.Module, failures: list[Exception]) -> str:
    """What failed, the user's own source line, and what to change."""
    error = failures[0]
    remedy = "make forward() a function of tensors that torch.export can follow"
    if "data-dependent" in str(error) or "GuardOnDataDependent" in type(error).__name__:
        remedy = (
            "this branch or size depends on a tensor's values: use torch.where or torch.cond, or fix the "
            "choice before quantizing"
        )
    return (
        f"{type(model).__name__} cannot be read as a graph: {_first_line(error)}{_user_line(error)}\n"
        f"  What to do: {remedy}; or quantize without a graph by placement='layerwise' (module hooks)"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _user_line(error: Exception) -> str:
    """The innermost line of the user's own code that led to an error."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_library(f.filename)]
    if not frames:
        return ""
    return f"\n  at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}:\n    {frames[-1].line}"


def _is_library(filename: str) -> bool:
    return any(part in filename for part in ("/torch/", "/bitsmith/", "<frozen", "<eval_with_key>", "/contextlib.py"))
