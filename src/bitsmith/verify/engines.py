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

EngineName = Literal["onnxruntime", "openvino", "torch", "ai8x"]
Array = np.ndarray[Any, Any]
_INTEGER_KERNELS = (
    "chip_", "QLinear", "QGemm", "QAttention", "ConvInteger", "MatMulInteger", "DynamicQuantize", "quantized::",
    "onednn::q",
)  # fmt: skip
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
    *(f"aten::{name}" for name in ("_convolution", "linear", "matmul", "addmm", "bmm", "mm", "lstm", "gru")),
    *(f"aten::conv{kind}{rank}d" for kind in ("", "_transpose") for rank in (1, 2, 3)),
}
TORCHSCRIPT_SUFFIX = ".pt"
_TORCH_COUNTED = ("aten::", "quantized::", "onednn::")


@dataclass
class Engine:
    """A loaded file: ``run(inputs by name) -> outputs``; ``kernels`` counts what the runtime made of it, if it says.

    ``call`` is there where the runtime takes tensors as they are, in the order of ``inputs``.
    """

    name: str
    version: str
    inputs: list[str]
    outputs: list[str]
    run: Callable[[dict[str, Array]], list[Array]]
    kernels: Counter[str] = field(default_factory=Counter)
    call: Callable[..., Any] | None = None

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
    engines: dict[str, EngineName] = {"openvino": "openvino", "ai8x": "ai8x", "torch": "torch"}
    return engines.get(name, "onnxruntime")


def companion_files(path: Path, engine: str) -> list[Path]:
    """The files without which the one at ``path`` says nothing: the network description of a checkpoint."""
    if engine != "ai8x":
        return []
    from ..ai8x.deployed import description_path

    return [description_path(path)]


def engine_of(path: str | Path, asked: EngineName | None = None, wanted: EngineName = "onnxruntime") -> EngineName:
    """Which runtime reads a file: the one that was asked for, torch for ``.pt``, or else ``wanted``."""
    is_script = Path(path).suffix == TORCHSCRIPT_SUFFIX
    if asked is None:
        return wanted if wanted == "ai8x" else "torch" if is_script else "onnxruntime" if wanted == "torch" else wanted
    if asked != "ai8x" and (asked == "torch") != is_script:
        kind = "is TorchScript, which engine 'torch' runs" if is_script else "is no TorchScript (.pt)"
        raise VerificationError(f"{path} {kind}: engine={asked!r} cannot run it")
    return asked


def open_engine(path: str | Path, engine: EngineName | None = None, threads: int | None = None) -> Engine:
    """Load an ONNX file, OpenVINO IR, TorchScript or a checkpoint for MAX78000 into a runtime.

    Raises VerificationError where the file cannot be loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise VerificationError(f"{path} is not a file: export the model first")
    chosen = engine_of(path, engine)
    if chosen == "ai8x":
        return _ai8x(path)
    openers = {"onnxruntime": _onnxruntime, "openvino": _openvino, "torch": _torchscript}
    return openers[chosen](path, threads)


def _torchscript(path: Path, threads: int | None) -> Engine:
    from ..engines.torch_script import load_script

    return script_engine(load_script(path), threads)


def script_engine(program: Any, threads: int | None = None) -> Engine:
    """An Engine of a TorchScript program that takes tensors and gives a tensor, or a tuple of them."""
    import torch

    if threads is not None and threads != torch.get_num_threads():
        raise VerificationError(
            f"torch's threads are those of the process, {torch.get_num_threads()} now: call "
            f"torch.set_num_threads({threads}) instead of threads={threads}"
        )
    names = [argument.name for argument in program.forward.schema.arguments[1:]]

    def call(*tensors: Any) -> Any:
        with torch.no_grad():
            return program(*tensors)

    def run(feeds: dict[str, Array]) -> list[Array]:
        try:
            results = call(*(torch.from_numpy(feeds[name]) for name in names))
        except RuntimeError as error:
            raise VerificationError(f"torch {torch.__version__} cannot run the file: {error}") from error
        return [r.numpy() for r in torch.utils._pytree.tree_leaves(results)]

    graph = program.inlined_graph  # holds its nodes alive
    kinds = Counter(node.kind() for node in graph.nodes() if node.kind().startswith(_TORCH_COUNTED))
    count = _tensors_in(next(graph.outputs()))
    outputs = [f"output_{index}" for index in range(count)] if count > 1 else ["output"]
    return Engine("torch", torch.__version__, names, outputs, run, kinds, call)


def _tensors_in(value: Any) -> int:
    """How many tensors a value of a TorchScript graph holds, which may be a tuple or a dict of them."""
    node = value.node()
    parts = list(node.inputs())
    if node.kind() == "prim::DictConstruct":
        parts = parts[1::2]
    elif node.kind() not in ("prim::TupleConstruct", "prim::ListConstruct"):
        return 1
    return sum(_tensors_in(part) for part in parts)


def _ai8x(path: Path) -> Engine:
    """A checkpoint with its network description, read as the network loader reads them, in the chip's integers."""
    from ..ai8x.deployed import DeployedChip

    chip = DeployedChip.open(path)
    kernels = Counter({f"chip_{name}": n for name, n in Counter(chip.operators).items()})
    return Engine("ai8x", import_module("bitsmith").__version__, [chip.input], ["output"], chip.run, kernels)


def open_verifiable(path: str | Path, engine: EngineName = "onnxruntime") -> Engine:
    """``open_engine``, so that the file's results do not depend on the number of threads.

    onnxruntime's DynamicQuantizeLSTM gives each thread some rows of the batch, and their states a scale of their own.
    """
    opened = open_engine(path, engine)
    return open_engine(path, engine, threads=1) if opened.kernels["DynamicQuantizeLSTM"] else opened


def _onnxruntime(path: Path, threads: int | None) -> Engine:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or len(os.sched_getaffinity(0))
    if _is_misread(path):
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
    single = inputs and all(i.shape and i.shape[0] == 1 for i in session.get_inputs())

    def run(feeds: dict[str, Array]) -> list[Array]:
        try:
            if single and (count := len(feeds[inputs[0]])) > 1:  # a file for one image gets them one by one
                rows = [{name: array[i : i + 1] for name, array in feeds.items()} for i in range(count)]
                return [np.concatenate(parts) for parts in zip(*(session.run(outputs, row) for row in rows))]
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


def _is_misread(path: Path) -> bool:
    """Whether onnxruntime's fusions of Q and DQ would compute something else than the file says.

    They take float8 for integers and then refuse their own graph, and replace a softmax between codes by tables that
    are off by several steps.
    """
    import onnx

    names = {"FLOAT8E4M3FN", "FLOAT8E5M2"}
    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own DecodeError
        raise VerificationError(f"{path} is not an ONNX file, or it is damaged: {error}") from error
    if any(onnx.TensorProto.DataType.Name(t.data_type) in names for t in graph.initializer):
        return True
    dequantized = {name for node in graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    quantized = {node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    softmaxes = [node for node in graph.node if node.op_type == "Softmax"]
    return any(node.input[0] in dequantized and node.output[0] in quantized for node in softmaxes)


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
