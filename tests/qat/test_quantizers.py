"""Training quantizers: gradients are the papers' equations, the grid is what eval mode computes, state travels."""

from __future__ import annotations

import copy
import math
from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitsmith.errors import NonFiniteError, RecipeError
from bitsmith.grid import FP8_E4M3, FloatFormat, Format, Grid, IntFormat, TensorSpec, fake_quantize
from bitsmith.qat.quantizers import KINDS, TrainingQuantizer, make_quantizer

UNSIGNED = TensorSpec(format=IntFormat(4, signed=False), symmetric=False)
SIGNED = TensorSpec(format=IntFormat(4))
LEARNED = ("lsq", "lsq+", "pact")


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def started(kind: str, spec: TensorSpec, grid: Grid, **options: object) -> TrainingQuantizer:
    quantizer = make_quantizer(kind, spec, **options)  # type: ignore[arg-type]
    quantizer.initialize(grid)
    return quantizer


def spread(value: Tensor, x: Tensor, axis: int | None, group: int | None) -> Tensor:
    """One number per element of ``x``."""
    if axis is None:
        return value.expand(x.shape)
    if group is None:
        return value.reshape([-1 if d == axis else 1 for d in range(x.ndim)]).expand(x.shape)
    return value.repeat_interleave(group, axis).narrow(axis, 0, x.shape[axis])


# Gradients


def lsq_by_hand(x: Tensor, scale: Tensor, low: float, high: float, g: Tensor) -> tuple[Tensor, Tensor]:
    """Equation (3) and the straight-through estimator, term by term in float64: gradients of x and of the scale."""
    v = x.double() / scale.double()
    inside = (v > low) & (v < high)
    slope = torch.where(inside, v.round() - v, v.clamp(low, high))
    return g.double() * inside, slope * g.double()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
def test_lsq_is_its_equations(layout: str) -> None:
    x = data(3, 8, 170, 70) * 3  # more than one piece
    x = x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x
    x = (x.transpose(1, 3) if layout == "permuted" else x).requires_grad_()
    quantizer = started("lsq", SIGNED, Grid(IntFormat(4), torch.tensor(0.7)))
    g = data(*x.shape, seed=1) / 100  # below the bound of the gradient
    y = quantizer(x)
    y.backward(g)
    grad_x, terms = lsq_by_hand(x.detach(), torch.tensor(0.7), -8, 7, g)
    assert x.grad is not None
    assert torch.equal(x.grad.double(), grad_x)
    expected = terms.sum() / math.sqrt(x[0].numel() * 7) / 0.7
    assert abs(expected) < 1
    torch.testing.assert_close(quantizer.log_scale.grad.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("axis", "group"), [(0, None), (1, None), (1, 4), (1, 5)])
def test_lsq_of_weights_has_a_gradient_for_every_scale(axis: int, group: int | None) -> None:
    weight = data(6, 12, 3).requires_grad_()
    granularity = "channel" if group is None else "group"
    spec = TensorSpec(format=IntFormat(3), granularity=granularity, group_size=group, axis=axis)
    shape = [weight.shape[axis]] if group is None else [6, -(-12 // group), 3]
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(2)) * 0.3 + 0.2
    quantizer = started("lsq", spec, Grid(IntFormat(3), scale, None, axis, group), of_weight=True)
    g = data(*weight.shape, seed=1)
    quantizer(weight).backward(g)
    each = spread(scale, weight, axis, group)
    grad_x, terms = lsq_by_hand(weight.detach(), each, -4, 3, g)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad.double(), grad_x)
    index = spread(torch.arange(scale.numel()).reshape(shape), weight, axis, group).reshape(-1)
    expected = torch.zeros(scale.numel(), dtype=torch.float64).index_add_(0, index, terms.reshape(-1)).reshape(shape)
    expected = expected / math.sqrt(weight.numel() / scale.numel() * 3) / scale
    assert bool((expected.abs() < 1).any())
    torch.testing.assert_close(quantizer.log_scale.grad.double(), expected.clamp(-1, 1), rtol=1e-4, atol=1e-6)


