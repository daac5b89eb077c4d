"""Rules about how a model is built: D1, D5, D6, D20 to D23, D25 and D26."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map_only

from ..capture import evaluation_mode
from ..capture.inputs import first_samples
from ..capture.ops import layer_of, op_of
from .rule import Note, rule
from .subject import Subject, innermost, shape_of
from .triage import training_call

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_ARITHMETIC = ("add", "mul", "sub", "cat", "matmul", "relu", "clamp", "sigmoid", "softmax", "leaky_relu", "avg_pool")
_DEPTHWISE_SHARE = 0.2


def is_depthwise(layer: nn.Module | None) -> bool:
    """Whether every channel is convolved alone."""
    return isinstance(layer, _CONV) and layer.groups == layer.in_channels > 1


@rule("D1", "every convolution is followed by a batch norm", "graph")
def norm_after_convolution(subject: Subject) -> Iterator[Note]:
    """A norm keeps the ranges of channels alike; the last (prediction) layer is exempt, depthwise ones never are."""
    convolutions = [n for n in subject.nodes("conv") if isinstance(layer_of(n), _CONV)]
    if not convolutions:
        return
    if not any(True for _ in subject.nodes("batch_norm")):
        yield Note(
            "note", type(subject.model).__name__, "there is no batch norm at all: if they were folded, all is well",
            "train with nn.BatchNorm2d behind every convolution; Bitsmith folds them",
        )  # fmt: skip
        return
    last = list(subject.nodes("conv", "linear", "conv_transpose"))[-1]
    for node in convolutions:
        if all(size == 1 for size in shape_of(node)[2:]):
            continue  # part of a gate, or a classifier written as a convolution
        followed = any(op_of(user).name == "batch_norm" for user in node.users)
        if followed or (node is last and not is_depthwise(layer_of(node))) or not node.users:
            continue
        if all(user.op == "output" for user in node.users) and not is_depthwise(layer_of(node)):
            continue
        kind = "depthwise convolution" if is_depthwise(layer_of(node)) else "convolution"
        yield Note(
            "warning", node, f"no batch norm directly behind this {kind}: its channels may have very unlike ranges",
            "nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), activation), and train",
        )  # fmt: skip


@rule("D5", "no module is called more than once", "model")
def called_twice(subject: Subject) -> Iterator[Note]:
    """Tools that keep one range for each module mix up the calls; torchvision's ResNets reuse their ReLU."""
    modules = dict(subject.model.named_modules())
    stubs = _is_by_hand(subject.model)
    for name, count in subject.calls.items():
        if count < 2 or isinstance(modules[name], nn.Identity | nn.Dropout):
            continue
        shares = any(True for _ in modules[name].parameters())
        yield Note(
            "error" if stubs else "warning" if shares else "note", name or type(subject.model).__name__,
            f"called {count} times in one pass: " + (
                "its calls share weights but not ranges, and bias scales follow ranges" if shares else
                "Bitsmith gives each call its own range, tools that keep one for each module do not"
            ),
            "make one module for each call: self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()",
        )  # fmt: skip


def _is_by_hand(model: nn.Module) -> bool:
    return any(type(module).__name__ == "QuantStub" for module in model.modules())


@rule("D6", "a model quantized by hand uses modules for arithmetic", "graph")
def functional_arithmetic(subject: Subject) -> Iterator[Note]:
    """Between QuantStub and DeQuantStub only modules are quantized; other models may write what they like."""
    if not _is_by_hand(subject.model):
        return
    for node in subject.nodes(*_ARITHMETIC):
        kind = innermost(node)[1]
        if node.op == "call_function" and not kind.startswith(("torch.nn.", "torch.ao.", "bitsmith.")):
            name = op_of(node).name
            todo = "self.relu = nn.ReLU(); self.relu(x)" if name == "relu" else "self.f = bitsmith.FloatFunctional()"
            if name in ("add", "mul", "cat", "matmul"):
                todo += f"; self.f.{name}(...)"
            yield Note("error", node, f"{name} is a function here: nothing holds its range between the stubs", todo)


@rule("D20", "every parameter is used", "model")
def unused_parameters(subject: Subject) -> Iterator[Note]:
    """What the outputs do not depend on is carried along: heads for training, dead branches, forgotten layers."""
    unused = _unused(subject)
    for owner in dict.fromkeys(name.rpartition(".")[0] for name in unused):
        count = sum(name.rpartition(".")[0] == owner for name in unused)
        yield Note(
            "warning", owner or "the model itself", f"{count} of its parameters reach no output in eval mode",
            "del model." + (owner or unused[0]) + ", or move what only training needs out of forward()",
        )  # fmt: skip


def _unused(subject: Subject) -> list[str]:
    parameters = {n: p.detach().requires_grad_() for n, p in subject.model.named_parameters() if p.is_floating_point()}
    args, kwargs = tree_map_only(Tensor, torch.clone, first_samples(subject.arguments, 1))
    with evaluation_mode(subject.model), torch.enable_grad():
        try:
            outputs = functional_call(subject.model, parameters, args, kwargs)
            sums = [o.sum() for o in tree_leaves(outputs) if isinstance(o, Tensor) and o.requires_grad]
            if not sums:
                return []
            grads = torch.autograd.grad(sum(sums[1:], sums[0]), list(parameters.values()), allow_unused=True)
        except (RuntimeError, NotImplementedError):  # no gradient through this model: nothing can be said
            return []
    return [name for name, grad in zip(parameters, grads) if grad is None]


