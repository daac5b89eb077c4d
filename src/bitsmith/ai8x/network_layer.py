"""One layer of a network description: its keys, their defaults and the loader's checks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, TypeGuard

from ..errors import BitsmithError
from .devices import Device

BINARY = -1
"""What ``quantization: bin`` becomes."""

INPUT = -1
"""What ``in_sequences: input`` (the network's input) becomes."""

STOP = -1
"""What ``next_sequence: stop`` becomes."""

Operator = Literal["conv1d", "conv2d", "convtranspose2d", "linear", "none"]
Pair = tuple[int, int]
Notify = Callable[[str, str], None]
"""Takes the kind, ``WARNING`` or ``NOTICE``, and the text."""

_OPERATOR_KEYS = ("convolution", "operation", "operator", "op")
_NAMES = """
    activate activation avg_pool bias_group bias_quadrant bypass calcx4 conv_groups convolution data_format dilation
    eltwise flatten groups in_channel_skip in_channels in_dim in_offset in_sequences in_skip kernel_size max_pool name
    next_sequence op operands operation operator out_channels out_offset output output_pad output_processors
    output_shift output_width pad pool_dilation pool_first pool_stride processors quantization read_gap readahead
    sequence simulated_sequence snoop_sequence streaming stride tcalc weight_source write_gap
"""
LAYER_KEYS = frozenset(_NAMES.split())
_OPERATORS: dict[str, Operator] = {
    "conv1d": "conv1d",
    "conv2d": "conv2d",
    "convtranspose2d": "convtranspose2d",
    "linear": "linear",
    "fc": "linear",
    "mlp": "linear",
    "none": "none",
    "passthrough": "none",
}
_ELTWISE = {
    "add": "add",
    "sub": "sub",
    "or": "or",
    "bitwiseor": "or",
    "bitwise_or": "or",
    "xor": "xor",
    "bitwisexor": "xor",
    "bitwise_xor": "xor",
}
_ACTIVATIONS = {"relu": "relu", "abs": "abs", "none": None}
_QUANTIZATIONS = {1: 1, 2: 2, 4: 4, 8: 8, "bin": BINARY, "binary": BINARY}
_PROCESSORS = 64


class NetworkError(BitsmithError):
    """The network description is missing, is no such file, or contradicts itself."""


@dataclass(frozen=True)
class NetworkLayer:
    """One layer. Pairs are (height, width); for ``conv1d`` the second number is its neutral value.

    ``quantization`` is None where the checkpoint decides, 1, 2, 4, 8, or BINARY. ``output_shift`` is what the file
    says, without the share of the weight bits that the loader adds. References to layers are sequence numbers.
    """

    sequence: int
    name: str | None
    op: Operator
    eltwise: str | None  # add, sub, or, xor
    operands: int
    quantization: int | None
    output_shift: int | None
    activation: str | None  # relu, abs
    output_width: int  # 8 or 32 bits
    kernel_size: Pair
    stride: Pair
    padding: Pair
    output_padding: Pair
    dilation: Pair
    groups: int
    pooling: str | None  # max, avg
    pool: Pair
    pool_stride: Pair
    pool_dilation: Pair
    pool_first: bool
    flatten: bool
    bypass: bool
    weight_source: int | None
    in_sequences: tuple[int, ...] | None
    next_sequence: int | None
    processors: int | None
    output_processors: int | None
    in_channels: int | None
    in_dim: Pair | None
    out_channels: int | None
    in_offset: int | None
    out_offset: int
    big_data: bool  # channels first ("chw") instead of last
    streaming: bool
    write_gap: int
    read_gap: int
    settings: dict[str, Any]  # the file's own entry, with the keys that are not above

    @property
    def reads_weights(self) -> bool:
        """Whether the loader takes the checkpoint's next weight for this layer."""
        return self.op != "none" and not self.bypass and self.weight_source is None


class LayerReader:
    """Reads one entry; each method takes one group of keys."""

    def __init__(self, entry: dict[str, Any], sequence: int, notify: Notify) -> None:
        self.entry = entry
        self.sequence = sequence
        self.notify = notify

    def fail(self, message: str) -> NoReturn:
        raise NetworkError(f"{message} (found in layer sequence {self.sequence} in YAML configuration).")

    def read(self, device: Device) -> NetworkLayer:
        processors = self._processors("processors") if device.needs_processors else None
        pooling = next((kind for kind in ("max", "avg") if f"{kind}_pool" in self.entry), None)
        pool = self._pair(f"{pooling}_pool") if pooling else (1, 1)
        quantization = self._choice("quantization", _QUANTIZATIONS, "`quantization` must be 1, 2, 4, 8 or bin/binary")
        if "out_offset" not in self.entry:
            self._default("Defaulting to `out_offset = 0` for")
        activation, activated = self._activation()
        op, eltwise, called = self._operator()
        if op != "none" and not activated:
            self._default(f'Defaulting to "no activation" for {called} in', "NOTICE")
        weights = op != "none"
        convolves = op in ("conv1d", "conv2d", "convtranspose2d")
        if "dilation" in self.entry and not weights:
            self.fail("`dilation` requires a convolution operator")
        if "pool_dilation" in self.entry and pooling is None:
            self.fail("`pool_dilation` requires pooling")
        eltwise = self._choice(
            "eltwise", _ELTWISE, f'Unknown value "{self.entry.get("eltwise")}" for `eltwise`', eltwise
        )
        flat = op == "conv1d"  # the second direction does not exist
        operands = self._operands(eltwise)
        pool_first = self._flag("pool_first", True)
        if not pool_first and (operands == 1 or pool == (1, 1)):
            self.fail("`pool_first: False` requires both pooling and element-wise operations")
        return NetworkLayer(
            sequence=self.sequence,
            name=None if self.entry.get("name") is None else str(self.entry["name"]),
            op=op,
            eltwise=eltwise,
            operands=operands,
            quantization=quantization,
            output_shift=self._optional_int("output_shift"),
            activation=activation,
            output_width=self._choice("output_width", {8: 8, 32: 32}, "`output_width` must be 8 or 32", 8),
            kernel_size=self._kernel_size(op),
            stride=_along(self._stride(op, pooling), flat),
            padding=_along(self._from_zero("pad", 1 if convolves else 0), flat, 0),
            output_padding=self._from_zero("output_pad", 1 if op == "convtranspose2d" else 0),
            dilation=_along(self._pair("dilation"), flat),
            groups=self._int(self._one_of("conv_groups", "groups"), 1, minimum=1),
            pooling=pooling,
            pool=_along(pool, flat),
            pool_stride=_along(self._pair("pool_stride"), flat),
            pool_dilation=_along(self._pair("pool_dilation"), flat),
            pool_first=pool_first,
            flatten=self._flag("flatten", False),
            bypass=self._flag("bypass", False),
            weight_source=self.entry.get("weight_source"),  # names become numbers in _resolve
            in_sequences=self.entry.get("in_sequences"),
            next_sequence=self.entry.get("next_sequence"),
            processors=processors,
            output_processors=self._processors("output_processors") if "output_processors" in self.entry else None,
            in_channels=self._optional_int("in_channels"),
            in_dim=self._in_dim(),
            out_channels=self._optional_int("out_channels"),
            in_offset=self._optional_int("in_offset"),
            out_offset=self._int("out_offset", 0),
            big_data=self._big_data(),
            streaming=self._flag("streaming", False),
            write_gap=self._int("write_gap", 0),
            read_gap=self._int(self._one_of("in_skip", "read_gap"), 0),
            settings=dict(self.entry),
        )

    def _default(self, text: str, kind: str = "WARNING") -> None:
        self.notify(kind, f"{text} layer sequence {self.sequence} in YAML configuration.")

    def _one_of(self, *keys: str) -> str:
        """The key of several spellings that is there; the first where none is."""
        present = [key for key in keys if key in self.entry]
        if len(present) > 1:
            self.fail(f"Duplicate key for {'/'.join(f'`{key}`' for key in keys)}")
        return present[0] if present else keys[0]

    def _processors(self, key: str) -> int:
        value = self.entry.get(key)
        if isinstance(value, str):
            with suppress(ValueError):
                value = int(value.replace(".", "").replace("_", ""), 16)
        if value is None:
            self.fail(f"`{key}` must not be zero or missing")
        if not is_int(value) or not 1 <= value < 2**_PROCESSORS:
            self.fail(f"`{key}` must be an int from 1 to 2**{_PROCESSORS}-1")
        return int(value)

    def _choice(self, key: str, choices: dict[Any, Any], message: str, default: Any = None) -> Any:
        if key not in self.entry:
            return default
        value = self.entry[key]
        value = value.lower() if isinstance(value, str) else value
        if isinstance(value, bool) or not isinstance(value, (str, int)) or value not in choices:
            self.fail(message)
        return choices[value]

    def _activation(self) -> tuple[str | None, bool]:
        key = self._one_of("activation", "activate")
        message = f'Unknown value "{self.entry.get(key)}" for `{key}`'
        if key in self.entry and self.entry[key] is None:  # a bare `activate:` or null, as good as the word
            return None, True
        return self._choice(key, _ACTIVATIONS, message), key in self.entry

    def _operator(self) -> tuple[Operator, str | None, str]:
        key = self._one_of(*_OPERATOR_KEYS)
        if key not in self.entry:
            self._default("Defaulting to `op: Conv2d` for")
            return "conv2d", None, "conv2d"
        called = str(self.entry[key] or "none").lower()
        if called in _ELTWISE:
            return "none", _ELTWISE[called], called
        if called not in _OPERATORS:
            self.fail(f'Unknown value "{self.entry[key]}" for `{key}`')
        return _OPERATORS[called], None, called

    def _operands(self, eltwise: str | None) -> int:
        if eltwise is None:
            if "operands" in self.entry:
                self.fail("`operands` can only be used with element-wise operations")
            return 1
        value = self._int("operands", 2)
        if not 2 <= value <= 16:
            self.fail("`operands` has to be 2..16")
        return value

    def _kernel_size(self, op: Operator) -> Pair:
        fixed: dict[str, Pair] = {"conv2d": (3, 3), "convtranspose2d": (3, 3), "conv1d": (9, 1)}
        if "kernel_size" not in self.entry:
            return fixed.get(op, (1, 1))
        if op == "linear":
            self.fail("Cannot configure `kernel_size` for fully connected layers")
        value = str(self.entry["kernel_size"]).lower()
        two = {"conv2d": ("1x1", "3x3"), "convtranspose2d": ("3x3",)}.get(op)
        if value not in (two or [str(length) for length in range(1, 10)]):
            self.fail(f"Unsupported value `{value}` for `kernel_size`")
        if two:
            return int(value[0]), int(value[2])
        return (int(value), 1) if op == "conv1d" else (1, 1)

    def _stride(self, op: Operator, pooling: str | None) -> Pair:
        height, width = self._pair("stride", (2, 2) if op == "convtranspose2d" else (1, 1))
        if height != width:
            self.fail("`stride` values must be equal in both dimensions")
        if "stride" in self.entry:
            if pooling is not None and height != 1:
                self.fail("Cannot set `stride` to non-default value when pooling")
            if pooling is None and op == "convtranspose2d" and height != 2:
                self.fail("Cannot set `stride` to non-default value for ConvTranspose2D")
        return (2, 2) if op == "convtranspose2d" else (height, width)

    def _pair(self, key: str, default: Pair = (1, 1)) -> Pair:
        value = self.entry.get(key, default)
        first, second = value if isinstance(value, (list, tuple)) and len(value) == 2 else (value, value)
        if not is_int(first) or not is_int(second) or first < 1 or second < 1:
            self.fail(f"Unsupported value `{value}` for `{key}`")
        return first, second

    def _from_zero(self, key: str, default: int) -> Pair:
        value = self.entry.get(key, default)
        if not is_int(value) or value < 0:
            self.fail(f"Unsupported value {value} for `{key}`")
        return value, value

    def _in_dim(self) -> Pair | None:
        value = self.entry.get("in_dim")
        if value is None:
            return None
        sizes = [value] if is_int(value) else value
        if not isinstance(sizes, list) or not 1 <= len(sizes) <= 2 or not all(map(is_int, sizes)):
            self.fail("`in_dim` must be an integer or list not exceeding two dimensions")
        return sizes[0], sizes[1] if len(sizes) == 2 else 1

    def _big_data(self) -> bool:
        formats = {"chw": True, "big": True, "hwc": False, "little": False}
        return bool(self._choice("data_format", formats, "Unknown value for `data_format`", False))

    def _flag(self, key: str, default: bool) -> bool:
        return bool(self.entry.get(key, default))

    def _int(self, key: str, default: int, minimum: int = 0) -> int:
        value = self.entry.get(key, default)
        if not is_int(value) or value < minimum:
            self.fail(f"Unsupported value `{value}` for `{key}`")
        return int(value)

    def _optional_int(self, key: str) -> int | None:
        value = self.entry.get(key)
        if value is not None and not is_int(value):
            self.fail(f"Unsupported value `{value}` for `{key}`")
        return value


def _along(pair: Pair, flat: bool, neutral: int = 1) -> Pair:
    return (pair[0], neutral) if flat else pair


def is_int(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