def test_a_step_of_gradient_descent_moves_the_scale_as_the_papers_does() -> None:
    x, scale, rate = data(64), 0.3, 1e-4
    quantizer = started("lsq", SIGNED, Grid(IntFormat(4), torch.tensor(scale)), of_weight=True)
    quantizer(x).square().sum().mul(0.01).backward()
    torch.optim.SGD([quantizer.log_scale], rate).step()
    y = fake_quantize(x, Grid(IntFormat(4), torch.tensor(scale)))
    _, terms = lsq_by_hand(x, torch.tensor(scale), -8, 7, 0.02 * y)
    expected = scale - rate * float(terms.sum()) / math.sqrt(64 * 7)
    assert float(quantizer.require_grid().scale) == pytest.approx(expected, rel=1e-6)


def test_lsq_offset_is_its_equations() -> None:
    """Straight-through rounding of the zero point: the formula with a real offset, differentiated by autograd."""
    scale, zero = 0.25, 6
    quantizer = started("lsq+", UNSIGNED, Grid(UNSIGNED.format, torch.tensor(scale), torch.tensor(zero)))
    x = (data(400) * 2).requires_grad_()
    g = data(400, seed=1) / 10
    y = quantizer(x)
    y.backward(g)
    s, beta = torch.tensor(scale, dtype=torch.float64), torch.tensor(-zero * scale, dtype=torch.float64)
    s.requires_grad_()
    beta.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    v = (x64 - beta) / s
    clipped = v.clamp(0, 15)
    (((clipped.round() - clipped).detach() + clipped) * s + beta).backward(g.double())
    factor = 1 / math.sqrt(400 * 15)
    assert x.grad is not None
    assert x64.grad is not None
    torch.testing.assert_close(x.grad.double(), x64.grad)
    assert s.grad is not None
    assert beta.grad is not None
    torch.testing.assert_close(quantizer.log_scale.grad.double(), s.grad * factor / scale, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.offset.grad.double(), beta.grad * factor / (15 * scale), rtol=1e-4, atol=1e-6)


def test_the_learned_offset_reaches_the_grid_as_an_integer_zero_point() -> None:
    quantizer = started("lsq+", UNSIGNED, Grid(UNSIGNED.format, torch.tensor(0.25), torch.tensor(6)))
    for beta, zero in ((-6 * 0.25, 6), (-6.4 * 0.25, 6), (-6.6 * 0.25, 7), (-100.0, 15), (3.0, 0)):
        with torch.no_grad():
            quantizer.offset.fill_(beta / (15 * 0.25))
        assert int(quantizer.require_grid().zero_point) == zero
        x = data(50)
        assert torch.equal(
            quantizer(x), fake_quantize(x, Grid(UNSIGNED.format, torch.tensor(0.25), torch.tensor(zero)))
        )


def test_pact_is_its_equation() -> None:
    """Equation (3): the gradient of the threshold is 1 where a value is clipped by it, 0 elsewhere."""
    quantizer = started("pact", SIGNED, Grid(IntFormat(4, signed=False), torch.tensor(0.1)), non_negative=True)
    x = data(500).requires_grad_()
    g = data(500, seed=1)
    y = quantizer(x)
    y.backward(g)
    top = x.detach() >= 1.5
    assert x.grad is not None
    assert torch.equal(x.grad, g * ((x.detach() > 0) & ~top))
    torch.testing.assert_close(quantizer.clip.grad, g[top].sum())
    both = started("pact", SIGNED, Grid(IntFormat(4), torch.tensor(0.1)))
    both(x.detach()).backward(g)
    v = x.detach() / 0.1
    torch.testing.assert_close(both.clip.grad, (g * (v >= 7)).sum() - (g * (v <= -8)).sum() * 8 / 7)


@pytest.mark.parametrize("fmt", [IntFormat(8), IntFormat(2, narrow=True), FP8_E4M3, FloatFormat(2, 1)], ids=str)
def test_moving_average_passes_gradients_where_values_are_only_rounded(fmt: Format) -> None:
    quantizer = started("moving-average", TensorSpec(format=fmt), Grid(fmt, torch.tensor(0.01))).eval()
    ours, theirs = (data(300) * 2).requires_grad_(), (data(300) * 2).requires_grad_()
    g = data(300, seed=1)
    quantizer(ours).backward(g)
    fake_quantize(theirs, quantizer.require_grid()).backward(g)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert bool((ours.grad != 0).any())


