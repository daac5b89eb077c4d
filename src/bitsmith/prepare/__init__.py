"""Rewriting a LayerGraph without changing its function."""

from .fold_batch_norm import fold_batch_norm

__all__ = ["fold_batch_norm"]
