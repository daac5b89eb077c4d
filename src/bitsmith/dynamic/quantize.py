"""Dynamic quantization in one call: every layer that has a dynamic form is replaced by it."""

from __future__ import annotations

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..capture import check_finite
from ..errors import PlacementError, RecipeError
from ..flow import check_arguments
from ..grid import IntFormat, TensorSpec
from ..recipe import Override, Recipe, load_recipe
from ..targets import Target, get_target
from .attention import DynamicMultiheadAttention
from .laws import Activations
from .layers import DynamicEmbedding, DynamicEmbeddingBag, DynamicLayer, DynamicLinear
from .model import DynamicModel
from .recurrent_layers import DynamicCell, DynamicRecurrent
from .report import build_dynamic_report
from .weights import check_weights

_ENGINES = ("onnxruntime", "torch")


@dataclass(frozen=True)
class Plan:
    """How one layer is to be quantized."""

    name: str
    weights: TensorSpec
    activations: Activations
    target: Target


def _sequence(layer: Any, plan: Plan) -> DynamicLayer:
    return DynamicRecurrent(layer, plan.weights, sequence_activations(layer, plan), plan.name)


def sequence_activations(layer: nn.Module, plan: Plan) -> Activations:
    """Recurrent kernels know one scale per tensor. onnxruntime has one for LSTM, torch for LSTM and GRU."""
    kernels = nn.LSTM if plan.target.engine == "onnxruntime" else nn.LSTM | nn.GRU
    return "tensor" if plan.activations != "float" and isinstance(layer, kernels) else "float"


# Type -> how its dynamic form is made. A subclass counts where it has kept the type's own forward.
_LAYERS: dict[type[nn.Module], Callable[[Any, Plan], DynamicLayer]] = {
    nn.Linear: lambda layer, plan: DynamicLinear(layer.weight, layer.bias, plan.weights, plan.activations, plan.name),
    nn.LSTM: _sequence,
    nn.GRU: _sequence,
    nn.RNN: _sequence,
    nn.LSTMCell: lambda layer, plan: DynamicCell(layer, plan.weights, plan.activations, plan.name),
    nn.GRUCell: lambda layer, plan: DynamicCell(layer, plan.weights, plan.activations, plan.name),
    nn.RNNCell: lambda layer, plan: DynamicCell(layer, plan.weights, plan.activations, plan.name),
    nn.MultiheadAttention: lambda layer, plan: DynamicMultiheadAttention(
        layer, plan.weights, plan.activations, plan.name
    ),
    nn.Embedding: lambda layer, plan: DynamicEmbedding(layer, plan.weights, plan.name),
    nn.EmbeddingBag: lambda layer, plan: DynamicEmbeddingBag(layer, plan.weights, plan.name),
}


def quantize_dynamic(
    model: nn.Module, recipe: str | Path | Recipe = "int8-dynamic", target: str | Target = "onnxruntime", *,
    overrides: Iterable[Override] = (), example_inputs: Any = None,
) -> DynamicModel:  # fmt: skip
    """Weights to 8 bits now, activations at run time: no calibration data, and no graph of the model.

    Replaces Linear, LSTM, GRU, RNN, LSTMCell, GRUCell, RNNCell, MultiheadAttention, Embedding and EmbeddingBag.
    Recipes: ``int8-dynamic`` (activations with a scale per tensor), ``int8-dynamic-tensor`` (weights too, the fastest),
    ``int8-dynamic-token`` (activations with a scale per token) and ``fp16-dynamic`` (float16 weights, float
    activations), or your own with ``placement: dynamic``. ``target`` is ``onnxruntime`` or ``torch``. ``overrides``
    change or exclude layers by name, ``type:LSTM``, ``first`` or ``last``.
    ``example_inputs``, a batch, is what files are made with; without it, it is the first call's inputs.

    The caller's model is not changed. Raises PlacementError where nothing would be quantized.

    >>> import torch
    >>> net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> q = quantize_dynamic(net)
    >>> q.model[0]
    DynamicLinear(weight=[32, 16], weights=int8, activations=tensor)
    >>> q(torch.randn(2, 16)).shape
    torch.Size([2, 4])
    """
    check_arguments(model)
    if isinstance(recipe, set | frozenset | list | tuple | dict):  # torch.ao's qconfig_spec
        raise RecipeError(
            "quantize_dynamic takes a recipe, not a set of layer types: every layer with a dynamic form is quantized; "
            "leave some out with overrides=[bitsmith.Override(match='type:LSTM', exclude=True)]"
        )
    if any(isinstance(module, DynamicLayer) for module in model.modules()):
        raise PlacementError("this model is quantized already: quantize the float model that it came from")
    recipe, target = load_recipe(recipe), get_target(target)
    if more := tuple(overrides):
        recipe = Recipe.model_validate({**recipe.model_dump(), "overrides": (*recipe.overrides, *more)})
    check_dynamic(recipe, target)
    check_finite(model)
    replaced, notes = _replacements(model, recipe, target)
    # deepcopy takes what is in its memo for the copy: shared layers stay shared, and no float weight is copied twice.
    kept = list(model.modules())
    copied = copy.deepcopy(model, {id(layer): replaced[i] for i, layer in enumerate(kept) if i in replaced})
    _leave_fast_paths(copied)
    q = DynamicModel(copied, recipe, target, build_dynamic_report(recipe, target), inspect.signature(model.forward))
    q.report = build_dynamic_report(recipe, target, q, notes)
    q.float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if example_inputs is not None:
        q.set_example(example_inputs)
    return q