@pytest.mark.parametrize("kind", ["moving-average", "lsq", "lsq+", "pact"])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_non_negative_quantizer_is_a_relu_and_itself(kind: str, frozen: bool) -> None:
    spec = SIGNED if kind == "pact" else UNSIGNED
    quantizer = make_quantizer(kind, spec, non_negative=True)
    assert quantizer.subsumes_relu
    quantizer.initialize(Grid(IntFormat(4, signed=False), torch.tensor(0.1)))
    if frozen:
        quantizer.freeze()
    twin = copy.deepcopy(quantizer)
    x, behind = data(900), data(900)
    x[:3] = behind[:3] = torch.tensor([0.0, 0.04, -0.04])
    x.requires_grad_()
    behind.requires_grad_()
    g = data(900, seed=1)
    y, z = quantizer(x), twin(behind.relu())
    assert torch.equal(y, z)
    y.backward(g)
    z.backward(g)
    assert x.grad is not None
    assert torch.equal(x.grad, behind.grad)
    for mine, its in zip(quantizer.state_dict().values(), twin.state_dict().values()):
        assert torch.equal(mine, its)


# The grid


def specs(kind: str, fmt: Format, symmetric: bool, scale: str, rounding: str, granularity: str) -> TensorSpec:
    return TensorSpec(
        format=fmt, symmetric=symmetric or isinstance(fmt, FloatFormat), scale=scale, po2_rounding=rounding,  # type: ignore[arg-type]
        granularity=granularity, group_size=3 if granularity == "group" else None,  # type: ignore[arg-type]
    )  # fmt: skip


FORMATS: list[Format] = [
    *(IntFormat(bits, signed=signed) for bits, signed in product((2, 3, 4, 8, 16), (True, False))),
    IntFormat(2, narrow=True), IntFormat(8, narrow=True), FP8_E4M3, FloatFormat(3, 2), FloatFormat(2, 1),
]  # fmt: skip


@given(
    kind=st.sampled_from(sorted(KINDS)), fmt=st.sampled_from(FORMATS), symmetric=st.booleans(),
    scale=st.sampled_from(["float32", "po2"]), rounding=st.sampled_from(["ceil", "nearest"]),
    place=st.sampled_from(["tensor", "tensor+", "channel", "weight", "weight channel", "weight group"]),
    size=st.floats(1e-3, 1e3), seed=st.integers(0, 9), steps=st.integers(0, 2),
)  # fmt: skip
def test_the_grid_is_what_eval_mode_computes(
    kind: str, fmt: Format, symmetric: bool, scale: str, rounding: str, place: str, size: float, seed: int, steps: int
) -> None:
    """After any training, forward in eval mode is grid.fake_quantize to the bit; frozen, saved and loaded too."""
    spec = specs(
        kind, fmt, symmetric, scale, rounding, place.split()[-1] if " " in place or place == "channel" else "tensor"
    )
    options = {"of_weight": place.startswith("weight"), "non_negative": place == "tensor+"}
    try:
        quantizer = make_quantizer(kind, spec, **options)  # type: ignore[arg-type]
    except RecipeError:
        assert kind in ("lsq+", "pact")
        return
    x = (data(4, 7, 5, seed=seed) + 0.2) * size
    optimizer = None
    for _ in range(steps + 1):
        values = x.clone().requires_grad_()
        (quantizer(values) - values.detach() * 0.9).square().mean().backward()
        optimizer = optimizer or torch.optim.Adam([*quantizer.parameters(), nn.Parameter(torch.ones(1))], 0.05)
        optimizer.step()
    quantizer.eval()
    y = quantizer(x)
    grid = quantizer.require_grid()
    assert torch.equal(y, fake_quantize(x.relu() if quantizer.subsumes_relu else x, grid))
    assert bool((grid.scale > 0).all() & grid.scale.isfinite().all())
    if scale == "po2":
        assert bool((torch.frexp(grid.scale).mantissa == 0.5).all())
    if grid.zero_point is not None and isinstance(fmt, IntFormat) and isinstance(grid.format, IntFormat):
        assert grid.zero_point.dtype == torch.int32
        assert bool((grid.zero_point >= grid.format.qmin).all() & (grid.zero_point <= grid.format.qmax).all())
    for make_frozen in (False, True):
        if make_frozen:
            quantizer.freeze()
        fresh = make_quantizer(kind, spec, **options)  # type: ignore[arg-type]
        fresh.load_state_dict(quantizer.state_dict())
        assert torch.equal(fresh.eval()(x), y)
        assert torch.equal(copy.deepcopy(quantizer)(x), y)
    quantizer.unfreeze()
    assert torch.equal(quantizer(x), y)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("scale", ["float32", "po2"])
