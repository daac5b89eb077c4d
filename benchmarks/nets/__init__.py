"""The benchmark networks, written as their users write them, with their weights and data.

Example:
    model, calibration_batches, test_batches, info = benchmarks.nets.load("resnet20")
"""

from benchmarks.nets.registry import Benchmark, Info, load, names, top1

__all__ = ["Benchmark", "Info", "load", "names", "top1"]
