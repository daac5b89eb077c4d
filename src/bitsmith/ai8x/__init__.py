"""MAX78000 and MAX78002: checkpoints of ai8x-training quantized as ai8x-synthesis' ``quantize.py`` does, and read back.

The command is short and starts often, so nothing here imports PyTorch before it is needed.
"""

from .checkpoint import read_checkpoint, write_checkpoint
from .convert import quantize_file
from .devices import Device, find_device
from .inspect import Inspection, inspect_checkpoint
from .quantize import Options, quantize_checkpoint

__all__ = [
    "Device",
    "Inspection",
    "Options",
    "find_device",
    "inspect_checkpoint",
    "quantize_checkpoint",
    "quantize_file",
    "read_checkpoint",
    "write_checkpoint",
]
