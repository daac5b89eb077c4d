"""The network description: fields, defaults, and the messages that users of the loader know."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitsmith.ai8x.devices import CMSIS_NN, MAX78000, MAX78002, UnknownDeviceError, find_device
from bitsmith.ai8x.network import BINARY, INPUT, STOP, Network, NetworkError, read_network

HEAD = "arch: a\ndataset: d\nlayers:\n"
LAYER = "  - {processors: 1, out_offset: 0, op: conv2d, activate: ReLU"


def network(tmp_path: Path, text: str, device=MAX78000, said: list[str] | None = None) -> Network:
    file = tmp_path / "n.yaml"
    file.write_text(text)
    return read_network(
        file, device, lambda kind, message: (said if said is not None else []).append(f"{kind}: {message}")
    )


def layers(*extra: str) -> str:
    return HEAD + "".join(f"{LAYER}{', ' + more if more else ''}}}\n" for more in extra)


@pytest.mark.parametrize(
    ("name", "device"),
    [
        *((name, MAX78000) for name in ("85", "ai85", "MAX85", "AI78000", "max78000", "78000", "Ai85", "MaX78000")),
        *((name, MAX78002) for name in ("87", "AI87", "MAX78002", "78002", "max87")),
        *((name, CMSIS_NN) for name in ("CMSIS-NN", "cmsis-nn")),
    ],
)
def test_devices_have_many_spellings(name, device):
    assert find_device(name) is device


@pytest.mark.parametrize("name", ["AI84", "84", " 85", " MAX78000", "max", "", "maxai85", "max 85", "78001", "85.0"])
def test_other_devices_are_unknown(name):
    with pytest.raises(UnknownDeviceError):
        find_device(name)


def test_a_layer_has_the_loaders_defaults(tmp_path):
    (layer,) = network(tmp_path, layers("")).layers
    assert (layer.op, layer.kernel_size, layer.stride, layer.padding, layer.dilation) == (
        "conv2d",
        (3, 3),
        (1, 1),
        (1, 1),
        (1, 1),
    )
    assert (layer.groups, layer.pooling, layer.output_width, layer.operands) == (1, None, 8, 1)
    assert (layer.quantization, layer.output_shift, layer.activation, layer.eltwise) == (None, None, "relu", None)
    assert layer.reads_weights


def test_every_field_is_read(tmp_path):
    text = """
arch: a
dataset: d
layers:
  - {name: First, processors: 'ffff.0000_ffff.0000', in_dim: [28, 27], in_channels: 3, data_format: HWC, op: Conv1d,
     kernel_size: 5, pad: 2, stride: 2, dilation: 3, groups: 4, quantization: Binary, output_shift: -2,
     activation: Abs, out_offset: 0x2000, flatten: true}
  - {processors: 1, out_offset: 0, eltwise: add, op: none, operands: 3, in_sequences: [first, INPUT, 0],
     avg_pool: [2, 3], pool_stride: 2, pool_dilation: 2, pool_first: false, output_width: 32, next_sequence: Stop,
     weight_source: first, bypass: 1, write_gap: 1, read_gap: 2}
