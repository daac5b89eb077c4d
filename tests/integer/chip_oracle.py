"""The chips' arithmetic one number at a time, in Python's integers: what the executor is held against."""

from __future__ import annotations

import itertools
from typing import Any

Nested = Any


def outputs(
    x: list[list[list[int]]], weight: Nested, bias: list[int] | None, *, bits: int, output_shift: int,
    activation: str | None = None, wide: bool = False, padding: int = 0, dilation: int = 1, groups: int = 1,
    transposed: bool = False, flat: bool = False,
) -> list[list[list[int]]]:  # fmt: skip
    """One layer on one sample: ``x[channel][row][column]``; ``weight`` nested as in PyTorch. ``flat``: along rows."""
    accumulate = _transposed if transposed else _convolution
    sums = accumulate(x, weight, padding, dilation, groups, flat)
    total = output_shift + 8 - bits
    result = []
    for channel, plane in enumerate(sums):
        offset = 0 if bias is None else 128 * bias[channel]
        result.append([[_finish(value + offset, total, activation, wide) for value in row] for row in plane])
    return result


def _finish(accumulator: int, total: int, activation: str | None, wide: bool) -> int:
    if wide:
        return max(-(2**29), min(2**29 - 1, accumulator))
    numerator = 2 * accumulator * 2 ** (total + 15) + 128 * 2**15  # over 2 * 128 * 2**15
    y = max(-128, min(127, numerator // (2 * 128 * 2**15)))
    if activation == "relu":
        return max(y, 0)
    return min(abs(y), 127) if activation == "abs" else y


def _convolution(
    x: Nested, weight: Nested, padding: int, dilation: int, groups: int, flat: bool
) -> list[list[list[int]]]:
    rows, columns = len(x[0]), len(x[0][0])
    high, wide = len(weight[0][0]), len(weight[0][0][0])
    pad_columns = 0 if flat else padding
    out_rows = rows + 2 * padding - dilation * (high - 1)
    out_columns = columns + 2 * pad_columns - dilation * (wide - 1)
    each_in, each_out = len(x) // groups, len(weight) // groups
    found = []
    for o, kernel in enumerate(weight):
        first = o // each_out * each_in
        plane = [[0] * out_columns for _ in range(out_rows)]
        for r, c, i, u, v in itertools.product(
            range(out_rows), range(out_columns), range(each_in), range(high), range(wide)
        ):
            row, column = r + u * dilation - padding, c + v * dilation - pad_columns
            if 0 <= row < rows and 0 <= column < columns:
                plane[r][c] += kernel[i][u][v] * x[first + i][row][column]
        found.append(plane)
    return found


def _transposed(
    x: Nested, weight: Nested, padding: int, dilation: int, groups: int, flat: bool
) -> list[list[list[int]]]:
    """3 x 3 with stride 2 and output padding 1: every input is spread over the outputs it touches."""
    rows, columns = len(x[0]), len(x[0][0])
    sizes = [(n - 1) * 2 - 2 * padding + 3 + 1 for n in (rows, columns)]
    found = [[[0] * sizes[1] for _ in range(sizes[0])] for _ in weight[0]]
    for i, o, r, c, u, v in itertools.product(
        range(len(x)), range(len(weight[0])), range(rows), range(columns), range(3), range(3)
    ):
        row, column = 2 * r + u - padding, 2 * c + v - padding
        if 0 <= row < sizes[0] and 0 <= column < sizes[1]:
            found[o][row][column] += weight[i][o][u][v] * x[i][r][c]
    return found


def average(values: list[int], rounding: bool = False) -> int:
    """The mean of a window, cut toward zero, or rounded with halves away from zero."""
    total, count = sum(values), len(values)
    size = (2 * abs(total) + count) // (2 * count) if rounding else abs(total) // count
    return size if total >= 0 else -size


def combine(name: str, values: list[int]) -> int:
    """An element-wise operation on all operands; only the result saturates."""
    result = values[0]
    for value in values[1:]:
        result = {"add": result + value, "sub": result - value, "or": result | value, "xor": result ^ value}[name]
    return max(-128, min(127, result))
