"""PyTorch's sums on x86-64, to the bit, without PyTorch.

A clip method's factor and the statistics that the verbose output prints depend on the order in which float32 values
are added. PyTorch adds in cascades: 4 streams of vector lanes, in groups of 2**n, group sums in groups again.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

_STREAMS = 4
_LEVELS = 4
_VECTOR_BYTES = 32


def total(values: Array) -> Any:
    """The sum of ``values`` (any shape, taken in order) in their own precision, as one thread of PyTorch forms it."""
    flat = values.reshape(-1)
    lanes = _VECTOR_BYTES // flat.itemsize
    if flat.size < lanes:
        lanes = 1
    rows = flat[: flat.size // lanes * lanes].reshape(-1, lanes)
    complete = len(rows) // _STREAMS
    streams = _cascade(rows[: complete * _STREAMS].reshape(complete, _STREAMS, lanes))  # (streams, lanes)
    for row in rows[complete * _STREAMS :]:
        streams[0] += row
    vector = streams[0]
    for stream in streams[1:]:
        vector = vector + stream
    result = flat.dtype.type(0)
    for value in (*flat[rows.size :], *vector):
        result = result + value
    return result


def mean(values: Array) -> Any:
    """`total` over the number of values."""
    return total(values) / values.dtype.type(values.size)


def standard_deviation(values: Array) -> Any:
    """The unbiased standard deviation (n - 1) around `mean`: squares are added one by one in float64."""
    distances = values.reshape(-1).astype(np.float64) - np.float64(mean(values))
    squares = np.cumsum(distances * distances)[-1]  # cumsum adds in order, where sum forms pairs
    with np.errstate(all="ignore"):  # one value has none: NaN, as PyTorch says
        return values.dtype.type(np.sqrt(squares / np.float64(values.size - 1)))


def _cascade(rows: Array) -> Array:
    """The sum over the first axis: groups of ``step`` rows, group sums in groups of ``step`` again, and so on."""
    step = 1 << max(4, (max(len(rows), 1) - 1).bit_length() // _LEVELS)
    sums = []
    for _ in range(_LEVELS - 1):
        groups = len(rows) // step
        sums.append(_in_order(rows[groups * step :]))
        rows = _in_order(rows[: groups * step].reshape(groups, step, *rows.shape[1:]).swapaxes(0, 1))
    sums.append(_in_order(rows))
    return _in_order(np.stack(sums))


def _in_order(rows: Array) -> Array:
    """The sum over the first axis, one after the other, from zero."""
    result = np.zeros(rows.shape[1:], rows.dtype)
    for row in rows:
        result += row
    return result
