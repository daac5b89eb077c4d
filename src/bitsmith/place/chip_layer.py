"""One layer of a convolutional accelerator: what it reads, does and writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import fx

Shape = tuple[int, int, int]  # channels, height, width
Operator = Literal["conv1d", "conv2d", "convtranspose2d", "linear", "none"]
INPUT = -1


@dataclass(frozen=True)
class Pool:
    """Pooling of what a layer reads."""

    kind: Literal["max", "avg"]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass
class ChipLayer:
    """One layer: what it reads (layers by number, -1 is the input), what it does, and the shapes on both sides.

    ``node`` is the layer of the model whose weights it has; ``identity`` layers have weights that change nothing,
    but put the channels behind ``first`` others.
    ``dense``: a depthwise convolution spread out over all channels. ``write_gap``: its words leave room for those
    of another layer.
    """

    name: str
    op: Operator
    sources: list[int]
    read: Shape
    written: Shape
    node: fx.Node | None = None
    pool: Pool | None = None
    eltwise: str | None = None
    activation: str | None = None
    kernel: tuple[int, ...] = ()
    padding: int = 0
    output_padding: int = 0
    dilation: int = 1
    groups: int = 1
    bits: int = 8
    bias: bool = False
    wide: bool = False
    flatten: bool = False
    identity: bool = False
    first: int = 0
    dense: bool = False
    write_gap: int = 0

    @property
    def pooled(self) -> tuple[int, int]:
        """Height and width after pooling."""
        _, height, width = self.read
        if self.pool is None:
            return height, width
        sizes = list(zip((height, width), self.pool.kernel, self.pool.stride))
        pooled = [(size - kernel) // stride + 1 for size, kernel, stride in sizes]
        return pooled[0], pooled[1] if len(sizes) == 2 else width
