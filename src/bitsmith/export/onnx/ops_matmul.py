"""Matrix products and normalization over features."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .builder import Builder, Dim
from .ops_layers import same_padding
from .ops_pool import per_axis
from .registry import Call, Result, fake, is_static, lowers


@lowers("aten.matmul.default", "aten.bmm.default", "aten.mm.default", "aten.mv.default", "aten.dot.default")
def matmul(call: Call) -> Result:
    first, second = list(call.args)[:2]
    return call.emit("MatMul", call.tensor(first), call.tensor(second))


@lowers("aten.baddbmm.default", "aten.addmm.default")
def add_matmul(call: Call) -> Result:
    if call["alpha"] != 1 or call["beta"] != 1:
        raise call.refuse("alpha or beta is not 1", "write the product and the sum separately")
    names = list(call.args)
    return call.emit("Add", call.emit("MatMul", call.tensor(names[1]), call.tensor(names[2])), call.tensor())


@lowers("aten.einsum.default")
def einsum(call: Call) -> Result:
    return call.emit("Einsum", *(call.builder.value(t) for t in call["tensors"]), equation=call["equation"])


@lowers("aten.linear.default")
def linear(call: Call) -> Result:
    """A linear whose weight is computed by the model; constant weights come as modules."""
    rank = call.fake("weight").ndim
    weight = call.emit("Transpose", call.tensor("weight"), perm=list(range(rank))[::-1])
    product = call.emit("MatMul", call.tensor("input"), weight)
    return product if call["bias"] is None else call.emit("Add", product, call.tensor("bias"))


@lowers(
    "aten.conv1d.default", "aten.conv2d.default", "aten.conv3d.default", "aten.conv1d.padding",
    "aten.conv2d.padding", "aten.conv3d.padding",
)  # fmt: skip
def conv(call: Call) -> Result:
    """A convolution whose weight is computed by the model; constant weights come as modules."""
    rank = call.fake("input").ndim - 2
    kernel = [int(size) for size in call.fake("weight").shape[2:]]
    dilation, padding = per_axis(call["dilation"], rank), call["padding"]
    if isinstance(padding, str):
        pads = same_padding(kernel, dilation) if padding == "same" else [0] * (2 * rank)
    else:
        pads = per_axis(padding, rank) * 2
    return call.emit(
        "Conv", call.tensor("input"), call.tensor("weight"), call.optional("bias"), kernel_shape=kernel,
        strides=per_axis(call["stride"], rank), dilations=dilation, pads=pads, group=call["groups"],
    )  # fmt: skip


def emit_layer_norm(
    builder: Builder, x: str, shape: list[int], weight: str | None, bias: str | None, epsilon: float
) -> str:
    """LayerNormalization; its definition before opset 17."""
    if builder.opset >= 17:
        if builder.for_onnxruntime:
            _keep_apart(builder, x)
        scale = weight or builder.constant(torch.ones(shape), "weight")
        return builder.emit("LayerNormalization", [x, scale, bias], axis=-len(shape), epsilon=epsilon)[0]
    (mean,) = _mean(builder, x, len(shape))
    (centered,) = builder.emit("Sub", [x, mean])
    (square,) = builder.emit("Mul", [centered, centered])
    (variance,) = _mean(builder, square, len(shape))
    (shifted,) = builder.emit("Add", [variance, builder.constant(torch.tensor(epsilon), "epsilon")])
    (deviation,) = builder.emit("Sqrt", [shifted])
    (y,) = builder.emit("Div", [centered, deviation])
    return _affine(builder, y, weight, bias)


def _keep_apart(builder: Builder, x: str) -> None:
    """Write a layer norm's Add of two activations as a Sum, the same operator by another name.

    onnxruntime 1.31 fuses an Add into the layer norm, in a kernel that takes 2 to 10 times as long as the two.
    """
    maker = next((node for node in reversed(builder.nodes) if x in node.output), None)
    if maker is not None and maker.op_type == "Add" and not any(name in builder.initializers for name in maker.input):
        maker.op_type = "Sum"


def _mean(builder: Builder, x: str, rank: int) -> tuple[str, ...]:
    axes = list(range(-rank, 0))
    if builder.opset >= 18:
        return builder.emit("ReduceMean", [x, builder.constant(torch.tensor(axes), "axes")], keepdims=1)
    return builder.emit("ReduceMean", [x], axes=axes, keepdims=1)


def _affine(builder: Builder, x: str, weight: str | None, bias: str | None) -> str:
    if weight is not None:
        (x,) = builder.emit("Mul", [x, weight])
    if bias is not None:
        (x,) = builder.emit("Add", [x, bias])
    return x


def emit_group_norm(
    builder: Builder,
    x: str,
    shape: Sequence[Dim],
    groups: int,
    weight: str | None,
    bias: str | None,
    epsilon: float,
) -> str:
    """Group norm as an instance norm over (batch, groups, rest): the same at every opset.

    GroupNormalization itself took its scale per group until opset 21.
    """
    ones = builder.constant(torch.ones(groups), "ones")
    zeros = builder.constant(torch.zeros(groups), "zeros")
    grouped = builder.constant(torch.tensor([0, groups, -1]), "grouped_shape")
    (y,) = builder.emit("Reshape", [x, grouped])
    (y,) = builder.emit("InstanceNormalization", [y, ones, zeros], epsilon=epsilon)
    if all(is_static(dim) for dim in shape[1:]):
        back = builder.constant(torch.tensor([0, *(int(dim) for dim in shape[1:])]), "shape")
    else:
        back = builder.shape_tensor(shape)
    (y,) = builder.emit("Reshape", [y, back])
    return _affine(builder, y, weight, bias)


@lowers("aten.layer_norm.default")
def layer_norm(call: Call) -> Result:
    weight, bias = call.optional("weight"), call.optional("bias")
    return emit_layer_norm(call.builder, call.tensor("input"), call["normalized_shape"], weight, bias, call["eps"])


@lowers("aten.rms_norm.default")
def rms_norm(call: Call) -> Result:
    dtype, axes = call.out.dtype, list(range(-len(call["normalized_shape"]), 0))
    x = call.tensor("input")
    square = call.emit("Mul", x, x)
    if call.opset >= 18:
        mean = call.emit("ReduceMean", square, call.ints(axes), keepdims=1)
    else:
        mean = call.emit("ReduceMean", square, axes=axes, keepdims=1)
    epsilon = torch.finfo(dtype).eps if call["eps"] is None else call["eps"]
    root = call.emit("Sqrt", call.emit("Add", mean, call.scalar(epsilon, dtype, "epsilon")))
    return _affine(call.builder, call.emit("Div", x, root), call.optional("weight"), None)


@lowers("aten.group_norm.default")
def group_norm(call: Call) -> Result:
    x, rank = call.fake("input"), call.fake("input").ndim
    axes = call.ints(range(1, rank - 1))
    weight, bias = (
        call.emit("Unsqueeze", name, axes) if (name := call.optional(part)) is not None and rank > 2 else name
        for part in ("weight", "bias")
    )
    return emit_group_norm(call.builder, call.tensor("input"), x.shape, call["num_groups"], weight, bias, call["eps"])


@lowers("aten.instance_norm.default")
def instance_norm(call: Call) -> Result:
    if not call["use_input_stats"]:
        raise call.refuse("an instance norm with running statistics", "use a batch norm")
    channels = int(call.fake("input").shape[1])
    weight = call.optional("weight") or call.builder.constant(torch.ones(channels), "ones")
    bias = call.optional("bias") or call.builder.constant(torch.zeros(channels), "zeros")
    return call.emit("InstanceNormalization", call.tensor("input"), weight, bias, epsilon=call["eps"])


@lowers("aten.batch_norm.default")
def batch_norm(call: Call) -> Result:
    if call["running_mean"] is None or call["training"]:
        raise call.refuse("a batch norm over the batch's own statistics", "train with track_running_stats=True")
    channels = fake(call["running_mean"]).shape[0]
    weight = call.optional("weight") or call.builder.constant(torch.ones(int(channels)), "ones")
    bias = call.optional("bias") or call.builder.constant(torch.zeros(int(channels)), "zeros")
    statistics = (call.tensor("running_mean"), call.tensor("running_var"))
    return call.emit("BatchNormalization", call.tensor("input"), weight, bias, *statistics, epsilon=call["eps"])


@lowers("aten._native_batch_norm_legit_no_training.default")
def batch_norm_decomposed(call: Call) -> Result:
    """What ``run_decompositions`` makes of a batch norm in eval mode: (output, nothing, nothing)."""
    channels = int(fake(call["running_mean"]).shape[0])
    weight = call.optional("weight") or call.builder.constant(torch.ones(channels), "ones")
    bias = call.optional("bias") or call.builder.constant(torch.zeros(channels), "zeros")
    inputs = (call.tensor("input"), weight, bias, call.tensor("running_mean"), call.tensor("running_var"))
    return (call.emit("BatchNormalization", *inputs, epsilon=call["eps"]),)


@lowers("aten.embedding.default")
def embedding(call: Call) -> Result:
    return call.emit("Gather", call.tensor("weight"), call.tensor("indices"), axis=0)
