"""Rewrites of an ATen graph to fewer kinds of operators, each exact."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .ops import aten_name

# Constants of a shape, whatever tensor they are asked of -> what they are filled with (None: their argument).
_FILLS = {"new_zeros": 0, "zeros_like": 0, "new_ones": 1, "ones_like": 1, "new_full": None, "full_like": None}
_WHOLE = 2**31  # from here on the end of a slice means the end of the axis
# Regions that run a part of the graph under another autograd or autocast mode -> the place of that part.
_REGIONS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def simplify(graph: fx.GraphModule) -> None:
    """What must come before constants are folded."""
    _batch_norms_to_functions(graph)
    _zeros_in_concats_to_pads(graph)
    _free_fills(graph)
    _scatters_to_concats(graph)
    _views_to_reshapes(graph)
    _einsums_to_products(graph)


def write_out(graph: fx.GraphModule, *, whole_attention: bool = False) -> None:
    """Composite operators in the vocabulary of a LayerGraph."""
    _merge_means(graph)
    _one_dimensional_pools(graph)
    if not whole_attention:
        _decompose_attention(graph)


def inline_regions(graph: fx.GraphModule) -> None:
    """Put the body of ``no_grad`` and ``autocast`` regions in their place: float inference needs neither."""
    for node in list(graph.graph.nodes):
        index = _REGIONS.get(aten_name(node)) if node.op == "call_function" else None
        if index is None:
            continue
        part, inputs = node.args[index], node.args[index + 1 :]
        assert isinstance(part, fx.Node)
        body = getattr(graph, str(part.target))
        inline_regions(body)
        _move_attributes(graph, body, str(part.target))
        places = [n for n in body.graph.nodes if n.op == "placeholder"]
        with graph.graph.inserting_before(node):
            results = graph.graph.graph_copy(body.graph, dict(zip(places, inputs)))
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
            graph.graph.erase_node(user)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _move_attributes(graph: fx.GraphModule, body: fx.GraphModule, prefix: str) -> None:
    for node in body.graph.nodes:
        if node.op == "get_attr":
            value: Any = body
            for atom in str(node.target).split("."):
                value = getattr(value, atom)
            node.target = f"{prefix}_{str(node.target).replace('.', '_')}"
            setattr(graph, node.target, value)


def _scatters_to_concats(graph: fx.GraphModule) -> None:
    """Functionalized writes into a slice become a concat of what is kept and what is written."""
    aten = torch.ops.aten

    def call(target: Any, *args: Any) -> fx.Node:
        return _call(graph.graph, target, *args)

    for node in list(graph.graph.nodes):
        if node.op != "call_function" or aten_name(node) not in ("slice_scatter", "copy"):
            continue
        whole, part, dim, start, end, step = (list(node.args) + [0, None, None, 1][len(node.args) - 2 :])[:6]
        fake, written = whole.meta["val"], part.meta["val"] if isinstance(part, fx.Node) else None
        if aten_name(node) == "copy":
            if written is not None and (written.shape, written.dtype) == (fake.shape, fake.dtype):
                node.replace_all_uses_with(part)
                graph.graph.erase_node(node)
            continue
        size, start = fake.shape[dim], start or 0
        if not start and (end is None or (isinstance(end, int) and end >= _WHOLE)):
            node.replace_all_uses_with(part)
            graph.graph.erase_node(node)
            continue
        end = size if end is None else min(end, size) if isinstance(size, int) else end
        if step != 1 or not all(isinstance(value, int) and value >= 0 for value in (size, start, end)):
            continue
        with graph.graph.inserting_before(node):
            before = [call(aten.slice.Tensor, whole, dim, 0, start)] if start else []
            after = [call(aten.slice.Tensor, whole, dim, end, size)] if end < size else []
            result = call(aten.cat.default, [*before, part, *after], dim) if before or after else part
        node.replace_all_uses_with(result)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _batch_norms_to_functions(graph: fx.GraphModule) -> None:
    """The form that functionalization gives a batch norm yields three values, of which one is read."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or aten_name(node) != "_native_batch_norm_legit_no_training":
            continue
        source, weight, bias, mean, variance, momentum, eps = node.args
        for user in list(node.users):
            with graph.graph.inserting_before(user):
                arguments = (source, weight, bias, mean, variance, False, momentum, eps, False)
                norm = graph.graph.call_function(torch.ops.aten.batch_norm.default, arguments)
            norm.meta = {**node.meta, "val": user.meta["val"]}
            user.replace_all_uses_with(norm)
            graph.graph.erase_node(user)
    graph.graph.eliminate_dead_code()


