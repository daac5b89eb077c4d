"""What a Target, range rule, quantizer or layer mapping of your own must satisfy: call these from your tests.

    from bitsmith.testing import check_target
    def test_my_chip() -> None:
        check_target(MY_CHIP)

Each check raises AssertionError with what is wrong. Bitsmith's own targets and rules pass them.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .capture.ops import _OPS
from .eager.contracts import check_layer_mapping, check_quantizer
from .errors import CalibrationError, NonFiniteError, RecipeError
from .export import export_ai8x, export_onnx
from .flow import quantize
from .grid import Format, Grid, IntFormat, Quantizer, TensorSpec, fake_quantize
from .model import QuantizedModel
from .ranges.rules import Rule
from .ranges.solve import solve_grid
from .recipe import NAMED, Recipe, bits_recipe
from .targets import Target
from .verify import verify

__all__ = ["check_layer_mapping", "check_quantizer", "check_range_rule", "check_target"]


def check_target(target: Target) -> None:
    """A Target is coherent data, refuses what it has no numbers for, and is obeyed by the models made for it.

    For every recipe that the target takes, the simulation equals the integer executor on every output, and
    the grids are of the target's widths, signs and scales. With an engine and ``exact`` the exported file
    must compute the same bits there.

    >>> from bitsmith.targets import get_target
    >>> check_target(get_target("generic"))
    """
    _check_data(target)
    _check_refusals(target)
    taken = [recipe for recipe in _recipes() if _takes(target, recipe)]
    assert taken, f"target {target.name} takes none of the recipes {[r.name for r in _recipes()]}"
    for recipe in taken:
        torch.manual_seed(0)
        q = quantize(_net(target), [_images(16, 0)], recipe=recipe, target=target)
        _check_grids(q)
        x = _images(8, 1)
        same = torch.equal(q(x), q.integer_executor()(x))
        assert same, f"target {target.name}, recipe {recipe.name}: simulation and integer executor differ"
    if target.exact and target.engine in ("onnxruntime", "openvino", "ai8x"):
        _check_file(target, taken[0])


def check_range_rule(rule: Rule, name: str = "the rule") -> None:
    """A range rule covers its data well, follows its scale, merges, and refuses what has no range.

    >>> from bitsmith.ranges.rules import RULES
    >>> check_range_rule(RULES["minmax"])
    """
    data = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) + 0.5
    formats: tuple[Format, ...] = (IntFormat(4), IntFormat(8), IntFormat(16))
    for fmt in formats:
        for symmetric in (True, False):
            spec = TensorSpec(format=fmt, symmetric=symmetric)
            grid = _grid(rule, spec, data[:9_000], data[9_000:])
            error = (fake_quantize(data, grid) - data).square().mean() / data.square().mean()
            assert error < (0.05 if fmt.bits == 4 else 0.01), f"{name}: relative error {float(error):.3f} with {fmt}"
    spec = TensorSpec(format=IntFormat(8))
    once, eightfold = (float(_grid(rule, spec, data * factor).scale) for factor in (1.0, 8.0))
    assert math.isclose(eightfold, 8 * once, rel_tol=1e-6), f"{name} does not follow the scale of the data"
    one, two = rule.statistic(spec, None), rule.statistic(spec, None)
    one.update(data)
    two.update(data * 2)
    lo, hi = rule.range(one.merge(two).finish(), spec, False)
    together = _grid(rule, spec, data, data * 2).scale
    merged = solve_grid(lo, hi, spec).scale
    assert math.isclose(float(merged), float(together), rel_tol=1e-6), f"{name}: merging differs from watching both"
    for bad, error_type in ((torch.tensor([1.0, float("nan")]), NonFiniteError), (None, CalibrationError)):
        try:
            _grid(rule, spec, *([] if bad is None else [bad]))
        except error_type:
            continue
        raise AssertionError(f"{name} makes a range of {'nothing' if bad is None else 'a NaN'}")


class _Net(nn.Module):
    """The operators that targets treat differently: residual, depthwise, concat, gate, pools, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point, self.head = nn.Conv2d(8, 8, 1), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(x + self.point(F.relu6(self.depth(x))))
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(x * torch.sigmoid(y), 2)], 1)
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))  # type: ignore[no-any-return]


