"""torch.ao's dynamic layers, as Bitsmith's: the weights' integers and scales are taken over."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..dynamic.laws import Activations
from ..dynamic.layers import DynamicLayer, DynamicLinear
from ..dynamic.model import DynamicModel
from ..dynamic.quantize import Plan, activations_of, sequence_activations
from ..dynamic.recurrent_layers import DynamicCell, DynamicRecurrent
from ..dynamic.report import build_dynamic_report
from ..dynamic.weights import HALF
from ..errors import MigrationError
from ..grid import TensorSpec
from ..recipe import Override, Recipe, load_recipe
from ..targets import Target
from .names import quantized_modules
from .pieces import weight_grid_of

_Make = Callable[[Any, Plan], DynamicLayer]


def migrate_dynamic(model: nn.Module, target: Target) -> DynamicModel:
    """The DynamicModel of a model that torch.ao quantized dynamically."""
    layers: dict[int, DynamicLayer] = {}
    specs: dict[str, TensorSpec] = {}
    for name, kind, module in quantized_modules(model):
        if (make := _LAYERS.get(kind)) is None:
            raise MigrationError(
                f"{name or 'the model'}: torch.ao's quantized {kind} has no dynamic form here; known are "
                f"{', '.join(_LAYERS)}. Leave it in float, or quantize the float model with bitsmith.quantize_dynamic"
            )
        spec = specs[name] = _spec(module)
        half = spec.format == HALF
        base = load_recipe("fp16-dynamic" if half else "int8-dynamic")
        layers[id(module)] = make(module, Plan(name, spec, activations_of(base.activations), target))
    copied = copy.deepcopy(model, dict(layers))
    recipe = _recipe(specs)
    q = DynamicModel(copied, recipe, target, build_dynamic_report(recipe, target), inspect.signature(model.forward))
    note = "weights are torch.ao's integers; inputs get 8 bits where its x86 kernels use 7"
    q.report = build_dynamic_report(recipe, target, q, [note])
    q.float_bytes = 4 * sum(w.numel() for _, layer in q.dynamic_layers() for w in layer.weights())
    return q


def _recipe(specs: dict[str, TensorSpec]) -> Recipe:
    """The recipe by which the float model's layers get the same kinds of numbers."""
    first = next(iter(specs.values()))
    base = load_recipe("fp16-dynamic" if first.format == HALF else "int8-dynamic")
    others = tuple(Override(match=name, weights=spec) for name, spec in specs.items() if spec != first)
    return base.model_copy(update={"name": "torch-ao-dynamic", "weights": first, "overrides": others})


def _weights(module: Any) -> list[Tensor]:
    if hasattr(module, "get_weight"):
        return list(module.get_weight().values())
    return [module.weight()]


def _is_half(module: Any) -> bool:
    packed = getattr(module, "_packed_params", None)
    return torch.float16 in (getattr(module, "dtype", None), getattr(packed, "dtype", None))


def _spec(module: Any) -> TensorSpec:
    if _is_half(module):
        return TensorSpec(format=HALF, granularity="tensor")
    granularity: Literal["tensor", "channel"] = "tensor"
    if _weights(module)[0].qscheme() == torch.per_channel_affine:
        granularity = "channel"
    weights = load_recipe("int8-dynamic").weights
    assert weights is not None
    return weights.model_copy(update={"granularity": granularity})


def _codes(weight: Tensor, where: str) -> tuple[Tensor, Tensor | None]:
    """Integers and scales, or float16 values."""
    if not weight.is_quantized:
        return weight.detach().half(), None
    grid = weight_grid_of(weight, where)
    return weight.int_repr().contiguous(), grid.scale.contiguous()


def _put(layer: DynamicLayer, name: str, codes: Tensor, scale: Tensor | None) -> None:
    layer.register_buffer(name, codes)
    if scale is not None:
        layer.register_buffer(f"{name}_scale", scale)


def dynamic_linear(weight: Tensor, bias: Tensor | None, activations: Activations, where: str) -> DynamicLinear:
    """A linear layer on integers that are there already."""
    layer = DynamicLinear.__new__(DynamicLinear)
    DynamicLayer.__init__(layer, activations)
    layer._store("weight", *_codes(weight, where))
    layer._constant("bias", bias)
    return layer


def _linear(module: Any, plan: Plan) -> DynamicLayer:
    return dynamic_linear(module.weight(), module.bias(), plan.activations, plan.name)


def _sequence(module: Any, plan: Plan) -> DynamicLayer:
    sizes = {"num_layers": module.num_layers, "bias": module.bias, "batch_first": module.batch_first}
    kind = nn.LSTM if type(module).__name__ == "LSTM" else nn.GRU
    layer = kind(module.input_size, module.hidden_size, bidirectional=module.bidirectional, **sizes)
    weights = module.get_weight()
    with torch.no_grad():
        for name, value in {**weights, **(module.get_bias() if module.bias else {})}.items():
            getattr(layer, name).copy_(value.dequantize() if value.is_quantized else value)
    new = DynamicRecurrent(layer, plan.weights, sequence_activations(layer, plan), plan.name)
    suffixes = ("", "_reverse") if module.bidirectional else ("",)
    for index in range(module.num_layers):
        for part in ("weight_ih", "weight_hh"):
            found = [_codes(weights[f"{part}_l{index}{suffix}"], plan.name) for suffix in suffixes]
            scales = [scale for _, scale in found if scale is not None]
            codes = torch.stack([codes for codes, _ in found])
            _put(new, f"{part}_l{index}", codes, torch.stack(scales) if scales else None)
    return new


def _cell(module: Any, plan: Plan) -> DynamicLayer:
    name = type(module).__name__
    options = {"nonlinearity": module.nonlinearity} if name == "RNNCell" else {}
    weights = module.get_weight()
    layer = getattr(nn, name)(module.input_size, module.hidden_size, bias=module.bias, **options)
    with torch.no_grad():
        for part, value in (module.get_bias() if module.bias else {}).items():
            getattr(layer, part).copy_(value)
    new = DynamicCell(layer, plan.weights, plan.activations, plan.name)
    new.input = dynamic_linear(weights["weight_ih"], None, plan.activations, plan.name)
    new.state = dynamic_linear(weights["weight_hh"], None, plan.activations, plan.name)
    return new


_LAYERS: dict[str, _Make] = {
    "dynamic.Linear": _linear,
    "dynamic.LSTM": _sequence,
    "dynamic.GRU": _sequence,
    "dynamic.LSTMCell": _cell,
    "dynamic.GRUCell": _cell,
    "dynamic.RNNCell": _cell,
}
