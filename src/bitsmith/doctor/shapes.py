"""Rules about sizes that TI's TIDL runs: D11 to D16 and D30. Source: its list of supported operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..capture.ops import aten_name, layer_of, op_of
from ..place.plan import operands
from .activations import function_name
from .rule import Note, rule
from .structure import is_depthwise
from .subject import Subject, shape_of

_POOLED_PLANE = 1024
_RANK_OF_LAYERS, _RANK = 4, 6
_COORDINATES = "half_pixel, asymmetric or pytorch_half_pixel"


def _pair(value: Any) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value, value)
    return (int(value[0]),) * 2 if len(value) == 1 else tuple(map(int, value))


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of an ATen call by their names, defaults filled in."""
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    if schema is None:
        return {}
    return {
        a.name: node.args[i] if i < len(node.args) else node.kwargs.get(a.name, a.default_value)
        for i, a in enumerate(schema.arguments)
    }


@rule("D11", "convolutions have kernels and strides that TIDL runs", "tidl")
def convolutions(subject: Subject) -> Iterator[Note]:
    """Square strides of 1 or 2, small odd kernels."""
    assert subject.device is not None
    for node in subject.nodes("conv"):
        layer = layer_of(node)
        if not isinstance(layer, nn.Conv1d | nn.Conv2d):
            yield Note("error", node, "TIDL convolves one or two dimensions", "nn.Conv2d over each slice")
            continue
        kernel, stride = tuple(layer.kernel_size), tuple(layer.stride)
        width = shape_of(node.args[0])[-1:]
        if (why := _refused(layer, kernel, stride, subject.device.stride_3)) is not None:
            yield Note("error", node, why[0], why[1])
        elif max(kernel) >= 7:
            yield Note(
                "warning", node, f"kernel {_times(kernel)}: three convolutions of 3 x 3 cost less and round better",
                "bitsmith.doctor.fix(model, x, 'large_kernels'), and train",
            )  # fmt: skip
        elif any(k % 2 == 0 for k in kernel):
            odd = tuple(k + 1 - k % 2 for k in kernel)
            yield Note("warning", node, f"kernel {_times(kernel)} is even: TIDL pads it to an odd one",
                       f"kernel_size={odd[0]}, and train")  # fmt: skip
        padding = max(_pair(layer.padding)) if not isinstance(layer.padding, str) else 0
        if width and padding > width[0]:
            yield Note("error", node, f"pads {padding} pixels to an input {width[0]} wide", "a smaller padding")


def _refused(
    layer: nn.Module, kernel: tuple[int, ...], stride: tuple[int, ...], stride_3: bool
) -> tuple[str, str] | None:
    """Why the device does not run a convolution, and what to do."""
    if len(set(stride)) > 1:
        return f"strides {_times(stride)} differ", "the same stride in both directions"
    if is_depthwise(layer) and (max(kernel) not in (3, 5, 7) or len(set(kernel)) > 1 or stride[0] > 2):
        return (
            f"depthwise kernel {_times(kernel)} with stride {stride[0]}; TIDL runs 3, 5 and 7 with stride 1 or 2",
            "kernel_size=3 and stride 1 or 2",
        )
    if stride[0] == 4 and set(kernel) != {11}:
        return f"stride 4 with kernel {_times(kernel)}; TIDL has it with 11 x 11 only", "two convolutions of stride 2"
    if stride[0] == 3 and not (set(kernel) == {3} and stride_3):
        return f"stride 3 with kernel {_times(kernel)} is not run here", "stride 2, or a pooling in front"
    if stride[0] > 4:
        return (
            f"stride {stride[0]} with kernel {_times(kernel)}; TIDL has strides of 1, 2 and 4",
            "several convolutions of stride 2, as in hybrid vision transformers",
        )
    if stride[0] == 2 and max(kernel) > 7:
        return f"kernel {_times(kernel)} with stride 2; the largest is 7", "a stack of 3 x 3, the first with stride 2"
    return None


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(map(str, sizes))


