"""Dropout and its kin: without effect in the eval mode that a model is captured in, at work while it trains.

While a model is captured, ``torch.nn.functional``'s dropouts leave marks, and so do modules of the user's that ask for
``self.training`` and return what they were given in eval mode (stochastic depth). Behind placement each mark becomes a
module again, which reads quantized values: its scaling must not widen their range.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

_PREFIX = "only in train mode: "
_DROPOUTS: dict[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "dropout1d": nn.Dropout1d,
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha_dropout": nn.AlphaDropout,
    "feature_alpha_dropout": nn.FeatureAlphaDropout,
}


def _mark(x: Tensor, name: str) -> Tensor:
    marked: Tensor = torch.ops.bitsmith.mark(x, f"{_PREFIX}{name}")
    return marked


def _marking_dropout(name: str, original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return original(input, p, training, inplace) if training or not p else _mark(input, f"{name} {p}")

    return dropout


def _marking_module(path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    result = original(*args, **kwargs)
    return _mark(result, f"module {path}") if args and result is args[0] else result


@contextmanager
def marking_randomness(model: nn.Module) -> Iterator[None]:
    """Let what only acts in train mode leave marks."""
    functions = {name: getattr(F, name) for name in _DROPOUTS}
    modules = {path: m for path, m in model.named_modules() if path and _is_random(m)}
    for name, function in functions.items():
        setattr(F, name, _marking_dropout(name, function))
    for path, module in modules.items():
        module.forward = partial(_marking_module, path, module.forward)
    try:
        yield
    finally:
        for name, function in functions.items():
            setattr(F, name, function)
        for module in modules.values():
            del module.__dict__["forward"]


def _asks_for_mode(module: nn.Module) -> bool:
    """Whether the code of a module's forward reads ``self.training`` for more than torch's dropouts."""
    try:
        lines = inspect.getsource(type(module).forward).splitlines()
    except (OSError, TypeError):
        return False
    return any(
        "self.training" in line for line in lines if not re.search(r"\bF\.\w*dropout|functional\.\w*dropout", line)
    )


def _is_random(module: nn.Module) -> bool:
    """A module of the user's without parameters or parts that asks for its mode: it can only drop or scale."""
    is_leaf = not list(module.children()) and not list(module.parameters()) and not list(module.buffers())
    return is_leaf and not type(module).__module__.startswith("torch.nn.") and _asks_for_mode(module)


def what_is_lost(model: nn.Module, kept: set[str]) -> list[str]:
    """A note for each module that behaves otherwise in train mode, which the captured graph does not know."""
    notes = []
    for path, module in model.named_modules():
        name = f"{path or type(model).__name__} ({type(module).__name__})"
        rate = getattr(module, "dropout", 0.0)
        if _is_reparametrized(module):
            notes.append(f"{name}: its weight norm or other parametrization is worked in: the weight itself trains")
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and isinstance(rate, float) and rate:
            notes.append(f"{name}: its own dropout of {rate} is off in training, since it is not in the graph")
        elif isinstance(module, nn.SyncBatchNorm):
            notes.append(
                f"{name}: each process has its own statistics; nn.SyncBatchNorm.convert_sync_batchnorm(prepared model) "
                "synchronizes them again"
            )
        elif isinstance(module, nn.RReLU):
            notes.append(f"{name}: its slope is the mean one in training too")
        elif not type(module).__module__.startswith("torch.nn.") and path not in kept and _asks_for_mode(module):
            notes.append(f"{name}: forward asks for self.training, but trains here as it runs in eval mode")
    return notes


def _is_reparametrized(module: nn.Module) -> bool:
    """Whether a weight is computed from others, by torch's parametrizations or by the hooks that they replaced."""
    hooks = (type(hook).__name__ for hook in module._forward_pre_hooks.values())
    return parametrize.is_parametrized(module) or not {"WeightNorm", "SpectralNorm"}.isdisjoint(hooks)


@dataclass(frozen=True)
class Drop:
    """A module that acts on what ``users`` read of ``source``, in train mode only."""

    module: nn.Module
    path: str
    source: fx.Node
    users: tuple[fx.Node, ...]


def take_randomness(graph: fx.GraphModule, model: nn.Module) -> list[Drop]:
    """Take the marks out of a captured graph."""
    drops = []
    for index, node in enumerate(list(graph.graph.nodes)):
        if node.target is not torch.ops.bitsmith.mark.default or not str(node.args[1]).startswith(_PREFIX):
            continue
        kind, argument = str(node.args[1]).removeprefix(_PREFIX).split(" ", 1)
        if kind == "module":
            module, path = copy.deepcopy(model.get_submodule(argument)), argument
        else:
            module, path = _DROPOUTS[kind](float(argument)), f"dropouts.{kind}_{index}"
        drops.append(Drop(module, path, node.args[0], tuple(node.users)))
        node.replace_all_uses_with(node.args[0])
        graph.graph.erase_node(node)
    graph.recompile()
    return drops
