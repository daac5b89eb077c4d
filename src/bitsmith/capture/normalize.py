"""Bring a captured ATen graph into the form of a LayerGraph: constants folded, no no-ops, layers as modules."""

from __future__ import annotations


from typing import Any

import torch
from torch import Tensor, fx, nn

from .layers import build_layer
from .ops import aten_name

_NO_OPS = {"contiguous", "clone", "alias", "detach", "lift_fresh_copy", "detach_", "dropout", "feature_dropout",
           "alpha_dropout"}  # fmt: skip
_ASSERTIONS = {"_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size", "_assert_scalar",
               "_assert_async"}  # fmt: skip
_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "normal", "multinomial"}


def normalize(graph: fx.GraphModule, prefix: str = "") -> fx.GraphModule:
    """The LayerGraph of a functional ATen graph; parametric calls become modules under their original names."""
    _drop_no_ops(graph)
    _fold_constants(graph)
    _views_to_reshapes(graph)
    _merge_means(graph)
    _decompose_attention(graph)
    layered = _calls_to_layers(graph, prefix)
    layered.graph.eliminate_dead_code()
    layered.graph.lint()
    layered.recompile()
    return layered


def _drop_no_ops(graph: fx.GraphModule) -> None:
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and "_guards_fn" in str(node.target):
            graph.graph.erase_node(node)
        elif node.op == "call_function":
            if aten_name(node) in _ASSERTIONS:
                graph.graph.erase_node(node)
            elif _is_no_op(node):
                node.replace_all_uses_with(node.args[0])
                graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _is_no_op(node: fx.Node) -> bool:
    name, args = aten_name(node), node.args
    if name in _NO_OPS:
        return True
    source = args[0].meta.get("val") if args and isinstance(args[0], fx.Node) else None
    value = node.meta.get("val")
    if not isinstance(source, Tensor) or not isinstance(value, Tensor):
        return False
    if name == "slice":  # x[0:] over a whole dimension
        start, end, step = (list(args) + [None] * 5)[2:5]
        return not start and (end is None or (isinstance(end, int) and end >= 2**31)) and step in (None, 1)
    if name in ("to", "_to_copy", "type_as", "float"):
        return bool(source.dtype == value.dtype)
    if name in ("view", "reshape", "expand"):
        return tuple(map(str, source.shape)) == tuple(map(str, value.shape))
    return False


def _attribute(graph: fx.GraphModule, path: str) -> Any:
    value: Any = graph
    for atom in path.split("."):
        value = getattr(value, atom)
    return value


def _fold_constants(graph: fx.GraphModule) -> None:
    """Evaluate what depends on parameters and literals only: weight norms, position tables, fixed masks."""
    constants: dict[fx.Node, Any] = {}
    for node in list(graph.graph.nodes):
        if node.op == "get_attr":
            constants[node] = _attribute(graph, str(node.target))
            continue
        if (
            node.op != "call_function"
            or not node.all_input_nodes
            and not isinstance(node.meta.get("val"), Tensor)
        ):
            continue
        if aten_name(node) in _RANDOM or not all(n in constants for n in node.all_input_nodes):
            continue
        if any(isinstance(leaf, torch.SymInt) for leaf in _sizes(node.meta.get("val"))):
            continue

        def literal(n: fx.Node) -> Any:
            return constants[n]

        args, kwargs = fx.map_arg(node.args, literal), fx.map_arg(node.kwargs, literal)
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        if not isinstance(value, Tensor):
            constants[node] = value
            continue
        name = f"folded_{node.name}"
        graph.register_buffer(name, value.detach().clone())
        with graph.graph.inserting_before(node):
            folded = graph.graph.get_attr(name)
        folded.meta.update(node.meta)
        constants[folded] = value
        node.replace_all_uses_with(folded)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _sizes(value: Any) -> list[Any]:
    return [
        size for leaf in torch.utils._pytree.tree_leaves(value) for size in getattr(leaf, "shape", [leaf])
    ]


def _views_to_reshapes(graph: fx.GraphModule) -> None:
    """``view`` fails on other memory formats; ``reshape`` means the same and does not."""
    for node in graph.graph.nodes:
        if node.op == "call_function" and aten_name(node) == "view":
            node.target = torch.ops.aten.reshape.default


