"""The names of TI's tools mean what they say: every scale of a calibrated model against the name's own formula."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.grid import Grid, Quantizer
from bitsmith.place.layers import QuantLayer
from bitsmith.recipe import TI


@dataclass(frozen=True)
class Says:
    """What a name says; ``shrunk`` is the percentile of the activations, in percent."""

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    symmetric: bool = False
    po2: bool = False
    shrunk: float = 99.99
    fixed: float | None = None
    weight_limit: float = math.inf


MEANING = {
    "WC8_AT8": Says(),
    "MSA_WC8_AT8": Says(shrunk=100.0),
    "WT8SYMP2_AT8SYMP2": Says(per_channel=False, symmetric=True, po2=True),
    "WC8SYMP2_AT8SYMP2": Says(symmetric=True, po2=True),
    "WC8SYMP2_AT8SYMP2R4": Says(symmetric=True, po2=True, fixed=4.0),
    "WC8P2_AT8P2": Says(po2=True),
    "MSA_WC8P2_AT8P2": Says(po2=True, shrunk=100.0),
    "WC4_AT8": Says(weight_bits=4),
    "WC4M4_AT8": Says(weight_bits=4, weight_limit=4.0),
    "WC16_AT16": Says(16, 16, symmetric=True, shrunk=100.0),
}


class Net(nn.Module):
    """A signed input, a value that cannot be negative, weights of which one channel reaches past 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)
        with torch.no_grad():
            self.first.weight[1, 0] = -6.0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def calibrated(name: str) -> tuple[bs.QuantizedModel, Net, Tensor]:
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(25, 2, 40, 40) + 0.3
    return bs.quantize(net, [x], name, target="generic"), net, x


def activation_grids(q: bs.QuantizedModel) -> list[Grid]:
    """In the order of the graph: the input's first."""
    named = q.graph.named_modules()
    return [m.require_grid() for name, m in named if isinstance(m, Quantizer) and not name.endswith("_quantizer")]


def power_of_two(scale: Tensor, up: bool = True) -> Tensor:
    exponent = scale.double().log2()
    return 2.0 ** (exponent.ceil() if up else exponent.round())


def percentile(values: Tensor, percent: float) -> tuple[float, float]:
    """The order statistic of rank ceil(percent / 100 * n), and its mirror image, from a full sort."""
    ordered = values.flatten().sort().values
    rank = math.ceil(percent / 100 * len(ordered))
    return float(ordered[len(ordered) - rank]), float(ordered[rank - 1])


def expected(says: Says, values: Tensor, non_negative: bool) -> tuple[float, int]:
    """Scale and zero point of activations."""
    lo, hi = percentile(values, says.shrunk)
    if non_negative:
        lo = 0.0
    if says.fixed is not None:
        lo, hi = (0.0 if non_negative else -says.fixed), says.fixed
    levels = 2**says.activation_bits - 1
    signed = says.symmetric and not non_negative
    raw = max(-lo, hi) / (2 ** (says.activation_bits - 1) - 1) if signed else (hi - lo) / levels
    scale = float(power_of_two(torch.tensor(raw), up=says.fixed is None)) if says.po2 else raw
    return scale, 0 if signed or non_negative else round(-lo / scale)


def assert_activations(grid: Grid, says: Says, values: Tensor, non_negative: bool) -> None:
    scale, zero_point = expected(says, values, non_negative)
    assert grid.format.bits == says.activation_bits
    assert grid.axis is None
    assert grid.scale.item() == pytest.approx(scale, rel=1e-5)
    assert (0 if grid.zero_point is None else int(grid.zero_point)) == zero_point
    assert grid.format.signed is (says.symmetric and not non_negative)


@pytest.mark.parametrize("name", TI)
def test_every_number_is_the_one_in_the_name(name: str) -> None:
    says = MEANING[name]
    q, net, x = calibrated(name)
    layers = [module for module in q.graph.modules() if isinstance(module, QuantLayer)]
    for layer, original in zip(layers, (net.first, net.second), strict=True):
        assert layer.weight_quantizer is not None
        grid = layer.weight_quantizer.require_grid()
        assert (grid.format.bits, grid.format.signed, grid.zero_point) == (says.weight_bits, True, None)
        most = original.weight.detach().abs().flatten(1).amax(1).clamp(max=says.weight_limit)
        most = most if says.per_channel else most.amax()
        scale = most.double() / (2 ** (says.weight_bits - 1) - 1)
        torch.testing.assert_close(grid.scale.double(), power_of_two(scale) if says.po2 else scale, rtol=1e-6, atol=0)
        assert grid.axis == (0 if says.per_channel else None)
    first, second = activation_grids(q)[:2]
    with torch.no_grad():
        assert_activations(first, says, x, non_negative=False)
        assert_activations(second, says, torch.relu(net.first(x)), non_negative=True)


def test_every_name_has_a_meaning() -> None:
    assert MEANING.keys() == TI.keys()


def test_a_range_of_four_is_four_and_not_eight() -> None:
    """128 steps of 2**-5 for a signed value, 256 of 2**-6 for an unsigned one."""
    grids = activation_grids(calibrated("WC8SYMP2_AT8SYMP2R4")[0])
    assert [float(grid.scale) for grid in grids[:2]] == [2.0**-5, 2.0**-6]


def test_names_that_differ_give_numbers_that_differ() -> None:
    """MSA keeps the peaks that the plain name cuts off; R4 and M4 are not the names without."""
    for plain, other in (
        ("WC8_AT8", "MSA_WC8_AT8"),
        ("WC8P2_AT8P2", "WC8SYMP2_AT8SYMP2"),
        ("WC8SYMP2_AT8SYMP2", "WC8SYMP2_AT8SYMP2R4"),
        ("WC4_AT8", "WC4M4_AT8"),
    ):
        scales = []
        for name in (plain, other):
            grids = [m.grid for m in calibrated(name)[0].graph.modules() if isinstance(m, Quantizer)]
            scales.append(torch.cat([grid.scale.flatten() for grid in grids if grid is not None]))
        assert not torch.equal(*scales), f"{plain} and {other} are the same"


def test_only_msa_keeps_one_peak_in_thirty_thousand_values() -> None:
    x = torch.cat([torch.randn(30_000, 1), torch.tensor([[30.0]])])
    net = nn.Sequential(nn.Linear(1, 2)).eval()
    plain, whole = (
        activation_grids(bs.quantize(net, [x], name, target="generic"))[0]
        for name in ("WC8P2_AT8P2", "MSA_WC8P2_AT8P2")
    )
    assert float(whole.scale) >= 2 * float(plain.scale)


def test_ti_devices_take_their_own_names() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval()
    x = torch.randn(32, 3, 8, 8)
    assert bs.quantize(net, [x], "WT8SYMP2_AT8SYMP2", target="tda4vm").report.coverage.fraction == 1.0
    assert bs.quantize(net, [x], "WC8_AT8", target="am68a").report.coverage.fraction == 1.0
    with pytest.raises(bs.BitsmithError, match="tda4vm"):
        bs.quantize(net, [x], "WC8_AT8", target="tda4vm")
