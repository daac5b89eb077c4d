"""The walk over a training checkpoint that makes the file for the MAX78000/MAX78002 network loader.

Keys, shapes, dtypes and order are those of ai8x-synthesis' ``quantize.py``. Where that program is wrong, the default
is right and ``compat`` repeats it: see docs/max78000.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BitsmithError, NonFiniteError
from . import arithmetic
from .batch_norm import check_batch_norms
from .checkpoint import as_array, is_tensor
from .console import listed, shortest
from .devices import Device
from .network_layer import BINARY, Notify
from .sums import mean

if TYPE_CHECKING:
    from .network import Network

CLIP_METHODS = ("AVGMAX", "MAX", "STDDEV", "SCALE")
DEFAULT_SCALE = 0.85
DEFAULT_STDDEV = 2.0
_WEIGHT_BITS = (1, 2, 4, 8)
_SHIFT_METHOD = "MAX_BIT_SHIFT"

State = dict[str, Any]
Say = Callable[[str], None]


class QuantizeError(BitsmithError):
    """A checkpoint cannot be quantized. ``original``: how quantize.py reports it, where that differs."""

    def __init__(self, message: str, original: str | None = None) -> None:
        super().__init__(message)
        self.original = original


@dataclass(frozen=True)
class Options:
    """What the command line says. ``clip_method`` None: the training's own information (QAT) decides the shift."""

    device: Device
    clip_method: str | None = None
    qat_weight_bits: int | None = None
    scale: float = DEFAULT_SCALE
    stddev: float = DEFAULT_STDDEV
    compat: bool = False


def split_key(key: str) -> tuple[str | None, str | None, str]:
    """Layer, operation and parameter of a key; what it does not have is None.

    >>> split_key("module.conv1.op.weight"), split_key("fc.weight"), split_key("weight")
    (('module.conv1', 'op', 'weight'), ('fc', None, 'weight'), (None, None, 'weight'))
    """
    parts: list[Any] = key.rsplit(".", maxsplit=2)
    if len(parts) == 3:
        return parts[0], parts[1], parts[2]
    return (parts[0], None, parts[1]) if len(parts) == 2 else (None, None, key)