@pytest.mark.parametrize("rounding", ["ceil", "nearest"])
def test_it_starts_exactly_from_a_calibrated_grid(kind: str, scale: str, rounding: str) -> None:
    start = torch.tensor(0.125 if scale == "po2" else 0.1)
    affine = kind in ("lsq+", "lsq", "moving-average")
    cases = [(IntFormat(8), None, kind != "lsq+", False), (IntFormat(8, signed=False), None, True, True)]
    cases += [(IntFormat(8, signed=False), torch.tensor(37, dtype=torch.int32), False, False)] if affine else []
    for fmt, zero, symmetric, non_negative in cases:
        spec = TensorSpec(format=fmt, symmetric=symmetric, scale=scale, po2_rounding=rounding)  # type: ignore[arg-type]
        quantizer = started(kind, spec, Grid(fmt, start, zero), non_negative=non_negative)
        grid = quantizer.require_grid()
        assert torch.equal(grid.scale, start), (kind, fmt, zero)
        assert int(0 if grid.zero_point is None else grid.zero_point) == int(0 if zero is None else zero)


def test_codes_moved_up_for_x86_stay_moved() -> None:
    """A signed spec whose grid has its codes moved to unsigned ones keeps them so, symmetric around them."""
    moved = Grid(IntFormat(8, signed=False), torch.tensor(0.1), torch.tensor(128, dtype=torch.int32))
    for kind in ("moving-average", "lsq", "pact"):
        quantizer = started(kind, TensorSpec(format=IntFormat(8)), moved)
        assert torch.equal(quantizer.require_grid().scale, moved.scale)
        quantizer(data(100) * 5)
        for grid in (quantizer.require_grid(), _narrowed(quantizer)):
            assert grid.format == IntFormat(8 if grid.zero_point == 128 else 4, signed=False)
            assert int(grid.zero_point) in (128, 8)  # type: ignore[arg-type]


def _narrowed(quantizer: TrainingQuantizer) -> Grid:
    quantizer.set_bits(4)
    return quantizer.require_grid()


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_gradual_bits_keep_the_clipping_range(kind: str) -> None:
    spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=kind == "pact")
    quantizer = started(kind, spec, Grid(spec.format, torch.tensor(0.01)), non_negative=True)
    for bits in (6, 4, 2):
        quantizer.set_bits(bits)
        grid = quantizer.require_grid()
        assert grid.format == IntFormat(bits, signed=False)
        assert float(grid.scale) * (2**bits - 1) == pytest.approx(2.55)
    fresh = make_quantizer(kind, spec, non_negative=True)
    fresh.load_state_dict(quantizer.state_dict())
    assert fresh.require_grid().format == IntFormat(2, signed=False)
    assert fresh.spec.format.bits == 2
    with pytest.raises(RecipeError, match="1 bits"):
        quantizer.set_bits(1)


# Moving averages


@given(
    bits=st.integers(2, 16), signed=st.booleans(), narrow=st.booleans(), symmetric=st.booleans(),
    low=st.floats(-100, 0), high=st.floats(0, 100),
)  # fmt: skip
def test_the_short_way_to_a_moving_grid_is_the_long_one(
    bits: int, signed: bool, narrow: bool, symmetric: bool, low: float, high: float
) -> None:
    spec = TensorSpec(format=IntFormat(bits, signed=signed, narrow=narrow), symmetric=symmetric)
    non_negative = symmetric and not signed
    quantizer = make_quantizer("moving-average", spec, non_negative=non_negative)
    assume(high - (0.0 if non_negative else low) > 1e-30)
    quantizer(torch.tensor([low, high], dtype=torch.float32))
    short = quantizer._short(float(quantizer.low), float(quantizer.high))  # type: ignore[operator]
    long = quantizer._solve(quantizer.low, quantizer.high, None)  # type: ignore[arg-type]
    assert short is not None
    assert torch.equal(short.scale, long.scale)
    assert short.format == long.format
    assert short.zero_point == long.zero_point