@rule("D12", "poolings have windows that TIDL runs", "tidl")
def poolings(subject: Subject) -> Iterator[Note]:
    """Windows of 1 to 3 with stride 1 or 2; planes of at most 1024 pixels averaged whole."""
    for node in subject.nodes("max_pool", "avg_pool", "global_avg_pool"):
        if op_of(node).name == "global_avg_pool":
            plane = shape_of(node.args[0])[2:]
            if len(plane) == 2 and plane[0] * plane[1] > _POOLED_PLANE:
                yield Note("error", node, f"averages {plane[0]} x {plane[1]} pixels; TIDL averages {_POOLED_PLANE}",
                           "pool by 2 x 2 first, or write it as a matmul with a constant row")  # fmt: skip
            continue
        found = arguments(node)
        if "kernel_size" not in found:
            continue
        kernel = _pair(found["kernel_size"])
        stride = _pair(found["stride"]) if found.get("stride") else kernel
        dilation = _pair(found.get("dilation") or 1)
        if max(kernel) > 3 or max(stride) > 2 or len(set(stride)) > 1 or (max(kernel) == 1 and stride[0] != 2):
            yield Note("error", node, f"window {_times(kernel)} with stride {_times(stride)}; TIDL runs 1 to 3 with "
                       "stride 1 or 2", "a cascade: two 3 x 3 of stride 1 see 5 x 5, three see 7 x 7")  # fmt: skip
        if max(dilation) > 1:
            yield Note("error", node, f"dilation {dilation[0]}; TIDL has none in poolings", "dilation=1")


@rule("D13", "transposed convolutions have 2 x 2 or 4 x 4 kernels and stride 2", "tidl")
def transposed(subject: Subject) -> Iterator[Note]:
    """Other sizes are not run; a resize with a convolution behind it does the same and rounds less."""
    for node in subject.nodes("conv_transpose"):
        layer: Any = layer_of(node)
        kernel, stride = tuple(layer.kernel_size), tuple(layer.stride)
        if set(kernel) not in ({2}, {4}) or set(stride) != {2} or layer.groups > 1:
            yield Note(
                "error", node, f"kernel {_times(kernel)}, stride {_times(stride)}, {layer.groups} groups; TIDL has 2 x "
                "2 and 4 x 4 with stride 2 in one group",
                "nn.Upsample(scale_factor=2, mode='nearest') and nn.Conv2d(..., 3, padding=1), and train",
            )  # fmt: skip


@rule("D14", "resizes have whole factors of two", "tidl")
def resizes(subject: Subject) -> Iterator[Note]:
    """Factors of a power of two, the same in both directions, upwards; nearest or linear."""
    for node in subject.nodes():
        name = aten_name(node)
        if node.op != "call_function" or "upsample" not in name:
            continue
        before, after = shape_of(node.args[0])[2:], shape_of(node)[2:]
        factors = [b / a for a, b in zip(before, after)]
        if any(kind in name for kind in ("bicubic", "aa")):
            yield Note("error", node, f"{name}: TIDL resizes to the nearest pixel or linearly", "mode='bilinear'")
        elif len(set(factors)) > 1 or any(f < 1 or f != int(f) or int(f) & (int(f) - 1) for f in factors):
            yield Note(
                "error", node, f"resizes {_times(tuple(before))} to {_times(tuple(after))}; TIDL has 1, 2, 4 ..., "
                "the same in both directions", "nn.Upsample(scale_factor=2), and sizes that divide",
            )  # fmt: skip
        elif arguments(node).get("output_size") is not None:
            yield Note("warning", node, "gives a size where TIDL wants a factor: Bitsmith's files name the factor",
                       f"F.interpolate(x, scale_factor={int(factors[0])})")  # fmt: skip


