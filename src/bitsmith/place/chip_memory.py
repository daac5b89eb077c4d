"""Where the layers of a chip keep their weights and data, and what does not fit.

Each of the chip's processors convolves one input channel (or every 64th) with its own kernels; four processors share
a data memory. A value therefore has a set of processors, which those who write it and those who read it agree on,
and an address, the same in all data memories.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ..targets.target import ChipLimits
from .chip_layer import INPUT, ChipLayer


@dataclass
class Region:
    """What one value occupies: ``processors`` as a mask, ``offset`` and ``size`` in bytes of their data memories."""

    processors: int = 0
    offset: int = 0
    size: int = 0


@dataclass
class ChipPlan:
    """Layers with the memory of what they read and write; ``reads[-1]`` does not exist: the input is ``input``."""

    layers: list[ChipLayer]
    written: dict[int, Region] = field(default_factory=dict)
    kernel_words: list[int] = field(default_factory=list)  # by processor
    problems: list[str] = field(default_factory=list)

    def read(self, layer: ChipLayer) -> Region:
        """What a layer reads; of several operands the first in memory."""
        return min((self.written[source] for source in layer.sources), key=lambda region: region.offset)


def passes(channels: int, limits: ChipLimits) -> int:
    """How many channels one processor handles, one after the other."""
    return -(-channels // limits.processors)


def processor_count(channels: int, limits: ChipLimits) -> int:
    """How many processors work on so many channels; groups of four where they work in several passes."""
    count = passes(channels, limits)
    share = -(-channels // count)
    step = limits.processors_per_memory
    return share if count == 1 else -(-share // step) * step


def kernel_words(layer: ChipLayer, limits: ChipLimits) -> int:
    """Weight memory that a layer takes of each of its processors, in words of 9 bytes."""
    if layer.op == "none":
        return 0
    elements = math.prod(layer.kernel)
    if layer.op == "linear":
        elements = layer.read[1] * layer.read[2]
    per_channel = 1 if layer.groups > 1 else layer.written[0]
    bits = per_channel * passes(layer.read[0], limits) * elements * layer.bits
    return -(-bits // 72)


def plan_memory(layers: list[ChipLayer], limits: ChipLimits) -> ChipPlan:
    """Give every value processors and addresses; what does not fit is in ``problems``."""
    plan = ChipPlan(layers, kernel_words=[0] * limits.processors)
    last_reader = {s: number for number, layer in enumerate(layers) for s in layer.sources}
    shared = _Shared(layers)
    for number in range(INPUT, len(layers)):
        plan.written[number] = Region(size=_size(layers, number, limits))
    _place_processors(plan, shared, limits)
    _place_weights_check(plan, limits)
    _place_data(plan, last_reader, limits)
    return plan


def _shape_of(layers: list[ChipLayer], number: int) -> tuple[int, int, int]:
    if number != INPUT:
        return layers[number].written
    return next((layer.read for layer in layers if INPUT in layer.sources), (1, 1, 1))


def _size(layers: list[ChipLayer], number: int, limits: ChipLimits) -> int:
    """Bytes of data memory: a word of four bytes, one for each processor, per pixel and pass."""
    channels, height, width = _shape_of(layers, number)
    size = 4 * height * width * passes(channels, limits)
    if number == INPUT:
        return size
    return size * (1 + layers[number].write_gap) * (4 if layers[number].wide else 1)


class _Shared:
    """Which values must lie on the same processors: operands of a sum, and both sides of a layer without weights."""

    def __init__(self, layers: list[ChipLayer]) -> None:
        self.parent = {number: number for number in range(INPUT, len(layers))}
        for number, layer in enumerate(layers):
            first = self.find(layer.sources[0])
            for other in layer.sources[1:]:
                self.parent[self.find(other)] = first
            if layer.op == "none":
                self.parent[self.find(number)] = self.find(layer.sources[0])

    def find(self, number: int) -> int:
        """The representative of a value's set."""
        while self.parent[number] != number:
            number = self.parent[number]
        return number