def state_of(checkpoint: dict[str, Any]) -> State:
    """The checkpoint's tensors by name."""
    if "state_dict" not in checkpoint:
        raise QuantizeError("No `state_dict` in checkpoint file.")
    state = checkpoint["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise QuantizeError("`state_dict` in the checkpoint file is not a mapping from names to tensors.")
    return state


def quantize_checkpoint(
    checkpoint: dict[str, Any],
    options: Options,
    network: Network | None = None,
    say: Say | None = None,
    notify: Notify = lambda kind, text: None,
) -> dict[str, Any]:
    """A new checkpoint with the weights and biases of ``checkpoint`` as the integers that the chip loads.

    Changed entries are NumPy arrays; all others are the caller's own objects. ``network`` may set the bits of layers.
    ``say`` gets the lines of the verbose output; ``notify`` gets warnings. Raises QuantizeError, NonFiniteError.
    """
    state = state_of(checkpoint)
    if say is not None:
        say(f"\nModel keys (state_dict):\n{', '.join(state)}")
    result = dict(checkpoint)
    result["extras"] = _extras(checkpoint, options, notify)
    schedule = checkpoint.get("compression_sched")
    if schedule is not None and not isinstance(schedule, dict):
        raise QuantizeError(
            f"`compression_sched` in the checkpoint file is a {type(schedule).__name__}, not a mapping."
        )
    masks = None if schedule is None else schedule.get("masks_dict")
    walk = _Walk(state, None if masks is None else dict(masks), options, network, say, notify)
    result["state_dict"] = walk.run()
    if schedule is not None and walk.masks is not None:
        result["compression_sched"] = {**schedule, "masks_dict": walk.masks}
    return result


def _extras(checkpoint: dict[str, Any], options: Options, notify: Notify) -> dict[str, Any]:
    """The entry ``extras`` with the method added."""
    extras = checkpoint.get("extras")
    if extras is None:
        if "extras" in checkpoint and options.compat:
            raise QuantizeError("", "TypeError: 'NoneType' object does not support item assignment")
        notify("WARNING", "No `extras` in checkpoint file.")
        extras = {}
    if not isinstance(extras, dict):
        raise QuantizeError(f"`extras` in the checkpoint file is a {type(extras).__name__}, not a mapping.")
    added: dict[str, Any] = {"clipping_method": options.clip_method or _SHIFT_METHOD}
    if options.clip_method == "STDDEV":
        added["clipping_nstds"] = options.stddev
    elif options.clip_method == "SCALE":
        added["clipping_scale"] = options.scale
    return {**extras, **added}


class _Walk:
    """One pass over the keys in stored order; ``new`` is the state being made."""

    def __init__(
        self,
        state: State,
        masks: State | None,
        options: Options,
        network: Network | None,
        say: Say | None,
        notify: Notify,
    ) -> None:
        self.state, self.new, self.masks = state, state.copy(), masks
        self.options, self.say, self.notify = options, say, notify
        self.plan = self._plan(network)  # bits by number of the weight; None where there is no network
        self.layers = 0
        self.skipped: list[str] = []
        self.corrected: dict[str, int] = {}
        self.thresholds = False

    def run(self) -> State:
        if not self.options.compat:
            check_batch_norms(self.state, self.notify)
        for key in self.state:
            layer, operation, parameter = split_key(key)
            if layer is None:
                continue
            if parameter in ("w_zero_point", "b_zero_point"):
                if np.any(self._array(key)):
                    message = f"Parameter {key} is not zero."
                    raise QuantizeError(message, f"RuntimeError: \n{message}")
                del self.new[key]
            elif parameter == "base_b_q":
                del self.new[key]
            elif parameter == "adjust_output_shift":
                self.new[key] = _field(0)
            elif parameter == "quantize_activation":
                self.new[key] = _field(1)
            elif parameter == "weight":
                if self.plan is not None and self.layers >= len(self.plan):
                    self.skipped.append(key)
                else:
                    self._layer(key, layer, operation)
                    self.layers += 1
        self._conclude()
        return self.new

    def _plan(self, network: Network | None) -> list[int | None] | None:
        if network is None:
            return None
        everything = [layer.quantization for layer in network.layers]
        with_weights = [layer.quantization for layer in network.layers if layer.reads_weights]
        if not everything:
            raise QuantizeError("The YAML configuration file has no layers.", "IndexError: list index out of range")
        if self.options.compat:
            return everything
        if everything != with_weights:
            self.notify(
                "NOTICE",
                f"{len(everything) - len(with_weights)} of {len(everything)} layers of the YAML configuration take no "
                "weights (`op: none`, `bypass` or `weight_source`): their `quantization` is passed over, as the loader "
                "does. quantize.py would have counted them (--compat).",
            )
        if BINARY in with_weights and self.options.device.name != "MAX78002":
            self.notify("WARNING", f"{self.options.device.name} has no binary weights (-1 and +1): MAX78002 does.")
        return with_weights

    def _layer(self, key: str, layer: str, operation: str | None) -> None:
        """Quantize one weight and its bias, and write the fields beside them."""
        if operation is None and self.options.compat:
            raise QuantizeError("", "TypeError: sequence item 1: expected str instance, NoneType found")
        bits, binary = self._bits(key, layer)
        weights = self._floats(key)
        bias_key = ".".join(part for part in (layer, operation, "bias") if part is not None)
        bias = self._floats(bias_key) if bias_key in self.state else None
        exponent, factor, shown = self._factor(key, layer, weights, bias, bits)
        self._tell(key, weights, shown, bits)
        self._warn(key, weights)
        if binary:
            one = weights.dtype.type(1)
            self.new[key] = np.where(weights >= 0, one, -one)
        else:
            self.new[key] = arithmetic.integers(weights, factor, bits)
        self._write_weight_bits(layer, bits)
        if bias is not None:
            self._tell(bias_key, bias, shown, bits)
            self._bias(bias_key, layer, bias, factor, bits)
        if exponent is not None:
            self._write_output_shift(layer, exponent, bits)

    def _bits(self, key: str, layer: str) -> tuple[int, bool]:
        """Bits of the layer, and whether its weights are -1 and +1: network, checkpoint, command line, then 8."""
        compat = self.options.compat
        bits = None if self.plan is None else self.plan[self.layers]
        if bits == BINARY and not compat:
            return 1, True
        if bits is None:
            bits = self._scalar_int(f"{layer}.weight_bits") or None
        if bits is None:
            bits = self.options.qat_weight_bits
        if bits is None:
            bits = self.options.device.default_weight_bits
        if bits is None:
            raise _unfinished("weights", "DEFAULT_WEIGHT_BITS")
        if not 1 <= bits <= 24 and (not compat or abs(bits) > 100):
            raise QuantizeError(f"{key}: {bits} bits are impossible: the chip has weights of 1, 2, 4 and 8 bits.")
        if not compat and bits not in _WEIGHT_BITS:
            self.notify("WARNING", f"{key} gets {bits} bits, but the chip has weights of 1, 2, 4 and 8 bits.")
        return bits, False

    def _factor(
        self, key: str, layer: str, weights: NDArray[Any], bias: NDArray[Any] | None, bits: int
    ) -> tuple[Any, Any, Any]:
        """The exponent of the shift (None with a clip method), the factor, and the factor as it is printed."""
        method, kind = self.options.clip_method, weights.dtype.type
        unit = 2.0 ** (bits - 1)
        if method is None:
            numbers = weights.reshape(-1) if bias is None else np.concatenate([weights.reshape(-1), bias.reshape(-1)])
            quantile, shape = self._quantile(layer)
            exponent = arithmetic.shift(np.abs(numbers), quantile, bits)
            factor = type(exponent)(unit * 2.0 ** float(exponent))  # exact: NumPy's float32 exp2 is not
            return exponent, factor, np.full(shape, factor)
        if method == "SCALE":
            return None, unit * self.options.scale, unit * self.options.scale
        if method == "STDDEV":
            if self.options.stddev <= 0:
                message = f"n_stds must be > 0, got {self.options.stddev}"
                raise QuantizeError(f"{message}: give --stddev a positive number.", f"ValueError: {message}")
            saturation = arithmetic.deviation_maximum(weights, self.options.stddev)
        else:
            find = arithmetic.maximum if method == "MAX" else arithmetic.average_maximum
            saturation = find(weights)
        if not self.options.compat and not np.isfinite(saturation):
            raise QuantizeError(f"{key} has no {method} statistic ({saturation}): use another --clip-method.")
        return None, kind(unit) * saturation, kind(unit) * saturation

    def _quantile(self, layer: str) -> tuple[float, tuple[int, ...]]:
        key = f"{layer}.shift_quantile"
        if key not in self.state:
            return 1.0, ()
        values = self._array(key)
        quantile = float(values.item()) if values.size == 1 else float("nan")
        if not 0 <= quantile <= 1:
            raise QuantizeError(
                f"{key} is {values.tolist()}: it must be one number from 0 to 1.",
                "RuntimeError: quantile() q values must be in the range [0, 1]",
            )
        return quantile, values.shape

    def _bias(self, key: str, layer: str, bias: NDArray[Any], factor: Any, bits: int) -> None:
        if self.options.compat and self.options.clip_method is not None:
            local = "cannot access local variable 'distribution_factor' where it is not associated with a value"
            raise QuantizeError("", f"UnboundLocalError: {local}")
        if self.options.device.activation_bits is None:
            raise _unfinished("biases", "ACTIVATION_BITS")
        self.new[key] = arithmetic.stored_bias(arithmetic.integers(bias, factor, bits), bits)
        self.new[f"{layer}.bias_bits"] = _field(bits)

    def _write_weight_bits(self, layer: str, bits: int) -> None:
        """Bits as the loader needs them, to undo the bias's scale; quantize.py writes 8 for whatever bits."""
        key = f"{layer}.weight_bits"
        present = key in self.new
        found = int(as_array(self.new[key]).item()) if present else 0
        if found == bits:
            return
        if not self.options.compat:
            if found not in (0, bits) or bits != 8:
                self.corrected[layer] = bits
            self.new[key] = _field(bits)
        elif found == 0:
            self.new[key] = _field(8)
        if not present and self.masks is not None:
            self.masks[key] = self.new[key]

    def _write_output_shift(self, layer: str, exponent: Any, bits: int) -> None:
        shift = -exponent
        threshold = f"{layer}.activation_threshold"
        if threshold in self.state and not self.options.compat:  # QATv2: the layer's outputs have a scale of their own
            self.thresholds = True
            shift = np.clip(shift - type(shift)(self._array(threshold).item()), -7 - bits, 23 - bits)
        self.new[f"{layer}.output_shift"] = _field(shift)
        if self.masks is not None:
            self.masks[f"{layer}.output_shift"] = self.new[f"{layer}.output_shift"]

    def _array(self, key: str) -> NDArray[Any]:
        value = self.state[key]
        if not is_tensor(value):
            raise QuantizeError(f"{key} in the checkpoint file is a {type(value).__name__}, not a plain tensor.")
        return as_array(value)

    def _scalar_int(self, key: str) -> int:
        if key not in self.state:
            return 0
        values = self._array(key)
        if values.size != 1 or not np.isfinite(values.item()):
            raise QuantizeError(f"{key} is {values.tolist()}: it must be one number of bits.")
        return int(values.item())

    def _floats(self, key: str) -> NDArray[Any]:
        """A weight or bias in float32 or float64, checked."""
        values = self._array(key)
        if values.dtype == np.float16:
            values = values.astype(np.float32)
        if values.dtype not in (np.float32, np.float64):
            raise QuantizeError(
                f"{key} holds {values.dtype}, not floating-point numbers: was the checkpoint quantized already?",
                "RuntimeError: quantile() input tensor must be either float or double dtype",
            )
        if values.size == 0 or values.ndim == 0:
            raise QuantizeError(f"{key} has the shape {values.shape}: a layer's weights have one dimension or more.")
        if not self.options.compat and not np.isfinite(values).all():
            raise NonFiniteError(
                f"{key} holds NaN or infinity ({np.count_nonzero(~np.isfinite(values))} of {values.size} numbers): "
                "the training diverged; take an earlier checkpoint."
            )
        return values

    def _tell(self, key: str, values: NDArray[Any], factor: Any, bits: int) -> None:
        if self.say is not None:
            with np.errstate(all="ignore"):
                average, largest = arithmetic.average_maximum(values), arithmetic.maximum(values)
            words = ("avg_max:", average, "max:", largest, "mean:", mean(values), "factor:", factor, "bits:", bits)
            self.say(" ".join([key, *(word if isinstance(word, str) else shortest(word) for word in words)]))

    def _warn(self, key: str, weights: NDArray[Any]) -> None:
        """Of what the loader will not like, or the network not survive."""
        if self.options.compat:
            return
        if not weights.any():
            self.notify("WARNING", f"All weights for `{key}` are zero.")
        if weights.ndim == 1:
            self.notify("WARNING", f"{key} has one dimension: the loader takes layers only, not normalization.")

    def _conclude(self) -> None:
        if self.options.compat:
            return
        if self.skipped:
            self.notify(
                "WARNING",
                f"{listed(self.skipped)} stay floating-point: the YAML configuration has no layers left for them.",
            )
        if self.corrected:
            bits = [f"{layer}: {number}" for layer, number in self.corrected.items()]
            self.notify(
                "NOTICE",
                f"weight_bits is what was used ({listed(bits)}), so that the loader scales biases rightly; "
                "quantize.py leaves 8 or the old value there (--compat).",
            )
        if self.thresholds:
            self.notify("NOTICE", "activation_threshold (QATv2) is part of output_shift; not so with --compat.")


def _field(value: Any) -> NDArray[Any]:
    return np.array([value], np.float32)


def _unfinished(what: str, name: str) -> QuantizeError:
    return QuantizeError(
        f"The device CMSIS-NN has no number of bits for {what}: quantize for MAX78000 or MAX78002.",
        f"AttributeError: 'DevCMSISNN' object has no attribute '{name}'",
    )
