"""Float modules to quantized ones, by a table from types to functions; recipes on modules say where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

from torch import nn

from ..capture.hooked import COMPUTE_LAYERS
from ..errors import RecipeError
from ..nn import (
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantEmbedding,
    QuantLinear,
    QuantLSTM,
    QuantModule,
    QuantMultiheadAttention,
    QuantOutput,
)
from ..nn.module import WeightedModule
from ..recipe import Override, Recipe, load_recipe
from .fuse import FUSED
from .stubs import QuantStub

LayerMapping = Callable[[Any, Recipe], nn.Module]  # (float module, its recipe) -> quantized module

_WEIGHTED: dict[type[nn.Module], type[WeightedModule]] = {
    nn.Conv1d: QuantConv1d, nn.Conv2d: QuantConv2d, nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d, nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d, nn.Linear: QuantLinear,
}  # fmt: skip
_OUTPUTS: tuple[type[nn.Module], ...] = (
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Sigmoid, nn.Tanh, nn.Hardsigmoid, nn.Hardswish, nn.Softplus, nn.Softmax,
    nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Upsample,
)  # fmt: skip


def _weighted(quantized: type[WeightedModule], layer: Any, recipe: Recipe) -> nn.Module:
    reads_itself = recipe.placement == "layerwise"
    activation = getattr(layer, "activation", None)
    return quantized.from_float(layer, inputs=reads_itself, outputs=not reads_itself, activation=activation)


def _output(module: nn.Module, recipe: Recipe) -> nn.Module:
    return module if recipe.placement == "layerwise" else QuantOutput(module)


MAPPING: dict[type[nn.Module], LayerMapping] = {
    **{kind: partial(_weighted, quantized) for kind, quantized in _WEIGHTED.items()},
    **{FUSED[kind]: partial(_weighted, quantized) for kind, quantized in _WEIGHTED.items()},
    **dict.fromkeys(_OUTPUTS, _output),
    nn.Embedding: lambda layer, recipe: QuantEmbedding.from_float(layer, outputs=recipe.placement != "layerwise"),
    nn.LSTM: lambda layer, recipe: QuantLSTM.from_float(layer),
    nn.MultiheadAttention: lambda layer, recipe: QuantMultiheadAttention.from_float(
        layer, outputs=recipe.placement != "layerwise"
    ),
}


def has_stubs(model: nn.Module) -> bool:
    """Whether a model is marked for quantization by hand."""
    return any(isinstance(module, QuantStub) for module in model.modules())


def swap(model: nn.Module, recipe: Recipe, mapping: Mapping[type[nn.Module], LayerMapping]) -> nn.Module:
    """Replace modules, in place, by what ``mapping`` makes of their exact type; returns the model, or its replacement.

    A module's attribute ``recipe`` (a recipe, or None for float) holds for it and for what is inside; the recipe's
    overrides are laid over that.
    """
    compute = [name for name, module in model.named_modules() if isinstance(module, COMPUTE_LAYERS)]
    done: dict[int, nn.Module] = {}

    def visit(module: nn.Module, path: str, outer: Recipe | None) -> nn.Module:
        if id(module) in done:
            return done[id(module)]
        own = _recipe_at(module, path, outer)
        if path in compute:
            own = _overridden(own, recipe, path, module, compute)
        make = mapping.get(type(module)) if own is not None else None
        result = make(module, own) if make is not None and own is not None else module
        done[id(module)] = result
        if result is module and not isinstance(module, QuantModule):
            for name, child in list(module._modules.items()):
                if child is not None:
                    module._modules[name] = visit(child, f"{path}.{name}".lstrip("."), own)
        for inner in [m for m in result.modules() if isinstance(m, QuantModule)] if result is not module else [result]:
            if isinstance(inner, QuantModule):
                inner.leave_in_float() if own is None else inner.assign(own)
        return result

    return visit(model, "", recipe)


def _recipe_at(module: nn.Module, path: str, outer: Recipe | None) -> Recipe | None:
    given = module.__dict__.get("recipe", outer)
    if given is None or isinstance(given, Recipe):
        return given
    try:
        return load_recipe(given)
    except RecipeError as error:
        raise RecipeError(f"{path or 'the model'}.recipe: {error}") from error


def _overridden(own: Recipe | None, recipe: Recipe, path: str, module: nn.Module, compute: list[str]) -> Recipe | None:
    index = compute.index(path)
    ends = {index == 0: "first", index == len(compute) - 1: "last"}
    position: Literal["first", "middle", "last", "only"] = "only" if len(compute) == 1 else ends.get(True, "middle")  # type: ignore[assignment]
    kinds = [base.__name__ for base in type(module).__mro__ if base in COMPUTE_LAYERS]
    for override in recipe.overrides:
        if own is None or not override.applies(path, (kinds or [""])[0], position):
            continue
        if override.exclude:
            return None
        changes = {k: v for k in ("weights", "activations", "bias") if (v := getattr(override, k)) is not None}
        own = own.model_copy(update=changes)
    return own


def module_overrides(model: nn.Module, names: list[str]) -> tuple[Override, ...]:
    """The attributes ``recipe`` of a model's modules, as overrides for the layers called ``names``."""
    marked = {path: module.__dict__["recipe"] for path, module in model.named_modules() if "recipe" in module.__dict__}
    found = []
    for name in names if marked else ():
        path = name
        while path not in marked and path:
            path = path.rpartition(".")[0]
        if path not in marked:
            continue
        own = _recipe_at(model.get_submodule(path), path, None)
        specs = {} if own is None else {"weights": own.weights, "activations": own.activations, "bias": own.bias}
        found.append(Override(match=name, exclude=own is None, **specs))
    return tuple(found)