@rule("D30", "upsampling does not align corners; pixel shuffles follow a 1 x 1 convolution", "tidl")
def corners(subject: Subject) -> Iterator[Note]:
    """Aligned corners need a different weight for every pixel; a depth-to-space is run as part of a convolution."""
    for node in subject.nodes():
        if node.op == "call_function" and arguments(node).get("align_corners"):
            yield Note("warning", node, f"aligned corners; TIDL has {_COORDINATES}", "align_corners=False")
        if function_name(node) == "pixel_shuffle":
            source = node.args[0]
            layer = layer_of(source) if isinstance(source, fx.Node) and source.op == "call_module" else None
            if not (isinstance(layer, nn.Conv2d) and set(layer.kernel_size) == {1}):
                yield Note("warning", node, "a pixel shuffle that no 1 x 1 convolution comes before",
                           "nn.Conv2d(c, c, 1) directly in front of nn.PixelShuffle")  # fmt: skip


@rule("D15", "tensors have few axes; concats and slices keep to inner ones", "tidl")
def axes(subject: Subject) -> Iterator[Note]:
    """Four axes that are not 1 around layers, six elsewhere; no work along the batch."""
    for node in subject.nodes():
        op, shape = op_of(node), shape_of(node)
        rank = sum(size > 1 for size in shape)
        most = _RANK_OF_LAYERS if op.role == "compute" or "pool" in op.name else _RANK
        if rank > most:
            yield Note("error", node, f"{rank} axes that are not 1; TIDL has {most} here", "reshape in front of it")
        if op.name == "cat":
            axis = int(arguments(node).get("dim") or 0) % max(len(shape), 1)
            if len(shape) - axis > 3 or axis == 0:
                yield Note("error", node, f"concatenates along axis {axis} of {len(shape)}; TIDL has the last three",
                           "permute, so that channels, rows or columns are put together")  # fmt: skip
        if function_name(node) == "slice" and int(arguments(node).get("step") or 1) != 1:
            yield Note(
                "error", node, "slices with a step; TIDL takes every element", "a pooling of stride 2, or reshape"
            )


@rule("D16", "softmax, argmax, gather and sizes are as TIDL runs them", "tidl")
def constants(subject: Subject) -> Iterator[Note]:
    """Softmax along the last axis or the rows, argmax along channels, constant indices and sizes, no casts between."""
    for node in subject.nodes():
        name, shape = function_name(node), shape_of(node)
        found = arguments(node)
        if name in ("softmax", "_softmax", "log_softmax"):
            axis = int(found["dim"]) % max(len(shape), 1)
            if len(shape) - axis > 2:
                yield Note("error", node, f"softmax along axis {axis} of {len(shape)}; TIDL has the last two",
                           "transpose in front of it")  # fmt: skip
        elif name == "argmax":
            before = len(shape_of(node.args[0]))
            if found.get("dim") is None or before - int(found["dim"]) % before != 3 or not found.get("keepdim"):
                yield Note("error", node, "argmax along channels with keepdim=True is the one that TIDL has",
                           "x.argmax(1, keepdim=True) on (N, C, H, W)")  # fmt: skip
        elif name in ("index", "gather", "index_select", "embedding"):
            indices = [n for n in node.all_input_nodes if _is_integer(n) and n.op != "get_attr"]
            if indices and not all(n.op == "placeholder" for n in indices):
                yield Note("error", node, f"{name} with computed indices; TIDL gathers constant ones", "a buffer")
        elif name in ("_to_copy", "to", "type_as") and not _at_end(node):
            yield Note("error", node, "a cast between layers; TIDL has them at inputs and outputs only",
                       "one dtype inside the model")  # fmt: skip
        elif name in ("nonzero", "masked_select", "unique"):
            yield Note("error", node, f"{name} gives as many values as there happen to be", "torch.where with a mask")


def _is_integer(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point()


def _at_end(node: fx.Node) -> bool:
    starts = all(n.op == "placeholder" for n in operands(node) or node.all_input_nodes)
    return starts or all(user.op == "output" for user in node.users)
