"""torch.jit: a module of kernels as one program without Python, and as a file. The only file that touches it."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import ExportError, VerificationError
from ..files import atomic_write
from ..model import QuantizedModel
from .torch_kernels import packing


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
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit announces its end of life at every call
        try:
            # oneDNN's packed layers keep the primitive of the first shape they meet, so one sample goes first.
            scripted = torch.jit.trace(module, example_inputs(q, 1), check_trace=False)  # type: ignore[no-untyped-call]
            inputs = example_inputs(q, 3)
            expected, found = module(*inputs), scripted(*inputs)
        except Exception as error:  # torch.jit raises many types
            raise ExportError(f"torch.jit cannot trace the quantized model: {error}") from error
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(found)):
        if a.shape != b.shape or not torch.equal(a, b):
            raise ExportError(
                "torch.jit's trace of the quantized model computes something else for another batch size: the model "
                "makes tensors or decisions from its batch size that a trace takes for constants"
            )
    return scripted


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
