"""Quantization-aware training: a model on the grids of a recipe that trains in its user's own loop."""
