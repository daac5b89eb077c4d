"""One operator between DequantizeLinear and QuantizeLinear, run by onnxruntime's own integer kernel."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
TYPES = {np.dtype(np.uint8): TensorProto.UINT8, np.dtype(np.int8): TensorProto.INT8}


@dataclass(frozen=True)
class Codes:
    """A tensor as a runtime stores it: ``real = (codes - zero) * scale``; ``constant`` makes it a weight."""

    codes: Array
    scale: Any  # float, or one per channel of axis 0
    zero: int = 0
    constant: bool = False


def run_kernel(
    op: str,
    operands: list[Codes],
    scale: float | None,
    zero: int = 0,
    *,
    dtype: Any = np.uint8,
    bias: Array | None = None,
    **attributes: Any,
) -> tuple[Array, list[str]]:
    """The output codes (real numbers where ``scale`` is None), and the kernels that onnxruntime ran.

    ``bias`` are int32 codes at the scale of the products.
    """
    graph, feeds = _graph(op, operands, scale, zero, np.dtype(dtype), bias, attributes)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = str(Path(folder, "optimized.onnx"))
        session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        kernels = [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]
    (result,) = session.run(None, feeds)
    return np.asarray(result), kernels


def _graph(
    op: str,
    operands: list[Codes],
    scale: float | None,
    zero: int,
    dtype: np.dtype[Any],
    bias: Array | None,
    attributes: dict[str, Any],
) -> tuple[onnx.GraphProto, dict[str, Array]]:
    nodes, constants, inputs, feeds, names = [], [], [], {}, []

    def constant(name: str, value: Any, kind: Any) -> str:
        constants.append(numpy_helper.from_array(np.asarray(value, dtype=kind), name))
        return name

    for i, x in enumerate(operands):
        kind = x.codes.dtype
        if x.constant:
            constant(f"x{i}", x.codes, kind)
        else:
            inputs.append(helper.make_tensor_value_info(f"x{i}", TYPES[kind], x.codes.shape))
            feeds[f"x{i}"] = x.codes
        scales = np.asarray(x.scale, dtype=np.float32)
        grid = [
            constant(f"s{i}", scales, np.float32),
            constant(f"z{i}", np.full(scales.shape, x.zero), kind),
        ]
        axis = {"axis": 0} if scales.ndim else {}
        nodes.append(helper.make_node("DequantizeLinear", [f"x{i}", *grid], [f"r{i}"], **axis))
        names.append(f"r{i}")
    if bias is not None:
        s = np.float32(operands[0].scale) * np.asarray(operands[1].scale, dtype=np.float32)
        grid = [constant("s_b", s, np.float32)]
        axis = {"axis": 0} if s.ndim else {}
        nodes.append(helper.make_node("DequantizeLinear", [constant("b", bias, np.int32), *grid], ["r_b"], **axis))
        names.append("r_b")
    nodes.append(helper.make_node(op, names, ["real"], **attributes))
    output, kind = "real", TensorProto.FLOAT
    if scale is not None:
        grid = [constant("s_y", scale, np.float32), constant("z_y", zero, dtype)]
        nodes.append(helper.make_node("QuantizeLinear", ["real", *grid], ["y"]))
        output, kind = "y", TYPES[dtype]
    outputs = [helper.make_tensor_value_info(output, kind, None)]
    return helper.make_graph(nodes, "kernel", inputs, outputs, constants), feeds
