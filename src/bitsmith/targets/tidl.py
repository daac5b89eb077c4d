"""Texas Instruments' Jacinto 7 and AM6xA processors, whose TIDL library imports quantized ONNX files.

Sources: edgeai-tidl-tools (supported operators, prequantized models, quantization parameters) and the quantization
guidelines of edgeai-tensorlab's model optimization tools.
"""

from __future__ import annotations

from .target import Target, TidlDevice

_COMPUTE = {"conv", "linear", "matmul", "conv_transpose"}
_RESCALE = {"add", "mul", "cat", "avg_pool", "global_avg_pool", "sigmoid", "leaky_relu"}
_NOTES = (
    "Files hold int8 QDQ of opset 16 for one image; the compile options that go with them are in import.yaml.",
    "16 bits, alone or mixed with 8, enter by a file of ranges beside the float model: bitsmith.export_tidl.",
)
_PO2_NOTES = ("Scales are powers of two and weights have one per tensor; both operands of a matmul are signed.",)
_NO_TABLES = ("Sigmoid, tanh, GELU, softmax and ELU are not in its operator set.",)


def _device(name: str, description: str, device: TidlDevice) -> Target:
    notes = (*_NOTES, *(_PO2_NOTES if device.po2 else ()), *(() if device.lookup_tables else _NO_TABLES))
    return Target(
        name=name,
        description=description,
        engine="onnxruntime",
        default_recipe="tidl" if device.po2 else "int8",
        weight_bits=(8, 16),
        activation_bits=(8, 16),
        integer_bits=(8, 16),
        accumulator_bits=64,
        floats=False,
        scales=("po2",) if device.po2 else ("float32", "po2"),
        symmetric_activations=device.po2,
        symmetric_weights=True,
        granularities=("tensor",) if device.po2 else ("tensor", "channel"),
        tensor_weights=frozenset({"conv_transpose"}),
        integer_operators=frozenset(_COMPUTE | _RESCALE),
        all_ranges=True,
        same_signs=device.po2,
        tidl=device,
        notes=notes,
    )


_MMA1 = TidlDevice(po2=True)
_MMA2 = TidlDevice(po2=False)

TIDL_TARGETS = (
    _device(
        "tidl",
        "Any of TI's TIDL devices (what all of them run)",
        TidlDevice(po2=True, lookup_tables=False, deconv_16bit=False, stride_3=False),
    ),
    _device("tda4vm", "TI TDA4VM (MMAv1; ONNX for TIDL)", _MMA1),
    _device("am68pa", "TI AM68PA (MMAv1; ONNX for TIDL)", _MMA1),
    _device(
        "am62a",
        "TI AM62A (MMAv2; ONNX for TIDL)",
        TidlDevice(po2=False, lookup_tables=False, deconv_16bit=False, stride_3=False),
    ),
    _device(
        "am67a", "TI AM67A, TDA4AEN (MMAv2; ONNX for TIDL)", TidlDevice(po2=False, deconv_16bit=False, stride_3=False)
    ),
    _device("am68a", "TI AM68A, TDA4AL, TDA4VE, TDA4VL (MMAv2; ONNX for TIDL)", _MMA2),
    _device("am69a", "TI AM69A, TDA4VH (MMAv2; ONNX for TIDL)", _MMA2),
)
