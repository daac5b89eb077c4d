"""A dynamically quantized model in a folder: integers, scales and float parts in one safetensors file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..recipe import Recipe
from ..report.model import Report
from ..targets import Target
from .model import DynamicModel
from .quantize import quantize_dynamic


def state_of(q: DynamicModel) -> dict[str, Tensor]:
    """Every tensor of the model once, also where two modules share it."""
    state, seen = dict[str, Tensor](), set[int]()
    for name, value in q.model.state_dict(keep_vars=True).items():
        if id(value) not in seen:
            seen.add(id(value))
            state[name] = value.detach().contiguous()
    return state


def restore(
    model: nn.Module, recipe: Recipe, target: Target, report: Report, state: dict[str, Tensor], folder: Path
) -> DynamicModel:
    """The saved model; ``model``, the float model (or torch.ao's), gives the structure and nothing else."""
    from ..migrate.dynamic import migrate_dynamic  # builds on this package
    from ..migrate.names import is_torch_ao

    q = migrate_dynamic(model, target) if is_torch_ao(model) else quantize_dynamic(model, recipe, target)
    own: dict[str, Any] = state_of(q)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    other = sorted(
        k for k in own.keys() & state.keys() if own[k].shape != state[k].shape or own[k].dtype != state[k].dtype
    )
    if missing or unexpected or other:
        raise CheckpointError(
            f"the model in {folder} does not fit this float model: missing {missing[:8]}, unexpected "
            f"{unexpected[:8]}, other shapes or types {other[:8]}. Pass the model that was quantized"
        )
    with torch.no_grad():
        for name, value in q.model.state_dict(keep_vars=True).items():
            if name in state:
                value.copy_(state[name])
    q.report = report
    return q
