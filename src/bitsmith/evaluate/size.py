"""How many bytes a model is."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from ..errors import DataError
from ..grid import Quantizer
from ..nn.module import WeightedModule
from ..place.layers import QuantLayer


def model_size(model: nn.Module | str | os.PathLike[str]) -> int:
    """Bytes of a model's parameters and buffers, or of its file.

    Weights and biases on a grid count with their bits, and so do scales (4 bytes) and zero points (1 byte); everything
    else counts as it lies in memory. A file counts with the external data that lies beside it under its name.

    >>> import bitsmith as bs, torch
    >>> net = nn.Linear(100, 10)
    >>> model_size(net), model_size(bs.quantize(net, [torch.randn(16, 100)]))
    (4040, 1085)
    """
    if not isinstance(model, nn.Module):
        path = Path(model)
        if not path.is_file():
            raise DataError(f"{path} is no file: give a model, or the path of its file")
        return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))
    bits: dict[int, int] = {}  # of the tensors that do not count as they lie in memory, by their ids
    for module in model.modules():
        if isinstance(module, QuantLayer):
            for tensor, quantizer in ((module.weight, module.weight_quantizer), (module.bias, module.bias_quantizer)):
                if tensor is not None and quantizer is not None and quantizer.grid is not None:
                    bits[id(tensor)] = quantizer.format.bits
            if module.bias_quantizer is not None and module.bias_quantizer.scale is not None:
                bits[id(module.bias_quantizer.scale)] = 0  # the product of the scales of input and weight
        elif isinstance(module, WeightedModule) and module.weight_quantizer.enabled:
            bits[id(module.weight)] = module.weight_quantizer.spec.format.bits
        elif isinstance(module, Quantizer) and module.zero_point is not None:
            bits[id(module.zero_point)] = 8
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return sum((t.numel() * bits.get(i, 8 * t.element_size()) + 7) // 8 for i, t in tensors.items())