def _place_processors(plan: ChipPlan, shared: _Shared, limits: ChipLimits) -> None:
    """Processors for each value: those whose weight memory is emptiest, the most demanding values first."""
    needs: dict[int, int] = {}
    for layer in plan.layers:
        root = shared.find(layer.sources[0])
        needs[root] = needs.get(root, 0) + kernel_words(layer, limits)
    roots = sorted({shared.find(n) for n in plan.written}, key=lambda root: (root != INPUT, -needs.get(root, 0)))
    step = limits.processors_per_memory
    for root in roots:
        members = [n for n in plan.written if shared.find(n) == root]
        count = max(processor_count(_shape_of(plan.layers, n)[0], limits) for n in members)
        count = min(count, limits.processors)
        starts = [0] if root == shared.find(INPUT) else range(0, limits.processors - count + 1, step)
        start = min(starts, key=lambda s: max(plan.kernel_words[s : s + count]))
        for processor in range(start, start + count):
            plan.kernel_words[processor] += needs.get(root, 0)
        for member in members:
            plan.written[member].processors = ((1 << count) - 1) << start


def _place_weights_check(plan: ChipPlan, limits: ChipLimits) -> None:
    fullest = max(plan.kernel_words)
    if fullest <= limits.kernel_words:
        return
    largest = sorted(plan.layers, key=lambda layer: -kernel_words(layer, limits))[:3]
    parts = ", ".join(f"{x.name!r} {kernel_words(x, limits)} ({x.bits} bits{_why(x)})" for x in largest)
    plan.problems.append(
        f"weights take {fullest} kernel words of 9 bytes on a processor, which has {limits.kernel_words}; most of "
        f"them have {parts}. Give the largest layers fewer bits (4, 2 or 1) or fewer channels"
    )


def _why(layer: ChipLayer) -> str:
    return ", spread out from groups" if layer.dense else ""


def _place_data(plan: ChipPlan, last_reader: dict[int, int], limits: ChipLimits) -> None:
    """Addresses, first fit, in the order of the layers; operands of a sum lie interleaved in one place."""
    groups, bases = _interleaved(plan.layers), dict[tuple[int, ...], int]()
    placed: list[int] = []
    for number in range(INPUT, len(plan.layers)):
        region = plan.written[number]
        partners = groups.get(number, [number])
        if tuple(partners) in bases:
            region.offset = bases[tuple(partners)] + 4 * partners.index(number)
            placed.append(number)
            continue
        end = max(last_reader.get(n, len(plan.layers)) for n in partners)
        born = min(partners)
        quads = _memories(region.processors)
        alive = [
            plan.written[n]
            for n in placed
            if last_reader.get(n, len(plan.layers)) >= born
            and n <= end
            and _memories(plan.written[n].processors) & quads
        ]
        base = bases[tuple(partners)] = _first_fit(region.size, alive)
        region.offset = base + 4 * partners.index(number)
        placed.append(number)
        if base + region.size > limits.data_bytes:
            shape = "x".join(map(str, _shape_of(plan.layers, number)))
            name = "the input" if number == INPUT else repr(plan.layers[number].name)
            plan.problems.append(
                f"{name}: its values ({shape}, {region.size} bytes in each data memory) do not fit beside what is "
                f"still read: the data memories have {limits.data_bytes} bytes. Pool earlier, or use smaller images"
            )
            region.offset = 0


def _interleaved(layers: list[ChipLayer]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for layer in layers:
        if layer.eltwise is not None:
            found.update(dict.fromkeys(layer.sources, layer.sources))
    return found


def _memories(processors: int) -> int:
    """The data memories of a set of processors, as a mask."""
    return sum(1 << memory for memory in range(16) if processors >> 4 * memory & 0xF)


def _first_fit(size: int, alive: list[Region]) -> int:
    offset = 0
    for region in sorted(alive, key=lambda r: r.offset):
        if offset + size <= region.offset:
            break
        offset = max(offset, region.offset + region.size)
    return -(-offset // 4) * 4