def _merge_means(graph: fx.GraphModule) -> None:
    """Means over both axes of a plane, in one step or two, become a global pooling and a flatten."""
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or aten_name(node) != "mean" or not isinstance(node.args[0], fx.Node):
            continue
        source, dims = node.args[0], _mean_dims(node)
        if dims == {2} and aten_name(source) == "mean" and _mean_dims(source) == {3} and len(source.users) == 1:
            source, dims = source.args[0], {2, 3}  # x.mean(3).mean(2)
        rank = source.meta["val"].ndim  # type: ignore[union-attr]
        if dims != {2, 3} or rank != 4 or node.meta["val"].ndim != 2:
            continue
        with graph.graph.inserting_before(node):
            pooled = graph.graph.call_function(torch.ops.aten.mean.dim, (source, [2, 3], True))
            pooled.meta = {**node.meta, "val": torch.ops.aten.mean.dim(source.meta["val"], [2, 3], True)}  # type: ignore[union-attr]
            flat = graph.graph.call_function(torch.ops.aten.flatten.using_ints, (pooled, 1))
            flat.meta = dict(node.meta)
        node.replace_all_uses_with(flat)
        graph.graph.erase_node(node)
    graph.graph.eliminate_dead_code()


def _mean_dims(node: fx.Node) -> set[int]:
    source = node.args[0]
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims = [dims] if isinstance(dims, int) else dims
    if not isinstance(source, fx.Node) or not isinstance(dims, list | tuple):
        return set()
    return {int(d) % source.meta["val"].ndim for d in dims}  # type: ignore[arg-type]


def _decompose_attention(graph: fx.GraphModule) -> None:
    """Write scaled dot-product attention out as matmul, softmax, matmul, so that both products can be quantized."""
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
        created = graph.call_function(target, args)
        fake = fx.map_arg(args, lambda n: n.meta["val"])
        created.meta = {**node.meta, "val": target(*fake)}
        return created

    with graph.inserting_before(node):
        scores = call(
            aten.mul.Tensor, call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1)), scale
        )
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


def _calls_to_layers(graph: fx.GraphModule, prefix: str) -> fx.GraphModule:
    """A new GraphModule in which convolutions, linears, norms and embeddings are ``torch.nn`` modules."""
    root = nn.Module()
    placed: dict[tuple[Any, ...], str] = {}

    def attribute(node: Any) -> Any:
        is_constant = isinstance(node, fx.Node) and node.op == "get_attr"
        return _attribute(graph, str(node.target)) if is_constant else None

    for node in list(graph.graph.nodes):
        if node.op != "call_function":
            continue
        built = build_layer(node, attribute)
        if built is None:
            continue
        layer, inputs, weights = built
        key = (
            type(layer),
            *(str(w.target) if isinstance(w, fx.Node) else None for w in weights),
            repr(layer),
        )
        if key not in placed:
            placed[key] = _unique(root, _layer_name(node, weights, prefix))
            set_module(root, placed[key], layer)
        with graph.graph.inserting_before(node):
            call = graph.graph.create_node("call_module", placed[key], tuple(inputs))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.graph.erase_node(node)
    for node in reversed(list(graph.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.graph.erase_node(node)
    _move_constants(graph, root)
    codegen = graph.graph._codegen
    layered = fx.GraphModule(root, graph.graph, class_name="LayerGraph")
    layered.graph.set_codegen(codegen)
    return layered


def _move_constants(graph: fx.GraphModule, root: nn.Module) -> None:
    """Keep only the tensors that the graph still reads, as flat buffers."""
    names: dict[str, str] = {}
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        path = str(node.target)
        if path not in names:
            value = _attribute(graph, path)
            names[path] = path.replace(".", "_")
            node.meta.setdefault("val", value)
            root.register_buffer(names[path], value.detach().clone())
        node.target = names[path]


def _layer_name(node: fx.Node, weights: list[Any], prefix: str) -> str:
    """The path of the module that owns the weight, or the module that made the call."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    weight = str(weights[0].target) if weights and isinstance(weights[0], fx.Node) else ""
    if weight and not weight.startswith("folded_"):
        name = weight.removesuffix("weight").rstrip("._")
    else:
        name, owner = (str(stack[-1][0]), str(stack[-1][1])) if stack else ("", "")
        if not owner.endswith(("Conv1d", "Conv2d", "Conv3d", "Linear", "Norm1d", "Norm2d", "Norm3d")):
            name = f"{name}.{node.name}".lstrip(".")
    name = name.removeprefix(prefix)
    return name or str(node.name)


def _unique(root: nn.Module, name: str) -> str:
    candidate, number = name, 1
    existing = {path for path, _ in root.named_modules() if path}
    while any(path == candidate or path.startswith(candidate + ".") for path in existing):
        number += 1
        candidate = f"{name}_{number}"
    return candidate


def set_module(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    owner = root
    for atom in parents:
        if not hasattr(owner, atom):
            owner.add_module(atom, nn.Module())
        owner = getattr(owner, atom)
    owner.add_module(leaf, module)
