"""The C kernels compute what the eager ones do, to the bit but for sums; without a compiler nothing changes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitsmith.grid import FP8_E4M3, Grid, IntFormat, kernels
from bitsmith.qat import native
from bitsmith.qat.kernels import Clipping, Extremes, LearnedClipping, StraightThrough


@pytest.fixture(autouse=True)
def _free_choice() -> Iterator[None]:
    yield
    kernels.use_compiled(None)
    native._library.cache_clear()


def compiled() -> None:
    kernels.use_compiled(None)
    if native._library(False) is None:
        pytest.skip("no C compiler")


def grids() -> list[tuple[str, Tensor, Grid]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300_007, generator=generator) * 4
    x[:4] = torch.tensor([torch.inf, -torch.inf, 3e38, 0.0])
    x[4:1004] = (torch.arange(-500, 500) + 0.5) * 0.1
    weight = torch.randn(16, 24, 3, 3, generator=generator)
    image = weight.contiguous(memory_format=torch.channels_last)
    rows = torch.randn(40, 96, generator=generator)
    scale = torch.rand(16, generator=generator) * 0.1 + 0.1
    zero = torch.randint(0, 16, (16,), generator=generator, dtype=torch.int32)
    unsigned = IntFormat(4, signed=False)
    return [
        ("tensor", x, Grid(IntFormat(8), torch.tensor(0.1))),
        ("affine", x, Grid(unsigned, torch.tensor(0.1), torch.tensor(7, dtype=torch.int32))),
        ("16 bits", x, Grid(IntFormat(16), torch.tensor(0.001))),
        ("images", image, Grid(IntFormat(8), torch.tensor(0.02))),
        ("channels", weight, Grid(IntFormat(3), scale, None, 0)),
        ("channels, affine", weight, Grid(unsigned, scale, zero, 0)),
        ("channels of images", image, Grid(IntFormat(3), scale, None, 0)),
        ("groups", rows, Grid(IntFormat(3), torch.rand(40, 6, generator=generator) + 0.1, None, 1, 16)),
    ]


GRIDS = [pytest.param(x, grid, id=name) for name, x, grid in grids()]


@pytest.mark.parametrize(("x", "grid"), GRIDS)
def test_forward_is_the_eager_one_to_the_bit(x: Tensor, grid: Grid) -> None:
    compiled()
    out = native.fake_quantize(x, grid, *(v for v in _codes(grid)))
    assert out is not None
    assert out.stride() == x.stride()
    assert torch.equal(out, kernels.fake_quantize(x, grid))


@pytest.mark.parametrize(("x", "grid"), GRIDS)
@pytest.mark.parametrize("rounding_counts", [True, False])
def test_backward_is_the_eager_one(x: Tensor, grid: Grid, rounding_counts: bool) -> None:
    compiled()
    clipping = Clipping.of(grid, margin=0.0, relu=False)
    results = []
    for way in (None, False):
        kernels.use_compiled(way)
        values = x.nan_to_num(posinf=50.0, neginf=-50.0).clamp(-60, 60).requires_grad_()
        size, offset = torch.ones_like(grid.scale).requires_grad_(), torch.zeros_like(grid.scale).requires_grad_()
        small = torch.full_like(grid.scale, 1e-9)
        y = LearnedClipping.apply(values, size, offset, clipping, small, small, grid.scale, rounding_counts)
        y.backward(
            torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sum(0, keepdim=True).expand(x.shape)
        )
        straight = values.detach().requires_grad_()
        StraightThrough.apply(straight, grid, clipping, None).backward(torch.ones_like(x))
        results.append((values.grad, straight.grad, size.grad, offset.grad))
    ours, theirs = results
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    for mine, its in zip(ours[2:], theirs[2:]):
        assert mine is not None
        torch.testing.assert_close(mine, its, rtol=3e-3, atol=1e-9 * 1e-3 * x.numel() ** 0.5)


def test_extremes_and_what_is_not_finite() -> None:
    compiled()
    grid = Grid(IntFormat(8, signed=False), torch.tensor(0.02))
    x = torch.randn(100_000)
    for greatest_only, bad in ((False, None), (True, None), (False, torch.nan), (False, torch.inf)):
        if bad is not None:
            x[77_777] = bad
        watch = Extremes(greatest_only)
        y = StraightThrough.apply(x, grid, Clipping.of(grid, margin=0.5, relu=greatest_only), watch)
        low, high = watch.ends()
        if bad is None:
            assert (low, high) == (0.0 if greatest_only else x.min(), x.max())
        else:
            assert not math.isfinite(low + high)
        assert torch.equal(y.isnan(), x.isnan())


def test_what_they_do_not_take_goes_the_eager_way() -> None:
    scale = torch.rand(5) + 0.1
    for x, grid in (
        (torch.randn(4, 5), Grid(IntFormat(8), scale, None, 1)),
        (torch.randn(4, 5), Grid(FP8_E4M3, torch.tensor(1.0))),
        (torch.randn(4, 10)[:, ::2], Grid(IntFormat(8), torch.tensor(1.0))),
        (torch.randn(4, 5).double(), Grid(IntFormat(8), torch.tensor(1.0))),
        (torch.randn(4, 5), Grid(IntFormat(8), torch.rand(4, 2) + 0.1, None, 1, 3)),
    ):
        assert native.fake_quantize(x, grid, *_codes(grid)) is None


def test_without_a_compiler_the_eager_way_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x, grid = torch.randn(10), Grid(IntFormat(8), torch.tensor(0.1))
    for compiler, message in (("/nonexistent/cc", "No such file"), ("false", "not used here")):
        native._library.cache_clear()
        monkeypatch.setenv("CC", compiler)
        kernels.use_compiled(None)
        assert native.fake_quantize(x, grid, *_codes(grid)) is None
        kernels.use_compiled(True)
        with pytest.warns(UserWarning, match=message):
            assert native.fake_quantize(x, grid, *_codes(grid)) is None
    monkeypatch.setenv("BITSMITH_COMPILE", "0")
    kernels.use_compiled(None)
    assert native.fake_quantize(x, grid, *_codes(grid)) is None


def _codes(grid: Grid) -> tuple[Tensor, Tensor]:
    from bitsmith.qat.kernels import code_ends

    return code_ends(grid)
