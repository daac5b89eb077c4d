"""Models and data by name, and what a model is worth: accuracy, agreement, latency."""

from .checkpoint import load_weights, read_checkpoint
from .data import ArrayData, Data, balanced_indices, load_data
from .images import Preprocess
from .latency import Latency, interleaved_latency, onnxruntime_session
from .metrics import Metrics, Recorder, evaluate, evaluate_many, load_metric
from .models import load_model, weights_note
from .progress import progress
from .size import model_size
from .stated import stated_preprocess

__all__ = [
    "ArrayData",
    "Data",
    "Latency",
    "Metrics",
    "Preprocess",
    "Recorder",
    "balanced_indices",
    "evaluate",
    "evaluate_many",
    "interleaved_latency",
    "load_data",
    "load_metric",
    "load_model",
    "load_weights",
    "model_size",
    "onnxruntime_session",
    "progress",
    "read_checkpoint",
    "stated_preprocess",
    "weights_note",
]
