"""Quantization in steps that the user drives: prepare, run batches, convert."""

from .steps import convert, prepare

__all__ = ["convert", "prepare"]
