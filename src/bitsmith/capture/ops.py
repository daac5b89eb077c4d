"""The vocabulary of a LayerGraph: what each operator is called and how it treats codes and signs.

One row per operator. Placement, the integer laws, the exporter and the reports all speak these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from ..grid import Quantizer
from ..place.layers import QuantLayer


@dataclass(frozen=True)
class Op:
    """One kind of operator.

    ``role``: ``compute`` (multiply-accumulates), ``rescale`` (its kernel rescales between input and output
    grids), ``move`` (moves elements, codes stay what they are), ``activation`` (fuses into what is before it)
    or ``float``. ``sign``: ``non_negative`` (the output never is below 0), ``keeps`` (non-negative where all
    inputs are) or ``any``.
    """

    name: str
    role: str
    sign: str = "any"


def _rows(role: str, sign: str, *names: str) -> dict[str, Op]:
    return {name: Op(name, role, sign) for name in names}


_OPS: dict[str, Op] = {
    **_rows("compute", "any", "conv", "conv_transpose", "linear", "matmul"),
    **_rows("rescale", "keeps", "add", "mul", "cat", "avg_pool", "global_avg_pool"),
    **_rows("rescale", "any", "leaky_relu", "hardswish", "elu", "sub", "xor"),
    **_rows("rescale", "keeps", "or"),
    **_rows("rescale", "non_negative", "sigmoid", "abs"),
    **_rows("activation", "non_negative", "relu"),
    **_rows("activation", "keeps", "clamp"),
    **_rows("move", "keeps", "max_pool", "reshape", "transpose", "slice", "pad", "resize_nearest", "getitem"),
    **_rows("float", "non_negative", "hardsigmoid", "exp", "square", "sqrt", "softmax"),
    **_rows(
        "float",
        "any",
        "gelu",
        "silu",
        "tanh",
        "norm",
        "batch_norm",
        "embedding",
        "recurrent",
        "other",
    ),
}

# ATen packet name -> operator. What is missing here is a float operator.
_ATEN: dict[str, str] = {
    "conv1d": "conv", "conv2d": "conv", "conv3d": "conv", "linear": "linear",
    "conv_transpose1d": "conv_transpose", "conv_transpose2d": "conv_transpose",
    "conv_transpose3d": "conv_transpose",
    "matmul": "matmul", "bmm": "matmul", "add": "add", "sub": "sub",
    "bitwise_or": "or", "bitwise_xor": "xor", "mul": "mul", "cat": "cat", "concat": "cat",
    "avg_pool1d": "avg_pool", "avg_pool2d": "avg_pool", "avg_pool3d": "avg_pool",
    "adaptive_avg_pool1d": "avg_pool", "adaptive_avg_pool2d": "avg_pool", "adaptive_avg_pool3d": "avg_pool",
    "leaky_relu": "leaky_relu", "elu": "elu", "celu": "elu",
    "sigmoid": "sigmoid", "softmax": "softmax", "_softmax": "softmax",
    "relu": "relu", "hardtanh": "clamp", "relu6": "clamp", "clamp": "clamp", "clamp_min": "clamp",
    "max_pool1d": "max_pool", "max_pool2d": "max_pool", "max_pool3d": "max_pool",
    "view": "reshape", "reshape": "reshape", "flatten": "reshape", "unflatten": "reshape",
    "squeeze": "reshape", "unsqueeze": "reshape", "expand": "reshape", "pixel_shuffle": "transpose",
    "channel_shuffle": "transpose",
    "permute": "transpose", "transpose": "transpose", "t": "transpose", "repeat": "reshape",
    "slice": "slice", "select": "slice", "split": "slice", "split_with_sizes": "slice", "chunk": "slice",
    "unbind": "slice", "narrow": "slice", "index_select": "slice", "pad": "pad", "constant_pad_nd": "pad",
    "upsample_nearest1d": "resize_nearest", "upsample_nearest2d": "resize_nearest",
    "upsample_nearest3d": "resize_nearest",
    "hardsigmoid": "hardsigmoid", "exp": "exp", "abs": "abs", "square": "square", "sqrt": "sqrt",
    "hardswish": "hardswish", "gelu": "gelu", "silu": "silu", "tanh": "tanh",
    "layer_norm": "norm", "group_norm": "norm", "instance_norm": "norm", "rms_norm": "norm",
    "batch_norm": "batch_norm", "embedding": "embedding", "lstm": "recurrent", "gru": "recurrent",
    "rnn_tanh": "recurrent", "rnn_relu": "recurrent",
}  # fmt: skip

_MODULES: list[tuple[tuple[type[nn.Module], ...], str]] = [
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), "conv"),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "conv_transpose"),
    ((nn.Linear,), "linear"),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), "batch_norm"),
    ((nn.LayerNorm, nn.GroupNorm), "norm"),
    ((nn.Embedding,), "embedding"),
]


def aten_name(node: fx.Node) -> str:
    """The ATen name of a call_function node without its overload, or the callable's own name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[-1]
    return getattr(target, "__name__", str(target))


