"""Benchmarks: real networks, real data and the rivals' numbers. Run with `python -m` from the root."""
