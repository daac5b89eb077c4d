"""Independent runtimes, each behind one function: a file in, a callable on numpy arrays out."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np

from ..errors import MissingExtraError, VerificationError

EngineName = Literal["onnxruntime", "openvino", "ai8x"]
Array = np.ndarray[Any, Any]
_INTEGER_KERNELS = ("chip_", "QLinear", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantize")
_ON_CODES = " on codes"
_COMPUTE_KERNELS = {
    "Conv",
    "FusedConv",
    "ConvTranspose",
    "Gemm",
    "FusedGemm",
    "MatMul",
    "FusedMatMul",
    "LSTM",
    "GRU",
}


@dataclass
class Engine:
    """A loaded file: ``run(inputs by name) -> outputs``; ``kernels`` counts what the runtime made of it, if it says."""

    name: str
    version: str
    inputs: list[str]
    outputs: list[str]
    run: Callable[[dict[str, Array]], list[Array]]
    kernels: Counter[str] = field(default_factory=Counter)

    @property
    def integer_kernels(self) -> dict[str, int]:
        """Kernels that multiply or rescale codes: in integers, or ``on codes`` in float32, which is exact as well."""
        return {
            k: n for k, n in sorted(self.kernels.items()) if k.startswith(_INTEGER_KERNELS) or k.endswith(_ON_CODES)
        }

    @property
    def float_compute_kernels(self) -> dict[str, int]:
        """Convolutions and products that the runtime computes in float."""
        return {k: n for k, n in sorted(self.kernels.items()) if k in _COMPUTE_KERNELS}


def engine_for(name: str) -> EngineName:
    """The engine that runs the files of a target, or that a certificate names.

    >>> engine_for("ai8x"), engine_for("none")
    ('ai8x', 'onnxruntime')
    """
    return "openvino" if name == "openvino" else "ai8x" if name == "ai8x" else "onnxruntime"


def companion_files(path: Path, engine: str) -> list[Path]:
    """The files without which the one at ``path`` says nothing: the network description of a checkpoint."""
    if engine != "ai8x":
        return []
    from ..ai8x.deployed import description_path

    return [description_path(path)]


def open_engine(path: str | Path, engine: EngineName = "onnxruntime", threads: int | None = None) -> Engine:
    """Load an ONNX file (or OpenVINO IR, or a checkpoint for MAX78000) into a runtime.

    Raises VerificationError where the file cannot be loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise VerificationError(f"{path} is not a file: export the model first")
    if engine == "ai8x":
        return _ai8x(path)
    return _onnxruntime(path, threads) if engine == "onnxruntime" else _openvino(path, threads)


def _ai8x(path: Path) -> Engine:
    """A checkpoint with its network description, read as the network loader reads them, in the chip's integers."""
    from ..ai8x.deployed import DeployedChip

    chip = DeployedChip.open(path)
    kernels = Counter({f"chip_{name}": n for name, n in Counter(chip.operators).items()})
    return Engine("ai8x", import_module("bitsmith").__version__, [chip.input], ["output"], chip.run, kernels)


def _onnxruntime(path: Path, threads: int | None) -> Engine:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    if _holds_float8(path):  # its QDQ fusions take float8 for integers and then refuse their own graph
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with TemporaryDirectory(prefix="bitsmith-ort-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options.optimized_model_filepath = str(optimized)
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises a family of its own, without a common base
            raise VerificationError(f"onnxruntime {ort.__version__} cannot load {path}: {error}") from error
        kernels = _kernels(optimized)
    inputs, outputs = [i.name for i in session.get_inputs()], [o.name for o in session.get_outputs()]

    def run(feeds: dict[str, Array]) -> list[Array]:
        try:
            return list(session.run(outputs, feeds))
        except Exception as error:
            raise VerificationError(f"onnxruntime {ort.__version__} cannot run {path}: {error}") from error

    return Engine("onnxruntime", ort.__version__, inputs, outputs, run, kernels)


def _kernels(path: Path) -> Counter[str]:
    """The operators of a file by type; float layers that multiply codes are counted apart."""
    import onnx
    from onnx import numpy_helper

    if not path.is_file():
        return Counter()
    graph = onnx.load(str(path), load_external_data=False).graph
    constants = {t.name: t for t in graph.initializer}
    codes = {
        node.output[0]
        for node in graph.node
        if node.op_type == "DequantizeLinear"
        and (scale := constants.get(node.input[1])) is not None
        and scale.data_location == onnx.TensorProto.DEFAULT
        and (numpy_helper.to_array(scale) == 1).all()
    }
    return Counter(
        node.op_type + (_ON_CODES if node.op_type in _COMPUTE_KERNELS and codes.issuperset(node.input[:2]) else "")
        for node in graph.node
    )


def _holds_float8(path: Path) -> bool:
    import onnx

    names = {"FLOAT8E4M3FN", "FLOAT8E5M2"}
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own DecodeError
        raise VerificationError(f"{path} is not an ONNX file, or it is damaged: {error}") from error
    return any(onnx.TensorProto.DataType.Name(t.data_type) in names for t in graph.initializer)


def _openvino(path: Path, threads: int | None) -> Engine:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("OpenVINO is not installed: pip install 'bitsmith[openvino]'") from error
    config = {
        "INFERENCE_NUM_THREADS": str(threads or len(os.sched_getaffinity(0))),
        "INFERENCE_PRECISION_HINT": "f32",  # else layers in float run in bfloat16 on processors that have it
        "PERFORMANCE_HINT": "LATENCY",
    }
    try:
        model = openvino.Core().compile_model(str(path), "CPU", config)
    except RuntimeError as error:
        raise VerificationError(f"OpenVINO {openvino.__version__} cannot load {path}: {error}") from error
    request = model.create_infer_request()

    def run(feeds: dict[str, Array]) -> list[Array]:
        results = request.infer(feeds)
        return [np.array(results[output]) for output in model.outputs]

    names = [i.get_any_name() for i in model.inputs], [o.get_any_name() for o in model.outputs]
    return Engine("openvino", openvino.__version__, *names, run)
