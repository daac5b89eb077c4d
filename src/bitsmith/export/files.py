"""Writing a QuantizedModel: ONNX with QDQ or QCDQ, TorchScript, and torch.export's own format."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, fx, nn

from ..capture import evaluation_mode
from ..capture.inputs import batch_arguments
from ..errors import ExportError
from ..files import atomic_write
from ..model import QuantizedModel
from ..verify.engines import TORCHSCRIPT_SUFFIX

if TYPE_CHECKING:
    from ..dynamic import DynamicModel


def export_onnx(
    q: QuantizedModel | DynamicModel, path: str | Path, style: Literal["qdq", "qcdq"] = "qdq", *,
    opset: int | None = None, pack_int4: bool = True,
) -> Path:  # fmt: skip
    """Write ``q`` as ONNX: integer weights, int32 biases, QuantizeLinear and DequantizeLinear around codes.

    ``style="qcdq"`` adds the Clip that widths other than 8 and 16 bits need; ``"qdq"`` has none, and refuses them.
    ``opset`` is 13 to 26. ``pack_int4`` packs weights of 4 bits and less as INT4 from opset 21 on; onnxruntime then
    computes those layers in float, with False (int8 storage, less zero points) in integers. For TI's TIDL devices the
    file keeps the rules of their import: one image, opset 16, int8 alone. The file appears whole or not at all.

    >>> import bitsmith as bs, tempfile, pathlib
    >>> q = bs.quantize(nn.Linear(4, 2), [torch.randn(32, 4)])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_onnx(q, pathlib.Path(folder, "m.onnx")).name
    'm.onnx'
    """
    from .onnx import build_onnx, save_onnx

    q = q.captured()
    if q.target.tidl is not None:
        from .tidl import build_tidl

        return save_onnx(build_tidl(q, style=style, opset=opset), Path(path))
    model = build_onnx(
        q.graph, style=style, opset=opset, pack_int4=pack_int4, uint8_activations=q.target.unsigned_codes,
        on_codes=q.program.layers_on_codes if style == "qdq" else (),
        for_onnxruntime=q.recipe.placement == "dynamic" and q.target.engine == "onnxruntime",
    )  # fmt: skip
    return save_onnx(model, Path(path))


def export_torchscript(
    q: QuantizedModel | DynamicModel, path: str | Path, style: Literal["int8", "qcdq"] = "int8"
) -> Path:
    """Write ``q`` as TorchScript, which ``torch.jit.load`` reads and runs without Bitsmith, at any batch size.

    ``style="int8"`` runs on PyTorch's int8 CPU kernels (x86-64); its integers are those of ``deploy(q, "torch")``.
    ``"qcdq"`` holds plain quantize, clamp and dequantize arithmetic around float layers, for any device and width
    up to 16 bits; parameters are stored as integers in both. Inputs are the model's tensors in order; several
    outputs come as a flat tuple. The file appears whole or not at all. Raises ExportError where the model holds
    small floats, or where torch.jit cannot trace it. A dynamically quantized model is written on torch's dynamic
    kernels (style ``"int8"``), its outputs in its own structure.

    >>> import bitsmith as bs, tempfile, pathlib
    >>> q = bs.quantize(nn.Linear(4, 2), [torch.randn(32, 4)], target="torch")
    >>> x = torch.randn(3, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = torch.jit.load(export_torchscript(q, pathlib.Path(folder, "m.pt")))
    >>> bool((file(x) == q(x)).all())
    True
    """
    from ..engines import build_qcdq, build_torch, save_script, script, script_dynamic

    if style not in ("int8", "qcdq"):
        raise ExportError(f"style={style!r} is not known: TorchScript files are 'int8' or 'qcdq'")
    if Path(path).suffix != TORCHSCRIPT_SUFFIX:
        raise ExportError(f"{path}: name a TorchScript file .pt, so that its engine can be told")
    if not isinstance(q, QuantizedModel):
        if style != "int8":
            raise ExportError("scales that are found at run time have kernels in style 'int8' alone")
        return save_script(script_dynamic(q), path)
    module = build_torch(q, portable=True) if style == "int8" else build_qcdq(q)
    return save_script(script(module, q), path)


class _Simulation(nn.Module):
    """The fake-quantized graph alone, which torch.export can follow."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.layers = graph  # not 'graph': that is a name of fx's own

    def forward(self, *args: Any) -> Any:
        return self.layers(*args)


def export_pt2(q: QuantizedModel | DynamicModel, path: str | Path) -> Path:
    """Write the fake-quantized model as a ``.pt2`` file, which ``torch.export.load`` reads without Bitsmith.

    It computes in float on the grids; it is no integer file. Raises ExportError where torch.export refuses the model,
    and for recurrent layers quantized dynamically, whose steps are an operator of Bitsmith's.
    """
    q = q.captured()
    placeholders = [n.meta.get("val") for n in q.graph.graph.nodes if n.op == "placeholder"]
    if not all(isinstance(value, Tensor) for value in placeholders):
        raise ExportError("export_pt2 takes models whose inputs are all tensors")
    dynamic = tuple(
        {axis: torch.export.Dim.AUTO for axis, size in enumerate(v.shape) if isinstance(size, torch.SymInt)} or None
        for v in placeholders
    )
    examples = tuple(
        torch.zeros([int(d) if isinstance(d, int) else 2 for d in v.shape], dtype=v.dtype) for v in placeholders
    )
    spec: Any = q.graph.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    args, kwargs = torch.utils._pytree.tree_unflatten(list(examples), spec)
    if kwargs:
        raise ExportError("export_pt2 takes models without keyword-only inputs")
    shapes, _ = torch.utils._pytree.tree_unflatten(list(dynamic), spec)
    simulation = _Simulation(_in_torch_s_operators(q.graph) if q.recipe.placement == "dynamic" else q.graph)
    try:
        with torch.no_grad():
            program = torch.export.export(simulation, args, dynamic_shapes=(tuple(shapes),), strict=False)
    except Exception as error:  # torch raises many types here
        raise ExportError(f"torch.export cannot follow the quantized model: {error}") from error
    with atomic_write(path) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "No complete tensor")  # said of every buffer that is a part of another
        torch.export.save(program, str(temporary))
    return Path(path)


