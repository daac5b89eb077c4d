"""How good a model's answers are: against the labels, and against another model's answers."""

from __future__ import annotations

import inspect
import itertools
import math
import numbers
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import BitsmithError, DataError
from .data import Data, batch_size, is_labels
from .factory import load_callable
from .progress import progress

Model = Callable[..., Any]
Metric = Callable[[Tensor, Tensor], float]


class Metrics(BaseModel):
    """The measures of one model over one data set; None where the data or the outputs do not allow one."""

    model_config = ConfigDict(extra="forbid")

    samples: int = 0
    top1: float | None = Field(default=None, description="percent of samples whose greatest score is the label's")
    top5: float | None = Field(default=None, description="percent of samples whose label is in the five greatest")
    agreement: float | None = Field(default=None, description="percent of samples with the reference's answer")
    mse: float | None = Field(default=None, description="mean squared difference to the reference's outputs")
    sqnr_db: float | None = Field(default=None, description="reference's power over that of the difference")
    metric: float | None = Field(default=None, description="the user's own measure, averaged over the samples")
    seconds: float = 0.0

    @property
    def images_per_second(self) -> float:
        """Samples for each second that the model itself took."""
        return self.samples / self.seconds if self.seconds else math.inf


class Recorder:
    """A model that remembers its outputs, so that others can be compared with them without running it again.

    Past ``limit`` bytes it forgets them; ``reference`` is then the model itself. ``scores`` is how many classes it
    has told apart.
    """

    def __init__(self, model: Model, limit: int = 512 << 20) -> None:
        self._model = model
        self.device = device_of(model)
        self.scores: int | None = None
        self._left = limit
        self._outputs: list[Tensor] | None = []

    def __call__(self, *inputs: Any) -> Tensor:
        output = first_tensor(self._model(*inputs))
        self.scores = output.shape[1] if output.ndim == 2 else None
        self._left -= output.numel() * output.element_size()
        if self._left < 0:
            self._outputs = None
        elif self._outputs is not None:
            self._outputs.append(output)
        return output

    @property
    def reference(self) -> Model | Sequence[Tensor]:
        """What ``evaluate(reference=...)`` takes."""
        return self._model if self._outputs is None else self._outputs


def evaluate(
    model: Model,
    data: Data,
    *,
    reference: Model | Sequence[Tensor] | None = None,
    metric: Metric | None = None,
    what: str = "evaluating",
    show_progress: bool | None = False,
) -> Metrics:
    """Run ``model`` over ``data`` and measure its answers.

    ``model`` maps a batch of inputs to outputs: a module, which gets them on its device, or any function.
    ``reference`` is another such model, or its outputs batch by batch; ``metric(outputs, targets)`` is called for each
    batch.

    >>> from bitsmith.evaluate import ArrayData
    >>> data = ArrayData(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    >>> evaluate(lambda x: x, data).top1
    75.0
    """
    return evaluate_many({"model": model}, data, reference, metric=metric, what=what, show_progress=show_progress)[
        "model"
    ]


def evaluate_many(
    models: Mapping[str, Model],
    data: Data,
    reference: Model | Sequence[Tensor] | None = None,
    *,
    metric: Metric | None = None,
    what: str = "evaluating",
    show_progress: bool | None = False,
) -> dict[str, Metrics]:
    """Measure several models in one pass, so that every image is read once; as ``evaluate`` for each."""
    tallies = {name: _Tally(data.name, metric) for name in models}
    with torch.inference_mode():
        for index, batch in enumerate(progress(data, what, enabled=show_progress)):
            inputs, targets = split_batch(batch)
            expected = None
            if reference is not None:
                expected = _run(reference, inputs, data) if callable(reference) else reference[index]
            for name, model in models.items():
                start = time.perf_counter()
                output = _run(model, inputs, data)
                tallies[name].seconds += time.perf_counter() - start
                tallies[name].add(output, targets, expected, batch_size(inputs))
    return {name: tally.finish() for name, tally in tallies.items()}


def _run(model: Model, inputs: tuple[Any, ...], data: Data) -> Tensor:
    """The model's answer; a batch that it cannot take is the data's fault, and described."""
    device = device_of(model)
    try:
        moved = [value.to(device) if isinstance(value, Tensor) else value for value in inputs]
        return first_tensor(model(*moved))
    except BitsmithError:
        raise
    # What a model raises on inputs of the wrong shape or type is its author's choice.
    except Exception as error:
        shapes = ", ".join(
            f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
            for value in inputs
            if isinstance(value, Tensor)
        )
        raise DataError(
            f"the model fails on a batch of {shapes or type(inputs[0]).__name__} from {data.name}: "
            f"{type(error).__name__}: {str(error).strip()}. The data need the shape and type that the "
            f"model was trained with"
        ) from error


def load_metric(spec: str) -> Metric:
    """The user's ``file.py:function(outputs, targets) -> float``; DataError where it cannot be called so."""
    metric = load_callable(spec, "a metric, function(outputs, targets) -> float", DataError)
    try:
        signature = inspect.signature(metric)
    except (TypeError, ValueError):  # a built-in that does not tell
        return metric
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise DataError(
            f"{spec!r} takes {signature}, but a metric is called as function(outputs, targets), with two "
            f"positional arguments, and returns a number: {error}"
        ) from error
    return metric


def split_batch(batch: Any) -> tuple[tuple[Any, ...], Tensor | None]:
    """A batch's inputs and targets: a tensor has none, of a tuple the last element is the target."""
    if isinstance(batch, Tensor):
        return (batch,), None
    if isinstance(batch, tuple | list) and batch:
        if len(batch) == 1:
            return (batch[0],), None
        return tuple(batch[:-1]), torch.as_tensor(batch[-1])
    raise DataError(
        f"a validation batch of type {type(batch).__name__} is not understood: give a tensor of inputs, or a "
        f"tuple of inputs and targets"
    )


