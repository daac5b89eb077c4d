"""The recipe's steps that rewrite a model without changing its function, each kept only where it helps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..capture import copy_graph
from ..capture.inputs import Arguments
from ..recipe import Recipe
from .equalize import equalize
from .equalize_activations import equalize_activations
from .fold_batch_norm import fold_batch_norm
from .gate import Trial, objection
from .split_channels import split_channels

Judge = Callable[[fx.GraphModule, fx.GraphModule], Trial]  # a graph, once quantized, against a float one

_REWRITES: dict[str, Callable[[fx.GraphModule, list[Arguments], Any, Recipe], str]] = {
    "equalize": equalize,
    "equalize_activations": equalize_activations,
    "split_channels": split_channels,
}


def prepare(
    graph: fx.GraphModule, recipe: Recipe, batches: list[Arguments], judge: Judge
) -> tuple[fx.GraphModule, list[str]]:
    """The graph after the steps of stage ``prepare``, and a line on what each did.

    Folding a batch norm always helps. What moves ranges from one layer to another may do harm (equalization does
    where weights have a scale per channel): such a step is kept only where ``judge`` finds clearly and noticeably less
    noise after it (``gate.py``), against the outputs of the graph before any of them.
    """
    notes: list[str] = []
    exact: fx.GraphModule | None = None
    before: Trial | None = None
    for step in recipe.steps:
        if step.name == "fold_batch_norm":
            notes += fold_batch_norm(graph)
        elif step.name in _REWRITES:
            exact = exact or graph
            before = before or judge(graph, exact)
            candidate = copy_graph(graph)
            with torch.no_grad():
                note = _REWRITES[step.name](candidate, batches, step, recipe)
            after = judge(candidate, exact)
            noise = f"output SQNR {before.db:.1f} dB without it, {after.db:.1f} dB with it"
            if reason := objection(before, after):
                notes.append(f"{step.name}: undone, {noise}: {reason}")
            else:
                graph, before = candidate, after
                notes.append(f"{step.name}: {note}; {noise}")
    return graph, notes