def _in_torch_s_operators(graph: fx.GraphModule) -> fx.GraphModule:
    """The same graph with the definitions of Bitsmith's own operators in their place."""
    from ..dynamic import laws, ops

    definitions = {ops.dynamic_linear: laws.linear, ops.dynamic_embedding: ops.embedding}
    plain = fx.GraphModule(graph, copy.deepcopy(graph.graph))
    for node in plain.graph.nodes:
        if node.target is ops.dynamic_recurrent:
            raise ExportError(
                "recurrent layers that are quantized dynamically have no form in a .pt2 file: use export_torchscript "
                "or export_onnx"
            )
        node.target = definitions.get(node.target, node.target)
    plain.recompile()
    return plain


def save_float_pt2(model: nn.Module, example_inputs: Any, path: str | Path) -> Path:
    """Write a float model as a ``.pt2`` file, its first dimension free where its code allows it.

    ``example_inputs`` is one batch, as for calibration. Raises ExportError where torch.export refuses the model.
    """
    args, kwargs = batch_arguments(model, example_inputs)
    shapes = torch.utils._pytree.tree_map_only(Tensor, lambda t: {0: torch.export.Dim.AUTO} if t.ndim else None, args)
    with evaluation_mode(model), torch.no_grad():
        try:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=None if kwargs else shapes, strict=False)
        except Exception as error:  # torch raises many types here
            raise ExportError(f"torch.export cannot follow {type(model).__name__}: {error}") from error
    with atomic_write(path) as temporary:
        torch.export.save(program, str(temporary))
    return Path(path)
