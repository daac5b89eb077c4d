"""Surgery: what is replaced, what stays the same function, and that the user's model is not touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitsmith as bs
from bitsmith.doctor import fix

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Excite(nn.Module):
    """A gate under no name that could be searched for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.b(F.relu(self.a(x.mean((2, 3), keepdim=True)))))


def net(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), *layers).eval()


@pytest.mark.parametrize(
    ("operation", "layer", "made"),
    [
        ("relu6", nn.ReLU6(), nn.ReLU), ("activations", nn.GELU(), nn.ReLU), ("activations", nn.SiLU(), nn.ReLU),
        ("large_kernels", nn.Conv2d(8, 8, 7, padding=3), nn.Sequential), ("squeeze_excite", Excite(), nn.Identity),
    ],
)  # fmt: skip
def test_what_changes_the_function_says_so(operation: str, layer: nn.Module, made: type[nn.Module]) -> None:
    model = net(layer)
    fixed, changes, left = fix(model, X, operation)
    assert isinstance(fixed[2], made)  # type: ignore[index]
    assert model[2] is layer
    assert [(c.operation, c.where, c.trains) for c in changes] == [(operation, "2", True)]
    assert not left


@pytest.mark.parametrize(
    ("operation", "layer"),
    [
        ("tables", nn.SiLU()), ("tables", nn.Hardswish()), ("layer_norm", nn.LayerNorm(32)),
        ("layer_norm", nn.LayerNorm([32, 32], elementwise_affine=False)),
    ],
)  # fmt: skip
def test_other_forms_compute_the_same(operation: str, layer: nn.Module) -> None:
    model = net(layer)
    surgery = fix(model, X, operation)
    assert not surgery.needs_training
    assert len(surgery.changes) == 1
    assert torch.allclose(surgery.model(X), model(X), atol=1e-5)


@pytest.mark.parametrize("size", [5, 7, 9])
@pytest.mark.parametrize("stride", [1, 2])
def test_stacks_have_the_output_size_of_the_kernel(size: int, stride: int) -> None:
    for image in (31, 32):
        model = net(nn.Conv2d(8, 16, size, stride, size // 2))
        stack = fix(model, X, "large_kernels").model
        x = torch.randn(1, 3, image, image)
        assert stack(x).shape == model(x).shape
        sizes = [m.kernel_size[0] for m in stack[2] if isinstance(m, nn.Conv2d)]  # type: ignore[index]
        assert sizes == [3] * ((size - 1) // 2)  # (size - 1) / 2 steps of one pixel each way see as far


def test_a_depthwise_kernel_stays_depthwise() -> None:
    stack = fix(net(nn.Conv2d(8, 8, 5, padding=2, groups=8)), X, "large_kernels").model[2]  # type: ignore[index]
    assert all(m.groups == 8 for m in stack if isinstance(m, nn.Conv2d))


def test_what_cannot_be_replaced_is_named() -> None:
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 7)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.conv(x))

    _, changes, left = fix(Written().eval(), X)
    assert not changes
    assert any("silu" in line for line in left)
    assert any("conv" in line for line in left)


def test_a_module_in_two_places_is_replaced_once() -> None:
    shared = nn.ReLU6()
    fixed, changes, _ = fix(net(shared, nn.Conv2d(8, 8, 1), shared), X, "relu6")
    assert fixed[2] is fixed[4]  # type: ignore[index]
    assert len(changes) == 1


def test_a_diagnosis_operates_on_its_model() -> None:
    model = net(nn.ReLU6())
    surgery = bs.doctor(model, X).fix("relu6")
    assert isinstance(surgery.model[2], nn.ReLU)  # type: ignore[index]
    assert not bs.doctor(surgery.model, X).of("D8")


def test_unknown_operations_are_refused() -> None:
    with pytest.raises(bs.BitsmithError, match="relu6"):
        fix(net(), X, "relu7")


def test_a_fixed_model_is_trained_quantized_and_deployed(tmp_path: Path) -> None:
    model = fix(net(nn.SiLU(), Excite(), nn.Conv2d(8, 8, 5, padding=2)), X).model
    model.train()(X).square().mean().backward()
    q = bs.quantize(model.eval(), [X], target="tda4vm")
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "m.onnx"), X).passed