def test_moving_average_by_hand() -> None:
    spec = TensorSpec(format=IntFormat(8, signed=False), symmetric=False)
    quantizer = make_quantizer("moving-average", spec)
    batches = [data(1000, seed=i) * (i + 1) for i in range(4)]
    low, high = float(batches[0].min()), float(batches[0].max())
    for batch in batches:
        quantizer(batch)
        low, high = 0.9 * low + 0.1 * float(batch.min()), 0.9 * high + 0.1 * float(batch.max())
    grid = quantizer.require_grid()
    assert float(grid.scale) == pytest.approx((high - low) / 255, rel=1e-6)
    assert int(grid.zero_point) == round(-low / ((high - low) / 255))  # type: ignore[arg-type]
    before = float(grid.scale)
    quantizer.eval()(batches[3])
    quantizer.train().freeze()
    quantizer(batches[3])
    assert float(quantizer.require_grid().scale) == before
    quantizer.unfreeze()
    quantizer(batches[3])
    assert float(quantizer.require_grid().scale) > before


def test_ranges_of_weights_are_their_own_at_every_step() -> None:
    quantizer = make_quantizer("moving-average", TensorSpec(format=IntFormat(8), granularity="channel"), of_weight=True)
    for seed in range(2):
        weight = data(4, 9, seed=seed)
        y = quantizer(weight)
        torch.testing.assert_close(quantizer.require_grid().scale, weight.abs().amax(1) / 127)
        weight[1] = 0.0  # a dead channel takes the largest scale
        y = quantizer(weight)
        assert quantizer.require_grid().scale[1] == quantizer.require_grid().scale.max()
        assert torch.equal(y, fake_quantize(weight, quantizer.require_grid()))


# Life


@pytest.mark.parametrize("kind", LEARNED)
def test_a_frozen_scale_gets_no_gradient_and_stays(kind: str) -> None:
    quantizer = started(kind, SIGNED, Grid(IntFormat(4, signed=False), torch.tensor(0.1)), non_negative=True)
    quantizer.freeze()
    x = data(100).requires_grad_()
    quantizer(x).sum().backward()
    assert all(p.grad is None for p in quantizer.parameters())
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.add_(1.0)  # an optimizer's momentum
    assert float(quantizer.require_grid().scale) == pytest.approx(0.1)
    quantizer.unfreeze()
    assert float(quantizer.require_grid().scale) == pytest.approx(0.1)


@pytest.mark.parametrize("kind", LEARNED)
def test_scales_stay_positive_whatever_an_optimizer_does(kind: str) -> None:
    quantizer = started(kind, SIGNED, Grid(IntFormat(4, signed=False), torch.tensor(0.1)), non_negative=True)
    for value in (-1e6, 1e6):
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.fill_(value if kind == "pact" else math.copysign(80.0, value))
        scale = quantizer.require_grid().scale
        assert bool(scale > 0)
        assert bool(scale.isfinite())
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.fill_(math.nan)
    with pytest.raises(NonFiniteError, match="lower the learning rate"):
        quantizer(data(3))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_zeros_say_nothing_and_nan_is_refused(kind: str) -> None:
    quantizer = make_quantizer(kind, SIGNED if kind == "pact" else UNSIGNED, non_negative=True)
    x = torch.tensor([-1.0, 0.0])
    assert torch.equal(quantizer(x), torch.zeros(2))
    assert quantizer.grid is None
    assert quantizer(data(20)).max() > 0
    if kind == "moving-average":
        with pytest.raises(NonFiniteError, match="diverged"):
            quantizer(torch.tensor([1.0, math.nan]))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_half_precision_goes_through_float32(kind: str) -> None:
    quantizer = started(kind, SIGNED, Grid(IntFormat(4, signed=False), torch.tensor(0.25)), non_negative=True)
    x = data(64).bfloat16().requires_grad_()
    y = quantizer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, ((x > 0) & (x < 3.75)).bfloat16())


