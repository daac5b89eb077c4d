"""A writer of ONNX models of our own: LayerGraph in, checked ModelProto out."""

from .build import DEFAULT_OPSET, NEWEST_OPSET, OLDEST_OPSET, build_onnx
from .save import save_onnx

__all__ = ["DEFAULT_OPSET", "NEWEST_OPSET", "OLDEST_OPSET", "build_onnx", "save_onnx"]
