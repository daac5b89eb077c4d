"""torch.jit: a module of kernels as one program without Python, and as a file. The only file that touches it."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..errors import ExportError, VerificationError
from ..files import atomic_write
from ..model import QuantizedModel
from .torch_kernels import packing

if TYPE_CHECKING:
    from ..dynamic import DynamicModel


def example_inputs(q: QuantizedModel, batch: int) -> tuple[Tensor, ...]:
    """Tensors that the model takes, with ``batch`` wherever a size is free."""
    values = [n.meta["val"] for n in q.graph.graph.nodes if n.op == "placeholder"]
    generator = torch.Generator().manual_seed(0)

    def example(value: Tensor) -> Tensor:
        shape = [size if isinstance(size, int) else batch for size in value.shape]
        if value.dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=value.dtype)
        return torch.zeros(shape, dtype=value.dtype)

    return tuple(example(value) for value in values)


def script(module: fx.GraphModule, q: QuantizedModel) -> Any:
    """``module`` as TorchScript. Raises ExportError where a size of the example would be baked in."""
    # oneDNN's packed layers keep the primitive of the first shape they meet, so one sample goes first.
    return _traced(module, example_inputs(q, 1), example_inputs(q, 3))


def script_dynamic(q: DynamicModel) -> Any:
    """A dynamically quantized model on torch's kernels as TorchScript, of any batch and length that its graph takes."""
    from ..dynamic.torch_kernels import TorchDeployed

    args, kwargs = q.example()
    if kwargs:
        raise ExportError(f"TorchScript files take positional inputs, not {', '.join(kwargs)} by name")
    while args and args[-1] is None:  # which a trace does not take
        args = args[:-1]
    leaves, structure = torch.utils._pytree.tree_flatten(args)
    placeholders = [n.meta.get("val") for n in q.captured().graph.graph.nodes if n.op == "placeholder"]
    larger = [_larger(leaf, value) for leaf, value in zip(leaves, placeholders)]
    module, others = TorchDeployed(q).model, torch.utils._pytree.tree_unflatten(larger, structure)
    with torch.no_grad():
        module(*args)  # parts of layers are packed at their first use
        try:
            module(*others)
        except RuntimeError:  # sizes that the graph thinks free depend on one another
            others = args
    return _traced(module, args, others, exact=False)


def _larger(leaf: Any, value: Any) -> Any:
    """The example with the last one twice of everything whose number is free."""
    if isinstance(leaf, Tensor) and isinstance(value, Tensor):
        for axis, size in enumerate(value.shape):
            if isinstance(size, torch.SymInt):
                leaf = torch.cat([leaf, leaf.narrow(axis, leaf.shape[axis] - 1, 1)], axis)
    return leaf


def _traced(module: nn.Module, inputs: tuple[Any, ...], others: tuple[Any, ...], *, exact: bool = True) -> Any:
    """The trace for ``inputs``, which must compute the same as the module for ``others``.

    ``exact``: to the bit, and without dicts among the outputs.
    """
    slack = 0.0 if exact else 1e-5
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit announces its end of life at every call
        try:
            scripted = torch.jit.trace(module, inputs, strict=exact, check_trace=False)  # type: ignore[no-untyped-call]
            expected, found = module(*others), scripted(*others)
        except Exception as error:  # torch.jit raises many types
            raise ExportError(f"torch.jit cannot trace the quantized model: {error}") from error
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found)):
        if not _same(a, b, slack):
            raise ExportError(
                "torch.jit's trace of the quantized model computes something else for another batch size or length: "
                "the model makes tensors or decisions from them that a trace takes for constants"
            )
    return scripted


def _same(a: Tensor, b: Tensor, slack: float) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=slack, atol=slack, equal_nan=True)


def repacked(scripted: Any) -> Any:
    """The same program, its layers packed anew: oneDNN keeps the primitive of their first shape, here the trace's."""
    buffer = BytesIO()
    with packing("x86"):
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        return torch.jit.load(buffer)  # type: ignore[no-untyped-call]


def freeze(scripted: Any) -> Any:
    """The program with its modules dissolved, which saves their overhead at run time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.freeze(scripted.eval())


def save_script(scripted: Any, path: str | Path) -> Path:
    """Write a TorchScript file, whole or not at all."""
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(scripted, str(temporary))
    return Path(path)


def load_script(path: str | Path) -> Any:
    """Load a TorchScript file. Raises VerificationError where it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(str(path), map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as error:
        raise VerificationError(f"{path} is no TorchScript file, or it is damaged: {error}") from error
