"""Files that other runtimes read."""

from .ai8x import export_ai8x
from .files import export_onnx, export_pt2, export_torchscript

__all__ = ["export_ai8x", "export_onnx", "export_pt2", "export_torchscript"]
