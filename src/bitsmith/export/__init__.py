"""Files that other runtimes read."""

from .ai8x import export_ai8x
from .files import export_onnx, export_pt2, export_torchscript
from .tidl import export_tidl

__all__ = ["export_ai8x", "export_onnx", "export_pt2", "export_tidl", "export_torchscript"]
