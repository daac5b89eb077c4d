"""Reading a model with ``torch.export``. The only file that touches it for capture."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from .inputs import Arguments
from .mutations import mutations_to_functions, needs_functionalization
from .rewrites import inline_regions

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.library.custom_op("bitsmith::batch_norm", mutates_args=())
def _batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float
) -> Tensor:
    return torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)


@_batch_norm.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, variance: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@contextlib.contextmanager
def _whole_batch_norms(model: nn.Module) -> Iterator[None]:
    """Have batch norms read as one operator: torch works their shapes out through their arithmetic, which is slow."""

    def whole(norm: nn.BatchNorm2d, x: Tensor) -> Any:
        return torch.ops.bitsmith.batch_norm(x, norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)

    norms = [m for m in model.modules() if type(m) in _BATCH_NORMS and getattr(m, "running_mean", None) is not None]
    norms = [norm for norm in norms if "forward" not in norm.__dict__]
    for norm in norms:
        norm.forward = partial(whole, norm)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


def _to_aten(graph: fx.GraphModule) -> None:
    for node in graph.graph.nodes:
        if node.target is torch.ops.bitsmith.batch_norm.default:
            *tensors, eps = node.args
            node.target, node.args = torch.ops.aten.batch_norm.default, (*tensors, False, 0.0, eps, False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch's own warnings and graph dumps from the user; no fused attention, so that all is visible."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    torch.backends.mha.set_fastpath_enabled(False)
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        logger.setLevel(level)


def at_least_two(arguments: Arguments) -> Arguments:
    """Repeat a batch of one, since export takes a dimension of size 1 for a constant."""

    def repeat(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == 1:
            return torch.cat([value, value])
        return value

    args, kwargs = arguments
    return torch.utils._pytree.tree_map(repeat, args), torch.utils._pytree.tree_map(repeat, kwargs)


def export_graph(
    model: nn.Module, arguments: Arguments, *, dynamic_batch: bool = True, free_length: bool = False
) -> fx.GraphModule:
    """The model as a functional ATen graph with its parameters as attributes.

    The leading dimension of every input tensor is dynamic where the model's own code allows it; with ``free_length``
    also the next one of sequences, which are inputs of rank 3, and integers or masks of rank 2.
    """
    args, kwargs = at_least_two(arguments) if dynamic_batch else arguments

    def dims(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim:
            is_sequence = value.ndim == 3 or (value.ndim == 2 and not value.is_floating_point())
            axes = (0, 1) if free_length and is_sequence else (0,)
            return dict.fromkeys(axes, torch.export.Dim.AUTO)
        return None

    bound = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    dynamic = torch.utils._pytree.tree_map(dims, dict(bound)) if dynamic_batch else None
    with _quiet(), _whole_batch_norms(model), torch.no_grad():
        program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic, strict=False)
        if needs_functionalization(program.graph):
            program = program.run_decompositions({})
        graph = program.module(check_guards=False)
    assert isinstance(graph, fx.GraphModule)
    inline_regions(graph)
    _to_aten(graph)
    mutations_to_functions(graph)
    return graph
