"""A quantized checkpoint read back: what the chip gets of each layer, and what the network loader would say to it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError
from .arithmetic import bounds
from .batch_norm import batch_norms
from .checkpoint import as_array, is_tensor
from .console import listed
from .devices import Device
from .network_layer import BINARY
from .quantize import split_key

if TYPE_CHECKING:
    from .network import Network, NetworkLayer

SATURATED = 0.1
"""Share of weights on a bound of their range from which a channel (of 4 or 8 bits) counts as saturated."""

_SHIFT_LIMIT = 15
_BIAS_MIN, _BIAS_MAX = -128, 127


@dataclass(frozen=True)
class LayerView:
    """One weight as the loader reads it. ``bits`` is -1 for binary weights; ``shift`` includes the bits' share."""

    key: str
    shape: tuple[int, ...]
    bits: int
    output_shift: int
    shift: int
    minimum: int
    maximum: int
    weight_bytes: int
    bias: tuple[int, int] | None  # the smallest and the largest that the chip gets
    bias_bytes: int
    channels: int
    dead_channels: int
    saturated_channels: int
    saturated_weights: float  # share


@dataclass
class Inspection:
    """All layers of a checkpoint; ``errors`` stop the loader, ``warnings`` do not."""

    device: Device
    arch: str | None
    epoch: int | None
    layers: list[LayerView] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    not_integers: list[str] = field(default_factory=list)

    @property
    def weight_bytes(self) -> int:
        """What all weights take of the chip's weight memory."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def bias_bytes(self) -> int:
        """What all biases take of the chip's bias memory."""
        return sum(layer.bias_bytes for layer in self.layers)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**asdict(self), "weight_bytes": self.weight_bytes, "bias_bytes": self.bias_bytes}


def inspect_checkpoint(checkpoint: dict[str, Any], device: Device, network: Network | None = None) -> Inspection:
    """Read a quantized ``checkpoint`` as the loader for ``device`` would, with ``network``'s description if given."""
    state = checkpoint.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError("No `state_dict` in checkpoint file.")
    arch, epoch = checkpoint.get("arch"), checkpoint.get("epoch")
    found = Inspection(device, arch if isinstance(arch, str) else None, epoch if isinstance(epoch, int) else None)
    _check_head(found, network)
    described = None if network is None else [layer for layer in network.layers if layer.reads_weights]
    weights = [key for key in state if split_key(key)[2] == "weight" and "." in key]
    for number, key in enumerate(weights):
        if described is not None and number >= len(described):
            names = listed(weights[number:])
            found.warnings.append(f"the YAML configuration has no layer for {names}: the loader does not read it")
            break
        layer = None if described is None else described[number]
        if not is_tensor(state[key]):
            found.errors.append(f"{key} is a {type(state[key]).__name__}, not a tensor")
        else:
            found.layers.append(_LayerReader(found, state, key, layer).read())
    if described is not None and len(described) > len(weights):
        found.errors.append(
            f"the YAML configuration has {len(described)} layers with weights, the checkpoint {len(weights)}"
        )
    _check_whole(found, state)
    return found


def _check_head(found: Inspection, network: Network | None) -> None:
    if found.epoch is None:
        found.errors.append("the checkpoint has no `epoch`")
    if found.arch is None:
        found.warnings.append("the checkpoint has no `arch`")
    elif network is not None and found.arch.lower() != network.arch.lower():
        found.errors.append(f"the checkpoint is of the architecture {found.arch}, the YAML is for {network.arch}")


def _check_whole(found: Inspection, state: dict[str, Any]) -> None:
    if found.not_integers:
        found.errors.insert(0, f"not quantized, see 'bitsmith ai8x': {listed(found.not_integers)}")
    if prefixes := list(batch_norms(state)):
        found.warnings.append(f"batch normalization is not fused ({listed(prefixes)}): the chip has none")
    for what, used, memory in (
        ("weights", found.weight_bytes, found.device.weight_memory),
        ("biases", found.bias_bytes, found.device.bias_memory),
    ):
        if memory is not None and used > memory:
            found.errors.append(f"the {what} take {used:,} bytes; the {found.device.name} has {memory:,}")
    if len(found.layers) > found.device.max_layers:
        most = found.device.max_layers
        found.errors.append(f"there are {len(found.layers)} layers; the {found.device.name} has {most}")


