"""Batch normalization in a checkpoint: found by its running statistics, and fused into the layer before it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BitsmithError
from .checkpoint import as_array
from .console import listed
from .network_layer import Notify

EPSILON = 1e-5
"""Of ``torch.nn.BatchNorm`` and of ai8x-training."""

_PARTS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_AFFINE = ("weight", "bias")
State = dict[str, Any]


class BatchNormError(BitsmithError):
    """A batch normalization is not fused, or cannot be."""


def batch_norms(state: State) -> dict[str, bool]:
    """Prefixes of the batch normalizations in ``state``, and whether each has a weight or a bias."""
    prefixes = [key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")]
    return {
        prefix: any(f"{prefix}.{part}" in state for part in _AFFINE)
        for prefix in prefixes
        if f"{prefix}.running_var" in state
    }


def check_batch_norms(state: State, notify: Notify) -> None:
    """Warn of batch normalizations that are not fused; raise BatchNormError where they have weights."""
    found = batch_norms(state)
    affine = [prefix for prefix, has_weights in found.items() if has_weights]
    if affine:
        raise BatchNormError(
            f"The checkpoint has batch normalization that is not fused ({listed(affine)}). The chip has none; its "
            "weights would be taken for layers. Fuse it with --fuse-bn, or in training (ai8x.fuse_bn_layers)."
        )
    if found:
        notify(
            "WARNING",
            f"The checkpoint has running statistics of batch normalization that is not fused ({listed(list(found))}). "
            "The chip has none, so the network will not compute what was trained: fuse with --fuse-bn.",
        )


def fuse_batch_norms(state: State, notify: Notify) -> State:
    """``state`` with every batch normalization multiplied into the weights and bias of its layer.

    As ai8x-training does it: ``layer.bn`` belongs to ``layer.op``, and a quarter of its output is taken, since the
    training's forward pass divides by 4 before quantization starts; not so in QATv2 and in plain PyTorch models,
    where the normalization belongs to the last layer of its number of channels before it.
    """
    result = state.copy()
    later = any(key.endswith(".activation_threshold") for key in state)
    for prefix in batch_norms(state):
        layer, paired = _layer_of(prefix, state)
        quarter = paired and not later
        result = _fuse(result, prefix, layer, 0.25 if quarter else 1.0)
        notify("NOTICE", f"{prefix} is fused into {layer}{' (times 1/4, as ai8x-training does)' if quarter else ''}.")
    return result


def _layer_of(prefix: str, state: State) -> tuple[str, bool]:
    """The layer that ``prefix`` normalizes, and whether it is an ai8x layer with an operation and a ``bn``."""
    channels = as_array(state[f"{prefix}.running_mean"]).size
    parent = prefix.rpartition(".")[0]
    keys = list(state)
    before = keys[: keys.index(f"{prefix}.running_mean")]
    weights = [key for key in before if key.endswith(".weight") and as_array(state[key]).ndim > 1]
    inside = [key for key in weights if parent and key.rpartition(".")[0].rpartition(".")[0] == parent]
    fits = [key for key in (inside or weights) if channels in as_array(state[key]).shape[:2]]
    paired = bool(inside) and prefix.endswith(".bn")
    chosen = fits[-1:] if not paired or len(fits) == 1 else []
    if not chosen:
        raise BatchNormError(f"{prefix} has {channels} channels: the checkpoint has no layer before it that it fits.")
    return chosen[0].removesuffix(".weight"), paired


def _fuse(state: State, prefix: str, layer: str, part: float) -> State:
    weights = as_array(state[f"{layer}.weight"])
    kind = weights.dtype.type

    def values(name: str, default: float) -> NDArray[Any]:
        key = name if name == bias_key else f"{prefix}.{name}"
        found = as_array(state[key]).astype(kind) if key in state else np.full(channels.shape, default, kind)
        if found.shape != channels.shape:
            raise BatchNormError(f"{key} has the shape {found.shape}: {prefix} has {channels.size} channels.")
        return found

    bias_key, channels = f"{layer}.bias", as_array(state[f"{prefix}.running_mean"])
    gain = kind(part) * values("weight", 1) / np.sqrt(values("running_var", 1) + kind(EPSILON))
    # The output channels of a transposed convolution are its second axis; a square one cannot be told from its shape.
    axis = 0 if weights.shape[0] == channels.size else 1
    along = [1] * weights.ndim
    along[axis] = -1
    changed = {
        f"{layer}.weight": weights * gain.reshape(along),
        bias_key: (values(bias_key, 0) - values("running_mean", 0)) * gain + kind(part) * values("bias", 0),
    }
    result = type(state)()
    for key, value in state.items():
        if key not in (f"{prefix}.{name}" for name in _PARTS):
            result[key] = changed.get(key, value)
        if key == f"{layer}.weight" and bias_key not in state:
            result[bias_key] = changed[bias_key]
    return result
