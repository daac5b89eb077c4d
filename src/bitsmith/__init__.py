"""Bitsmith: a trained PyTorch model in, a verified fixed-point model for a named target out."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .deployment import deploy
    from .doctor import doctor
    from .dynamic import DynamicModel, quantize_dynamic
    from .eager import DeQuantStub, FloatFunctional, QuantStub, convert, fuse_modules, prepare
    from .errors import BitsmithError
    from .export import export_ai8x, export_onnx, export_pt2, export_tidl, export_torchscript
    from .flow import quantize
    from .migrate import migrate
    from .model import QuantizedModel
    from .qat import QATSchedule, prepare_qat
    from .recipe import Override, Recipe, load_recipe
    from .report.write import write_report
    from .sensitivity import sensitivity
    from .storage import load, save
    from .targets import Target, get_target, list_targets
    from .tensor import QuantizedTensor
    from .verify import Certificate, verify
    from .wrap import PTQModel, QATModel

# Public name -> module; imported at first use, so that `import bitsmith` costs next to nothing.
_PUBLIC = {
    "BitsmithError": "errors",
    "Certificate": "verify",
    "DeQuantStub": "eager",
    "DynamicModel": "dynamic",
    "FloatFunctional": "eager",
    "Override": "recipe",
    "PTQModel": "wrap",
    "QATModel": "wrap",
    "QATSchedule": "qat",
    "QuantStub": "eager",
    "QuantizedModel": "model",
    "QuantizedTensor": "tensor",
    "Recipe": "recipe",
    "Target": "targets",
    "convert": "eager",
    "deploy": "deployment",
    "doctor": "doctor",
    "export_ai8x": "export",
    "export_onnx": "export",
    "export_pt2": "export",
    "export_tidl": "export",
    "export_torchscript": "export",
    "fuse_modules": "eager",
    "get_target": "targets",
    "list_targets": "targets",
    "load": "storage",
    "load_recipe": "recipe",
    "migrate": "migrate",
    "prepare": "eager",
    "prepare_qat": "qat",
    "quantize": "flow",
    "quantize_dynamic": "dynamic",
    "save": "storage",
    "sensitivity": "sensitivity",
    "verify": "verify",
    "write_report": "report.write",
}

__all__ = sorted([*_PUBLIC, "__version__"])


class _Package(ModuleType):
    """``bitsmith.verify`` is a function although a folder bears its name: importing the folder does not hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "nn":  # a folder that is public as a whole
        return importlib.import_module(".nn", __name__)
    if name not in _PUBLIC:
        raise AttributeError(f"module 'bitsmith' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "errors", "nn"]