def check_dynamic(recipe: Recipe, target: Target) -> None:
    """Refuse a recipe that does not find its scales at run time, or that the target has no kernels for."""
    if recipe.placement != "dynamic":
        raise RecipeError(
            f"recipe {recipe.name!r} has static activations: use bitsmith.quantize(model, calibration, recipe), or one "
            "of int8-dynamic, int8-dynamic-tensor, int8-dynamic-token, fp16-dynamic"
        )
    if target.engine not in _ENGINES:
        raise RecipeError(f"dynamic quantization knows the targets {' and '.join(_ENGINES)}, not {target.name!r}")
    parts: tuple[Recipe | Override, ...] = (recipe, *recipe.overrides)
    for part in parts:
        if part.weights is not None:
            check_weights(part.weights, f"recipe {recipe.name!r}")
        if part.activations is not None:
            activations_of(part.activations)
    if recipe.weights is None:
        raise RecipeError(f"recipe {recipe.name!r} has no weights to quantize: dynamic layers are about weights")


def activations_of(spec: TensorSpec | None) -> Activations:
    """How a spec says that activations are quantized; RecipeError where no kernel does it so."""
    if spec is None:
        return "float"
    fmt = spec.format
    if isinstance(fmt, IntFormat) and fmt.bits == 8 and spec.scale == "float32":
        if spec.granularity == "tensor" and not fmt.signed and not spec.symmetric:
            return "tensor"
        if spec.granularity == "token" and fmt.signed and spec.symmetric:
            return "token"
    raise RecipeError(
        "dynamic activations are 8-bit: unsigned and affine per tensor, or signed and symmetric per token, not "
        f"{fmt}, {'symmetric' if spec.symmetric else 'affine'}, per {spec.granularity}"
    )


def layer_type(module: nn.Module) -> type[nn.Module] | None:
    """The type of ``torch.nn`` that a module computes as, where that has a dynamic form."""
    for base in _LAYERS:
        if isinstance(module, base) and type(module).forward is base.forward:
            return base
    return None


def _candidates(model: nn.Module) -> dict[int, tuple[str, nn.Module]]:
    """The layers with a dynamic form, by their place in ``model.modules()``, but those inside of one."""
    found: dict[int, tuple[str, nn.Module]] = {}
    inside: set[int] = set()
    for index, (name, module) in enumerate(model.named_modules()):
        if id(module) not in inside and layer_type(module) is not None:
            found[index] = (name, module)
            inside.update(id(m) for m in module.modules())
    return found


def _replacements(
    model: nn.Module, recipe: Recipe, target: Target
) -> tuple[dict[int, DynamicLayer], list[str]]:  # fmt: skip
    candidates, notes = _candidates(model), list[str]()
    for index, (name, layer) in list(candidates.items()):
        if getattr(layer, "proj_size", 0):
            notes.append(f"{name or 'the model'} stays float: no runtime has an integer LSTM with proj_size")
            del candidates[index]
    replaced: dict[int, DynamicLayer] = {}
    used: set[int] = set()
    last = len(candidates) - 1
    for place, (index, (name, layer)) in enumerate(candidates.items()):
        position: Any = "middle"
        if place in (0, last):
            position = "only" if last == 0 else "first" if place == 0 else "last"
        kind = layer_type(layer)
        assert kind is not None
        hits = [i for i, o in enumerate(recipe.overrides) if o.applies(name, kind.__name__, position)]
        used.update(hits)
        matched = [recipe.overrides[i] for i in hits]
        if any(o.exclude for o in matched):
            continue
        if getattr(layer, "out_features", 2) == 1 and not any(o.weights or o.activations for o in matched):
            notes.append(
                f"{name or 'the model'} stays float: with one output, quantizing its input costs more than it gains; "
                "an override with weights quantizes it"
            )
            continue
        weights, activations = recipe.weights, recipe.activations
        for override in matched:
            weights, activations = override.weights or weights, override.activations or activations
        assert weights is not None
        plan = Plan(name or type(layer).__name__, weights, activations_of(activations), target)
        replaced[index] = _LAYERS[kind](layer, plan).train(layer.training)
    _check_overrides(recipe, used, [name for name, _ in candidates.values()])
    if not replaced:
        held = Counter(type(m).__name__ for m in model.modules() if not list(m.children()))
        counts = ", ".join(f"{count} {kind}" for kind, count in sorted(held.items())) or "no layers"
        why = f" ({'; '.join(notes)})" if notes else ""
        raise PlacementError(
            f"nothing in {type(model).__name__} would be quantized: it holds {counts}"
            f"{', all of which are excluded or stay float' if _candidates(model) else ''}"
            f"{why}. Dynamic quantization takes "
            f"{', '.join(kind.__name__ for kind in _LAYERS)}; for convolutions use bitsmith.quantize with calibration"
        )
    return replaced, notes


def _check_overrides(recipe: Recipe, used: set[int], names: list[str]) -> None:
    for index, override in enumerate(recipe.overrides):
        if index not in used:
            more = " ..." if len(names) > 8 else ""
            raise PlacementError(
                f"override {override.match!r} matches no layer; layers are {', '.join(names[:8])}{more}"
            )


def _leave_fast_paths(model: nn.Module) -> None:
    """Keep torch's transformer layers from their fused kernels, which would read float weights past our layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