def first_tensor(output: Any) -> Tensor:
    """The first tensor among a model's outputs, which is the one that is judged, in CPU memory, without its history."""
    for leaf in torch.utils._pytree.tree_leaves(output):
        if isinstance(leaf, Tensor):
            return leaf.detach().cpu()
        if hasattr(leaf, "__array__"):
            return torch.as_tensor(leaf)
    raise DataError(f"the model returned a {type(output).__name__} without any tensor: there is nothing to judge")


def device_of(model: Any) -> torch.device:
    """Where a model computes: where its parameters or buffers are; of any function the CPU.

    >>> device_of(nn.Linear(2, 2)).type
    'cpu'
    """
    if isinstance(model, Recorder):
        return model.device
    tensors = itertools.chain(model.parameters(), model.buffers()) if isinstance(model, nn.Module) else iter(())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def count_parameters(model: nn.Module) -> int:
    """The numbers in a model's parameters.

    >>> count_parameters(nn.Linear(4, 2))
    10
    """
    return sum(parameter.numel() for parameter in model.parameters())


class _Tally:
    """The sums from which ``Metrics`` are made."""

    def __init__(self, name: str, metric: Metric | None) -> None:
        self.name = name
        self.metric = metric
        self.seconds = 0.0
        self.samples = self.right = self.right5 = self.same = 0
        self.labelled = self.scored = self.compared = self.measured = False
        self.classes = 0
        self.error = self.power = self.measure = 0.0
        self.elements = 0

    def add(self, output: Tensor, targets: Tensor | None, expected: Tensor | None, size: int) -> None:
        self.samples += size
        is_scores = output.ndim == 2 and output.shape[1] > 1
        if targets is not None and is_scores and is_labels(targets):
            self._add_labels(output, targets)
        if targets is not None and self.metric is not None:
            self.measure += self._measure(output, targets) * size
            self.measured = True
        if expected is not None:
            self._add_expected(output, expected, is_scores)

    def _add_labels(self, output: Tensor, targets: Tensor) -> None:
        self.classes = output.shape[1]
        if len(targets) != len(output):
            raise DataError(f"{self.name}: a batch has {len(targets)} labels, but the model gave {len(output)} answers")
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < self.classes:
            raise DataError(
                f"{self.name}: the labels go from {int(targets.min())} to {int(targets.max())}, but the "
                f"model has {self.classes} scores: its classes are 0 to {self.classes - 1}, in the sorted "
                f"order of the folders' names"
            )
        self.labelled = True
        ranking = output.topk(min(5, self.classes), dim=1).indices  # (N, 5)
        hits = ranking == targets.unsqueeze(1)
        # argmax, not the ranking's first: the two may differ where scores tie, as they do on a coarse grid
        self.right += int((output.argmax(1) == targets).sum())
        self.right5 += int(hits.any(1).sum())

    def _add_expected(self, output: Tensor, expected: Tensor, is_scores: bool) -> None:
        if output.shape != expected.shape:
            raise DataError(
                f"{self.name}: outputs of the shapes {tuple(output.shape)} and {tuple(expected.shape)} "
                f"cannot be compared"
            )
        self.compared = True
        if is_scores:
            self.scored = True
            self.same += int((output.argmax(1) == expected.argmax(1)).sum())
        wide = expected.double()
        self.error += float((output.double() - wide).square().sum())
        self.power += float(wide.square().sum())
        self.elements += expected.numel()

    def _measure(self, output: Tensor, targets: Tensor) -> float:
        assert self.metric is not None
        given = f"outputs {tuple(output.shape)} and targets {tuple(targets.shape)}"
        try:
            result = self.metric(output, targets)
        except Exception as error:
            raise DataError(f"your metric failed on {given}: {type(error).__name__}: {error}") from error
        number = _real(result)
        if number is None:
            raise DataError(f"your metric returned {_shown(result)} for {given}: it must return one real number")
        if not math.isfinite(number):
            raise DataError(f"your metric returned {number} for {given}: it must return a finite number")
        return number

    def finish(self) -> Metrics:
        if not self.samples:
            raise DataError(f"{self.name} holds no samples: there is nothing to evaluate")
        if self.metric is not None and not self.measured:
            raise DataError(
                f"your metric takes outputs and targets, but {self.name} gives no targets to judge with: give "
                f"validation data with targets (y), or leave the metric out"
            )
        percent = 100.0 / self.samples
        return Metrics(
            samples=self.samples,
            top1=self.right * percent if self.labelled else None,
            top5=self.right5 * percent if self.labelled and self.classes > 5 else None,
            agreement=self.same * percent if self.scored else None,
            mse=self.error / self.elements if self.compared and self.elements else None,
            sqnr_db=sqnr_db(self.power, self.error) if self.compared else None,
            metric=self.measure / self.samples if self.metric is not None else None,
            seconds=round(self.seconds, 3),
        )


def _real(value: Any) -> float | None:
    """``value`` as a float if it is one real number: Python's, NumPy's or a tensor of one element."""
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biuf":
        value = torch.from_numpy(np.asarray(value, dtype=np.float64))
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex():
        return float(value)
    return None


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"


def sqnr_db(power: float, error: float) -> float | None:
    """Signal to noise in decibels; None where there is no noise or no signal, so no finite number to give.

    >>> sqnr_db(100.0, 1.0)
    20.0
    """
    return 10.0 * math.log10(power / error) if power > 0 and error > 0 else None
