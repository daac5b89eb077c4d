"""Operators that move elements: reshapes, slices, splits, pads, gathers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from .builder import Dim
from .registry import Call, Result, fake, is_static, lowers

_WHOLE = 2**31


@lowers(
    "aten.dropout.default", "aten.alias.default", "aten.contiguous.default", "aten.clone.default",
    "aten.detach.default", "aten.feature_dropout.default", "aten.alpha_dropout.default",
    "aten.lift_fresh_copy.default", "aten.view_as_real_copy.default",
)  # fmt: skip
def pass_through(call: Call) -> Result:
    """No node: the value is its input."""
    return call.builder.value(call.node.args[0])


@lowers(
    "aten._to_copy.default", "aten.to.dtype", "aten.to.dtype_layout", "aten.to.device",
    "aten.type_as.default", "aten.to.other", "aten.float.default",
)  # fmt: skip
def cast(call: Call) -> Result:
    return call.operand("self", call.out.dtype)


@lowers("getitem")
def getitem(call: Call) -> Result:
    source, index = call.node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    values = call.builder.values[source]
    if not isinstance(values, tuple) or index >= len(values):
        raise call.refuse(f"output {index} of {source.target} has no ONNX form", "use the first output only")
    return values[index]


def same(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are the same number or symbol (compared without adding a guard)."""
    if is_static(a) or is_static(b):
        return is_static(a) and is_static(b) and int(a) == int(b)
    return bool(a.node.expr == b.node.expr)  # type: ignore[union-attr]


def reshape_to(call: Call, x: str, source: Sequence[Dim], target: Sequence[Dim]) -> str:
    """Reshape with a constant shape where possible: 0 copies a free dimension, -1 infers one."""
    shape: list[int] = []
    for i, dim in enumerate(target):
        copied = i < len(source) and same(source[i], dim)
        shape.append(int(dim) if is_static(dim) else 0 if copied else -1)
    if shape.count(-1) > 1:
        return call.emit("Reshape", x, call.builder.shape_tensor(target))
    return call.emit("Reshape", x, call.ints(shape, "shape"))


@lowers(
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default", "aten.unflatten.int",
    "aten.view_as.default", "aten.reshape_as.default",
)  # fmt: skip
def reshape(call: Call) -> Result:
    source, target = call.fake().shape, call.out.shape
    if len(source) == len(target) and all(map(same, source, target)):
        return call.tensor()
    rows = call.builder.cache.get(
        ("rows", call.node.args[0])
    )  # attention's heads side by side, as its kernel gives them
    if rows is not None and len(target) == 3 and same(source[0], target[0]) and same(source[1], target[1]):
        return rows
    # Never Flatten: onnxruntime moves a QuantizeLinear back past Reshape and Squeeze, not past Flatten.
    return reshape_to(call, call.tensor(), source, target)


@lowers("aten.flatten.using_ints")
def flatten(call: Call) -> Result:
    return reshape(call)


@lowers("aten.permute.default", "aten.transpose.int", "aten.t.default", "aten.numpy_T.default", "aten.mT.default")
def permute(call: Call) -> Result:
    rank = call.fake().ndim
    order = list(range(rank))
    if "dims" in call.args:
        order = [dim % rank for dim in call["dims"]]
    elif rank >= 2:
        a, b = (call["dim0"] % rank, call["dim1"] % rank) if "dim0" in call.args else (rank - 2, rank - 1)
        order[a], order[b] = order[b], order[a]
    return call.tensor() if order == list(range(rank)) else call.emit("Transpose", call.tensor(), perm=order)


@lowers("aten.unsqueeze.default")
def unsqueeze(call: Call) -> Result:
    return call.emit("Unsqueeze", call.tensor(), call.ints([call.dim(call["dim"], call.out.ndim)]))


@lowers("aten.squeeze.dim", "aten.squeeze.dims", "aten.squeeze.default")
def squeeze(call: Call) -> Result:
    dims = call.args.get("dim", range(call.fake().ndim))
    shape = call.fake().shape
    chosen = [call.dim(dim) for dim in ([dims] if isinstance(dims, int) else dims)]
    if call.out.ndim == len(shape) - len(chosen):
        axes = chosen  # all go, also one whose size was found to be 1 as the graph was read
    else:
        axes = [dim for dim in chosen if is_static(shape[dim]) and int(shape[dim]) == 1]
    return call.emit("Squeeze", call.tensor(), call.ints(axes)) if axes else call.tensor()


def expand_to(call: Call, x: str, source: Sequence[Dim], target: Sequence[Dim]) -> str:
    """Broadcast; a 1 in Expand's shape keeps the input's dimension, so free ones need no computing."""
    padded = [1] * (len(target) - len(source)) + list(source)
    if len(source) == len(target) and all(map(same, padded, target)):
        return x
    return call.emit(
        "Expand",
        x,
        call.builder.shape_tensor([1 if same(a, b) else b for a, b in zip(padded, target, strict=True)]),
    )


