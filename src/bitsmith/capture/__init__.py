"""Reading a user's model, unmodified, into a LayerGraph."""

from .capture import capture, check_finite, copy_graph, evaluation_mode
from .inputs import ForwardFunction, batch_arguments, read_batches, sample_count, tensors_of

__all__ = [
    "ForwardFunction",
    "batch_arguments",
    "capture",
    "check_finite",
    "copy_graph",
    "evaluation_mode",
    "read_batches",
    "sample_count",
    "tensors_of",
]
