"""How one layer's weights and biases become integers, in the precision they are stored in.

Every product and every sum is rounded to that precision, float32 as a rule, before the next step: ties and shifts
fall as in the original only so. NumPy computes it; the results do not depend on the machine.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .sums import mean, standard_deviation

Array = NDArray[Any]


def bounds(bits: int) -> tuple[float, float]:
    """The smallest and the largest integer of ``bits``: -128 and 127 for 8.

    >>> bounds(1)
    (-1.0, 0.0)
    """
    return -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1


def shift(magnitudes: Array, quantile: float, bits: int) -> Any:
    """The exponent s by which a layer's numbers, ``magnitudes`` (absolute values), are scaled up.

    Half of the numbers' range or more is then used: ``quantile`` of them times 2**s is in (1/2, 1]. log2 is rounded
    to the numbers' precision before the floor, which decides next to powers of two.

    >>> shift(np.array([0.1, 0.3], np.float32), 1.0, 8)
    np.float32(1.0)
    """
    kind = magnitudes.dtype.type
    with np.errstate(all="ignore"):  # an all-zero layer: 1 / 0, log2(inf), then the upper limit
        inverse = kind(1) / order_statistic(magnitudes, quantile)
        exponent = np.floor(kind(np.log2(np.float64(inverse))))
    return np.clip(exponent, kind(-7 - bits), kind(23 - bits))


def order_statistic(values: Array, quantile: float) -> Any:
    """The ``quantile`` of ``values`` (1-D), interpolated linearly with one rounding; NaN where any is NaN."""
    kind = values.dtype.type
    if np.isnan(values).any():
        return kind(np.nan)
    rank = kind(quantile) * kind(values.size - 1)
    below, above = int(rank), int(np.ceil(rank))
    if above == 0 or below == above == values.size - 1:
        low = high = values.min() if above == 0 else values.max()
    else:
        low, high = np.partition(values, (below, above))[[below, above]]
    weight = kind(rank - kind(below))
    nearest = (weight, low) if weight < kind(0.5) else (weight - kind(1), high)
    with np.errstate(all="ignore"):
        return _multiply_add(nearest[0], high - low, nearest[1])


def _multiply_add(a: Any, b: Any, c: Any) -> Any:
    """``a * b + c`` with one rounding."""
    if a.dtype == np.float32:
        return np.float32(np.float64(a) * np.float64(b) + np.float64(c))
    if not np.isfinite([a, b, c]).all():
        return a * b + c
    return type(a)(float(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))))


def integers(values: Array, factor: Any, bits: int) -> Array:
    """``floor(factor * values + 0.5)`` within `bounds`: ties go up."""
    kind = values.dtype.type
    low, high = bounds(bits)
    with np.errstate(all="ignore"):
        result: Array = np.clip(np.floor(values * kind(factor) + kind(0.5)), kind(low), kind(high))
    return result


def stored_bias(codes: Array, bits: int) -> Array:
    """What the file holds for biases of the integers ``codes``: times 2**(bits - 1)."""
    result: Array = codes * codes.dtype.type(2.0 ** (bits - 8)) * codes.dtype.type(128)
    return result


def average_maximum(values: Array) -> Any:
    """The larger of the means of all rows' minima and maxima, as magnitudes; a row: all behind the first axis."""
    rows = values.reshape(values.shape[0], -1)
    return np.maximum(np.abs(mean(rows.min(axis=1))), np.abs(mean(rows.max(axis=1))))


def maximum(values: Array) -> Any:
    """The largest magnitude."""
    return np.maximum(np.abs(values.min()), np.abs(values.max()))


def deviation_maximum(values: Array, deviations: float) -> Any:
    """The largest magnitude within ``deviations`` standard deviations of the mean."""
    kind = values.dtype.type
    middle, reach = mean(values), kind(deviations) * standard_deviation(values)
    return np.maximum(
        np.abs(np.maximum(values.min(), middle - reach)), np.abs(np.minimum(values.max(), middle + reach))
    )