def test_a_state_of_another_shape_loads_into_a_fresh_module() -> None:
    for kind, granularity in product(("moving-average", "lsq", "lsq+"), ("channel", "group")):
        group = 4 if granularity == "group" else None
        spec = TensorSpec(format=IntFormat(4), symmetric=kind != "lsq+", granularity=granularity, group_size=group)  # type: ignore[arg-type]
        quantizer = make_quantizer(kind, spec, of_weight=True)
        weight = data(6, 8)
        y = quantizer(weight)
        fresh = nn.ModuleDict({"q": make_quantizer(kind, spec, of_weight=True)})
        report = fresh.load_state_dict({f"q.{k}": v for k, v in quantizer.state_dict().items()}, strict=True)
        assert not report.missing_keys
        assert torch.equal(fresh["q"](weight), y)
        fresh["q"].load_state_dict(make_quantizer(kind, spec, of_weight=True).state_dict())
        assert fresh["q"].grid is None


@pytest.mark.parametrize(
    ("kind", "spec", "options", "message"),
    [
        ("lsqq", SIGNED, {}, "choose one of moving-average"),
        ("lsq+", SIGNED, {}, "set symmetric to false"),
        ("lsq+", SIGNED, {"of_weight": True}, "as its authors do"),
        ("pact", SIGNED, {"of_weight": True}, "no meaning for weights"),
        ("pact", UNSIGNED, {}, "one threshold"),
        ("lsq", TensorSpec(format=IntFormat(17)), {}, "2 to 16 bits"),
        ("lsq", TensorSpec(format=IntFormat(1)), {}, "2 to 16 bits"),
        ("lsq", TensorSpec(format=IntFormat(8), dynamic=True), {}, "dynamic: false"),
        ("lsq", TensorSpec(format=IntFormat(8), granularity="group", group_size=4), {}, "no ranges per group"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(kind: str, spec: TensorSpec, options: dict[str, bool], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_quantizer(kind, spec, **options)


def test_grids_of_another_kind_are_refused() -> None:
    quantizer = make_quantizer("lsq", UNSIGNED)
    for grid in (
        Grid(IntFormat(4), torch.tensor(1.0)), Grid(FP8_E4M3, torch.tensor(1.0)),
        Grid(IntFormat(4, signed=False), torch.ones(3), None, 1),
    ):  # fmt: skip
        with pytest.raises(RecipeError, match="training was asked for"):
            quantizer.initialize(grid)
    with pytest.raises(RecipeError, match="small float"):
        make_quantizer("lsq", TensorSpec(format=FP8_E4M3)).set_bits(4)


def test_under_torch_distributed_frozen_parameters_get_zeros() -> None:
    """DistributedDataParallel waits for a gradient of every parameter; averages over one process change nothing."""
    quantizer = started("lsq", SIGNED, Grid(IntFormat(4), torch.tensor(0.1)))
    before = quantizer.require_grid().scale.clone()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        quantizer.synchronize()
        quantizer.freeze()
        quantizer(data(10).requires_grad_()).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert float(quantizer.log_scale.grad) == 0.0  # type: ignore[arg-type]
    assert torch.equal(quantizer.require_grid().scale, before)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["moving-average", "lsq"])
def test_torch_compile_goes_around_what_it_cannot_trace(kind: str) -> None:
    quantizer = started(kind, SIGNED, Grid(IntFormat(4), torch.tensor(0.5)))
    twin, x = copy.deepcopy(quantizer), data(64)
    results = []
    for function in (torch.compile(lambda v: twin(v * 1.0), backend="eager"), lambda v: quantizer(v * 1.0)):
        values = x.clone().requires_grad_()
        y = function(values)
        y.square().sum().backward()
        results.append((y, values.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # type: ignore[arg-type]
    torch.testing.assert_close(twin.require_grid().scale, quantizer.require_grid().scale)
