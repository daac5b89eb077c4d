"""Checkpoint and network description for the MAX78000/MAX78002 network loader.

The checkpoint holds for each layer with weights ``<layer>.op.weight`` and ``.op.bias`` (integers in float32, the bias
times ``2**(b - 1)``), ``weight_bits`` and ``output_shift``; the description says how the layers hang together and where
their data lie. What the loader has no use for, but a user has, is in ``extras``: the scales of input and output.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ..ai8x.checkpoint import write_checkpoint
from ..ai8x.deployed import description_path
from ..capture.ops import module_of, quantizer_of
from ..errors import ExportError
from ..files import write_text
from ..grid import quantize
from ..integer.kernels import centred_weight
from ..integer.max78000 import total_shift
from ..model import QuantizedModel
from ..place.chip_layer import ChipLayer
from ..place.chip_limits import plan_chip
from ..place.chip_memory import ChipPlan
from ..place.layers import QuantLayer
from ..place.plan import fused_end


def export_ai8x(q: QuantizedModel, path: str | Path, *, arch: str = "bitsmith", dataset: str = "custom") -> Path:
    """Write ``q`` as a checkpoint at ``path`` and, beside it, its network description with the suffix ``.yaml``.

    ``arch`` and ``dataset`` are the names that the loader shows and compares. Both files appear whole or not at all.
    Raises ExportError where ``q`` was quantized for another target.

    Source: what ai8x-synthesis reads (izer/checkpoint.py, izer/yamlcfg.py).

    >>> import bitsmith as bs, tempfile, pathlib
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.ReLU())
    >>> q = bs.quantize(net, [torch.randn(8, 1, 6, 6)], target="max78000")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bs.export_ai8x(q, pathlib.Path(folder, "net.pth.tar"))
    ...     sorted(file.name for file in pathlib.Path(folder).iterdir())
    ['net.pth.tar', 'net.yaml']
    """
    if q.target.law != "max78000":
        raise ExportError(
            f"this model was quantized for {q.target.name}, whose numbers are others: quantize it with "
            "target='max78000' or 'max78002'"
        )
    path, plan = Path(path), plan_chip(q.graph, q.target)
    state: OrderedDict[str, Tensor] = OrderedDict()
    for layer in plan.layers:
        if layer.op != "none":
            state.update(_entries(layer))
    checkpoint = {"epoch": 0, "arch": arch, "extras": _extras(q, plan), "state_dict": state}
    write_text(description_path(path), network_yaml(plan, arch, dataset))
    write_checkpoint(checkpoint, path)
    return path


def _entries(layer: ChipLayer) -> dict[str, Tensor]:
    """The state_dict entries of one layer, named as ai8x-training names them."""
    if layer.identity:
        weight, bias, shift = torch.zeros(layer.written[0], layer.read[0], 1, 1), None, 1
        for channel in range(layer.read[0]):
            weight[layer.first + channel, channel] = 1.0
    else:
        assert layer.node is not None
        weight, bias = _integers(layer)
        shift = 0 if layer.wide else _total_shift(layer.node) - (8 - layer.bits)
    entries = {"op.weight": weight.float()}
    if bias is not None:
        entries["op.bias"] = bias.float() * 2.0 ** (layer.bits - 1)
    scalars = {
        "weight_bits": layer.bits, "bias_bits": 8, "output_shift": shift, "quantize_activation": 1,
        "adjust_output_shift": 0, "shift_quantile": 1,
    }  # fmt: skip
    entries.update({name: torch.tensor([float(value)]) for name, value in scalars.items()})
    return {f"{layer.name}.{name}": value for name, value in entries.items()}


def _integers(layer: ChipLayer) -> tuple[Tensor, Tensor | None]:
    """Weight and bias codes; a grouped convolution that the chip has not is spread out over all channels."""
    wrapped = _wrapped(layer)
    weight: Any = centred_weight(wrapped)
    if layer.dense:
        weight = _dense(weight, wrapped.layer.groups, transposed=layer.op == "convtranspose2d")  # type: ignore[arg-type]
    bias = wrapped.bias
    if bias is None:
        return weight, None
    assert wrapped.bias_quantizer is not None
    return weight, quantize(bias.detach(), wrapped.bias_quantizer.require_grid()).to(torch.int64)


def _dense(weight: Tensor, groups: int, *, transposed: bool) -> Tensor:
    """The weight of a grouped convolution as one without groups, zeros elsewhere."""
    blocks = weight.chunk(groups, 0)
    rows, columns = blocks[0].shape[:2]
    dense = weight.new_zeros(rows * groups, columns * groups, *weight.shape[2:])
    for index, block in enumerate(blocks):
        dense[index * rows : (index + 1) * rows, index * columns : (index + 1) * columns] = block
    assert transposed or dense.shape[0] == weight.shape[0]
    return dense


def _wrapped(layer: ChipLayer) -> QuantLayer:
    assert layer.node is not None
    module = module_of(layer.node)
    assert isinstance(module, QuantLayer)
    return module


def _scale(node: fx.Node | Any) -> float:
    quantizer = quantizer_of(node)
    assert quantizer is not None
    return float(quantizer.require_grid().scale)


def _accumulator_scale(node: fx.Node) -> float:
    module = module_of(node)
    assert isinstance(module, QuantLayer)
    assert module.weight_quantizer is not None
    source = quantizer_of(node.args[0])
    assert source is not None
    return float(source.require_grid().scale * module.weight_quantizer.require_grid().scale)


def _total_shift(node: fx.Node) -> int:
    end = next(user for user in fused_end(node).users if quantizer_of(user) is not None)
    return total_shift(_accumulator_scale(node), _scale(end))


def _extras(q: QuantizedModel, plan: ChipPlan) -> dict[str, Any]:
    """What turns the chip's codes into the model's numbers."""
    nodes = list(q.graph.graph.nodes)
    source = next(node for node in nodes if node.op == "placeholder")
    output = next(node for node in nodes if node.op == "output").all_input_nodes[0]
    wide = plan.layers[-1].wide
    while not wide and quantizer_of(output) is None:
        output = output.args[0]
    return {
        "made_by": "bitsmith",
        "device": q.target.name,
        "input": str(source.target),
        "input_scale": _scale(next(user for user in source.users if quantizer_of(user) is not None)),
        "output_scale": _accumulator_scale(plan.layers[-1].node) if wide else _scale(output),  # type: ignore[arg-type]
        "avg_pool_rounding": q.target.average_rounding,
    }


# The network description


def network_yaml(plan: ChipPlan, arch: str, dataset: str) -> str:
    """The description of all layers, in the words of the loader."""
    lines = ["---", f"arch: {arch}", f"dataset: {dataset}", "", "layers:"]
    for number, layer in enumerate(plan.layers):
        lines.append(f"  # {number}: {layer.name}, {_times(layer.read)} to {_times(layer.written)}")
        entries = _keys(plan, number, layer)
        lines += [f"  {'- ' if i == 0 else '  '}{key}: {value}" for i, (key, value) in enumerate(entries.items())]
    return "\n".join(lines) + "\n"


def _keys(plan: ChipPlan, number: int, layer: ChipLayer) -> dict[str, Any]:
    read, written = plan.read(layer), plan.written[number]
    keys: dict[str, Any] = {
        "in_sequences": layer.sources[0] if len(layer.sources) == 1 else layer.sources,
        "in_offset": f"0x{read.offset:04x}",
        "processors": f"0x{read.processors:016x}",
        "out_offset": f"0x{written.offset:04x}",
        "output_processors": f"0x{written.processors:016x}",
        "op": "passthrough" if layer.op == "none" else layer.op,
    }
    if number == 0:
        del keys["in_sequences"]
        keys["data_format"] = "HWC"
    if layer.eltwise is not None:
        keys["eltwise"] = layer.eltwise
    if layer.pool is not None:
        flat = len(layer.pool.kernel) == 1
        keys[f"{layer.pool.kind}_pool"] = [layer.pool.kernel[0], 1] if flat else list(layer.pool.kernel)
        keys["pool_stride"] = layer.pool.stride[0]
    if layer.op in ("conv1d", "conv2d", "convtranspose2d"):
        keys["kernel_size"] = layer.kernel[0] if layer.op == "conv1d" else f"{layer.kernel[0]}x{layer.kernel[1]}"
        keys["pad"] = layer.padding
    if layer.dilation > 1:
        keys["dilation"] = layer.dilation
    if layer.groups > 1:
        keys["groups"] = layer.groups
    if layer.flatten:
        keys["flatten"] = "true"
    if layer.op != "none":
        keys["activate"] = {None: "None", "relu": "ReLU", "abs": "Abs"}[layer.activation]
        keys["quantization"] = layer.bits
    if layer.write_gap:
        keys["write_gap"] = layer.write_gap
    if layer.wide:
        keys["output_width"] = 32
    return keys


def _times(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