def _free_fills(graph: fx.GraphModule) -> None:
    """``x.new_zeros(3)`` does not depend on x: where its shape is fixed it is a constant."""
    for node in graph.graph.nodes:
        if node.op != "call_function" or aten_name(node) not in _FILLS:
            continue
        value, fill = node.meta["val"], _FILLS[aten_name(node)]
        if any(isinstance(size, torch.SymInt) for size in value.shape):
            continue
        if fill is None:
            fill = node.args[2] if aten_name(node) == "new_full" else node.args[1]
        node.target = torch.ops.aten.full.default
        node.args = (list(value.shape), fill)
        node.kwargs = {"dtype": value.dtype, "device": value.device}


def _zeros_in_concats_to_pads(graph: fx.GraphModule) -> None:
    """Zeros concatenated before or behind a tensor are a padding, which leaves its codes what they are."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or aten_name(node) not in ("cat", "concat"):
            continue
        parts, dim = list(node.args[0]), node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        kept = [part for part in parts if not _is_zeros(part)]
        if len(kept) != 1 or len(parts) == 1:
            continue
        axis = dim % node.meta["val"].ndim
        sizes = [part.meta["val"].shape[axis] for part in parts]
        if not all(isinstance(size, int) for size in sizes):
            continue
        place = parts.index(kept[0])
        pads = [0, 0] * (node.meta["val"].ndim - 1 - axis) + [sum(sizes[:place]), sum(sizes[place + 1 :])]
        with graph.graph.inserting_before(node):
            padded = graph.graph.call_function(aten.constant_pad_nd.default, (kept[0], pads, 0.0))
        padded.meta = dict(node.meta)
        node.replace_all_uses_with(padded)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _is_zeros(node: fx.Node) -> bool:
    """Whether a value is zero whatever the inputs are."""
    if node.op != "call_function":
        return False
    if aten_name(node) in ("zeros", "new_zeros", "zeros_like"):
        return True
    return aten_name(node) in ("full", "new_full") and bool(node.args[-1] == 0)


def _views_to_reshapes(graph: fx.GraphModule) -> None:
    """``view`` fails on other memory formats; ``reshape`` means the same, does not, and names its sizes."""
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        if aten_name(node) in ("view", "_unsafe_view"):
            node.target = torch.ops.aten.reshape.default
        elif aten_name(node) in ("view_as", "reshape_as"):
            sizes = [-1 if isinstance(size, torch.SymInt) else size for size in node.meta["val"].shape]
            if sizes.count(-1) <= 1:
                node.target, node.args = torch.ops.aten.reshape.default, (node.args[0], sizes)


def _einsums_to_products(graph: fx.GraphModule) -> None:
    """An einsum of two operands over one common axis is a matmul between permutes, which can be quantized."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        orders = _matmul_orders(node) if node.op == "call_function" and aten_name(node) == "einsum" else None
        if orders is None:
            continue
        value, operands = node, list(node.args[1])
        with graph.graph.inserting_before(node):
            for index, order in enumerate(orders[:2]):
                if order != sorted(order):
                    operands[index] = _call(graph.graph, aten.permute.default, operands[index], order)
            value = _call(graph.graph, aten.matmul.default, *operands)
            if orders[2] != sorted(orders[2]):
                value = _call(graph.graph, aten.permute.default, value, orders[2])
        value.meta = {**node.meta, "val": value.meta["val"]}
        node.replace_all_uses_with(value)
        graph.graph.erase_node(node)


def _matmul_orders(node: fx.Node) -> tuple[list[int], list[int], list[int]] | None:
    """How to permute both operands and then their product, or None where it is more than one matmul."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    sides = terms.split(",")
    if len(sides) != 2 or "." in terms or not result or any(len(set(t)) != len(t) for t in (*sides, result)):
        return None
    left, right = sides
    common = [c for c in left if c in right]
    batch, summed = [c for c in common if c in result], [c for c in common if c not in result]
    rows, columns = [c for c in left if c not in right], [c for c in right if c not in left]
    several_rows = len(rows) > 1 and bool(batch)
    if len(summed) != 1 or len(columns) != 1 or not rows or several_rows:
        return None
    product = [*batch, *rows, *columns]
    if sorted(product) != sorted(result):
        return None  # an axis is summed in one operand alone
    return (
        [left.index(c) for c in [*batch, *rows, *summed]],
        [right.index(c) for c in [*batch, *summed, *columns]],
        [product.index(c) for c in result],
    )


def _call(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    """A call at the insertion point, with its fake value."""
    created: fx.Node = graph.call_function(target, args)
    created.meta["val"] = target(*fx.map_arg(args, lambda n: n.meta["val"]))
    return created


def _merge_means(graph: fx.GraphModule) -> None:
    """Means over both axes of a plane, in one step or two, become a global pooling (and a flatten)."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or aten_name(node) != "mean":
            continue
        source, axes = node.args[0], _mean_axes(node)
        if not isinstance(source, fx.Node) or axes is None:
            continue
        if len(axes) == 1 and aten_name(source) == "mean" and len(source.users) == 1:  # x.mean(3).mean(2)
            first = _mean_axes(source)
            if first is None or len(first) != 1:
                continue
            dropped = source.meta["val"].ndim == 3
            axes = first | {axis + 1 if dropped and axis >= min(first) else axis for axis in axes}
            source = source.args[0]
        kept = node.meta["val"].ndim in (2, 4)  # none or both of the axes
        if kept and axes == {2, 3} and source.meta["val"].ndim == 4:
            _replace_by_pooling(graph.graph, node, source)
    graph.graph.eliminate_dead_code()


