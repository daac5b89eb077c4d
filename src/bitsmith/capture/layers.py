"""ATen calls with weights, turned back into the ``torch.nn`` modules that they came from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .ops import aten_name

# (module, the nodes of its activations, the nodes of its parameters: weight first)
Built = tuple[nn.Module, list[Any], list[Any]]
Attribute = Callable[[Any], Any]
_CONV = {"conv1d": nn.Conv1d, "conv2d": nn.Conv2d, "conv3d": nn.Conv3d}
_CONV_TRANSPOSE = {
    "conv_transpose1d": nn.ConvTranspose1d,
    "conv_transpose2d": nn.ConvTranspose2d,
    "conv_transpose3d": nn.ConvTranspose3d,
}
_BATCH_NORM = {3: nn.BatchNorm1d, 2: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def build_layer(node: fx.Node, attribute: Attribute) -> Built | None:
    """The module that a call with constant weights amounts to; None where it is something else."""
    name = aten_name(node)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    arguments = _bound(node)
    for names, build in _BUILDERS:
        if name in names:
            return build(name, arguments, attribute)
    return None


def _bound(node: fx.Node) -> dict[str, Any]:
    """All arguments by schema name, defaults filled in."""
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    bound = {a.name: a.default_value for a in target._schema.arguments}
    bound.update(zip(bound, node.args))
    bound.update(node.kwargs)
    return bound


def _assign(module: nn.Module, **parameters: Any) -> None:
    for name, value in parameters.items():
        if value is None:
            continue
        copy = value.detach().clone()
        if isinstance(getattr(module, name), nn.Parameter):
            setattr(module, name, nn.Parameter(copy, requires_grad=False))
        else:
            setattr(module, name, copy)
    module.eval()


def _parameters(arguments: dict[str, Any], attribute: Attribute) -> tuple[Tensor | None, Tensor | None, bool]:
    """Weight, bias, and whether both are constants of the graph."""
    weight, bias = attribute(arguments["weight"]), attribute(arguments.get("bias"))
    constant = weight is not None and (bias is not None or arguments.get("bias") is None)
    return weight, bias, constant


def _conv(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight, bias, constant = _parameters(arguments, attribute)
    if not constant or weight is None:
        return None
    groups, padding = arguments["groups"], arguments["padding"]
    rank = weight.ndim - 2

    def per_axis(value: Any) -> Any:
        return value if isinstance(value, str) else tuple(value) * (rank if len(value) == 1 else 1)

    with torch.device("meta"):
        module = _CONV[name](
            weight.shape[1] * groups, weight.shape[0], per_axis(weight.shape[2:]),
            per_axis(arguments["stride"]), per_axis(padding), per_axis(arguments["dilation"]), groups,
            bias is not None,
        )  # fmt: skip
    _assign(module, weight=weight, bias=bias)
    return module, [arguments["input"]], [arguments["weight"], arguments["bias"]]


def _conv_transpose(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight, bias, constant = _parameters(arguments, attribute)
    if not constant or weight is None:
        return None
    groups, rank = arguments["groups"], weight.ndim - 2

    def per_axis(value: Any) -> Any:
        return tuple(value) * (rank if len(value) == 1 else 1)

    with torch.device("meta"):
        module = _CONV_TRANSPOSE[name](
            weight.shape[0], weight.shape[1] * groups, per_axis(weight.shape[2:]),
            per_axis(arguments["stride"]), per_axis(arguments["padding"]),
            per_axis(arguments["output_padding"]), groups, bias is not None, per_axis(arguments["dilation"]),
        )  # fmt: skip
    _assign(module, weight=weight, bias=bias)
    return module, [arguments["input"]], [arguments["weight"], arguments["bias"]]


def _linear(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight, bias, constant = _parameters(arguments, attribute)
    if not constant or weight is None:
        return None
    with torch.device("meta"):
        module = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    _assign(module, weight=weight, bias=bias)
    return module, [arguments["input"]], [arguments["weight"], arguments["bias"]]


_PRODUCTS = {"matmul": ("self", "other"), "mm": ("self", "mat2"), "addmm": ("mat1", "mat2")}


def _product(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    """``x @ w + b`` with a constant matrix is a linear layer whose weight is stored the other way round."""
    left, right = (arguments[key] for key in _PRODUCTS[name])
    matrix, bias = attribute(right), attribute(arguments["self"]) if name == "addmm" else None
    if matrix is None or matrix.ndim != 2 or attribute(left) is not None or left.meta["val"].ndim < 2:
        return None
    if name == "addmm":
        plain = (arguments["beta"], arguments["alpha"]) == (1, 1)
        if not plain or bias is None or bias.shape != matrix.shape[1:]:
            return None
    with torch.device("meta"):
        module = nn.Linear(matrix.shape[0], matrix.shape[1], bias is not None)
    _assign(module, weight=matrix.t().contiguous(), bias=bias)
    return module, [left], [right, arguments["self"] if bias is not None else None]


def _batch_norm(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight, bias, _ = _parameters(arguments, attribute)
    mean, variance = attribute(arguments["running_mean"]), attribute(arguments["running_var"])
    source = arguments["input"].meta.get("val")
    if mean is None or variance is None or source is None or source.ndim not in _BATCH_NORM:
        return None  # no running statistics: it normalizes each batch, even in eval mode
    module = _BATCH_NORM[source.ndim](mean.numel(), eps=arguments["eps"], affine=weight is not None)
    _assign(module, weight=weight, bias=bias, running_mean=mean, running_var=variance)
    return module, [arguments["input"]], [arguments["weight"] or arguments["running_mean"], arguments["bias"]]


def _layer_norm(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight, bias, constant = _parameters(arguments, attribute)
    if not constant or weight is None:
        return None
    module = nn.LayerNorm(arguments["normalized_shape"], arguments["eps"], bias=bias is not None)
    _assign(module, weight=weight, bias=bias)
    return module, [arguments["input"]], [arguments["weight"], arguments["bias"]]


def _group_norm(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight, bias, constant = _parameters(arguments, attribute)
    if not constant or weight is None or bias is None:
        return None
    module = nn.GroupNorm(arguments["num_groups"], weight.numel(), arguments["eps"])
    _assign(module, weight=weight, bias=bias)
    return module, [arguments["input"]], [arguments["weight"], arguments["bias"]]


def _embedding(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight = attribute(arguments["weight"])
    if weight is None:
        return None
    with torch.device("meta"):
        module = nn.Embedding(*weight.shape)
    _assign(module, weight=weight)
    return module, [arguments["indices"]], [arguments["weight"]]


def _prelu(name: str, arguments: dict[str, Any], attribute: Attribute) -> Built | None:
    weight = attribute(arguments["weight"])
    if weight is None:
        return None
    module = nn.PReLU(weight.numel())
    _assign(module, weight=weight)
    return module, [arguments["self"]], [arguments["weight"]]


_BUILDERS: list[tuple[set[str], Callable[[str, dict[str, Any], Attribute], Built | None]]] = [
    (set(_CONV), _conv),
    (set(_CONV_TRANSPOSE), _conv_transpose),
    ({"linear"}, _linear),
    (set(_PRODUCTS), _product),
    ({"batch_norm"}, _batch_norm),
    ({"layer_norm"}, _layer_norm),
    ({"group_norm"}, _group_norm),
    ({"embedding"}, _embedding),
    ({"prelu"}, _prelu),
]
