"""Batch normalization: refused or warned of, and fused so that the layer computes the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitsmith.ai8x.batch_norm import BatchNormError, check_batch_norms, fuse_batch_norms
from bitsmith.ai8x.command import main
from bitsmith.errors import BitsmithError


def norm(channels: int, affine: bool = True) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(channels, affine=affine).eval()
    for tensor in layer.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.3, 2)
    return layer


def loaded(module: nn.Module, state) -> nn.Module:
    module.load_state_dict(state, strict=True)
    return module


def heard():
    said: list[str] = []
    return said, lambda kind, text: said.append(f"{kind}: {text}")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_model_computes_the_same(affine, bias):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 5, 3, bias=bias), norm(5, affine), nn.Conv2d(5, 4, 1, bias=bias), norm(4, affine)
    )
    said, notify = heard()
    fused = fuse_batch_norms(model.state_dict(), notify)
    assert list(fused) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    without = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Identity(), nn.Conv2d(5, 4, 1))
    x = torch.rand(2, 3, 6, 6)
    torch.testing.assert_close(loaded(without, {k: torch.as_tensor(v) for k, v in fused.items()})(x), model(x))
    assert said == ["NOTICE: 1 is fused into 0.", "NOTICE: 3 is fused into 2."]


class Ai8x(nn.Module):
    """As ai8x-training names its parts; its forward pass divides by 4 behind the normalization."""

    def __init__(self, op: nn.Module, channels: int) -> None:
        super().__init__()
        self.op, self.bn = op, norm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(self.op(x)) / 4


@pytest.mark.parametrize("op", [nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(3, 5, 3)])
def test_an_ai8x_layer_computes_the_same(op):
    model = nn.Sequential(Ai8x(op, 5))
    _, notify = heard()
    fused = fuse_batch_norms(model.state_dict(), notify)
    x = torch.rand(2, 3, 6, 6)
    expected = model(x)
    model[0].op.load_state_dict({key.removeprefix("0.op."): torch.as_tensor(value) for key, value in fused.items()})
    torch.testing.assert_close(model[0].op(x), expected)


def test_qatv2_has_no_quarter():
    model = Ai8x(nn.Conv2d(3, 5, 3), 5)
    state = {f"c.{key}": value for key, value in model.state_dict().items()}
    _, notify = heard()
    quarter = fuse_batch_norms(state, notify)["c.op.weight"]
    whole = fuse_batch_norms({**state, "c.activation_threshold": torch.tensor(0.0)}, notify)["c.op.weight"]
    torch.testing.assert_close(torch.as_tensor(whole), 4 * torch.as_tensor(quarter))


def test_a_normalization_without_a_layer_is_named():
    state = {f"bn.{key}": value for key, value in norm(5).state_dict().items()}
    with pytest.raises(BatchNormError, match="bn has 5 channels"):
        fuse_batch_norms({"c.weight": torch.zeros(3, 3, 1, 1), **state}, lambda kind, text: None)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bn.running_var", torch.ones(4), "bn.running_var has the shape"),
        ("c.bias", torch.ones(4), "c.bias has the shape"),
        ("c.weight", 3, "a int where a plain tensor should be"),
    ],
)
def test_parts_that_do_not_fit_are_named(key, value, message):
    state = {"c.weight": torch.ones(5, 3, 1, 1), **{f"bn.{k}": v for k, v in norm(5).state_dict().items()}}
    with pytest.raises(BitsmithError, match=message):
        fuse_batch_norms({**state, key: value}, lambda kind, text: None)


def test_what_is_not_fused_is_refused_or_warned_of():
    said, notify = heard()
    check_batch_norms({f"c.bn.{key}": value for key, value in norm(5, affine=False).state_dict().items()}, notify)
    assert len(said) == 1
    assert said[0].startswith("WARNING: The checkpoint has running statistics")
    with pytest.raises(BatchNormError, match=r"not fused \(c\.bn\)"):
        check_batch_norms({f"c.bn.{key}": value for key, value in norm(5).state_dict().items()}, notify)


def test_the_command_fuses_on_request(tmp_path, capsys):
    state = {f"c.{key}": value for key, value in Ai8x(nn.Conv2d(3, 5, 3), 5).state_dict().items()}
    source, output = str(tmp_path / "a.pth"), str(tmp_path / "b.pth")
    torch.save({"state_dict": state, "extras": {}}, source)
    assert main([source, output, "--device", "85"]) == 1
    assert "--fuse-bn" in capsys.readouterr().err
    assert main([source, output, "--device", "85", "--fuse-bn"]) == 0
    assert list(torch.load(output)["state_dict"]) == [
        *("c.op.weight", "c.op.bias", "c.weight_bits", "c.bias_bits", "c.output_shift")
    ]
