"""Deciding where Quantizers stand."""

from .layers import QuantLayer

__all__ = ["QuantLayer"]