@lowers("aten.expand.default", "aten.expand_as.default", "aten.broadcast_to.default")
def expand(call: Call) -> Result:
    return expand_to(call, call.tensor(), call.fake().shape, call.out.shape)


@lowers("aten.repeat.default", "aten.tile.default")
def repeat(call: Call) -> Result:
    repeats: list[Dim] = [_static_or_value(r) for r in call["repeats" if "repeats" in call.args else "dims"]]
    x, missing = call.tensor(), len(repeats) - call.fake().ndim
    if missing > 0:
        x = call.emit("Unsqueeze", x, call.ints(range(missing)))
    repeats = [*([1] * -missing), *repeats]
    if all(is_static(r) and int(r) == 1 for r in repeats):
        return x
    return call.emit("Tile", x, call.builder.shape_tensor(repeats))


def _static_or_value(argument: object) -> Dim:
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    assert isinstance(value, int | torch.SymInt)
    return value


@lowers("aten.cat.default", "aten.concat.default")
def cat(call: Call) -> Result:
    # torch lets a cat hold one-dimensional empty tensors, of which nothing is left.
    parts = [part for part in call["tensors"] if not _is_empty(fake(part))]
    names = [call.builder.cast(call.builder.value(p), fake(p).dtype, call.out.dtype) for p in parts]
    return names[0] if len(names) == 1 else call.emit("Concat", *names, axis=call.dim(call["dim"], call.out.ndim))


