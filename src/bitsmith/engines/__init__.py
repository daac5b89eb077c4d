"""The quantized model on PyTorch's own int8 CPU kernels, in this process or as a TorchScript file."""

from .torch_build import build_torch
from .torch_qcdq import build_qcdq
from .torch_script import example_inputs, freeze, load_script, repacked, save_script, script, script_dynamic

__all__ = [
    "build_qcdq",
    "build_torch",
    "example_inputs",
    "freeze",
    "load_script",
    "repacked",
    "save_script",
    "script",
    "script_dynamic",
]
