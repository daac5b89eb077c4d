"""The eager pieces and the compiled kernel are the definition, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitsmith.errors import RecipeError
from bitsmith.grid import FP8_E4M3, FP8_E5M2, FloatFormat, Format, Grid, IntFormat, kernels

FORMATS: list[Format] = [
    *(IntFormat(bits, signed=signed) for bits in (1, 2, 4, 8, 16, 24, 25, 32) for signed in (True, False)),
    IntFormat(8, narrow=True),
    FP8_E4M3,
    FP8_E5M2,
    FloatFormat(2, 1),
    FloatFormat(8, 7, reserved="ieee"),
]
SIZE = 700_001  # several pieces, the last one short


def definition(x: Tensor, grid: Grid) -> Tensor:
    """The definition on whole tensors in float64, where every sum and clamp is exact."""
    scale, zero = grid.scale, grid.zero_point
    if scale.ndim:
        shape = [1] * x.ndim
        shape[grid.axis or 0] = -1
        scale = scale.view(shape)
        zero = None if zero is None else zero.view(shape)
    ratio = x / scale
    if not isinstance(grid.format, IntFormat):
        mantissa, exponent = torch.frexp(ratio.double())
        least = (exponent - 1).clamp(min=grid.format.min_exponent) - grid.format.mantissa_bits
        step = torch.ldexp(torch.ones_like(mantissa), least)
        value = (torch.round(ratio.double() / step) * step).clamp(-grid.format.max_value, grid.format.max_value)
        return value.float() * scale
    offset = 0.0 if zero is None else zero.double()
    code = (ratio.double().round() + offset).clamp(grid.format.qmin, grid.format.qmax)
    return (code - offset).float() * scale


def inputs(scale: float) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(SIZE, generator=generator) * torch.logspace(-4, 4, SIZE)
    ties = (torch.arange(-5000, 5000) + 0.5) * scale
    x[:10_000] = ties
    x[10_000:10_004] = torch.tensor([float("inf"), float("-inf"), 3e38, -3e38])
    return x


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_eager_pieces_are_the_definition(fmt: Format, affine: bool) -> None:
    if affine and not isinstance(fmt, IntFormat):
        pytest.skip("a float format has no zero point")
    scale = 0.37
    zero = None
    if affine and isinstance(fmt, IntFormat):
        zero = torch.tensor((fmt.qmin + min(fmt.qmax, 1 << 30)) // 2, dtype=torch.int32)
    grid = Grid(fmt, torch.tensor(scale), zero)
    x = inputs(scale)
    expected = definition(x, grid)
    assert torch.equal(kernels.fake_quantize(x, grid), expected)
    assert torch.equal(kernels.fake_quantize_(x.clone(), grid), expected)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rows", [3, 3000])
def test_channel_pieces_are_the_definition(axis: int, rows: int) -> None:
    x = torch.randn(rows, 900_000 // rows)
    channels = x.shape[axis]
    zero = torch.randint(-128, 128, (channels,), dtype=torch.int32)
    grid = Grid(IntFormat(8), torch.rand(channels) + 0.01, zero, axis)
    assert torch.equal(kernels.fake_quantize(x, grid), definition(x, grid))
    codes = kernels.quantize(x, grid)
    shape = (-1, 1) if axis == 0 else (1, -1)
    assert torch.equal((codes - zero.view(shape)) * grid.scale.view(shape), definition(x, grid))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_memory_layouts(layout: str) -> None:
    """Whatever the strides: the same numbers, and a dense layout is kept."""
    x = torch.randn(8, 16, 70, 70)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.transpose(0, 2) if layout == "transposed" else x[:, :, ::2] if layout == "sliced" else x
    grid = Grid(IntFormat(8), torch.tensor(0.02))
    y, codes = kernels.fake_quantize(x, grid), kernels.quantize(x, grid)
    assert torch.equal(y, definition(x, grid))
    assert torch.equal(codes.float() * 0.02, y)
    if layout == "channels_last":
        assert y.stride() == x.stride()
        assert codes.stride() == x.stride()


def test_in_place_overwrites_its_argument_only_when_asked() -> None:
    x = torch.tensor([0.6])
    grid = Grid(IntFormat(8), torch.tensor(0.5))
    kernels.fake_quantize(x, grid)
    assert x.item() == pytest.approx(0.6)
    assert kernels.fake_quantize_(x, grid) is x
    assert x.item() == 0.5


def test_a_wrong_switch_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_COMPILE", "maybe")
    with pytest.raises(RecipeError, match="BITSMITH_COMPILE='maybe'"):
        kernels.fake_quantize(torch.zeros(3), Grid(IntFormat(8), torch.tensor(1.0)))


def test_a_failing_compiler_warns_and_leaves_the_eager_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    kernels._compile.cache_clear()
    kernels.use_compiled(True)
    try:
        with pytest.warns(UserWarning, match="no compiler here"):
            y = kernels.fake_quantize(torch.tensor([0.6]), Grid(IntFormat(8), torch.tensor(0.5)))
        assert y.item() == 0.5
    finally:
        kernels.use_compiled(None)
        kernels._compile.cache_clear()


@pytest.mark.slow
def test_the_compiled_kernel_equals_the_eager_one() -> None:
    """Bit-equal for every format and granularity it takes, ties and infinities included."""
    kernels.use_compiled(True)
    try:
        if kernels._compile("integer") is None or kernels._compile("float") is None:
            pytest.skip("no working C++ compiler")
        x = inputs(0.37)
        for fmt in FORMATS:
            grid = Grid(fmt, torch.tensor(0.37))
            assert torch.equal(kernels.fake_quantize(x, grid), definition(x, grid)), fmt
        rows = torch.randn(40, 500)
        for axis in (0, 1):
            zero = torch.randint(-128, 128, (rows.shape[axis],), dtype=torch.int32)
            grid = Grid(IntFormat(8), torch.rand(rows.shape[axis]) + 0.01, zero, axis)
            assert torch.equal(kernels.fake_quantize(rows, grid), definition(rows, grid))
    finally:
        kernels.use_compiled(None)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_cuda_equals_cpu(fmt: Format) -> None:
    x = inputs(0.37)
    grid = Grid(fmt, torch.tensor(0.37))
    on_device = kernels.fake_quantize(x.cuda(), Grid(fmt, grid.scale.cuda()))
    assert torch.equal(on_device.cpu(), definition(x, grid))
