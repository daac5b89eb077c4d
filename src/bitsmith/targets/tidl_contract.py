"""What TI's TIDL import demands of a quantized ONNX file, checked on the file alone.

It reads the file with onnx and numpy and knows nothing of how Bitsmith wrote it, so it judges files of any origin.
Source: prequantized import in edgeai-tidl-tools, and the graph rules of TI's ONNX optimizer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import VerificationError
from .target import TidlDevice

NEWEST_OPSET = 19
_COMPUTE = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_DYNAMIC = ("Shape", "Size", "ConstantOfShape", "NonZero", "Loop", "If", "Scan", "DynamicQuantizeLinear")
_FUSED = ("Relu", "Clip")


@dataclass
class _File:
    """A file with its constants, the maker of every tensor, its readers, and what shape inference says."""

    model: Any
    constants: dict[str, Any] = field(default_factory=dict)
    maker: dict[str, Any] = field(default_factory=dict)
    readers: dict[str, list[Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> _File:
        import onnx
        from onnx import numpy_helper

        try:
            model = onnx.load(str(path))
        except Exception as error:  # protobuf's own DecodeError, or what reading raises
            raise VerificationError(f"{path} is not an ONNX file, or it is damaged: {error}") from error
        file = cls(model, {t.name: numpy_helper.to_array(t) for t in model.graph.initializer})
        for node in model.graph.node:
            file.maker.update(dict.fromkeys(node.output, node))
            for name in node.input:
                file.readers.setdefault(name, []).append(node)
        return file

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    @property
    def outputs(self) -> set[str]:
        return {output.name for output in self.model.graph.output}

    def dequantize(self, name: str) -> Any:
        """The DequantizeLinear that gives a tensor, or None."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def scale(self, node: Any) -> Any:
        return self.constants.get(node.input[1])

    def zero_point(self, node: Any) -> Any:
        return self.constants.get(node.input[2]) if len(node.input) > 2 else np.int8(0)


_Rule = Callable[[_File, TidlDevice], Iterator[str]]


def check_tidl(path: str | Path, device: TidlDevice) -> list[str]:
    """What TIDL's import would refuse in an ONNX file, one sentence each with the node or tensor; empty where nothing.

    Raises VerificationError where the file is no ONNX file.
    """
    file = _File.open(Path(path))
    return [violation for rule in _RULES for violation in rule(file, device)]


def _opset(file: _File, device: TidlDevice) -> Iterator[str]:
    for entry in file.model.opset_import:
        if entry.domain not in ("", "ai.onnx"):
            yield f"operators of domain {entry.domain!r}: TIDL knows ONNX's own only"
        elif entry.version > NEWEST_OPSET:
            yield f"opset {entry.version}: TIDL imports up to {NEWEST_OPSET}"


def _shapes(file: _File, device: TidlDevice) -> Iterator[str]:
    graph = file.model.graph
    known = {}
    for info in (*graph.input, *graph.output, *graph.value_info):
        kind = info.type.tensor_type
        known[info.name] = [d.dim_value for d in kind.shape.dim] if kind.HasField("shape") else None
    made = {name for node in graph.node for name in node.output if name}
    for name in sorted(made | {i.name for i in graph.input if i.name not in file.constants}):
        shape = known.get(name)
        if shape is None:
            yield f"tensor {name!r} has no shape: run shape inference on the file"
        elif any(size < 1 for size in shape):
            yield f"tensor {name!r} has a free dimension: all sizes have to be numbers"


def _names(file: _File, device: TidlDevice) -> Iterator[str]:
    for name, count in Counter(node.name for node in file.nodes).items():
        if not name:
            yield f"{count} nodes have no name: names are how layers are chosen for 16 bits"
        elif count > 1:
            yield f"{count} nodes are called {name!r}: names have to be unique"
    for name, count in Counter(name for node in file.nodes for name in node.output if name).items():
        if count > 1:
            yield f"{count} nodes write tensor {name!r}"


def _operators(file: _File, device: TidlDevice) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type in _DYNAMIC:
            yield f"node {node.name!r} is a {node.op_type}: sizes have to be constants"
        if node.op_type == "LayerNormalization":
            yield f"node {node.name!r} is a LayerNormalization: it has to be spelled out in its parts"
        if node.op_type == "Identity":
            yield f"node {node.name!r} is an Identity, which stands between layers that belong together"
        if node.op_type == "Cast":
            at_start = node.input[0] not in file.maker
            if not at_start and not file.outputs.issuperset(node.output):
                yield f"node {node.name!r} is a Cast in the middle: casts stand at inputs and outputs only"
        if node.op_type == "Reshape" and node.input[1] not in file.constants:
            yield f"node {node.name!r} reshapes to computed sizes: they have to be constants"


def _quantizers(file: _File, device: TidlDevice) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type not in _QDQ:
            continue
        scale, zero = file.scale(node), file.zero_point(node)
        if scale is None or zero is None:
            yield f"{node.name!r} computes its scale or zero point: both have to be constants"
            continue
        codes = file.constants.get(node.input[0])
        if codes is None:
            yield from _activation_pair(node, scale, zero)
        elif node.op_type == "QuantizeLinear":
            yield f"{node.name!r} quantizes a constant: store its codes as int8"
        elif codes.dtype not in (np.int8, np.int32):
            yield f"{node.name!r} dequantizes constants of {codes.dtype}: weights are int8, biases int32"
        if device.po2:
            yield from _power_of_two(node, scale, zero, bias=codes is not None and codes.dtype == np.int32)


