"""Files that other runtimes read."""

from .files import export_onnx, export_pt2

__all__ = ["export_onnx", "export_pt2"]
