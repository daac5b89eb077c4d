"""The rules for one layer, number by number, written from their description: slow, plain, and sharing no code.

Every float32 operation is formed exactly, with fractions, and rounded once by `float32`.
"""

from __future__ import annotations

import math
import struct
from fractions import Fraction


def float32(value: Fraction) -> Fraction:
    """``value`` rounded to float32, ties to even."""
    if value == 0:
        return Fraction(0)
    exponent = max(math.frexp(abs(value))[1] - 24, -149) if abs(value) > Fraction(1, 2**1000) else -149
    unit = Fraction(2) ** exponent
    return Fraction(round(value / unit)) * unit


def float64(value: Fraction) -> Fraction:
    try:
        return Fraction(value.numerator / value.denominator)
    except OverflowError:  # infinite there; any number as large is clamped alike
        return value


def limits(bits: int) -> tuple[int, int]:
    return -(2**bits) // 2, 2**bits // 2 - 1


def exponent(values: list[float], quantile: float, bits: int, rounded=float32) -> int:
    """Floor of log2(1 / q-quantile of the magnitudes), within -7 - bits and 23 - bits."""
    ordered = sorted(abs(Fraction(value)) for value in values)
    rank = rounded(rounded(Fraction(quantile)) * (len(ordered) - 1))
    below, above = math.floor(rank), math.ceil(rank)
    low, high = ordered[below], ordered[above]
    weight, step = rank - below, rounded(high - low)
    if weight < Fraction(1, 2):
        largest = rounded(weight * step + low)
    else:
        largest = rounded((weight - 1) * step + high)
    if largest == 0:
        return 23 - bits
    return min(max(floor_log2(rounded(1 / largest), rounded), -7 - bits), 23 - bits)


def floor_log2(value: Fraction, rounded) -> int:
    """log2 is rounded to nearest before the floor: just below 2**k it may become k."""
    k = 0
    while Fraction(2) ** k > value:
        k -= 1
    while Fraction(2) ** (k + 1) <= value:
        k += 1
    above = value / Fraction(2) ** (k + 1)  # in [1/2, 1)
    distance = Fraction(-math.log1p(float(above - 1)) / math.log(2))
    return k + 1 if rounded(Fraction(k + 1) - distance) == k + 1 else k


def integer(value: float, factor: Fraction, bits: int, rounded=float32) -> int:
    product = rounded(rounded(factor) * Fraction(value))
    low, high = limits(bits)
    return min(max(math.floor(rounded(product + Fraction(1, 2))), low), high)


def is_float32(value: float) -> bool:
    return struct.unpack("f", struct.pack("f", value))[0] == value