def _activation_pair(node: Any, scale: Any, zero: Any) -> Iterator[str]:
    if scale.ndim and scale.size > 1:
        yield f"{node.name!r} has {scale.size} scales: activations have one"
    if zero.dtype not in (np.int8, np.uint8):
        yield f"{node.name!r} has codes of {zero.dtype}: QDQ files hold 8 bits; 16 enter by a file of ranges"
    if any(attribute.name == "axis" and attribute.i != 1 for attribute in node.attribute):
        yield f"{node.name!r} names an axis: one scale for a tensor takes none"


def _power_of_two(node: Any, scale: Any, zero: Any, *, bias: bool) -> Iterator[str]:
    if np.any(np.frexp(scale.astype(np.float64))[0] != 0.5):
        yield f"{node.name!r} has a scale that is no power of two"
    if np.any(zero != 0):
        yield f"{node.name!r} has a zero point: this device is symmetric"
    if scale.size > 1 and not bias:
        yield f"{node.name!r} has {scale.size} weight scales: this device has one per tensor"


def _repeated(file: _File, device: TidlDevice) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type != "QuantizeLinear" or (before := file.dequantize(node.input[0])) is None:
            continue
        same = np.array_equal(file.scale(node), file.scale(before))
        if same and np.array_equal(file.zero_point(node), file.zero_point(before)):
            yield f"{node.name!r} quantizes again what {before.name!r} gives, on the same grid"


def _layers(file: _File, device: TidlDevice) -> Iterator[str]:
    for node in file.nodes:
        if node.op_type not in _COMPUTE:
            continue
        sources = [file.dequantize(name) for name in node.input[:2]]
        for name, source in zip(node.input[:2], sources):
            if source is None:
                yield f"layer {node.name!r} reads {name!r} in float: it has to come from a DequantizeLinear"
        if None in sources:
            continue
        if node.op_type != "MatMul" or sources[1].input[0] in file.constants:
            yield from _weight(file, node, sources[1])
        if len(node.input) > 2 and node.input[2]:
            yield from _bias(file, node, sources)
        if device.po2 and node.op_type == "MatMul":
            kinds = {file.zero_point(source).dtype for source in sources}
            if len(kinds) > 1:
                yield f"layer {node.name!r} multiplies signed by unsigned codes"


def _weight(file: _File, node: Any, source: Any) -> Iterator[str]:
    codes = file.constants.get(source.input[0])
    if codes is None or codes.dtype != np.int8:
        yield f"layer {node.name!r} has weights of {'computed codes' if codes is None else codes.dtype}, not int8"
    axis = next((a.i for a in source.attribute if a.name == "axis"), 1)
    if file.scale(source).size > 1 and axis != 0:
        yield f"layer {node.name!r} has weight scales along axis {axis}: they lie along axis 0"


def _bias(file: _File, node: Any, sources: list[Any]) -> Iterator[str]:
    source = file.dequantize(node.input[2])
    codes = None if source is None else file.constants.get(source.input[0])
    if source is None or codes is None or codes.dtype != np.int32:
        yield f"layer {node.name!r} has a bias that is not int32 behind a DequantizeLinear"
        return
    expected = np.float32(file.scale(sources[0])) * file.scale(sources[1]).astype(np.float32)
    found = file.scale(source)
    if not np.allclose(np.broadcast_to(found, codes.shape), np.broadcast_to(expected, codes.shape), rtol=1e-6, atol=0):
        yield f"layer {node.name!r} has a bias scale that is not s_x * s_w"
    if np.any(file.zero_point(source) != 0):
        yield f"layer {node.name!r} has a bias with a zero point"


def _ends(file: _File, device: TidlDevice) -> Iterator[str]:
    for entry in file.model.graph.input:
        readers = file.readers.get(entry.name, [])
        is_float = entry.type.tensor_type.elem_type == 1
        if entry.name not in file.constants and is_float and any(n.op_type != "QuantizeLinear" for n in readers):
            yield f"input {entry.name!r} is read in float: a QuantizeLinear has to come first"
    for name in sorted(file.outputs):
        node = file.maker.get(name)
        if node is not None and node.op_type == "Cast":
            node = file.maker.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear":
            yield f"output {name!r} leaves the file without a grid: it has to be quantized and dequantized"


def _ranges(file: _File, device: TidlDevice) -> Iterator[str]:
    """Layers hand on codes, at most through an activation that fuses."""
    for node in file.nodes:
        if node.op_type not in _COMPUTE:
            continue
        name = node.output[0]
        while len(readers := file.readers.get(name, [])) == 1 and readers[0].op_type in _FUSED:
            name = readers[0].output[0]
        if name in file.outputs or any(r.op_type not in ("QuantizeLinear", "Reshape", "Transpose") for r in readers):
            yield f"layer {node.name!r} hands its result on in float: TIDL would have no range for it"


_RULES: tuple[_Rule, ...] = (
    _opset, _shapes, _names, _operators, _quantizers, _repeated, _layers, _ends, _ranges,
)  # fmt: skip
