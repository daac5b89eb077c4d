"""Every rule of the doctor: a model that triggers it, and one that does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitsmith as bs
from bitsmith.doctor import Diagnosis, TrainingPlan
from bitsmith.doctor.examine import RULE_COUNT
from bitsmith.doctor.rule import RULES

IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Lambda(nn.Module):
    """A forward of one's own over some layers, which it gets as ``self``."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def conv(i: int = 3, o: int = 8, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def block(i: int = 3, o: int = 8, **options: Any) -> nn.Sequential:
    return nn.Sequential(conv(i, o, **options), nn.BatchNorm2d(o), nn.ReLU())


def healthy() -> nn.Module:
    return nn.Sequential(block(), block(8, 8), conv(8, 4, 1)).eval()


def after(function: Callable[[Tensor], Any]) -> nn.Module:
    """A block, then a function of its output (N, 8, 16, 16)."""
    return Lambda(lambda self, x: function(self.block(x)), block=block()).eval()


def behind(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(block(), *layers).eval()


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))))


class Shares(nn.Module):
    """A copy shares its parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv()

    def __deepcopy__(self, memo: dict[int, Any]) -> Shares:
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)  # type: ignore[no-any-return]


def by_hand(module: bool) -> nn.Module:
    layers = {"stub": bs.QuantStub(), "conv": block(), "end": bs.DeQuantStub(), "add": bs.FloatFunctional()}
    if module:
        return Lambda(lambda s, x: s.end(s.add.add(s.conv(s.stub(x)), s.conv[0](s.stub(x)))), **layers).eval()
    return Lambda(lambda s, x: s.end(s.conv(s.stub(x)) + s.conv(s.stub(x))), **layers).eval()


def with_unused() -> nn.Module:
    return Lambda(lambda self, x: self.used(x), used=block(), head=nn.Linear(4, 4)).eval()


def branches() -> nn.Module:
    return Lambda(
        lambda self, x: self.a(x) if float(x.sum()) > 1e9 or x.max() < 0 else self.b(x), a=block(), b=block()
    ).eval()


def twice() -> nn.Module:
    return Lambda(lambda self, x: self.conv(self.conv(self.stem(x))), stem=block(), conv=conv(8, 8)).eval()


def depthwise() -> nn.Module:
    return nn.Sequential(block(), *[block(8, 8, groups=8) for _ in range(3)]).eval()


def outlier() -> nn.Module:
    net = healthy()
    with torch.no_grad():
        net[1][0].weight[0, 0, 0, 0] = 40.0  # type: ignore[index]
    return net


def uneven_channels() -> nn.Module:
    net = healthy()
    with torch.no_grad():
        net[1][0].weight[0] *= 1e-3  # type: ignore[index]
    return net


def large_bias() -> nn.Module:
    layer = conv(8, 4, 1)
    with torch.no_grad():
        layer.weight.mul_(1e-9)
    return nn.Sequential(block(), layer).eval()


# rule: (target, a model that triggers it, one that does not)
STATIC: dict[str, list[tuple[str, Callable[[], nn.Module], Callable[[], nn.Module]]]] = {
    "D1": [
        ("onnxruntime", lambda: nn.Sequential(conv(), nn.ReLU(), block(8, 8)), healthy),
        ("onnxruntime", lambda: behind(conv(8, 8, groups=8)), healthy),
    ],
    "D5": [("onnxruntime", twice, healthy)],
    "D6": [("onnxruntime", lambda: by_hand(False), lambda: by_hand(True)), ("onnxruntime", lambda: by_hand(False),
            lambda: after(lambda y: y + y))],
    "D7": [
        ("onnxruntime", lambda: behind(nn.SiLU()), lambda: behind(nn.Sigmoid(), conv(8, 8))),
        ("am62a", lambda: behind(nn.GELU()), healthy), ("am62a", lambda: behind(nn.Sigmoid()), healthy),
        ("tda4vm", lambda: behind(nn.Hardswish()), lambda: behind(nn.GELU())),
    ],
    "D8": [("onnxruntime", lambda: behind(nn.ReLU6()), lambda: behind(nn.Hardtanh(0, 1)))],
    "D9": [("onnxruntime", lambda: behind(Gate()), lambda: after(lambda y: y * y))],
    "D10": [
        ("tda4vm", lambda: behind(nn.LayerNorm([16, 16])), lambda: behind(nn.LayerNorm(16))),
        ("tda4vm", lambda: behind(nn.GroupNorm(2, 8)), healthy),
    ],
    "D11": [
        ("tda4vm", lambda: behind(conv(8, 8, 9, stride=2)), lambda: behind(conv(8, 8, 3, stride=2))),
        ("tda4vm", lambda: behind(conv(8, 8, 3, stride=(1, 2))), healthy),
        ("am62a", lambda: behind(conv(8, 8, 3, stride=3)), healthy),
        ("tda4vm", lambda: behind(conv(8, 8, 4)), lambda: behind(conv(8, 8, 3, stride=3))),
        ("tda4vm", lambda: behind(conv(8, 8, 3, stride=4)), healthy),
        ("tda4vm", lambda: behind(conv(8, 8, 9, groups=8)), lambda: behind(conv(8, 8, 5, groups=8))),
        ("tda4vm", lambda: behind(conv(8, 8, 7)), healthy),
        ("tda4vm", lambda: behind(nn.Conv2d(8, 8, 16, 16)), healthy),
        ("tda4vm", lambda: behind(nn.Conv2d(8, 8, 3, padding=20)), healthy),
    ],
    "D12": [
        ("tda4vm", lambda: behind(nn.MaxPool2d(5, 1, 2)), lambda: behind(nn.MaxPool2d(3, 2, 1))),
        ("tda4vm", lambda: behind(nn.MaxPool2d(2, 1, dilation=2)), lambda: behind(nn.AvgPool2d(2))),
        ("tda4vm", lambda: behind(nn.Upsample(scale_factor=4), nn.AdaptiveAvgPool2d(1)),
            lambda: behind(nn.AdaptiveAvgPool2d(1))),
    ],
    "D13": [
        ("tda4vm", lambda: behind(nn.ConvTranspose2d(8, 8, 3, 2)), lambda: behind(nn.ConvTranspose2d(8, 8, 4, 2, 1)))
    ],
    "D14": [
        ("tda4vm", lambda: behind(nn.Upsample(scale_factor=3)), lambda: behind(nn.Upsample(scale_factor=2))),
        ("tda4vm", lambda: behind(nn.Upsample(size=(32, 16))), healthy),
        ("tda4vm", lambda: behind(nn.Upsample(scale_factor=2, mode="bicubic")), healthy),
    ],
    "D15": [
        ("tda4vm", lambda: after(lambda y: torch.cat([y, y], 0)), lambda: after(lambda y: torch.cat([y, y], 1))),
        ("tda4vm", lambda: after(lambda y: y[:, :, ::2]), lambda: after(lambda y: y[:, :, 2:])),
        ("tda4vm", lambda: after(lambda y: y.reshape(-1, 2, 2, 2, 4, 4, 4, 4) * 2.0), healthy),
    ],
    "D16": [
        ("tda4vm", lambda: after(lambda y: y.softmax(1)), lambda: after(lambda y: y.softmax(-1))),
        ("tda4vm", lambda: after(lambda y: y.argmax(2)), lambda: after(lambda y: y.argmax(1, keepdim=True))),
        ("tda4vm", lambda: after(lambda y: y.to(torch.float64).mul(2.0).to(torch.float32) + 1), healthy),
    ],
    "D17": [("onnxruntime", outlier, healthy), ("tda4vm", uneven_channels, healthy)],
    "D20": [("onnxruntime", with_unused, healthy)],
    "D21": [("onnxruntime", branches, healthy)],
    "D22": [("tda4vm", depthwise, healthy)],
    "D23": [
        ("onnxruntime", lambda: behind(conv(8, 1, 1)), healthy),
        ("onnxruntime", lambda: after(lambda y: (y, -y)), healthy),
    ],
    "D24": [("onnxruntime", Shares, healthy)],
    "D25": [
        ("onnxruntime", lambda: healthy().train(), healthy),
        ("onnxruntime", lambda: nn.Sequential(conv(), nn.BatchNorm2d(8, track_running_stats=False)), healthy),
        ("onnxruntime", lambda: behind(nn.BatchNorm2d(8)), healthy),
    ],
    "D26": [("onnxruntime", lambda: behind(nn.ReLU(inplace=True)), healthy)],
    "D30": [
        ("tda4vm", lambda: behind(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
            lambda: behind(nn.Upsample(scale_factor=2, mode="bilinear"))),
        ("tda4vm", lambda: behind(nn.PixelShuffle(2)), lambda: behind(conv(8, 8, 1), nn.PixelShuffle(2))),
    ],
}  # fmt: skip
CASES = [(rule, *case) for rule, cases in STATIC.items() for case in cases]


def examine(net: nn.Module, **options: Any) -> Diagnosis:
    return bs.doctor(net, IMAGES, **options)


@pytest.mark.parametrize(
    ("rule", "target", "sick", "well"), CASES, ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)]
)  # fmt: skip
def test_a_rule_finds_what_it_is_about_and_nothing_else(
    rule: str, target: str, sick: Callable[[], nn.Module], well: Callable[[], nn.Module]
) -> None:
    torch.manual_seed(0)
    found = examine(sick(), target=target).of(rule)
    assert found
    assert all(f.where and f.why and f.todo for f in found)
    assert not examine(well().eval(), target=target).of(rule)


def _sgd(net: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), **{"lr": 1e-5, **options})


def test_d2_weight_decay_on_fragile_parameters() -> None:
    net = healthy().eval()
    assert examine(net, optimizer=_sgd(net, weight_decay=1e-3)).of("D2")
    fragile = [p for p in net.parameters() if p.ndim == 1]
    weights = [p for p in net.parameters() if p.ndim > 1]
    groups = [{"params": weights, "weight_decay": 1e-3}, {"params": fragile, "weight_decay": 0.0}]
    assert not examine(net, optimizer=torch.optim.SGD(groups, lr=0.1)).of("D2")
    assert "D2" in examine(net).not_run


def test_d3_type_of_optimizer() -> None:
    net = healthy().eval()
    assert examine(net, optimizer=torch.optim.AdamW(net.parameters())).of("D3")
    assert not examine(net, optimizer=_sgd(net)).of("D3")
    assert examine(net, optimizer=_sgd(net), training=TrainingPlan(float_optimizer="AdamW")).of("D3")
    same = TrainingPlan(float_optimizer="AdamW")
    assert not examine(net, optimizer=torch.optim.AdamW(net.parameters()), training=same).of("D3")


@pytest.mark.parametrize(
    ("rate", "plan", "places"),
    [
        (1e-5, {"epochs": 30, "freeze_bn": 15, "freeze_ranges": 17}, []),
        (1e-1, {"epochs": 30}, ["optimizer"]),
        (1e-5, {"epochs": 4}, ["training.epochs"]),
        (1e-5, {"epochs": 30, "freeze_bn": 29}, ["training.freeze_bn"]),
        (1e-5, {"epochs": 30, "freeze_bn": 15, "freeze_ranges": 3}, ["training.freeze_ranges"]),
        (1e-5, {"epochs": 30, "freeze_bn": 0}, ["training.freeze_bn"]),
    ],
)
def test_d4_schedule(rate: float, plan: dict[str, int], places: list[str]) -> None:
    net = healthy().eval()
    found = examine(net, optimizer=_sgd(net, lr=rate), training=TrainingPlan(qat=True, **plan)).of("D4")  # type: ignore[arg-type]
    assert [f.where for f in found] == places


def test_d18_heavy_tails() -> None:
    net = healthy().eval()
    spiky = torch.randn(64, 3, 16, 16)
    spiky[0, 0, 0, 0] = 1e4
    assert examine(net, calibration=[spiky]).of("D18")
    assert not examine(net, calibration=[torch.randn(64, 3, 16, 16)]).of("D18")


def test_d19_biases_past_their_accumulator() -> None:
    assert examine(large_bias().eval(), calibration=[IMAGES]).of("D19")[0].severity == "error"
    assert not examine(healthy().eval(), calibration=[IMAGES]).of("D19")


def test_d27_calibration_size() -> None:
    net = healthy().eval()
    assert examine(net, calibration=[IMAGES]).of("D27")
    assert not examine(net, calibration=[IMAGES] * 25).of("D27")


def test_d29_the_file(tmp_path: Path) -> None:
    net = healthy().eval()
    good = bs.export_onnx(bs.quantize(net, [IMAGES], target="tda4vm"), tmp_path / "good.onnx")
    bad = bs.export_onnx(bs.quantize(net, [IMAGES]), tmp_path / "bad.onnx")
    assert not examine(net, target="tda4vm", file=good).of("D29")
    assert len(examine(net, target="tda4vm", file=bad).of("D29")) > 1


def test_every_rule_is_tested_here() -> None:
    elsewhere = {"D2", "D3", "D4", "D18", "D19", "D27", "D29"}
    assert RULES.keys() == STATIC.keys() | elsewhere
    assert RULE_COUNT == 30


def test_findings_name_layer_and_line() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block()

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(self.block(x))

    (finding,) = examine(Net().eval()).of("D7")
    assert finding.source.startswith("test_rules.py:")
    assert finding.source.endswith("return F.silu(self.block(x))")
    (finding,) = examine(behind(nn.Sequential(nn.SiLU())).eval()).of("D7")
    assert finding.where.startswith("1.0 ")


def test_a_diagnosis_is_data_and_text() -> None:
    diagnosis = examine(behind(nn.ReLU6()).eval())
    read = Diagnosis.model_validate_json(diagnosis.model_dump_json())
    assert read.findings == diagnosis.findings
    assert "ReLU6" in str(diagnosis)
    assert "D28" in diagnosis.not_run
    with pytest.raises(bs.BitsmithError, match="read from a file"):
        read.fix("relu6")


def test_the_model_is_left_as_it_was() -> None:
    net = behind(nn.ReLU(inplace=True)).eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = IMAGES.clone()
    bs.doctor(net, x, target="tda4vm", calibration=[x])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert torch.equal(x, IMAGES)
    assert all(p.grad is None for p in net.parameters())
