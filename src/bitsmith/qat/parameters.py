"""Which tensors of a captured graph train: those that train in the user's model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn


def restore_parameters(graph: fx.GraphModule, model: nn.Module) -> list[str]:
    """Give a captured graph the parameters of the model that it was read from; returns notes on what cannot train.

    Capture copies every tensor. What was one Parameter in the model is one again here (tied embeddings), what was
    frozen stays frozen, and what the graph reads as a constant although it is a Parameter (position embeddings, scales)
    is a Parameter again. Batch norms get their momentum back, which eval mode does not show.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen_all = not any(p.requires_grad for p in parameters.values())  # a model that was only ever run
    tied: dict[int, tuple[nn.Module, str]] = {}
    for owner, key, name, tensor in list(_tensors(graph)):
        original = parameters.get(name)
        trains = (
            frozen_all or (original.requires_grad if original is not None else True)
        ) and tensor.is_floating_point()
        if original is not None and id(original) in tied and _same(tied[id(original)], tensor):
            setattr(owner, key, getattr(*tied[id(original)]))
            continue
        tensor.requires_grad_(trains)
        if original is not None:
            tied[id(original)] = owner, key
    notes = _restore_constants(graph, parameters, frozen_all)
    _restore_momentum(graph, model)
    return notes


def _tensors(graph: fx.GraphModule) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
    """Parameters of the graph's layers: owner, key, full name, and the Parameter."""
    for path, module in graph.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield module, key, f"{path}.{key}" if path else key, parameter


def _same(place: tuple[nn.Module, str], tensor: Tensor) -> bool:
    other: Tensor = getattr(*place)
    return other is not tensor and other.shape == tensor.shape and torch.equal(other, tensor)


def _restore_constants(graph: fx.GraphModule, parameters: dict[str, nn.Parameter], frozen_all: bool) -> list[str]:
    flat = {name.replace(".", "_"): p for name, p in parameters.items()}
    notes = []
    for node in graph.graph.nodes:
        key = str(node.target)
        if node.op != "get_attr" or key not in graph._buffers:
            continue
        value = graph._buffers[key]
        assert value is not None
        original = flat.get(key) if key in flat else parameters.get(str(node.meta.get("parameter", "")))
        if original is None or not value.is_floating_point():
            if key.startswith("folded_") and value.is_floating_point() and not node.meta.get("parameter"):
                notes.append(f"{key.removeprefix('folded_')} is made of several tensors before the graph: constant now")
            continue
        del graph._buffers[key]
        trains = frozen_all or original.requires_grad
        graph.register_parameter(key, nn.Parameter(value.clone(), requires_grad=trains))
    return notes


def _restore_momentum(graph: fx.GraphModule, model: nn.Module) -> None:
    originals = dict(model.named_modules())
    for path, module in graph.named_modules():
        original = originals.get(path)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and isinstance(
            original, nn.modules.batchnorm._BatchNorm
        ):
            module.momentum = original.momentum
            if module.num_batches_tracked is not None and original.num_batches_tracked is not None:
                module.num_batches_tracked.copy_(original.num_batches_tracked)