@rule("D21", "forward() can be read as a graph", "model")
def readable(subject: Subject) -> Iterator[Note]:
    """Control flow that depends on values, assertions and numbers taken from shapes stop every exporter."""
    if subject.capture_error is not None:
        yield Note(
            "error", type(subject.model).__name__, subject.capture_error,
            "move that code out of forward(), or use torch.where / torch.cond in place of Python's if on tensors",
        )  # fmt: skip


@rule("D22", "few convolutions are depthwise", "graph")
def depthwise_share(subject: Subject) -> Iterator[Note]:
    """Depthwise channels have ranges of their own and few weights to average errors over."""
    convolutions = [layer_of(n) for n in subject.nodes("conv")]
    depthwise = sum(map(is_depthwise, convolutions))
    if not depthwise or depthwise / len(convolutions) < _DEPTHWISE_SHARE:
        return
    per_tensor = "channel" not in subject.target.granularities
    yield Note(
        "warning" if per_tensor else "note", type(subject.model).__name__,
        f"{depthwise} of {len(convolutions)} convolutions are depthwise: expect a larger loss at 8 bits"
        + (f", since {subject.target.name} has one scale for all their channels" if per_tensor else ""),
        f"a short training: {training_call(subject.target)}; or a network without them such as RegNetX"
        if per_tensor else
        "keep weight scales per channel (recipe 'int8'); with a loss, try recipe 'w8a8-best'",
    )  # fmt: skip


@rule("D23", "regression heads have 16 bits at both ends", "graph")
def regression_heads(subject: Subject) -> Iterator[Note]:
    """Boxes and depths are read as numbers, not compared: 255 steps may be too few."""
    output = next(n for n in subject.graph.graph.nodes if n.op == "output")
    results = [n for n in tree_leaves(output.args[0]) if isinstance(n, fx.Node) and shape_of(n)]
    shapes = [shape_of(node) for node in results]
    several = len(shapes) > 1
    if not several and not any(_is_regression(shape) for shape in shapes):
        return
    layers = [subject.where(n) for n in subject.nodes("conv", "linear", "conv_transpose")]
    ends = f"{layers[0]!r} and {layers[-1]!r}" if layers else "first and last layer"
    yield Note(
        "note", ", ".join(subject.where(n) for n in results),
        "outputs look like coordinates, sizes or depths, which 8 bits resolve to 1 in 255 of their range",
        f"try 16 bits for {ends}: overrides=[Override(match='first', ...), Override(match='last', ...)]",
    )  # fmt: skip


def _is_regression(shape: list[int]) -> bool:
    """A dense map of one channel, rows of four or five numbers, or a handful of numbers."""
    if len(shape) == 4:
        return shape[1] == 1 and shape[2] * shape[3] > 1
    return len(shape) in (2, 3) and shape[-1] in (1, 4, 5)


@rule("D25", "the model is in eval mode and its norms can be folded", "model")
def ready(subject: Subject) -> Iterator[Note]:
    """Post-training quantization folds running statistics; a norm without them, or in train mode, has none to fold."""
    training = [name for name, m in subject.model.named_modules() if m.training and isinstance(m, (*_NORM, nn.Dropout))]
    if subject.model.training or training:
        yield Note(
            "error", training[0] if training else type(subject.model).__name__,
            "in train mode: every pass changes the batch norms' statistics and drops values at random", "model.eval()",
        )  # fmt: skip
    for name, module in subject.model.named_modules():
        if isinstance(module, _NORM) and module.running_mean is None:
            yield Note(
                "error", name, "a batch norm without running statistics depends on its batch: it cannot be folded",
                "nn.BatchNorm2d(..., track_running_stats=True), and train",
            )  # fmt: skip
        if "ConvBn" in type(module).__name__ and ".qat" in type(module).__module__:
            yield Note(
                "error", name, "a convolution and its batch norm from another tool's QAT, still apart",
                "end that training with its own convert, or load its weights into the float model",
            )  # fmt: skip
    if subject.capture_error is None:
        for node in subject.folded.graph.nodes:
            norm = layer_of(node) if node.op == "call_module" else None
            if isinstance(norm, _NORM) and norm.running_mean is not None:
                yield Note(
                    "warning", str(node.target), "no layer can take this batch norm in: it stays, in float",
                    "place it directly behind a convolution or linear layer that nothing else reads",
                )  # fmt: skip


@rule("D26", "no activation works in place", "model")
def in_place(subject: Subject) -> Iterator[Note]:
    """Hooks, range observers and exporters may see a value after it was overwritten."""
    names = [name for name, module in subject.model.named_modules() if getattr(module, "inplace", False) is True]
    if names:
        yield Note(
            "note", ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
            "writes over its input: Bitsmith reads such models right, tools with hooks may not",
            "for m in model.modules(): if hasattr(m, 'inplace'): m.inplace = False",
        )  # fmt: skip