class _ChipNet(nn.Module):
    """The same for a chip whose layers are convolutions: strides, sums, pools and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.point = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.down, self.head = nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu6(self.down(F.relu(x + self.point(x)))) - F.avg_pool2d(x, 2)
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).flatten(1))  # type: ignore[no-any-return]


def _net(target: Target) -> nn.Module:
    return _Net() if target.limits is None else _ChipNet()


def _images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def _recipes() -> list[Recipe]:
    return [*NAMED.values(), *(bits_recipe(bits, bits, symmetric=True, scale="po2") for bits in (2, 4))]


def _takes(target: Target, recipe: Recipe) -> bool:
    try:
        target.check(recipe)
    except RecipeError:
        return False
    return True


def _check_data(target: Target) -> None:
    assert Target.model_validate_json(target.model_dump_json()) == target, "the data does not survive JSON"
    assert target.name.strip(), "a target needs a name"
    assert target.description.strip(), "a target needs a description"
    known = {name for name, op in _OPS.items() if op.role in ("compute", "rescale")}
    unknown = target.integer_operators - known
    assert not unknown, f"integer_operators {sorted(unknown)} are unknown; known are {sorted(known)}"
    extra = target.float_output - target.integer_operators
    assert not extra, f"float_output {sorted(extra)} are not among integer_operators"
    for field in ("weight_bits", "activation_bits", "integer_bits"):
        widths = getattr(target, field)
        assert bool(widths), f"{field} is empty"
        assert all(1 <= bits <= 32 for bits in widths), f"{field}={widths}: widths are 1 to 32"
        assert list(widths) == sorted(set(widths)), f"{field}={widths} should rise"
    needed = 2 * max(target.integer_bits)
    assert needed <= target.accumulator_bits, f"products of {needed} bits do not fit accumulator_bits"


def _check_refusals(target: Target) -> None:
    for bits in range(2, 17):
        for role, widths in (("weights", target.weight_bits), ("activations", target.activation_bits)):
            scale = target.scales[0]
            bias = TensorSpec(format=IntFormat(min(32, target.bias_bits)))
            chosen = {"weights": target.weight_bits[-1], "activations": target.activation_bits[-1], role: bits}
            specs = {name: TensorSpec(format=IntFormat(width), scale=scale) for name, width in chosen.items()}
            recipe = Recipe(**specs, bias=bias)
            assert _takes(target, recipe) == (bits in widths), f"{role} of {bits} bits: check() disagrees with the data"


def _check_grids(q: QuantizedModel) -> None:
    target = q.target
    for name, quantizer in q.graph.named_modules():
        if not isinstance(quantizer, Quantizer):
            continue
        grid = quantizer.require_grid()
        assert bool((grid.scale > 0).all() & grid.scale.isfinite().all()), f"the scale of {name} is {grid.scale}"
        if not isinstance(grid.format, IntFormat) or name.endswith("bias_quantizer"):
            continue
        is_weight = name.endswith("weight_quantizer")
        widths = target.weight_bits if is_weight else target.activation_bits
        assert grid.format.bits in widths, f"{name} has {grid.format.bits} bits, the target {widths}"
        if quantizer.spec.scale == "po2":
            exponents = grid.scale.log2()
            assert bool((exponents == exponents.round()).all()), f"the scale of {name} is no power of two"
        if target.unsigned_codes and not is_weight:
            assert not grid.format.signed, f"{name} has signed codes, the target takes unsigned ones"
        if target.symmetric_activations and not is_weight:
            middle = 0 if grid.format.signed or grid.zero_point is None else (grid.format.qmax + 1) // 2
            zero = 0 if grid.zero_point is None else int(grid.zero_point)
            assert zero in (0, middle), f"{name} has the zero point {zero}, the target none"


def _check_file(target: Target, recipe: Recipe) -> None:
    torch.manual_seed(0)
    q = quantize(_net(target), [_images(16, 0)], recipe=recipe, target=target)
    export = export_ai8x if target.engine == "ai8x" else export_onnx
    with tempfile.TemporaryDirectory() as folder:
        certificate = verify(q, export(q, Path(folder, "model")), _images(16, 1))
    assert certificate.passed, f"target {target.name}: {certificate.verdict}"


def _grid(rule: Rule, spec: TensorSpec, *batches: Tensor) -> Grid:
    statistic = rule.statistic(spec, sum(batch.numel() for batch in batches) or None)
    for batch in batches:
        statistic.update(batch)
    lo, hi = rule.range(statistic.finish(), spec, False)
    return solve_grid(lo, hi, spec)
