"""The command line: what argparse of the original accepts, and where the default is right and --compat is not."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from bitsmith.ai8x.checkpoint import read_checkpoint
from bitsmith.ai8x.command import main, parse
from bitsmith.ai8x.devices import MAX78000, MAX78002
from bitsmith.ai8x.inspect_command import main as inspect


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def layer(name: str, shape=(2, 1, 3, 3), bias=True, op="op", **fields) -> dict[str, torch.Tensor]:
    count = int(torch.Size(shape).numel())
    state = {f"{name}.{key}": torch.tensor([value]) for key, value in fields.items()}
    state[f"{name}.{op}.weight"] = torch.linspace(-0.5, 0.7, count).reshape(shape)
    if bias:
        state[f"{name}.{op}.bias"] = torch.linspace(-0.3, 0.2, shape[0])
    return state


def save(*layers: dict[str, torch.Tensor], **top) -> None:
    state = OrderedDict()
    for entries in layers:
        state.update(entries)
    torch.save({"epoch": 1, "arch": "a", "state_dict": state, "extras": {}, **top}, "in.pth")


def convert(*more: str, status: int = 0) -> dict[str, torch.Tensor]:
    assert main(["in.pth", "out.pth", "--device", "MAX78000", *more]) == status
    return read_checkpoint("out.pth")["state_dict"] if status == 0 else {}


def describe(*lines: str) -> None:
    text = "".join(f"  - {{processors: 1, out_offset: 0, op: conv2d, activate: ReLU, {line}}}\n" for line in lines)
    Path("n.yaml").write_text("arch: a\ndataset: d\nlayers:\n" + text)


@pytest.mark.parametrize("flag", [[], ["--compat"]])
def test_prefixes_are_accepted_as_in_the_original(flag):
    words = [
        "--dev",
        "85",
        "--cl",
        "SCALE",
        "--qat",
        "4",
        "--verb",
        "--sc",
        "-0.5",
        "--std",
        "3",
        "--co",
        "n.yaml",
        "a",
        "b",
    ]
    found = parse([*words, *flag])
    assert (found.input, found.output, found.config_file, found.verbose) == ("a", "b", "n.yaml", True)
    options = found.options
    assert (options.device, options.clip_method, options.qat_weight_bits) == (MAX78000, "SCALE", 4)
    assert (options.scale, options.stddev, options.compat) == (-0.5, 3.0, bool(flag))


def test_the_shortest_prefix_of_device_stays_free():
    assert parse(["a", "b", "--d=AI87", "--f"][:3]).options.device is MAX78002
    assert parse(["--d", "87", "--", "a", "--compat"]).output == "--compat"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("a b", "the following arguments are required: --device"),
        ("--device 85", "the following arguments are required: input, output"),
        ("a b --device 84", "argument --device: ('84', 'is not a supported device type')"),
        ("a b --device 85 --clip max", "argument --clip-method: invalid choice: 'max' (choose from 'AVGMAX', 'MAX',"),
        ("a b --device 85 --qat x", "argument --qat-weight-bits: invalid int value: 'x'"),
        ("a b --device 85 --scale x", "argument --scale: invalid float value: 'x'"),
        ("a b --device 85 --s 1", "ambiguous option: --s could match --scale, --stddev"),
        ("a b c --device 85", "unrecognized arguments: c"),
        ("a b --device 85 -c", "argument -c/--config-file: expected one argument"),
    ],
)
def test_wrong_usage(words, message, capsys):
    for flags, program in (([], "bitsmith ai8x"), (["--compat"], "quantize.py")):
        with pytest.raises(SystemExit) as stop:
            parse([*words.split(), *flags])
        assert stop.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith(f"usage: {program} [-h] [-c S] --device N [--clip-method {{AVGMAX,MAX,STDDEV,SCALE}}] [")
        assert f"\n{program}: error: {message}" in err


def test_help_is_the_originals(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--help", "--compat"])
    assert stop.value.code == 0
    original = capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(["-h"])
    ours = capsys.readouterr().out
    assert ours.startswith(original.replace("usage: quantize.py", "usage: bitsmith ai8x"))
    assert "--fuse-bn" in ours.removeprefix(original)


def test_real_weight_bits_by_default(work, capsys):
    save(layer("a"), layer("b", weight_bits=8), layer("c", weight_bits=0), layer("d", weight_bits=4))
    describe("quantization: 2", "quantization: 2", "", "")
    state = convert("-c", "n.yaml", "--qat-weight-bits", "4")
    assert [state[f"{name}.weight_bits"].item() for name in "abcd"] == [2, 2, 4, 4]
    assert "NOTICE: weight_bits is what was used (a: 2, b: 2, c: 4)" in capsys.readouterr().err
    assert inspect(["out.pth", "-c", "n.yaml"]) == 0
    state = convert("-c", "n.yaml", "--qat-weight-bits", "4", "--compat")
    assert [state[f"{name}.weight_bits"].item() for name in "abcd"] == [8, 8, 8, 4]
    assert capsys.readouterr().err == ""


def test_layers_without_weights_are_passed_over(work, capsys):
    save(layer("a"), layer("b"), layer("c"))
    describe("quantization: 4", "bypass: true, quantization: 1", "weight_source: 0", "quantization: 2", "")
    state = convert("-c", "n.yaml")
    assert [state[f"{name}.bias_bits"].item() for name in "abc"] == [4, 2, 8]
    state = convert("-c", "n.yaml", "--compat")
    assert [state[f"{name}.bias_bits"].item() for name in "abc"] == [4, 1, 8]


def test_weights_without_a_layer_stay_float(work, capsys):
    save(layer("a"), layer("b"))
    describe("")
    state = convert("-c", "n.yaml")
    assert "b.weight_bits" not in state
    assert torch.equal(state["b.op.weight"], layer("b")["b.op.weight"])
    assert "WARNING: b.op.weight stay floating-point" in capsys.readouterr().err


def test_binary_weights(work, capsys):
    save(layer("a", bias=False))
    describe("quantization: binary")
    state = convert("-c", "n.yaml")
    weights = layer("a")["a.op.weight"]
    assert torch.equal(state["a.op.weight"], torch.where(weights >= 0, 1.0, -1.0))
    assert (state["a.weight_bits"].item(), state["a.output_shift"].item()) == (1, 0)
    assert "WARNING: MAX78000 has no binary weights" in capsys.readouterr().err
    assert inspect(["out.pth", "--device", "MAX78002", "-c", "n.yaml"]) == 0
    assert inspect(["out.pth", "--device", "MAX78000"]) == 1
    assert convert("-c", "n.yaml", "--compat")["a.op.weight"].unique().tolist() == [-0.75]


def test_names_of_plain_models(work, capsys):
    weights, bias = layer("c").values()
    save({"conv1.weight": weights, "conv1.bias": bias, "weight": torch.ones(2)})
    state = convert()
    assert list(state) == ["conv1.weight", "conv1.bias", "weight"] + [
        f"conv1.{name}" for name in ("weight_bits", "bias_bits", "output_shift")
    ]
    save(layer("conv1"))
    assert torch.equal(convert()["conv1.op.weight"], state["conv1.weight"])
    assert torch.equal(state["weight"], torch.ones(2))


@pytest.mark.parametrize("bits", ["0", "-1", "25"])
def test_impossible_bits(work, capsys, bits):
    save(layer("a"))
    convert("--qat-weight-bits", bits, status=1)
    assert f"a.op.weight: {bits} bits are impossible" in capsys.readouterr().err
    convert("--qat-weight-bits", bits, "--compat")


def test_not_a_number(work, capsys):
    save({"a.op.weight": torch.tensor([[1.0, float("nan")]])})
    convert(status=1)
    assert "a.op.weight holds NaN or infinity (1 of 2 numbers)" in capsys.readouterr().err
    state = convert("--compat")
    assert state["a.op.weight"].isnan().all()
    assert state["a.output_shift"].isnan().all()
    save({"a.op.weight": torch.tensor([[1.0, float("inf")]])})
    assert convert("--compat")["a.op.weight"].isnan().all()


def test_extras_that_are_none(work, capsys):
    save(layer("a"), extras=None)
    convert()
    assert "WARNING: No `extras` in checkpoint file." in capsys.readouterr().err
    convert("--compat", status=1)
    assert capsys.readouterr().err == "TypeError: 'NoneType' object does not support item assignment\n"


def test_zero_layers_are_named(work, capsys):
    save({"a.op.weight": torch.zeros(1, 1)})
    assert convert()["a.output_shift"].item() == -15
    assert "WARNING: All weights for `a.op.weight` are zero." in capsys.readouterr().err


def test_any_float_kind_and_quantile_kind(work):
    for kind in (torch.float16, torch.bfloat16):
        save({"a.op.weight": torch.tensor([[0.5, 0.25]], dtype=kind), "a.shift_quantile": torch.tensor([1])})
        state = convert()
        assert state["a.op.weight"].dtype == torch.float32
        assert state["a.op.weight"].tolist() == [[127, 64]]


def test_layouts_and_gradients_make_no_difference(work, capsys):
    weights = torch.linspace(-1, 1, 36).reshape(2, 2, 3, 3)
    save({"a.op.weight": weights})
    plain = convert("-v")["a.op.weight"]
    said = capsys.readouterr().out
    for other in (weights.to(memory_format=torch.channels_last), torch.nn.Parameter(weights)):
        save({"a.op.weight": other})
        assert torch.equal(convert("-v")["a.op.weight"], plain)
        assert capsys.readouterr().out == said


def test_a_very_large_layer_has_a_quantile(work):
    torch.manual_seed(0)
    weights = torch.rand(2**24 + 1, 1)  # more than torch.quantile takes
    save({"a.op.weight": weights, "a.shift_quantile": torch.tensor([0.45])})
    assert convert()["a.output_shift"].item() == -1


def test_masks_and_the_optimizer(work):
    top = {"compression_sched": {"masks_dict": {"a": None}, "x": 1}, "optimizer_type": torch.optim.SGD}
    save(layer("a"), **top, optimizer_state_dict={"state": {}})
    convert("--qat-weight-bits", "4")
    found = read_checkpoint("out.pth")
    masks = found["compression_sched"]["masks_dict"]
    assert list(masks) == ["a", "a.weight_bits", "a.output_shift"]
    assert masks["a.weight_bits"].item() == 4
    assert found["compression_sched"]["x"] == 1
    assert found["optimizer_type"] is torch.optim.SGD
    convert("--drop-optimizer")
    assert set(read_checkpoint("out.pth")) == {"epoch", "arch", "state_dict", "extras", "compression_sched"}
    save(layer("a"), compression_sched={"masks_dict": None})
    convert()
    assert read_checkpoint("out.pth")["compression_sched"] == {"masks_dict": None}


def test_one_number_has_no_standard_deviation(work, capsys):
    save({"a.op.weight": torch.ones(1, 1)})
    convert("--clip-method", "STDDEV", status=1)
    assert "a.op.weight has no STDDEV statistic (nan)" in capsys.readouterr().err
    assert convert("--clip-method", "STDDEV", "--compat")["a.op.weight"].isnan().all()


def test_a_vector_is_no_layer(work, capsys):
    save({"ln.weight": torch.ones(4)})
    convert()
    assert "WARNING: ln.weight has one dimension" in capsys.readouterr().err
