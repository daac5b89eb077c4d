"""Small exported models, and ways to damage their files as little as possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn


class TwoHeads(nn.Module):
    """A residual net with two outputs of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.left, self.right = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.conv(x))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.left(x), self.right(x)


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def initializer(model: onnx.ModelProto, *words: str, dtype: Any = None) -> onnx.TensorProto:
    """The first constant whose name holds all words."""
    for tensor in model.graph.initializer:
        kind = numpy_helper.to_array(tensor).dtype
        if all(word in tensor.name for word in words) and dtype in (None, kind):
            return tensor
    raise LookupError(f"{words} is in none of {[t.name for t in model.graph.initializer]}")


def replace(tensor: onnx.TensorProto, array: Any) -> None:
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def change_one_code(model: onnx.ModelProto, layer: str) -> None:
    """The code of one weight, by one."""
    tensor = initializer(model, layer, "weight", dtype=np.int8)
    codes = numpy_helper.to_array(tensor).copy()
    codes.flat[0] += 1 if codes.flat[0] < 127 else -1
    replace(tensor, codes)


def shift_a_kernel(model: onnx.ModelProto, layer: str, by: int = 40) -> None:
    """All codes between the first input and the first output channel, by ``by``."""
    tensor = initializer(model, layer, "weight", dtype=np.int8)
    codes = numpy_helper.to_array(tensor).copy()
    codes[0, 0] = np.clip(codes[0, 0].astype(int) + by, -127, 127)
    replace(tensor, codes)


def change_one_bias(model: onnx.ModelProto, layer: str) -> None:
    """One bias code, by one step of the accumulator."""
    tensor = initializer(model, layer, "bias", dtype=np.int32)
    codes = numpy_helper.to_array(tensor).copy()
    codes.flat[0] += 1
    replace(tensor, codes)


def change_scale(model: onnx.ModelProto, *words: str) -> None:
    """A scale, by one unit in the last place."""
    tensor = initializer(model, *words, "scale", dtype=np.float32)
    replace(tensor, np.nextafter(numpy_helper.to_array(tensor), np.float32(np.inf), dtype=np.float32))


def set_scale(model: onnx.ModelProto, value: float, *words: str) -> None:
    tensor = initializer(model, *words, "scale", dtype=np.float32)
    replace(tensor, np.full_like(numpy_helper.to_array(tensor), value))


def change_zero_point(model: onnx.ModelProto, name: str) -> None:
    """By 20: a shift of codes and of where they clip. (By 1 changes nothing while no code is at an end.)"""
    tensor = initializer(model, name, "zero_point", dtype=np.uint8)
    replace(tensor, numpy_helper.to_array(tensor) + np.uint8(20))


def swap_outputs(model: onnx.ModelProto) -> None:
    """The two outputs change places but not names."""
    first, second = (output.name for output in model.graph.output)
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name in (first, second):
                node.output[index] = second if name == first else first


def drop_output(model: onnx.ModelProto) -> None:
    del model.graph.output[1]


def rename_input(model: onnx.ModelProto) -> None:
    old = model.graph.input[0].name
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == old:
                node.input[index] = "pixels"


def mutated(source: Path, target: Path, change: Any) -> Path:
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target