class _LayerReader:
    """Reads one weight with its fields; what the loader would refuse goes to ``found``."""

    def __init__(self, found: Inspection, state: dict[str, Any], key: str, described: NetworkLayer | None) -> None:
        self.found, self.state, self.key, self.described = found, state, key, described
        self.layer, self.operation, _ = split_key(key)

    def read(self) -> LayerView:
        stored = as_array(self.state[self.key])
        weights = self._integers(self.key, stored)
        field_bits = self._field("weight_bits", 8) or 8
        bits = self._bits(weights, field_bits)
        self._check_weights(weights, bits)
        shift = self._field("output_shift", 0)
        if self.described is not None and self.described.output_shift is not None:
            shift = self.described.output_shift
        total = shift + 8 - abs(bits)
        if abs(total) > _SHIFT_LIMIT:
            self._error(f"has the shift {shift}, {total} with its bits: the chip shifts by {_SHIFT_LIMIT} at most")
        bias = self._bias(field_bits)
        rows, saturated = self._rows(weights), np.zeros(1, bool)
        if bits in (4, 8) and weights.size:
            saturated = (rows == bounds(bits)[0]) | (rows == bounds(bits)[1])
        dead = ~rows.any(axis=1)
        if bias is not None and bias.size == dead.size:
            dead &= bias == 0
        return LayerView(
            key=self.key,
            shape=tuple(weights.shape),
            bits=bits,
            output_shift=shift,
            shift=total,
            minimum=int(weights.min(initial=0)),
            maximum=int(weights.max(initial=0)),
            weight_bytes=(weights.size * abs(bits) + 7) // 8,
            bias=None if bias is None else (int(bias.min(initial=0)), int(bias.max(initial=0))),
            bias_bytes=0 if bias is None else bias.size,
            channels=len(rows),
            dead_channels=int(dead.sum()),
            saturated_channels=int((saturated.mean(axis=-1) > SATURATED).sum()),
            saturated_weights=float(saturated.mean()),
        )

    def _error(self, text: str) -> None:
        self.found.errors.append(f"{self.key} {text}")

    def _integers(self, key: str, values: NDArray[Any]) -> NDArray[np.int64]:
        """Truncated, as the loader does it."""
        if not np.isfinite(values).all():
            self.found.errors.append(f"{key} holds NaN or infinity")
            values = np.nan_to_num(values, posinf=0, neginf=0)
        whole: NDArray[np.int64] = np.clip(np.trunc(values), -(2**62), 2**62).astype(np.int64)
        if (whole != values).any():
            self.found.not_integers.append(key)
        return whole

    def _field(self, name: str, default: int) -> int:
        value = self.state.get(f"{self.layer}.{name}")
        if value is None or not is_tensor(value):
            return default
        values = as_array(value)
        if values.size != 1 or not np.isfinite(values).all():
            self.found.errors.append(f"{self.layer}.{name} is {values.tolist()}, not one number")
            return default
        return int(values.item())

    def _bits(self, weights: NDArray[np.int64], field_bits: int) -> int:
        described = None if self.described is None else self.described.quantization
        if described is not None:
            return described
        if weights.size and (np.abs(weights) == 1).all() and (weights == 1).any() and field_bits == 1:
            return BINARY
        return field_bits

    def _check_weights(self, weights: NDArray[np.int64], bits: int) -> None:
        if weights.ndim == 1:
            self._error("has one dimension: fuse batch normalization first, with --fuse-bn")
        elif weights.ndim not in (2, 3, 4):
            self._error(f"has {weights.ndim} dimensions: the chip has linear layers and 1-D and 2-D convolutions")
        if not weights.any():
            self.found.warnings.append(f"all weights of {self.key} are zero")
        elif bits == BINARY:
            if (np.abs(weights) != 1).any():
                self._error("is binary, but has other weights than -1 and +1")
            elif self.found.device.name != "MAX78002":
                self._error(f"has binary weights (-1 and +1), which the {self.found.device.name} does not")
        elif bits not in (1, 2, 4, 8):
            self._error(f"has {bits} bits: the chip has 1, 2, 4 and 8")
        elif weights.min() < bounds(bits)[0] or weights.max() > bounds(bits)[1]:
            self._error(f"has weights from {weights.min()} to {weights.max()}, which are not of {bits} bits")
        if self.described is not None and weights.ndim in (2, 3, 4):
            kernel = (*weights.shape[2:], 1, 1)[:2]
            if kernel != self.described.kernel_size:
                words = ["x".join(map(str, size)) for size in (kernel, self.described.kernel_size)]
                self._error(f"has kernels of {words[0]}, the YAML configuration says {words[1]}")

    def _bias(self, field_bits: int) -> NDArray[np.int64] | None:
        """What the chip gets: the loader divides by 2**(weight_bits - 1) and takes the floor."""
        key = ".".join(part for part in (self.layer, self.operation, "bias") if part is not None)
        value = self.state.get(key)
        if value is None or not is_tensor(value):
            return None
        stored = self._integers(key, as_array(value))
        unit = 1 << min(max(field_bits, 1) - 1, 62)
        bias: NDArray[np.int64] = stored // unit
        if (bias * unit != stored).any():
            self.found.warnings.append(
                f"{key} is not in steps of {unit}: weight_bits ({field_bits}) is not what it was quantized with"
            )
        if bias.size and (bias.min() < _BIAS_MIN or bias.max() > _BIAS_MAX):
            limits = f"{_BIAS_MIN} to {_BIAS_MAX}"
            self.found.errors.append(f"{key} becomes {bias.min()} to {bias.max()} on the chip, which takes {limits}")
        return bias

    def _rows(self, weights: NDArray[np.int64]) -> NDArray[np.int64]:
        """One row per output channel, the second axis of a transposed convolution."""
        transposed = self.described is not None and self.described.op == "convtranspose2d" and weights.ndim == 4
        ordered = weights.swapaxes(0, 1) if transposed else weights
        return ordered.reshape(ordered.shape[0] if ordered.ndim else 1, -1)
