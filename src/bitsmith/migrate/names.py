"""torch.ao's classes, known by name: nothing here imports them, so that it goes on working when they are gone."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

_QUANTIZED = (
    "torch.ao.nn.quantized.",
    "torch.ao.nn.intrinsic.quantized.",
    "torch.nn.quantized.",
    "torch.nn.intrinsic.quantized.",
)
_UNFINISHED = ("torch.ao.nn.qat.", "torch.ao.nn.intrinsic.qat.", "torch.ao.quantization.")


def quantized_name(module: nn.Module) -> str | None:
    """``Conv2d``, ``dynamic.Linear`` ...: the class of a quantized module of torch.ao; None for any other module."""
    where = type(module).__module__
    if not where.startswith(_QUANTIZED) or ".reference." in where:
        return None
    return f"{'dynamic.' * ('.dynamic.' in where)}{type(module).__name__}"


def is_unfinished(module: nn.Module) -> bool:
    """Whether torch.ao has prepared this module but not converted it: observers, fake-quantize and QAT layers."""
    where = type(module).__module__
    stubs = ("QuantStub", "DeQuantStub", "QuantWrapper")
    return where.startswith(_UNFINISHED) and type(module).__name__ not in stubs


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """Path, class name and module of each quantized module, but of what is inside of one."""
    inside: set[int] = set()
    for path, module in model.named_modules():
        if id(module) not in inside and (name := quantized_name(module)) is not None:
            inside.update(id(inner) for inner in module.modules())
            yield path, name, module


def is_torch_ao(model: nn.Module) -> bool:
    """Whether torch.ao quantized the model: it holds its quantized modules, or calls its quantized functions."""
    if any(quantized_modules(model)):
        return True
    return isinstance(model, fx.GraphModule) and any(
        "quantize" in str(node.target) for node in model.graph.nodes if node.op == "call_function"
    )
