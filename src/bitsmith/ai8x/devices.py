"""The chips as the tools of ai8x know them: names, layer counts and weight memory."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import BitsmithError


@dataclass(frozen=True)
class Device:
    """One chip. ``weight_memory`` and ``bias_memory`` are in bytes; None: not a limit of the device itself."""

    name: str
    max_layers: int
    weight_memory: int | None
    bias_memory: int | None
    default_weight_bits: int | None = 8
    activation_bits: int | None = 8
    needs_processors: bool = True


# Kernels of 9 bytes per processor; there are 64. On MAX78002 the first of each 16 has more of them.
_KERNEL = 9
MAX78000 = Device("MAX78000", 32, weight_memory=64 * 768 * _KERNEL, bias_memory=4 * 512)
MAX78002 = Device("MAX78002", 128, weight_memory=(4 * 5120 + 60 * 4096) * _KERNEL, bias_memory=4 * 2048)
# The original accepts this third device but never finished it: it has no bits of its own.
CMSIS_NN = Device("CMSIS-NN", 256, None, None, default_weight_bits=None, activation_bits=None, needs_processors=False)

_DEVICES = {85: MAX78000, 78000: MAX78000, 87: MAX78002, 78002: MAX78002}


class UnknownDeviceError(BitsmithError):
    """The name is none of MAX78000, MAX78002 and their aliases."""


def find_device(name: str) -> Device:
    """The chip called ``name``, in any case: part number (``MAX78000``, ``78002``) or die (``AI85``, ``87``).

    >>> find_device("ai87").name
    'MAX78002'
    """
    lower = name.lower()
    if lower == "cmsis-nn":
        return CMSIS_NN
    rest = lower.removeprefix("max") if lower.startswith("max") else lower.removeprefix("ai")
    try:
        number = None if rest[:1].isspace() else int(rest)
    except ValueError:
        number = None
    if number not in _DEVICES:
        raise UnknownDeviceError(f"{name!r} is no device: MAX78000 (AI85) and MAX78002 (AI87) are")
    return _DEVICES[number]