"""
    first, second = network(tmp_path, text).layers
    assert (first.processors, first.in_dim, first.in_channels) == (0xFFFF0000FFFF0000, (28, 27), 3)
    assert (first.op, first.kernel_size, first.padding, first.stride, first.dilation) == (
        "conv1d",
        (5, 1),
        (2, 0),
        (2, 1),
        (3, 1),
    )
    assert (first.groups, first.quantization, first.output_shift, first.activation) == (4, BINARY, -2, "abs")
    assert (first.out_offset, first.flatten, first.name) == (0x2000, True, "First")
    assert (second.op, second.eltwise, second.operands, second.in_sequences) == ("none", "add", 3, (0, INPUT, 0))
    assert (second.pooling, second.pool, second.pool_stride, second.pool_dilation) == ("avg", (2, 3), (2, 2), (2, 2))
    assert (second.pool_first, second.output_width, second.next_sequence) == (False, 32, STOP)
    assert (second.weight_source, second.bypass, second.write_gap, second.read_gap) == (0, True, 1, 2)
    assert not second.reads_weights


def test_sequence_orders_the_layers_and_may_leave_holes(tmp_path):
    found = network(tmp_path, layers("sequence: 7, quantization: 8", "sequence: 2, quantization: 4", "quantization: 1"))
    assert [(layer.sequence, layer.quantization) for layer in found.layers] == [(2, 4), (3, 1), (7, 8)]


def test_defaults_are_announced(tmp_path):
    said: list[str] = []
    network(tmp_path, HEAD + "  - {processors: 1}\n  - {processors: 1, op: MLP, max_pool: 2}\n", said=said)
    assert said == [
        "WARNING: Defaulting to `out_offset = 0` for layer sequence 0 in YAML configuration.",
        "WARNING: Defaulting to `op: Conv2d` for layer sequence 0 in YAML configuration.",
        'NOTICE: Defaulting to "no activation" for conv2d in layer sequence 0 in YAML configuration.',
        "WARNING: Defaulting to `out_offset = 0` for layer sequence 1 in YAML configuration.",
        'NOTICE: Defaulting to "no activation" for mlp in layer sequence 1 in YAML configuration.',
        "WARNING: Using default pool stride of 1 in layer 1.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arch: a\nlayers: []\n", "Configuration file {file} does not contain `layers`, `arch`, or `dataset`."),
        ("", "Configuration file {file} does not contain `layers`, `arch`, or `dataset`."),
        ("bar: 1\n" + layers(""), "Configuration file {file} contains unknown key(s): {{'bar'}}."),
        (layers("foo: 1"), "Configuration file {file} contains unknown key(s) for `layers`: {{'foo'}}."),
        (
            "arch: b\n" + layers(""),
            'Found duplicate key arch while constructing a mapping   in "{file}", line 1',
        ),
        (layers("quantization: 3"), "`quantization` must be 1, 2, 4, 8 or bin/binary"),
        (layers("quantization: true"), "`quantization` must be 1, 2, 4, 8 or bin/binary"),
        (layers("", "quantization: []"), "`quantization` must be 1, 2, 4, 8 or bin/binary (found in layer sequence 1"),
        (
            layers(*[""] * 33),
            "This device supports up to 32 layers (found in layer sequence 32 in YAML conf",
        ),
        (layers("sequence: 40"), "This device supports up to 32 layers (found in layer sequence 40"),
        (layers("", "sequence: 0"), "Layer was already specified (found in layer sequence 0 in YAML configuration)."),
        (HEAD + "  - {out_offset: 0}\n", "`processors` must not be zero or missing (found in layer sequence 0"),
        (HEAD + "  - {processors: 0}\n", "`processors` must be an int from 1 to 2**64-1"),
        (HEAD + "  - {processors: 0x1_0000_0000_0000_0000}\n", "`processors` must be an int from 1 to 2**64-1"),
        (HEAD + "  - {processors: 1, op: conv9d}\n", 'Unknown value "conv9d" for `op`'),
        (
            HEAD + "  - {processors: 1, op: fc, operator: fc}\n",
            "Duplicate key for `convolution`/`operation`/`operator`/`op`",
        ),
        (layers("kernel_size: 5x5"), "Unsupported value `5x5` for `kernel_size`"),
        (layers("operands: 2"), "`operands` can only be used with element-wise operations"),
        (layers("in_sequences: nobody"), "Could not find the `in_sequences` layer name `nobody` in layer sequence 0"),
        (layers("name: a", "name: A"), "Duplicate layer name A for `name`"),
        (layers("name: input"), "Using reserved name input for `name`"),
        (layers("max_pool: x"), "Unsupported value `x` for `max_pool`"),
        (layers("sequence: -1"), "`sequence` must be an int from 0, not -1"),
        ("arch: !!python/object/apply:os.system [echo]\n", "is not valid YAML: could not determine a constructor"),
        ("arch: [\n", "is not valid YAML"),
        ("? [a]\n: 1\n", "Found unacceptable key"),
        ("[" * 5000, "is not valid YAML"),
        ("arch: a\ndataset: d\nlayers: 3\n", "`layers` must be a list"),
        (HEAD + "  - 3\n", "layer sequence 0 is not a mapping"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, text, message):
    with pytest.raises(NetworkError) as caught:
        network(tmp_path, text)
    assert message.format(file=tmp_path / "n.yaml") in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(NetworkError, match=r"^YAML configuration file nowhere.yaml does not exist!$"):
        read_network("nowhere.yaml", MAX78000)


def test_the_larger_device_takes_more_layers_and_the_third_no_processors(tmp_path):
    assert len(network(tmp_path, layers(*[""] * 33), MAX78002).layers) == 33
    assert network(tmp_path, HEAD + "  - {out_offset: 0}\n", CMSIS_NN).layers[0].processors is None
