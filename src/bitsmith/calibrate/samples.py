"""Minibatches out of the walk's store: samples in random order, of both streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from ..optimize.reconstruct import Batch
from .blocks import Block, batch_size, has_samples

if TYPE_CHECKING:
    from .walk import Walk

_SHARE = 2  # of the memory budget goes to samples held at a time: one part in this many


class Samples:
    """What a block reads and should give, for the samples of some chunks that the quantized stream follows.

    As many chunks as the memory budget allows are held at a time, and minibatches drawn from these without
    replacement before others are read. A graph of a fixed batch size gets its chunks whole.
    """

    def __init__(
        self, walk: Walk, block: Block, device: torch.device | None, chunks: Sequence[int], *,
        float_inputs: bool = False,
    ) -> None:  # fmt: skip
        self.walk, self.block, self.device, self.float_inputs = walk, block, device, float_inputs
        self.batch = batch_size(walk.graph)
        self.chunks = chunks

    def minibatches(self, size: int, count: int, seed: int) -> Iterator[Batch]:
        """``count`` minibatches of ``size`` samples (fewer where there are not so many)."""
        generator = torch.Generator().manual_seed(seed)
        shards = self._shards()
        held: dict[str, Any] | None = None
        done = 0
        while True:
            for index in torch.randperm(len(shards), generator=generator).tolist():
                if held is None or len(shards) > 1:
                    held = self._load(shards[index])
                total = held["count"]
                order = torch.randperm(total, generator=generator)
                for rows in torch.split(order, size) if self.batch is not None else [order]:
                    if len(rows) < min(size, total):
                        continue
                    yield self._take(held, rows)
                    done += 1
                    if done == count:
                        return

    def _shards(self) -> list[list[int]]:
        """Chunks in groups that fit the memory; one chunk each where chunks cannot be mixed."""
        if self.batch is None:
            return [[chunk] for chunk in self.chunks]
        budget = self.walk.store.budget // _SHARE
        shards: list[list[int]] = [[]]
        held = 0
        for chunk in self.chunks:
            size = sum(self._float(end, chunk).numel() * 4 for end in self.block.ends)
            size += sum(2 * self._float(source, chunk).numel() * 4 for source in self.block.sources)
            if held + size > budget and shards[-1]:
                shards.append([])
                held = 0
            shards[-1].append(chunk)
            held += size
        return shards

    def _float(self, node: fx.Node, chunk: int) -> Tensor:
        value = self.walk.store.get(("float", node.name, chunk))
        assert isinstance(value, Tensor)
        return value

    def _load(self, chunks: list[int]) -> dict[str, Any]:
        walk, block = self.walk, self.block

        def join(parts: list[Any]) -> Any:
            value = torch.cat(parts) if len(parts) > 1 else parts[0]
            return value.to(self.device) if self.device is not None else value

        def side(node: fx.Node) -> Any:
            value = node.meta.get("val")
            if has_samples(value, self.batch):
                return join([walk.read("quantized", node, chunk) for chunk in chunks])
            return walk.read("quantized", node, chunks[0])

        exact = {source: join([self._float(source, c) for c in chunks]) for source in block.sources}
        return {
            "count": sum(walk.counts[chunk] for chunk in chunks),
            "sides": {node: side(node) for node in block.sides},
            "exact": exact,
            "read": exact
            if self.float_inputs
            else {source: join([walk.read("quantized", source, c) for c in chunks]) for source in block.sources},
            "targets": [join([self._float(end, c) for c in chunks]) for end in block.ends],
        }

    def _take(self, held: dict[str, Any], rows: Tensor) -> Batch:
        whole = self.batch is None

        def take(value: Tensor) -> Tensor:
            return value if whole else _rows(value, rows.to(value.device))

        values: dict[fx.Node, Any] = {node: take(value) for node, value in held["read"].items()}
        for node, value in held["sides"].items():
            meta = node.meta.get("val")
            values[node] = take(value) if has_samples(meta, self.batch) else _resized(meta, value, len(rows))
        exact = {node: take(value) for node, value in held["exact"].items()}
        return Batch(values, exact, [take(target) for target in held["targets"]])


def _rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]`` with ``x``'s order of the axes in memory."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).index_select(0, rows).permute(0, 3, 1, 2)
    return x.index_select(0, rows)


def _resized(meta: Any, value: Any, count: int) -> Any:
    """A size that depends on the number of samples, for ``count`` of them; other values as they are."""
    if not isinstance(meta, torch.SymInt):
        return value
    expression = meta.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, count)))