def _replace_by_pooling(graph: fx.Graph, node: fx.Node, source: fx.Node) -> None:
    pool = torch.ops.aten.mean.dim
    with graph.inserting_before(node):
        result = graph.call_function(pool, (source, [2, 3], True))
        result.meta = {**node.meta, "val": pool(source.meta["val"], [2, 3], True)}
        if node.meta["val"].ndim == 2:
            result = graph.call_function(torch.ops.aten.flatten.using_ints, (result, 1))
            result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _mean_axes(node: fx.Node) -> set[int] | None:
    """The axes of a mean, counted from the front; None where it is over all."""
    source = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(source, fx.Node) or not isinstance(dims, list | tuple):
        return None
    return {int(d) % source.meta["val"].ndim for d in dims}


def _one_dimensional_pools(graph: fx.GraphModule) -> None:
    """``max_pool1d`` as ``max_pool2d`` over rows of height 1: torch has no kernel for integers in one dimension."""
    aten = torch.ops.aten
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or aten_name(node) != "max_pool1d":
            continue
        source, kernel, *rest = node.args
        stride, padding, dilation, ceil_mode = (list(rest) + [[], 0, 1, False][len(rest) :])[:4]

        def row(value: Any, unit: int) -> list[int]:
            values = [value] if isinstance(value, int) else list(value)
            return [unit, *values] if values else []

        sizes = (row(kernel, 1), row(stride, 1), row(padding, 0), row(dilation, 1))
        with graph.graph.inserting_before(node):
            rows = _call(graph.graph, aten.unsqueeze.default, source, 2)
            pooled = _call(graph.graph, aten.max_pool2d.default, rows, *sizes, ceil_mode)
            flat = _call(graph.graph, aten.squeeze.dim, pooled, 2)
        node.replace_all_uses_with(flat)
        graph.graph.erase_node(node)


def _decompose_attention(graph: fx.GraphModule) -> None:
    """Write attention out as matmul, softmax, matmul, so that both products can be quantized."""
    for node in list(graph.graph.nodes):
        if node.op == "call_function" and aten_name(node) == "scaled_dot_product_attention":
            _write_out_attention(graph.graph, node)


def _write_out_attention(graph: fx.Graph, node: fx.Node) -> None:
    aten = torch.ops.aten
    query, key, value = node.args[:3]
    options = dict(zip(("attn_mask", "dropout_p", "is_causal"), node.args[3:])) | dict(node.kwargs)
    q, k = query.meta["val"], key.meta["val"]  # type: ignore[union-attr]
    scale = options.get("scale") or float(q.shape[-1]) ** -0.5
    if options.get("enable_gqa") or (options.get("is_causal") and not isinstance(q.shape[-2], int)):
        return  # left whole, in float

    def call(target: Any, *args: Any) -> fx.Node:
        return _call(graph, target, *args)

    with graph.inserting_before(node):
        scores = call(aten.mul.Tensor, call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1)), scale)
        mask = options.get("attn_mask")
        if options.get("is_causal"):
            mask = _causal_mask(graph, int(q.shape[-2]), int(k.shape[-2]))
        if isinstance(mask, fx.Node):
            if mask.meta["val"].dtype == torch.bool:
                mask = call(aten.where.ScalarOther, mask, scores, float("-inf"))
                scores = mask
            else:
                scores = call(aten.add.Tensor, scores, mask)
        result = call(aten.matmul.default, call(aten.softmax.int, scores, -1), value)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def _causal_mask(graph: fx.Graph, queries: int, keys: int) -> fx.Node:
    module = graph.owning_module
    assert module is not None
    name = f"causal_mask_{queries}_{keys}"
    mask = torch.full((queries, keys), float("-inf")).triu(1)
    module.register_buffer(name, mask)
    created = graph.get_attr(name)
    created.meta["val"] = mask
    return created
