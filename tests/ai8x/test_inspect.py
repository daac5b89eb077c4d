"""A quantized checkpoint read back as the loader reads it."""

from __future__ import annotations

import json

import pytest
import torch

from bitsmith.ai8x.devices import MAX78000, MAX78002
from bitsmith.ai8x.inspect import inspect_checkpoint
from bitsmith.ai8x.inspect_command import main, table
from bitsmith.ai8x.network import parse_network

WEIGHTS = torch.tensor([[1, -2, 0], [0, 0, 0], [127, 127, -128]]).reshape(3, 3, 1, 1).float()


def checkpoint(weights=WEIGHTS, **state):
    fields = {"c.op.weight": weights, "c.weight_bits": torch.tensor([8.0]), "c.output_shift": torch.tensor([-2.0])}
    return {"epoch": 3, "arch": "net", "state_dict": {**fields, **state}}


def network(**changes):
    layer = {"processors": 1, "op": "conv2d", "kernel_size": "1x1", "out_offset": 0, "activate": "ReLU", **changes}
    return parse_network({"arch": "NET", "dataset": "d", "layers": [layer]}, MAX78000)


def test_a_layer_is_described():
    found = inspect_checkpoint(checkpoint(**{"c.op.bias": torch.tensor([128.0, 0.0, -256.0])}), MAX78000, network())
    (layer,) = found.layers
    assert (layer.key, layer.shape, layer.bits, layer.output_shift, layer.shift) == (
        "c.op.weight",
        (3, 3, 1, 1),
        8,
        -2,
        -2,
    )
    assert (layer.minimum, layer.maximum, layer.bias) == (-128, 127, (-2, 1))
    assert (layer.weight_bytes, layer.bias_bytes, found.weight_bytes, found.bias_bytes) == (9, 3, 9, 3)
    assert (layer.channels, layer.dead_channels, layer.saturated_channels) == (3, 1, 1)
    assert layer.saturated_weights == pytest.approx(3 / 9)
    assert (found.errors, found.warnings) == ([], [])
    assert "The loader takes this file." in table(found)


def test_memory_counts_bits():
    state = {"c.weight_bits": torch.tensor([2])}
    found = inspect_checkpoint(checkpoint(WEIGHTS.clamp(-2, 1), **state), MAX78000)
    assert found.weight_bytes == 3  # 9 weights of 2 bits
    assert found.layers[0].shift == -2 + 6
    big = inspect_checkpoint(checkpoint(torch.ones(512, 1024)), MAX78000)
    assert big.errors == ["the weights take 524,288 bytes; the MAX78000 has 442,368"]
    assert inspect_checkpoint(checkpoint(torch.ones(512, 1024)), MAX78002).errors == []


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"c.op.weight": WEIGHTS + 0.5}, "not quantized, see 'bitsmith ai8x': c.op.weight"),
        ({"c.op.weight": torch.full((2, 2), float("nan"))}, "c.op.weight holds NaN or infinity"),
        ({"c.op.weight": torch.ones(4)}, "c.op.weight has one dimension: fuse batch normalization"),
        ({"c.op.weight": torch.ones(1, 1, 1, 1, 1)}, "c.op.weight has 5 dimensions"),
        ({"c.op.weight": WEIGHTS * 2}, "c.op.weight has weights from -256 to 254, which are not of 8 bits"),
        ({"c.weight_bits": torch.tensor([4])}, "which are not of 4 bits"),
        ({"c.weight_bits": torch.tensor([3])}, "c.op.weight has 3 bits: the chip has 1, 2, 4 and 8"),
        ({"c.weight_bits": torch.tensor([8, 8])}, "c.weight_bits is [8, 8], not one number"),
        ({"c.output_shift": torch.tensor([16.0])}, "c.op.weight has the shift 16, 16 with its bits"),
        ({"c.op.bias": torch.tensor([128.0 * 128])}, "c.op.bias becomes 128 to 128 on the chip"),
        ({"c.op.weight": 3}, "c.op.weight is a int, not a tensor"),
        ({"c.op.weight": torch.tensor([[1.0, -1.0]]), "c.weight_bits": torch.tensor([1])}, "binary weights"),
    ],
)
def test_what_the_loader_refuses(state, message):
    assert message in "\n".join(inspect_checkpoint(checkpoint(**state), MAX78000).errors)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"c.op.weight": torch.zeros(2, 2)}, "all weights of c.op.weight are zero"),
        ({"c.op.bias": torch.tensor([8.0])}, "c.op.bias is not in steps of 128: weight_bits (8) is not what it was"),
        ({"c.bn.running_mean": torch.ones(3), "c.bn.running_var": torch.ones(3)}, "is not fused (c.bn)"),
    ],
)
def test_what_the_loader_lets_pass(state, message):
    found = inspect_checkpoint(checkpoint(**state), MAX78000)
    assert message in "\n".join(found.warnings)
    assert found.errors == []


def test_the_description_is_held_against_the_file():
    def errors(**changes):
        return "\n".join(inspect_checkpoint(checkpoint(), MAX78000, network(**changes)).errors)

    assert errors() == ""
    assert "has kernels of 1x1, the YAML configuration says 3x3" in errors(kernel_size="3x3")
    assert "which are not of 4 bits" in errors(quantization=4)
    assert "has other weights than -1 and +1" in errors(quantization="bin")
    assert "has the shift 20" in errors(output_shift=20)
    other = parse_network({"arch": "x", "dataset": "d", "layers": []}, MAX78000)
    found = inspect_checkpoint(checkpoint(), MAX78000, other)
    assert found.errors == ["the checkpoint is of the architecture net, the YAML is for x"]
    assert found.warnings == ["the YAML configuration has no layer for c.op.weight: the loader does not read it"]
    empty = inspect_checkpoint({"state_dict": {}}, MAX78000, network())
    assert empty.errors == [
        "the checkpoint has no `epoch`",
        "the YAML configuration has 1 layers with weights, the checkpoint 0",
    ]
    assert empty.warnings == ["the checkpoint has no `arch`"]


def test_channels_of_a_transposed_convolution_are_its_second_axis():
    weights = torch.ones(2, 3, 3, 3)
    weights[:, 1] = 0
    described = network(op="convtranspose2d", kernel_size="3x3")
    (layer,) = inspect_checkpoint(checkpoint(weights), MAX78000, described).layers
    assert (layer.channels, layer.dead_channels) == (3, 1)


def test_the_command(tmp_path, capsys):
    file = tmp_path / "q.pth"
    torch.save(checkpoint(), file)
    assert main([str(file)]) == 0
    assert "c.op" in capsys.readouterr().out
    assert main([str(file), "--json", "--device", "87"]) == 0
    assert json.loads(capsys.readouterr().out)["layers"][0]["dead_channels"] == 1
    torch.save(checkpoint(WEIGHTS + 0.5), file)
    assert main([str(file)]) == 1
    assert "The loader does not take this file." in capsys.readouterr().out
    assert main([str(tmp_path / "none.pth")]) == 1
    assert "does not exist" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([str(file), "--device", "84"])
    assert stop.value.code == 2