def module_of(node: fx.Node) -> nn.Module | None:
    """The module that a call_module node calls."""
    if node.op != "call_module":
        return None
    module = node.graph.owning_module
    assert module is not None
    return module.get_submodule(str(node.target))


def layer_of(node: fx.Node) -> nn.Module | None:
    """The user's layer at a call_module node, looked up through a QuantLayer."""
    module = module_of(node)
    return module.layer if isinstance(module, QuantLayer) else module


def quantizer_of(node: Any) -> Quantizer | None:
    """The Quantizer that a node calls, or None."""
    module = module_of(node) if isinstance(node, fx.Node) else None
    return module if isinstance(module, Quantizer) else None


def op_of(node: fx.Node) -> Op:
    """What a node does.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    >>> [op_of(node).name for node in graph.graph.nodes]
    ['other', 'linear', 'other']
    """
    if node.op == "call_module":
        layer = layer_of(node)
        for types, name in _MODULES:
            if isinstance(layer, types):
                return _OPS[name]
        return _OPS["other"]
    if node.op != "call_function":
        return _OPS["other"]
    name = aten_name(node)
    if name == "getitem":
        return _OPS["getitem"]
    if name in ("add", "sub", "mul") and not all(_is_activation(a) for a in node.args[:2]):
        return _OPS["other"]  # with a scalar or a constant: arithmetic in float
    if name in ("adaptive_avg_pool2d", "avg_pool2d", "mean", "adaptive_avg_pool1d", "avg_pool1d"):
        return _pooling(node, name)
    if name in ("pad", "constant_pad_nd") and not _pads_zero(node, name):
        return _OPS["other"]
    if name in ("max_pool2d", "max_pool1d", "max_pool3d") and len(node.args) > 5 and node.args[5]:
        return _OPS["other"]
    return _OPS[_ATEN.get(name, "other")]


def _is_activation(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op != "get_attr" and isinstance(value.meta.get("val"), torch.Tensor)


def _pads_zero(node: fx.Node, name: str) -> bool:
    if name == "constant_pad_nd":
        return not (len(node.args) > 2 and node.args[2])
    mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
    return mode == "constant" and not value


def _pooling(node: fx.Node, name: str) -> Op:
    """Average pooling is global where its window is the whole plane."""
    source = node.args[0]
    assert isinstance(source, fx.Node)
    shape = _static_shape(source)
    rank = 1 if name.endswith("1d") else 2
    if name == "mean":
        dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        if shape is None or len(shape) != 4 or not isinstance(dims, list | tuple):
            return _OPS["other"]
        return _OPS["global_avg_pool" if {int(d) % 4 for d in dims} == {2, 3} else "other"]
    given = node.args[1]
    window = [given] if isinstance(given, int) else list(given)  # type: ignore[arg-type]
    window = window * rank if len(window) == 1 else window
    spatial = shape[-rank:] if shape else None
    if name.startswith("adaptive"):
        if all(w == 1 for w in window):
            return _OPS["global_avg_pool"]
        divides = spatial is not None and all(s and s % w == 0 for s, w in zip(spatial, window))
        return _OPS["avg_pool" if divides else "other"]
    padding, ceil_mode, _, divisor = (list(node.args[3:]) + [0, False, True, None][len(node.args[3:]) :])[:4]
    if ceil_mode or divisor is not None:
        return _OPS["other"]
    unpadded = not any(padding) if isinstance(padding, list | tuple) else not padding
    return _OPS["global_avg_pool" if unpadded and spatial == window else "avg_pool"]


def _static_shape(node: fx.Node) -> list[int | None] | None:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return None
    return [int(d) if isinstance(d, int) else None for d in value.shape]
