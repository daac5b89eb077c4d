"""Model surgery: a copy of a model in which parts that quantize badly are replaced by ones that do not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ..capture import capture, evaluation_mode
from ..capture.inputs import Arguments, batch_arguments
from ..capture.ops import op_of
from ..errors import CaptureError, DataError
from .activations import gates
from .subject import innermost


@dataclass(frozen=True)
class Change:
    """One module replaced; ``trains``: the function is another now, and the model has to be trained again."""

    operation: str
    where: str
    before: str
    after: str
    trains: bool


class Surgery(NamedTuple):
    """The new model, what was changed in it, and what could not be."""

    model: nn.Module
    changes: list[Change]
    left: list[str]

    @property
    def needs_training(self) -> bool:
        """Whether the new model computes something else than the old one."""
        return any(change.trains for change in self.changes)


class SigmoidGate(nn.Module):
    """x * gate(x): SiLU with ``nn.Sigmoid``, Hardswish with ``nn.Hardsigmoid``; the same function in two operators.

    >>> x = torch.randn(4)
    >>> bool(torch.allclose(SigmoidGate(nn.Sigmoid())(x), nn.functional.silu(x)))
    True
    """

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        """x times its gate."""
        y: Tensor = x * self.gate(x)
        return y


class ExpandedLayerNorm(nn.Module):
    """A layer norm in its parts (mean, difference, square, root), with the parameters of the original."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.axes = tuple(range(-len(norm.normalized_shape), 0))
        self.eps = norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, x: Tensor) -> Tensor:
        """(x - mean) / sqrt(variance + eps) * weight + bias."""
        centred = x - x.mean(self.axes, keepdim=True)
        y = centred / torch.sqrt((centred * centred).mean(self.axes, keepdim=True) + self.eps)
        y = y if self.weight is None else y * self.weight
        return y if self.bias is None else y + self.bias


_RELUS = (nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.LeakyReLU, nn.PReLU)
Replacement = tuple[nn.Module, bool] | None


def _relu6(module: nn.Module) -> Replacement:
    return (nn.ReLU(), True) if isinstance(module, nn.ReLU6) else None


def _activations(module: nn.Module) -> Replacement:
    return (nn.ReLU(), True) if isinstance(module, _RELUS) else None


def _tables(module: nn.Module) -> Replacement:
    if isinstance(module, nn.SiLU):
        return SigmoidGate(nn.Sigmoid()), False
    if isinstance(module, nn.Hardswish):
        return SigmoidGate(nn.Hardsigmoid()), False
    return None


def _layer_norm(module: nn.Module) -> Replacement:
    return (ExpandedLayerNorm(module), False) if isinstance(module, nn.LayerNorm) else None


def _large_kernels(module: nn.Module) -> Replacement:
    """A k x k convolution, k odd and at least 5, as (k - 1) / 2 of 3 x 3, which see as far."""
    if not isinstance(module, nn.Conv2d) or max(module.kernel_size) < 5 or not stackable(module):
        return None
    size, groups = module.kernel_size[0], module.groups
    layers: list[nn.Module] = []
    channels = module.in_channels
    for index in range((size - 1) // 2):
        last = index == (size - 1) // 2 - 1
        stride = module.stride[0] if index == 0 else 1
        layers.append(
            nn.Conv2d(channels, module.out_channels, 3, stride, 1, groups=groups, bias=last and module.bias is not None)
        )
        channels = module.out_channels
        if not last:
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
    return nn.Sequential(*layers).to(module.weight.device), True


def stackable(layer: nn.Conv2d) -> bool:
    """Whether a stack of 3 x 3 gives the same output size."""
    height, width = layer.kernel_size
    same = layer.padding == "same" or layer.padding == (height // 2, width // 2)
    grouped = layer.out_channels % layer.groups == 0
    return height == width and height % 2 == 1 and same and layer.dilation == (1, 1) and grouped


# Operation -> what it makes of a module, where it replaces one module by another.
_BY_MODULE: dict[str, Callable[[nn.Module], Replacement]] = {
    "relu6": _relu6,
    "activations": _activations,
    "tables": _tables,
    "large_kernels": _large_kernels,
    "layer_norm": _layer_norm,
}
OPERATIONS = (*_BY_MODULE, "squeeze_excite")
# Without names: all but "tables", which "activations" makes needless.
DEFAULT = tuple(name for name in OPERATIONS if name != "tables")


def fix(model: nn.Module, example_inputs: Any, *operations: str) -> Surgery:
    """A copy of ``model`` with these operations done; the model itself is not touched.

    ``"relu6"`` (ReLU6 to ReLU), ``"activations"`` (SiLU, GELU, Hardswish ... to ReLU), ``"tables"`` (SiLU and Hardswish
    as products with a sigmoid: the same function), ``"large_kernels"`` (5 x 5 and more to stacks of 3 x 3),
    ``"squeeze_excite"`` (gates removed), ``"layer_norm"`` (in its parts: the same function). None named: all but
    ``"tables"``. Each ``Change`` says whether the function is another now; ``left`` names what is written as a function
    in ``forward()``, which only its author can replace.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6())
    >>> fixed, changes, left = fix(net, torch.randn(1, 3, 8, 8), "relu6")
    >>> fixed[1], net[1], changes[0].trains
    (ReLU(), ReLU6(), True)
    """
    if unknown := [name for name in operations if name not in OPERATIONS]:
        raise DataError(f"no operation is called {unknown[0]!r}: known are {', '.join(OPERATIONS)}")
    chosen = operations or DEFAULT
    arguments = batch_arguments(model, example_inputs) if not _is_arguments(example_inputs) else example_inputs
    fixed = copy.deepcopy(model)
    changes: list[Change] = []
    left: list[str] = []
    for name in chosen:
        if name == "squeeze_excite":
            _remove_gates(fixed, arguments, changes, left)
        else:
            fixed = _replace_modules(fixed, name, changes)
            left += _unreached(fixed, name)
    for name, count in _functional(fixed, arguments, chosen).items():
        left.append(f"{name} is called as a function {count} times: make it a module, or replace it by hand")
    _check_runs(model, fixed, arguments)
    return Surgery(fixed, changes, left)


def _is_arguments(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], tuple) and isinstance(value[1], dict)


def _replace_modules(model: nn.Module, operation: str, changes: list[Change]) -> nn.Module:
    done: dict[int, nn.Module] = {}  # a module in two places is replaced by one module in both
    for name, module in list(model.named_modules(remove_duplicate=False)):
        replacement = _BY_MODULE[operation](module) if id(module) not in done else (done[id(module)], False)
        if replacement is None:
            continue
        made, trains = replacement
        if id(module) not in done:
            changes.append(Change(operation, name, _short(module), _short(made), trains))
            done[id(module)] = made.train(module.training)
        if not name:
            return made
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made)
    return model


