"""Finding the grids of a model of quantized layers in place, so that it can be run and trained as it is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..calibrate.watching import WatchingQuantizer, WeightQuantizer
from ..capture import ForwardFunction, evaluation_mode, read_batches
from ..errors import CalibrationError, DataError
from ..recipe import Recipe, load_recipe
from .module import QuantModule


def calibrate(
    model: nn.Module, batches: Iterable[Any], recipe: str | Path | Recipe = "int8", *,
    forward: ForwardFunction | None = None,
) -> None:  # fmt: skip
    """Run ``batches`` through a model of quantized layers and give every Quantizer its grid, in place.

    ``recipe`` fills in what a layer carries no spec for. From then on the model computes on its grids, with
    straight-through gradients: train it on, then ``bitsmith.convert`` it. The grids of values stay where they are,
    those of weights follow the weights.

    >>> from bitsmith.nn import QuantIdentity, QuantLinear
    >>> net = nn.Sequential(QuantIdentity(), QuantLinear(4, 2))
    >>> calibrate(net, [torch.randn(32, 4)])
    >>> net(torch.randn(8, 4)).sum().backward()
    >>> net[1].weight.grad.shape
    torch.Size([2, 4])
    """
    recipe = load_recipe(recipe)
    modules = {name: m for name, m in model.named_modules() if isinstance(m, QuantModule)}
    if not modules:
        raise DataError(
            f"{type(model).__name__} holds no quantized layer: write it with bitsmith.nn, or bitsmith.prepare it"
        )
    for module in modules.values():
        module.assign(recipe)
    watchers = {name: m for name, m in model.named_modules() if isinstance(m, WatchingQuantizer)}
    weights = [m for m in model.modules() if isinstance(m, WeightQuantizer)]
    for weight in weights:
        weight.enabled = False  # ranges are those of the float model
    for watcher in watchers.values():
        watcher.watch()
    with evaluation_mode(model), torch.no_grad():
        arguments = read_batches(model, batches, forward)
        for args, kwargs in arguments:
            model(*args, **kwargs)
    for name, watcher in watchers.items():
        if not watcher.batches:  # as self-attention never reads a key of its own
            watcher.statistic = None
            continue
        try:
            watcher.fix()
        except CalibrationError as error:
            raise type(error)(f"no range for {name.rpartition('.')[0]!r}: {error}") from error
    for weight in weights:
        weight.enabled = True
    with evaluation_mode(model), torch.no_grad():  # once on the grids, so that a state_dict has those of weights too
        model(*arguments[-1][0], **arguments[-1][1])
