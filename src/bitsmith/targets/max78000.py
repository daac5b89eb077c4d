"""Analog Devices MAX78000 and MAX78002: convolutional accelerators with memory beside their processors.

Sources: the device data of the network loader (ai8x-synthesis, izer/tornadocnn.py) and the operator limits in the
README of ai8x-training.
"""

from __future__ import annotations

from .target import ChipLimits, Target

_COMPUTE = {"conv", "linear", "conv_transpose"}
_KEEPS_SCALE = {"add", "sub", "or", "xor", "avg_pool", "global_avg_pool", "abs"}
_NOTES = (
    "All scales may be any number as long as s_x * s_w / s_y is a power of two: weight scales follow activations.",
    "A bias has 8 bits of 128 accumulator steps each. The last layer hands on its 32-bit accumulator.",
    "Convolutions with a stride run with stride 1 and are subsampled by the layer that reads them.",
)


def _chip(name: str, description: str, limits: ChipLimits) -> Target:
    return Target(
        name=name,
        description=description,
        engine="ai8x",
        law="max78000",
        default_recipe="ai8x",
        weight_bits=(1, 2, 4, 8),
        activation_bits=(8,),
        integer_bits=(1, 2, 4, 8),
        floats=False,
        symmetric_activations=True,
        symmetric_weights=True,
        granularities=("tensor",),
        integer_operators=frozenset(_COMPUTE | _KEEPS_SCALE),
        keeps_scale=frozenset(_KEEPS_SCALE),
        float_output=frozenset({"conv", "linear"}),
        shifts=(-15, 15),
        wide_bits=30,
        bias_unit=128,
        rescales=False,
        exact=True,
        bias_bits=8,
        limits=limits,
        notes=_NOTES,
    )


MAX78000 = _chip(
    "max78000",
    "Analog Devices MAX78000 (checkpoint and YAML for its network loader)",
    ChipLimits(
        layers=32, kernel_words=768, data_bytes=1 << 15, bias_bytes=512, rows_and_columns=1023, dilation_1d=1023,
        unfused_pool_passes=1,
    ),
)  # fmt: skip
MAX78002 = _chip(
    "max78002",
    "Analog Devices MAX78002 (checkpoint and YAML for its network loader)",
    ChipLimits(
        layers=128, kernel_words=4096, data_bytes=80 << 10, bias_bytes=2048, rows_and_columns=2047, dilation_1d=2047,
        depthwise=True, binary_weights=True,
    ),
)  # fmt: skip
