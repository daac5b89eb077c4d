"""Algorithms that change weights and biases to lose less; visitors of the walk, one file each."""
