"""From a range ``lo .. hi`` to a Grid: the one place where scales and zero points are computed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import CalibrationError, NonFiniteError
from ..grid.formats import FloatFormat, Format, IntFormat
from ..grid.grid import Grid
from ..grid.spec import RangeRule, TensorSpec

_TINY = torch.finfo(torch.float32).tiny
_HUGE = torch.finfo(torch.float32).max


def solve_grid(
    lo: Tensor | float,
    hi: Tensor | float,
    spec: TensorSpec,
    *,
    non_negative: bool = False,
    unsigned_codes: bool = False,
    axis: int | None = None,
) -> Grid:
    """The grid of ``spec`` that covers ``lo .. hi``, extended to include 0.

    The range rule's ``limit`` holds here, whatever rule found the range.
    ``lo`` and ``hi`` are numbers or tensors shaped like the scale: 0-dimensional, one per channel of
    ``axis``, or one per group. What results:

    - symmetric signed: ``scale = max(|lo|, |hi|) / qmax``, so the threshold itself has a code; no zero point;
    - symmetric unsigned: ``scale = hi / (qmax - qmin)``;
    - affine: ``scale = (hi - lo) / (qmax - qmin)``, the zero point in ``qmin .. qmax``, so 0 is exact;
    - float format: ``scale = max(|lo|, |hi|) / max_value``;
    - ``non_negative`` (with ``spec.auto_unsigned``): the unsigned format of the same width, from 0;
    - ``unsigned_codes``: a signed integer grid with its codes and zero point moved up by ``2**(bits - 1)``:
      the same real numbers, for runtimes that are faster with uint8;
    - power-of-two scales: rounded up, so that nothing clips (an affine grid whose rounded zero point would
      push an end out takes the next power), or to the nearest exponent, as the spec says.

    Scales are float32, finite and never subnormal. A channel whose range is zero (or so small that its scale
    would be subnormal) gets the largest scale among the other channels. That is the safe choice for what
    follows: the channel's codes are all 0 under any scale, but its bias is stored as ``bias / (s_x * s_w)``
    in int32, which a tiny scale would overflow.

    Raises ``CalibrationError`` for a range that is zero everywhere or has ``lo > hi``, ``NonFiniteError`` for
    a NaN or an infinity.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> solve_grid(-1.0, 2.54, TensorSpec(format=IntFormat(8))).scale
    tensor(0.0200)
    >>> grid = solve_grid(-1.0, 1.55, TensorSpec(format=IntFormat(8), symmetric=False))
    >>> grid.scale, grid.zero_point
    (tensor(0.0100), tensor(-28, dtype=torch.int32))
    >>> solve_grid(0.0, 2.55, TensorSpec(format=IntFormat(8)), non_negative=True).format
    IntFormat(bits=8, signed=False, narrow=False)
    """
    low, high = torch.as_tensor(lo).double(), torch.as_tensor(hi).double()
    _check(low, high)
    low, high = _limited(low.clamp(max=0.0), high.clamp(min=0.0), spec.range)
    fmt: Format = spec.format
    if non_negative:
        low = torch.zeros_like(low)
        if isinstance(fmt, IntFormat) and spec.auto_unsigned:
            fmt = IntFormat(fmt.bits, signed=False)
    zero_point: Tensor | None
    from_zero = isinstance(fmt, IntFormat) and not fmt.signed and non_negative
    if isinstance(fmt, IntFormat) and not spec.symmetric and not from_zero:
        scale, zero_point = _affine(low, high, fmt, spec)
    else:
        scale, zero_point = _symmetric(low, high, fmt, spec)
    if unsigned_codes and isinstance(fmt, IntFormat) and fmt.signed:
        half = 1 << (fmt.bits - 1)
        moved = torch.zeros_like(scale, dtype=torch.int64) if zero_point is None else zero_point.long()
        fmt = IntFormat(fmt.bits, signed=False, narrow=fmt.narrow)
        zero_point = _as_zero_point(moved + half, fmt)
    return Grid(fmt, scale, zero_point, axis if scale.ndim else None, spec.group_size if scale.ndim else None)


def _check(lo: Tensor, hi: Tensor) -> None:
    if not bool((torch.isfinite(lo) & torch.isfinite(hi)).all()):
        raise NonFiniteError("the range holds a NaN or an infinity, so no scale can be computed from it")
    if bool((lo > hi).any()):
        index = int((lo > hi).flatten().nonzero()[0])
        pair = float(lo.flatten()[index]), float(hi.flatten()[index])
        raise CalibrationError(f"the range is upside down: lo {pair[0]:g} is above hi {pair[1]:g}")


def _limited(lo: Tensor, hi: Tensor, rule: RangeRule) -> tuple[Tensor, Tensor]:
    if rule.limit is None:
        return lo, hi
    if rule.fixed:
        return torch.full_like(lo, -rule.limit), torch.full_like(hi, rule.limit)
    return lo.clamp(min=-rule.limit), hi.clamp(max=rule.limit)


def _symmetric(lo: Tensor, hi: Tensor, fmt: Format, spec: TensorSpec) -> tuple[Tensor, Tensor | None]:
    zero_point = None
    if isinstance(fmt, FloatFormat):
        raw = torch.maximum(-lo, hi) / fmt.max_value
    elif fmt.signed:
        raw = torch.maximum(-lo, hi) / max(fmt.qmax, 1)
    else:
        raw = hi / max(fmt.qmax - fmt.qmin, 1)
        if fmt.qmin:
            zero_point = _as_zero_point(torch.full_like(raw, fmt.qmin), fmt)
    return _scale(raw, spec), zero_point


def _affine(lo: Tensor, hi: Tensor, fmt: IntFormat, spec: TensorSpec) -> tuple[Tensor, Tensor]:
    scale = _scale((hi - lo) / max(fmt.qmax - fmt.qmin, 1), spec)
    zero_point, fits = _zero_point(lo, hi, scale, fmt)
    if spec.scale == "po2" and spec.po2_rounding == "ceil" and not bool(fits.all()):
        scale = torch.where(fits, scale, (scale * 2.0).clamp(max=2.0**127))
        zero_point, _ = _zero_point(lo, hi, scale, fmt)
    return scale, _as_zero_point(zero_point, fmt)


def _zero_point(lo: Tensor, hi: Tensor, scale: Tensor, fmt: IntFormat) -> tuple[Tensor, Tensor]:
    """The zero point, and whether the codes of both ends then lie within ``qmin .. qmax``.

    The ends are rounded as the kernels round them (a float32 division, half to even). Where the two rounded
    ends are one code further apart than the format is wide, one end clips, by half a step at most.
    """
    least = fmt.qmin - (lo.float() / scale).round().double()
    greatest = fmt.qmax - (hi.float() / scale).round().double()
    zero_point = (fmt.qmin - lo / scale.double()).round().clamp(fmt.qmin, fmt.qmax)
    fits = least <= greatest
    return torch.where(fits, zero_point.clamp(least, greatest), zero_point), fits


def _scale(raw: Tensor, spec: TensorSpec) -> Tensor:
    """float32 scales from exact ones: dead channels filled in, powers of two where the spec asks for them."""
    dead = raw < _TINY
    if bool(dead.all()):
        raise CalibrationError(
            "the range is zero: every value seen is 0 (or too small for a float32 scale). "
            "Check that the calibration data reaches this point, or leave this tensor unquantized"
        )
    raw = torch.where(dead, raw.max(), raw)
    if spec.scale == "float32":
        return raw.clamp(_TINY, _HUGE).float()
    return power_of_two(raw, spec).float()


def power_of_two(scale: Tensor, spec: TensorSpec) -> Tensor:
    """The powers of two that stand for ``scale``: rounded up, or to the nearest exponent, as ``spec`` says.

    >>> from bitsmith.grid import IntFormat, TensorSpec
    >>> power_of_two(torch.tensor([0.25, 0.26]), TensorSpec(format=IntFormat(8), scale="po2"))
    tensor([0.2500, 0.5000])
    """
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa * 2**exponent, mantissa in [0.5, 1)
    limit = 0.5 if spec.po2_rounding == "ceil" else 0.5**0.5
    exponent = torch.where(mantissa <= limit, exponent - 1, exponent).clamp(-126, 127)
    return torch.ldexp(torch.ones_like(scale), exponent)


def _as_zero_point(value: Tensor, fmt: IntFormat) -> Tensor:
    """int32, or int64 for the one format whose zero points int32 cannot hold."""
    return value.to(torch.int64 if fmt.bits == 32 and not fmt.signed else torch.int32)
