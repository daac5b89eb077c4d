"""Live activations of the walk, in memory up to a budget and in a temporary file beyond it."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OutputError

Key = tuple[str, str, int]  # (stream, node, chunk)


class Store:
    """Values by (stream, node, chunk). Past ``budget`` bytes the least recently used tensors go to disk.

    Files are read back with plain reads, not mapped, so that resident memory stays within the budget.

    >>> with Store(budget=0) as store:
    ...     store.put(("float", "x", 0), torch.arange(3.0))
    ...     store.get(("float", "x", 0)), store.spilled_bytes
    (tensor([0., 1., 2.]), 12)
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.resident_bytes = 0
        self.spilled_bytes = 0
        self._values: OrderedDict[Key, Any] = OrderedDict()
        self._spilled: dict[Key, tuple[Path, torch.dtype, torch.Size, tuple[int, ...]]] = {}
        self._folder: Path | None = None
        self._count = 0

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._values.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def put(self, key: Key, value: Any) -> None:
        """Keep a value, in place of what was there; older ones may move to disk."""
        self.forget(key)
        self._values[key] = value
        self.resident_bytes += _size(value)
        self._spill()

    def get(self, key: Key) -> Any:
        """The value, read back from disk if it is there."""
        if key in self._spilled:
            return self._read(key)
        self._values.move_to_end(key)
        return self._values[key]

    def drop(self, stream: str, node: str, chunks: int) -> None:
        """Forget a node's values."""
        for chunk in range(chunks):
            self.forget((stream, node, chunk))

    def forget(self, key: Key) -> None:
        """Forget one value, if it is there."""
        if key in self._values:
            self.resident_bytes -= _size(self._values.pop(key))
        elif key in self._spilled:
            self._spilled.pop(key)[0].unlink(missing_ok=True)

    def _spill(self) -> None:
        while self.resident_bytes > self.budget:
            key = next((k for k, v in self._values.items() if isinstance(v, Tensor) and v.numel()), None)
            if key is None:
                return
            value = self._values.pop(key)
            self.resident_bytes -= _size(value)
            self._write(key, value)

    def _write(self, key: Key, value: Tensor) -> None:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="bitsmith-walk-"))
        path = self._folder / f"{self._count}.bin"
        self._count += 1
        dense = value.detach().cpu()
        order = _dense_order(dense)
        flat = dense.permute(order).contiguous().flatten().view(torch.uint8)
        try:
            flat.numpy().tofile(path)
        except OSError as error:
            raise OutputError(
                f"activations past the memory budget cannot be written to {self._folder}: {error}. Free disk space, "
                "point TMPDIR elsewhere, raise the memory budget or calibrate with fewer samples"
            ) from error
        self.spilled_bytes += flat.numel()
        self._spilled[key] = (path, value.dtype, dense.permute(order).shape, order)

    def _read(self, key: Key) -> Tensor:
        path, dtype, shape, order = self._spilled[key]
        flat = torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(dtype)
        inverse = [order.index(axis) for axis in range(len(order))]
        return flat.view(shape).permute(inverse)


def _dense_order(value: Tensor) -> tuple[int, ...]:
    """Axes from the largest stride to the smallest, so that memory formats survive the disk."""
    strides = value.stride()
    return tuple(sorted(range(value.ndim), key=lambda axis: (-strides[axis], axis)))


def _size(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
