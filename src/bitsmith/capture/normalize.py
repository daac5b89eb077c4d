"""Bring a captured ATen graph into the form of a LayerGraph: constants folded, layers as modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn

from .layers import build_layer
from .ops import aten_name
from .rewrites import simplify, write_out

_NO_OPS = {"contiguous", "clone", "alias", "detach", "lift_fresh_copy", "dropout", "feature_dropout",
           "alpha_dropout"}  # fmt: skip
_ASSERTIONS = {"_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size",
               "_assert_scalar", "_assert_async"}  # fmt: skip
_RANDOM = {"rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "normal", "multinomial"}


def normalize(graph: fx.GraphModule, *, whole_attention: bool = False) -> fx.GraphModule:
    """The LayerGraph of a functional ATen graph; parametric calls become modules under their own names."""
    simplify(graph)
    _drop_no_ops(graph)
    _fold_constants(graph)
    write_out(graph, whole_attention=whole_attention)
    layered = _calls_to_layers(graph)
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
    if name.rstrip("_") in _NO_OPS:
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
        if node.op != "call_function" or (not node.all_input_nodes and not isinstance(node.meta.get("val"), Tensor)):
            continue
        if aten_name(node) in _RANDOM or not all(n in constants for n in node.all_input_nodes):
            continue
        if any(isinstance(leaf, torch.SymInt) for leaf in _sizes(node.meta.get("val"))):
            continue

        def literal(n: fx.Node) -> Any:
            return constants[n]

        args, kwargs = fx.map_arg(node.args, literal), fx.map_arg(node.kwargs, literal)
        with torch.no_grad():
            value = node.target(*args, **kwargs)
        roots = {_parameter_name(n) for n in node.all_input_nodes}
        if len(roots) == 1:  # a transposed or sliced parameter still bears its name
            node.meta["parameter"] = roots.pop()
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


def _parameter_name(node: fx.Node) -> str:
    """The user's parameter that a constant is, or is made of; empty where it is made of several or none."""
    name = str(node.meta.get("parameter", node.target if node.op == "get_attr" else ""))
    return "" if name.startswith("folded_") else name


def _sizes(value: Any) -> list[Any]:
    return [size for leaf in torch.utils._pytree.tree_leaves(value) for size in getattr(leaf, "shape", [leaf])]


def _calls_to_layers(graph: fx.GraphModule) -> fx.GraphModule:
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
        name = _layer_name(node, layer, weights)
        parameters = (str(w.target) if isinstance(w, fx.Node) else None for w in weights)
        key = (name, aten_name(node), *parameters, repr(layer))
        if key not in placed:
            placed[key] = _unique(root, name)
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
    layered.meta.update(graph.meta)
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


def _layer_name(node: fx.Node, layer: nn.Module, weights: list[Any]) -> str:
    """The path of the user's layer that makes the call, else of the module that owns the weight."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, owner = (str(stack[-1][0]), str(stack[-1][1])) if stack else ("", "")
    path = path.split("@")[0]  # a second call is marked name@1
    if path and type(layer).__name__ in owner:  # parametrized layers are called ParametrizedConv2d
        return path
    weight = _parameter_name(weights[0]) if isinstance(weights[0], fx.Node) else ""
    if weight:
        return weight.removesuffix("weight").rstrip("._") or str(node.name)
    return f"{path}.{node.name}".lstrip(".")


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