def _is_empty(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 1 and is_static(tensor.shape[0]) and int(tensor.shape[0]) == 0


@lowers("aten.stack.default")
def stack(call: Call) -> Result:
    dim = call.dim(call["dim"], call.out.ndim)
    parts = [call.emit("Unsqueeze", call.builder.value(part), call.ints([dim])) for part in call["tensors"]]
    return call.emit("Concat", *parts, axis=dim)


@lowers("aten.slice.Tensor", "aten.narrow.default")
def slice_(call: Call) -> Result:
    dim = call.dim(call["dim"])
    size = call.fake().shape[dim]
    start = _static_or_value(call["start"]) if call["start"] is not None else 0
    if "length" in call.args:
        end: Dim = start + _static_or_value(call["length"])
    else:
        end = _static_or_value(call["end"]) if call["end"] is not None else 2 * _WHOLE
    step = call.args.get("step", 1)
    whole_end = (is_static(end) and int(end) >= _WHOLE) or same(end, size)
    if is_static(size) and is_static(end):
        whole_end = whole_end or int(end) >= int(size)
    if is_static(start) and int(start) == 0 and whole_end and step == 1:
        return call.tensor()
    end = torch.iinfo(torch.int64).max if whole_end else end
    bounds = [call.builder.shape_tensor([bound]) for bound in (start, end)]
    return call.emit("Slice", call.tensor(), *bounds, call.ints([dim]), call.ints([step], "steps"))


@lowers("aten.select.int")
def select(call: Call) -> Result:
    index = _static_or_value(call["index"])
    dim = call.dim(call["dim"])
    if is_static(index):
        return call.emit("Gather", call.tensor(), call.scalar(int(index), torch.int64, "index"), axis=dim)
    chosen = call.emit("Gather", call.tensor(), call.builder.dim_tensor(index), axis=dim)
    return call.emit("Squeeze", chosen, call.ints([dim]))


def _split(call: Call, dim: int, sizes: Sequence[Dim]) -> tuple[str, ...]:
    if len(sizes) == 1:
        return (call.tensor(),)
    inputs = [call.tensor(), call.builder.shape_tensor(sizes)]
    return call.builder.emit("Split", inputs, outputs=len(sizes), axis=dim)


@lowers(
    "aten.split.Tensor", "aten.split_with_sizes.default", "aten.chunk.default", "aten.split.sizes",
    "aten.tensor_split.sections",
)  # fmt: skip
def split(call: Call) -> Result:
    dim = call.dim(call["dim"])
    return _split(call, dim, [part.shape[dim] for part in call.node.meta["val"]])


@lowers("aten.unbind.int")
def unbind(call: Call) -> Result:
    dim = call.dim(call["dim"])
    parts = _split(call, dim, [1] * len(call.node.meta["val"]))
    return tuple(call.emit("Squeeze", part, call.ints([dim])) for part in parts)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def emit_pad(call: Call, pads: Sequence[int], mode: str, value: float | None) -> str:
    """Pad; torch lists (left, right) pairs from the last dimension on, ONNX all begins then all ends."""
    if not all(isinstance(pad, int) for pad in pads):
        raise call.refuse("a computed padding", "pad by numbers")
    if not any(pads):
        return call.tensor()
    if mode == "circular" and call.opset < 19:
        raise call.refuse("circular padding needs opset 19", "export with opset=19 or later")
    rank = call.fake().ndim
    begins, ends = [0] * rank, [0] * rank
    for i in range(len(pads) // 2):
        begins[rank - 1 - i], ends[rank - 1 - i] = pads[2 * i], pads[2 * i + 1]
    # 0 is Pad's default: left out, so that the padding of codes is their zero point.
    fill = call.scalar(value, call.out.dtype, "value") if mode == "constant" and value else None
    return call.emit("Pad", call.tensor(), call.ints(begins + ends, "pads"), fill, mode=_PAD_MODES[mode])


@lowers("aten.pad.default")
def pad(call: Call) -> Result:
    return emit_pad(call, call["pad"], call["mode"], call["value"])


@lowers("aten.constant_pad_nd.default")
def constant_pad(call: Call) -> Result:
    return emit_pad(call, call["pad"], "constant", call["value"])


@lowers("aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.reflection_pad3d.default")
def reflection_pad(call: Call) -> Result:
    return emit_pad(call, call["padding"], "reflect", None)


@lowers("aten.replication_pad1d.default", "aten.replication_pad2d.default", "aten.replication_pad3d.default")
def replication_pad(call: Call) -> Result:
    return emit_pad(call, call["padding"], "replicate", None)


@lowers("aten.gather.default")
def gather(call: Call) -> Result:
    return call.emit("GatherElements", call.tensor(), call.tensor("index"), axis=call.dim(call["dim"]))


@lowers("aten.index_select.default")
def index_select(call: Call) -> Result:
    return call.emit("Gather", call.tensor(), call.tensor("index"), axis=call.dim(call["dim"]))


@lowers("aten.index.Tensor")
def index(call: Call) -> Result:
    given = [(dim, node) for dim, node in enumerate(call["indices"]) if node is not None]
    if len(given) != 1 or fake(given[0][1]).dtype not in (torch.int64, torch.int32):
        raise call.refuse("indexing by several tensors or by a mask", "index along one dimension, or use torch.where")
    dim, node = given[0]
    return call.emit("Gather", call.tensor(), call.builder.value(node), axis=dim)


@lowers("aten.flip.default")
def flip(call: Call) -> Result:
    dims = [call.dim(dim) for dim in call["dims"]]
    count, least = len(dims), torch.iinfo(torch.int64).min
    return call.emit(
        "Slice", call.tensor(), call.ints([-1] * count, "starts"), call.ints([least] * count, "ends"),
        call.ints(dims), call.ints([-1] * count, "steps"),
    )  # fmt: skip


@lowers("aten.roll.default")
def roll(call: Call) -> Result:
    if not call["dims"]:
        raise call.refuse("a roll of the flattened tensor", "name the dimensions")
    x, shape, last = call.tensor(), call.fake().shape, torch.iinfo(torch.int64).max
    for shift, dim in zip(call["shifts"], (call.dim(d) for d in call["dims"]), strict=True):
        size = shape[dim]
        if is_static(size) and shift % int(size) == 0:
            continue
        cut = -(shift % int(size)) if is_static(size) else -shift
        axes, step = call.ints([dim]), call.ints([1], "steps")
        tail = call.emit("Slice", x, call.ints([cut], "starts"), call.ints([last], "ends"), axes, step)
        head = call.emit("Slice", x, call.ints([0], "starts"), call.ints([cut], "ends"), axes, step)
        x = call.emit("Concat", tail, head, axis=dim)
    return x


@lowers("aten.pixel_shuffle.default")
def pixel_shuffle(call: Call) -> Result:
    if call.fake().ndim != 4:
        raise call.refuse("only (batch, channels, height, width) inputs have DepthToSpace", "add a batch dimension")
    return call.emit("DepthToSpace", call.tensor(), blocksize=call["upscale_factor"], mode="CRD")


def _reshape_transpose_reshape(call: Call, middle: Sequence[Dim], order: list[int]) -> str:
    x = reshape_to(call, call.tensor(), call.fake().shape, middle)
    moved = [middle[i] for i in order]
    return reshape_to(call, call.emit("Transpose", x, perm=order), moved, call.out.shape)


@lowers("aten.pixel_unshuffle.default")
def pixel_unshuffle(call: Call) -> Result:
    factor = call["downscale_factor"]
    batch, channels, height, width = call.fake().shape
    middle = [batch, channels, height // factor, factor, width // factor, factor]
    return _reshape_transpose_reshape(call, middle, [0, 1, 3, 5, 2, 4])


@lowers("aten.channel_shuffle.default", "aten.native_channel_shuffle.default")
def channel_shuffle(call: Call) -> Result:
    batch, channels, *rest = call.fake().shape
    groups = call["groups"]
    middle = [batch, groups, channels // groups, *rest]
    return _reshape_transpose_reshape(call, middle, [0, 2, 1, *range(3, len(middle))])
