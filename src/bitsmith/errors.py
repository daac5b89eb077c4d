"""Every error that Bitsmith raises on purpose, in one tree.

A message says what is wrong, where (the layer's name or the file), why, and what to do.
"""

from __future__ import annotations


class BitsmithError(Exception):
    """Base of all errors of Bitsmith; ``except BitsmithError`` catches every one of them."""


class RecipeError(BitsmithError):
    """A recipe, a format or a tensor specification contradicts itself, or is unknown."""


class CaptureError(BitsmithError):
    """The model cannot be read: its code or its example inputs do not let a graph be made."""


class PlacementError(BitsmithError):
    """Quantizers cannot be placed as the policy promises, or too little would run in integers."""


class UnsupportedOperatorError(PlacementError):
    """An operator has no meaning under this policy, target, law or file format."""


class CalibrationError(BitsmithError):
    """Calibration data, or what the model makes of it, gives no usable range."""


class CollapseError(CalibrationError):
    """The quantized model is at chance level; the message says where its signal was lost."""


class NonFiniteError(CalibrationError):
    """A weight or an activation holds NaN or infinity."""


class DataError(BitsmithError):
    """A data set, an image folder or a batch is not what it should be."""


class CheckpointError(BitsmithError):
    """A file of weights is corrupt, unsafe, or does not match the model."""


class ExportError(BitsmithError):
    """The quantized model cannot be written in the form asked for."""


class VerificationError(BitsmithError):
    """A file does not compute what the simulation computes, or cannot be held against it."""


class OutputError(BitsmithError):
    """A result cannot be written where it was asked for."""


class MissingExtraError(BitsmithError):
    """An optional package is needed; the message names the ``pip install`` that brings it."""


class MigrationError(BitsmithError):
    """A model quantized with another tool holds something that has no form here."""
