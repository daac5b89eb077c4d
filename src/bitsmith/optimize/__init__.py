"""Algorithms that change weights and biases to lose less; visitors of the walk."""

from .bias_correction import ChannelMean, correct_bias

__all__ = ["ChannelMean", "correct_bias"]