def _short(module: nn.Module) -> str:
    text = str(module).replace("\n", "")
    return text if len(text) <= 60 else f"{type(module).__name__} of {sum(1 for _ in module.modules()) - 1} modules"


def _unreached(model: nn.Module, operation: str) -> list[str]:
    if operation != "large_kernels":
        return []
    return [
        f"{name}: a stack of 3 x 3 in place of its kernel of {max(module.kernel_size)} would change the output size"
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and max(module.kernel_size) >= 5 and not stackable(module)
    ]


def _remove_gates(model: nn.Module, arguments: Arguments, changes: list[Change], left: list[str]) -> None:
    """Put an Identity where a module multiplies its input by a gate and does nothing else."""
    try:
        graph = capture(model, arguments)
    except CaptureError as error:
        left.append(f"squeeze_excite: the model cannot be read as a graph ({error})")
        return
    for gate in gates(graph):
        path = innermost(gate)[0]
        inside = [n for n in _within(graph, path) if op_of(n).role == "compute"]
        if not path or len(inside) > 2 or any(True for n in _within(graph, path) if n.target == path):
            left.append(f"squeeze_excite: the gate at {path or gate.name!r} is no module of its own")
            continue
        parent, _, leaf = path.rpartition(".")
        before = model.get_submodule(path)
        setattr(model.get_submodule(parent), leaf, nn.Identity())
        changes.append(Change("squeeze_excite", path, type(before).__name__, "Identity()", True))


def _within(graph: fx.GraphModule, path: str) -> Iterator[fx.Node]:
    """The operators that a module's forward makes, those of its parts included."""
    for node in graph.graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if any(entry[0] == path for entry in stack):
            yield node


_FUNCTIONS = {
    "relu6": ("relu6",),
    "activations": ("silu", "gelu", "hardswish", "mish", "elu", "softplus", "leaky_relu"),
    "tables": ("silu", "hardswish"),
    "layer_norm": ("layer_norm",),
}


def _functional(model: nn.Module, arguments: Arguments, operations: tuple[str, ...]) -> dict[str, int]:
    """What is still called as a function; nothing where the model cannot be read."""
    wanted = {name for operation in operations for name in _FUNCTIONS.get(operation, ())}
    try:
        graph = capture(model, arguments) if wanted else None
    except CaptureError:
        return {}
    found: dict[str, int] = {}
    for node in graph.graph.nodes if graph is not None else ():
        name = str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""
        name = "relu6" if name == "hardtanh" and tuple(node.args[1:3]) == (0.0, 6.0) else name.removesuffix("_")
        if name in wanted:
            found[name] = found.get(name, 0) + 1
    return found


def _check_runs(model: nn.Module, fixed: nn.Module, arguments: Arguments) -> None:
    """The new model takes the same inputs to outputs of the same shapes."""
    args, kwargs = arguments
    shapes = []
    for candidate in (model, fixed):
        with evaluation_mode(candidate), torch.no_grad():
            leaves = torch.utils._pytree.tree_leaves(candidate(*args, **kwargs))
        shapes.append([tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)])
    if shapes[0] != shapes[1]:
        raise DataError(f"surgery changed the outputs' shapes from {shapes[0]} to {shapes[1]}: name fewer operations")
