"""Which depthwise layers PyTorch's FBGEMM kernels sum in saturating pairs, against the kernels themselves."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import bitsmith as bs
from bitsmith.engines.torch_kernels import LayerCodes, QuantizedConv, Stored, packing
from bitsmith.grid import Grid, IntFormat
from bitsmith.grid.kernels import quantize
from bitsmith.integer import torch_laws
from bitsmith.integer.pairs import adds_pairs, is_exact_in_pairs, largest_pair, raised_for_pairs


def depthwise(kernel=3, groups=104, **options) -> nn.Module:
    return nn.Conv2d(groups, groups, kernel, padding=options.pop("padding", kernel // 2), groups=groups, **options)


def sums(layer, codes, stored):
    """What FBGEMM's kernel makes of an input, and the exact sums, both in steps of 10,000."""
    weight = torch._make_per_tensor_quantized_tensor(codes.to(torch.int8), 1.0, 0)
    geometry = [list(layer.stride), list(layer.padding), list(layer.dilation), layer.groups]
    with packing("fbgemm"):
        packed = torch.ops.quantized.conv2d_prepack(weight, None, *geometry)
    x = torch._make_per_tensor_quantized_tensor(stored, 1.0, 0)
    found = torch.ops.quantized.conv2d(x, packed, 10_000.0, 128).int_repr().float() - 128
    return found, (F.conv2d(stored.float(), codes.float(), None, *geometry) / 10_000).round().clamp(-128, 127)


@pytest.mark.parametrize(
    "layer",
    [
        depthwise(3), depthwise(5), depthwise(3, stride=2), depthwise(3, stride=(1, 2)), depthwise(3, padding=0),
        depthwise(3, padding=2, dilation=2), depthwise(4, padding=1), depthwise(3, groups=132),
    ],
    ids=str,
)  # fmt: skip
def test_saturation_is_where_it_is_expected(layer):
    codes = torch.full(layer.weight.shape, 127)
    found, exact = sums(layer, codes, torch.full((1, layer.in_channels, 9, 9), 255, dtype=torch.uint8))
    assert torch.equal(found, exact) == (not adds_pairs(layer))


@pytest.mark.parametrize("kernel", [3, 5])
def test_neighbours_in_row_major_order_form_pairs(kernel):
    layer = depthwise(kernel)
    taps = kernel * kernel
    for first in range(taps):
        for second in range(first + 1, min(first + 4, taps)):
            codes = torch.zeros(104, taps, dtype=torch.int32)
            codes[:, [first, second]] = 127
            found, exact = sums(layer, codes.view(104, 1, kernel, kernel), torch.full((1, 104, 7, 7), 255).byte())
            paired = first % 2 == 0 and second == first + 1
            assert torch.equal(found, exact) == (not paired)
            assert int(largest_pair(codes).max()) == (254 if paired else 127)


@pytest.mark.parametrize("zeros", [(0, 0), (37, 101)])
@pytest.mark.parametrize("kernel", [3, 5])
def test_layers_within_the_limit_follow_the_law_to_the_bit(zeros, kernel):
    torch.manual_seed(0)
    layer = depthwise(kernel)
    weight = torch.randint(-64, 65, layer.weight.shape, dtype=torch.int8)  # pairs of up to 128
    weight[0], weight[1] = 64, -64
    assert is_exact_in_pairs(layer, weight)
    stored = torch.randint(0, 256, (2, 104, 12, 12), dtype=torch.uint8)
    stored[:, :2] = 255
    source = Grid(IntFormat(8, signed=False), torch.tensor(0.013), torch.tensor(zeros[0], dtype=torch.int32))
    scale = torch.rand(104) * 0.01 + 1e-4
    bias = torch.randint(-5000, 5000, (104,)) * (source.scale * scale)
    exact = F.conv2d(stored.double() - zeros[0], weight.double(), None, padding=kernel // 2, groups=104)
    output = Grid(IntFormat(8, signed=False), torch.tensor(0.7), torch.tensor(zeros[1], dtype=torch.int32))
    law = torch_laws.fbgemm(source, scale.view(-1, 1, 1), bias.view(-1, 1, 1), output, torch.float32)(exact.float())
    kernel_module = QuantizedConv(layer, LayerCodes(weight, scale, bias), Stored.of(output))
    found = kernel_module(torch._make_per_tensor_quantized_tensor(stored, float(source.scale), zeros[0]))
    assert torch.equal(found.int_repr().float() - zeros[1], law)


@given(st.integers(0, 1 << 30), st.sampled_from([2, 4, 8]), st.booleans(), st.booleans())
def test_raised_scales_always_suffice(seed, bits, per_channel, power_of_two):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(104, 1, 3, 3, generator=generator) * torch.rand(104, 1, 1, 1, generator=generator)
    fmt = IntFormat(bits, narrow=True)
    scale = weight.abs().amax((1, 2, 3)) / fmt.qmax if per_channel else weight.abs().max() / fmt.qmax
    if power_of_two:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    grid = Grid(fmt, scale, None, 0 if per_channel else None)
    raised = raised_for_pairs(depthwise(), weight, grid, power_of_two=power_of_two)
    assert is_exact_in_pairs(depthwise(), quantize(weight, raised))
    assert bool((raised.scale >= scale).all() and (raised.scale <= 2.01 * scale).all())
    assert (raised is grid) == (bits < 8) or raised is grid
    assert not power_of_two or bool((torch.log2(raised.scale) % 1 == 0).all())


def test_quantize_reports_what_it_raised_for_target_torch_only():
    torch.manual_seed(0)
    net, x = nn.Sequential(depthwise(3, bias=False), nn.ReLU(), nn.Conv2d(104, 4, 1)).eval(), torch.randn(4, 104, 8, 8)
    q = bs.quantize(net, [x], target="torch")
    assert any("1 depthwise layers" in note for note in q.report.notes)
    assert not any("depthwise" in note for note in bs.quantize(net, [x]).report.notes)
