"""The laws of PyTorch's kernels against the kernels, on codes chosen so that results lie close to ties."""

import pytest
import torch
import torch.nn.functional as F

from bitsmith.engines.torch_kernels import (
    POINTWISE,
    Binary,
    LayerCodes,
    Pointwise,
    QuantizedCat,
    QuantizedConv,
    QuantizedLinear,
    Stored,
)
from bitsmith.engines.torch_plain import PlainLayer
from bitsmith.grid import Grid, IntFormat
from bitsmith.integer import laws, torch_laws

SCALES = (0.1, 0.013, 0.7, 0.02)


def grid(scale: float, zero: int) -> Grid:
    return Grid(IntFormat(8, signed=False), torch.tensor(scale), torch.tensor(zero, dtype=torch.int32))


def codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def as_quantized(stored: torch.Tensor, on: Grid) -> torch.Tensor:
    return torch._make_per_tensor_quantized_tensor(stored, float(on.scale), laws.zero_point(on))


def centred(stored: torch.Tensor, on: Grid) -> torch.Tensor:
    return stored.float() - laws.zero_point(on)


@pytest.mark.parametrize("zeros", [(0, 0), (37, 101)])
@pytest.mark.parametrize(("channels", "kernel", "groups"), [((16, 32), 3, 1), ((32, 64), 1, 1), ((128, 128), 3, 128)])
def test_convolution(zeros, channels, kernel, groups):
    torch.manual_seed(kernel + groups)
    for _ in range(6):
        weight = torch.randint(-127, 128, (channels[1], channels[0] // groups, kernel, kernel), dtype=torch.int8)
        scale, source = torch.rand(channels[1]) * 0.01 + 1e-4, grid(float(torch.rand(()) + 0.01), zeros[0])
        bias = torch.randint(-5000, 5000, (channels[1],)) * (source.scale * scale)
        layer = torch.nn.Conv2d(*channels, kernel, padding=kernel // 2, groups=groups)
        stored = codes(4, channels[0], 20, 20)
        exact = F.conv2d(centred(stored, source).double(), weight.double(), None, padding=kernel // 2, groups=groups)
        per_channel = (-1, 1, 1)
        real = exact * (source.scale * scale).view(per_channel) + bias.view(per_channel)
        output = grid(float(real.abs().max()) / 200, zeros[1])
        law = torch_laws.convolution(
            source, scale.view(per_channel), bias.view(per_channel), output, torch.float32
        )(exact.float())  # fmt: skip
        parameters, ends = LayerCodes(weight, scale, bias), (Stored.of(source), Stored.of(output))
        packed = QuantizedConv(layer, parameters, ends[1])(as_quantized(stored, source))
        plain = PlainLayer(layer, parameters, *ends)(as_quantized(stored, source))
        assert torch.equal(packed.int_repr().float() - zeros[1], law)
        assert torch.equal(plain.int_repr().float() - zeros[1], law)


@pytest.mark.parametrize("zeros", [(0, 0), (37, 101)])
def test_linear(zeros):
    torch.manual_seed(0)
    for _ in range(6):
        weight = torch.randint(-127, 128, (100, 256), dtype=torch.int8)
        scale, source = torch.rand(100) * 0.01 + 1e-4, grid(float(torch.rand(()) + 0.01), zeros[0])
        bias = torch.randint(-5000, 5000, (100,)) * (source.scale * scale)
        stored = codes(200, 256)
        exact = F.linear(centred(stored, source).double(), weight.double())
        output = grid(float((exact * (source.scale * scale)).abs().max()) / 200, zeros[1])
        layer, parameters = torch.nn.Linear(256, 100), LayerCodes(weight, scale, bias)
        kernel = QuantizedLinear(layer, parameters, Stored.of(output))(as_quantized(stored, source))
        law = torch_laws.fbgemm(source, scale, bias, output, torch.float32)(exact.float())
        assert torch.equal(kernel.int_repr().float() - zeros[1], law)
        plain = PlainLayer(layer, parameters, Stored.of(source), None)(as_quantized(stored, source))
        float_law = torch_laws.convolution(source, scale, bias, None, torch.float32)(exact.float())
        assert torch.equal(plain, float_law)


@pytest.mark.parametrize("zeros", [(0, 0, 0), (0, 37, 20), (101, 37, 128)])
@pytest.mark.parametrize("name", ["add", "mul"])
def test_binary(name, zeros):
    torch.manual_seed(0)
    law = torch_laws.add if name == "add" else torch_laws.multiply
    for scale in SCALES:
        grids = [grid(s, z) for s, z in zip((0.013, 0.01, scale), zeros)]
        a, b = codes(64, 999), codes(64, 999)
        kernel = Binary(name, Stored.of(grids[2]))(as_quantized(a, grids[0]), as_quantized(b, grids[1]))
        expected = law(centred(a, grids[0]), centred(b, grids[1]), *grids, torch.float32)
        assert torch.equal(kernel.int_repr().float() - zeros[2], expected)


@pytest.mark.parametrize("zeros", [(0, 0), (101, 37)])
@pytest.mark.parametrize("name", POINTWISE)
def test_functions_of_one_element(name, zeros):
    function = getattr(F, name) if name != "sigmoid" else torch.sigmoid
    for scale in SCALES:
        source, output = grid(0.043, zeros[0]), grid(scale, zeros[1])
        stored = torch.arange(256, dtype=torch.uint8).repeat(3)
        kernel = Pointwise(name, Stored.of(output))(as_quantized(stored, source))
        real = function(torch_laws.dequantized(centred(stored, source), source))
        law = torch_laws.scaled(real, output, torch.float32)
        assert torch.equal(kernel.int_repr().float() - zeros[1], law)


@pytest.mark.parametrize("shape", [(4, 32, 9, 9), (40, 333)])
def test_cat(shape):
    torch.manual_seed(0)
    for scale in SCALES:
        grids = [grid(0.013, 101), grid(0.01, 37), grid(scale, 20)]
        parts = [codes(*shape), codes(*shape)]
        kernel = QuantizedCat(1, Stored.of(grids[2]), planes=len(shape) == 4)
        found = kernel([as_quantized(p, g) for p, g in zip(parts, grids)])
        law = torch_laws.cat([centred(p, g) for p, g in zip(parts, grids)], grids[:2], 1, grids[2], torch.float32)
        assert torch.equal(found.int_repr().float() - 20, law)


@pytest.mark.parametrize("zero", [0, 37])
def test_quantize(zero):
    torch.manual_seed(0)
    for scale in SCALES:
        x = torch.randint(-600, 600, (100_000,)) * (torch.tensor(scale) * 0.5)
        found = torch.quantize_per_tensor(x, float(torch.tensor(scale)), zero, torch.quint8).int_repr().float() - zero
        assert torch.equal(found, torch_laws.quantize_centred(x, grid(scale, zero), torch.float32))
