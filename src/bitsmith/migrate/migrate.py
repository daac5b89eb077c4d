"""A model quantized with torch.ao in, the same model in Bitsmith's form out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..capture.inputs import Arguments, batch_arguments
from ..dynamic.model import DynamicModel
from ..errors import CaptureError, DataError, MigrationError
from ..model import QuantizedModel
from ..targets import Target, get_target
from .dynamic import migrate_dynamic
from .names import is_torch_ao, is_unfinished, quantized_modules
from .static import migrate_static


def migrate(
    model: nn.Module, example_inputs: Any = None, target: str | Target = "torch"
) -> QuantizedModel | DynamicModel:  # fmt: skip
    """The same integers without torch.ao: weights, scales and zero points of a model that it quantized.

    Takes int8 models of ``torch.ao.quantization``'s ``convert`` and ``convert_fx`` (then ``example_inputs``, a batch,
    is needed to read the model's graph), and of ``quantize_dynamic``, int8 and float16. Gives a QuantizedModel or a
    DynamicModel, which exports, deploys, is saved and verified like any other. On target ``torch`` biases stay float,
    as in torch.ao; on others they become 32-bit integers at the scale of the accumulator.

    ``report.notes`` says how the outputs for ``example_inputs`` compare with those of the model given. Raises
    MigrationError, which names the module and says what to do, for what has no form here.

    >>> from torch.ao.quantization import quantize_dynamic
    >>> old = quantize_dynamic(nn.Sequential(nn.Linear(16, 4)))
    >>> q = migrate(old)
    >>> bool((q.model[0].weight == old[0].weight().int_repr()).all())
    True
    """
    if not isinstance(model, nn.Module):
        raise DataError(f"model must be a torch.nn.Module that torch.ao has quantized, not a {type(model).__name__}")
    target = get_target(target)
    _refuse(model)
    if any(name.startswith("dynamic.") for _, name, _ in quantized_modules(model)):
        q: QuantizedModel | DynamicModel = migrate_dynamic(model, target)
        if example_inputs is not None:
            assert isinstance(q, DynamicModel)
            q.set_example(example_inputs)
        return q
    if example_inputs is None:
        raise DataError(
            "a statically quantized model is read from its graph, and that from one batch: migrate(model, batch)"
        )
    example = batch_arguments(model, example_inputs)
    try:
        q = migrate_static(model, example, target)
    except DataError as error:
        if isinstance(error.__cause__, MigrationError):  # raised by a converted module when it was called
            raise error.__cause__ from None
        raise
    except CaptureError as error:
        raise MigrationError(
            f"the code of {type(model).__name__} cannot be read as a graph ({error}): take branches on data out of "
            "forward, or quantize the float model with bitsmith.quantize"
        ) from error
    q.report.notes.append(compare(model, q, example))
    return q


def compare(model: nn.Module, q: QuantizedModel, example: Arguments) -> str:
    """How the outputs of both models differ, in words."""
    try:
        with torch.no_grad():
            old, new = (torch.utils._pytree.tree_leaves(m(*example[0], **example[1])) for m in (model, q))
    except (RuntimeError, NotImplementedError) as error:  # a PyTorch without the kernels
        return f"not held against torch.ao's model, which does not run here: {error}"
    pairs = [
        ((a.dequantize() if a.is_quantized else a), b) for a, b in zip(old, new, strict=True) if isinstance(a, Tensor)
    ]
    total = sum(a.numel() for a, _ in pairs)
    unequal = sum(int((a != b).sum()) for a, b in pairs)
    largest = max((float((a - b).abs().max()) for a, b in pairs if a.numel()), default=0.0)
    equal = f"{total - unequal} of {total} outputs for the example equal torch.ao's"
    return f"{equal}; the largest difference is {largest:.6g}"


def _refuse(model: nn.Module) -> None:
    names = [name or "the model" for name, module in model.named_modules() if is_unfinished(module)]
    if names:
        raise MigrationError(
            f"the model is prepared by torch.ao but not converted ({', '.join(names[:4])}): call its convert or "
            "convert_fx first; or begin with the float model: bitsmith.quantize, or bitsmith.prepare_qat to train it"
        )
    if not is_torch_ao(model):
        raise MigrationError(
            f"nothing in {type(model).__name__} is quantized by torch.ao: use bitsmith.quantize or "
            "bitsmith.quantize_dynamic"
        )
