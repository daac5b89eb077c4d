"""Rules about activation functions, gates and norms: D7 to D10."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from ..capture.ops import aten_name, layer_of, op_of
from ..place.plan import clamp_bounds, operands, origin
from .rule import Note, rule
from .subject import Subject, innermost, shape_of

# Functions that TIDL computes from a table, where the device has tables.
_TABLES = ("sigmoid", "hardsigmoid", "gelu", "tanh", "elu", "softmax")
_COSTLY = ("silu", "hardswish", "gelu", "mish", "hardsigmoid", "elu", "selu", "celu", "softplus", "tanh", "prelu")
_GATES = ("sigmoid", "hardsigmoid", "tanh", "softmax")
_RAMPS = ("leaky_relu", "sigmoid")


def function_name(node: fx.Node) -> str:
    """What an activation is called: its ATen name, or that of its module."""
    if node.op == "call_module":
        return type(layer_of(node)).__name__.lower()
    return aten_name(node).removesuffix("_")


@rule("D7", "activations are cheap and exact on the target", "graph")
def activation_functions(subject: Subject) -> Iterator[Note]:
    """ReLU is a clip; everything else is a table, a float operator, or several steps with rounding between them."""
    for node in subject.nodes():
        name = function_name(node)
        if name not in (*_COSTLY, *_RAMPS, *(["softmax"] if subject.device else [])):
            continue
        device = subject.device
        if device is None:
            if op_of(node).name in subject.target.integer_operators:
                continue
            why = f"{name} runs in float on {subject.target.name}: its neighbours leave and enter integers around it"
        elif name == "leaky_relu" or name == "prelu":
            why = f"{name} multiplies negative values by a slope of its own, one more rounding"
        elif name in _TABLES and device.lookup_tables:
            continue
        elif name in _TABLES:
            why = f"{subject.target.name} has no tables: {name} does not run on its accelerator"
        else:
            why = f"TIDL has no {name}: it becomes several operators, each with a rounding, or leaves the accelerator"
        if name in _GATES:
            yield Note("warning", node, why, "leave the gate out and train again, or accept it: it bounds a value")
            continue
        todo = "nn.ReLU(), with a fine tuning: bitsmith.doctor.fix(model, x, 'activations')"
        if name in ("silu", "hardswish") and (device is None or device.lookup_tables):
            todo += "; or 'tables', which spells the same function with a sigmoid"
        yield Note("warning", node, why, todo)


@rule("D8", "ReLU instead of ReLU6", "graph")
def relu6(subject: Subject) -> Iterator[Note]:
    """A cap at 6 is no power of two, stops equalization from moving ranges, and helps nothing at 8 bits."""
    for node in subject.nodes("clamp"):
        if clamp_bounds(node) == (0.0, 6.0):
            po2 = subject.device is not None and subject.device.po2
            yield Note(
                "warning", node, "ReLU6 keeps equalization from moving ranges between layers"
                + (", and 6 is no end of a range of powers of two" if po2 else ""),
                "bitsmith.doctor.fix(model, x, 'relu6') and a short fine tuning: values above 6 are now let through",
            )  # fmt: skip


@rule("D9", "no squeeze-and-excitation", "graph")
def squeeze_excite(subject: Subject) -> Iterator[Note]:
    """A gate of two tiny layers scales whole channels: its rounding errors move all their pixels at once."""
    for gate in gates(subject.graph):
        yield Note(
            "warning", gate, "squeeze-and-excitation scales whole channels by a rounded number",
            "expect a loss, or bitsmith.doctor.fix(model, x, 'squeeze_excite') and train again",
        )  # fmt: skip


def gates(graph: fx.GraphModule) -> Iterator[fx.Node]:
    """The multiplications of squeeze-and-excitation: one side comes from the other's average through layers."""
    for node in graph.graph.nodes:
        if op_of(node).name == "mul" and len(operands(node)) == 2:
            a, b = (origin(n) for n in operands(node))
            if _pools(a, b) or _pools(b, a):
                yield node


def _pools(gate: fx.Node, value: fx.Node) -> bool:
    """Whether ``gate`` is computed from the global average of ``value`` by convolutions or linear layers."""
    layers = 0
    for _ in range(12):
        op = op_of(gate)
        layers += op.name in ("conv", "linear")
        if op.name == "global_avg_pool" or function_name(gate) == "mean":
            return layers > 0 and origin(operands(gate)[0] if operands(gate) else gate) is value
        sources = [n for n in gate.all_input_nodes if n.op != "get_attr"]
        if len(sources) != 1 or (op.role == "compute" and op.name == "matmul"):
            return False
        gate = sources[0]
    return False


@rule("D10", "layer norms lie over the last axis", "tidl")
def norms(subject: Subject) -> Iterator[Note]:
    """TIDL runs a layer norm over the last axis, read from its parts; other norms are not in its operator set."""
    for node in subject.nodes("norm"):
        layer = layer_of(node)
        kind = function_name(node)
        axes = list(layer.normalized_shape) if isinstance(layer, nn.LayerNorm) else None
        shape = node.args[1] if axes is None and kind == "layer_norm" else None
        axes = [int(str(size)) for size in shape] if isinstance(shape, list | tuple) else axes
        if axes is None:
            yield Note("error", node, f"{kind} is not in TIDL's operator set", "nn.BatchNorm2d, which folds away")
        elif len(axes) > 1:
            yield Note(
                "error", node, f"normalizes over {len(axes)} axes {axes}; TIDL does so over the last one",
                f"nn.LayerNorm({axes[-1]}), and train", )  # fmt: skip
        elif len(shape_of(node)) < 2 or innermost(node)[1].endswith("GroupNorm"):
            yield Note("error", node, "normalizes what has no rows", "keep a leading axis")
