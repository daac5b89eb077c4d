"""From a user's batch to the arguments of the model's ``forward``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError

ForwardFunction = Callable[[Any, Any], Any]
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class _Recorder:
    """Stands in for the model in a user's ``forward`` function and keeps the arguments it is called with."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.calls: list[Arguments] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        with torch.no_grad():
            return self._model(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _parameters(model: nn.Module) -> list[inspect.Parameter]:
    return list(inspect.signature(model.forward).parameters.values())


def batch_arguments(model: nn.Module, batch: Any, forward: ForwardFunction | None = None) -> Arguments:
    """Positional and keyword arguments of ``model`` for one batch.

    A tensor is the only argument. Of a tuple or list the leading elements that forward requires are its
    inputs, the rest (labels) is ignored; ``forward(self, *xs)`` takes them all. A mapping is taken by the
    parameter names of forward. ``forward(model, batch)`` overrides all that: what it calls the model with is
    taken.

    >>> net = nn.Linear(4, 2)
    >>> args, kwargs = batch_arguments(net, (torch.zeros(3, 4), torch.zeros(3)))
    >>> len(args), kwargs
    (1, {})
    """
    if forward is not None:
        recorder = _Recorder(model)
        forward(recorder, batch)
        if len(recorder.calls) != 1:
            raise DataError(
                f"the forward= function called the model {len(recorder.calls)} times for one batch; it must "
                "call it exactly once, as model(...)"
            )
        args, kwargs = recorder.calls[0]
        return positional(inspect.signature(model.forward), args, kwargs)
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return positional(inspect.signature(model.forward), (), _by_name(model, batch))
    if isinstance(batch, tuple | list):
        return _leading(model, batch), {}
    raise DataError(
        f"a batch of type {type(batch).__module__}.{type(batch).__qualname__} is not understood: give a "
        "tensor, a tuple or list whose leading elements are the inputs, a dict by forward's parameter names, "
        "or pass forward=lambda model, batch: ..."
    )


def positional(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """The same arguments with as many as possible in their places, so that every call looks alike."""
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise DataError(f"the inputs do not fit forward{signature}: {error}") from error
    return bound.args, bound.kwargs


def _by_name(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    parameters = _parameters(model)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return dict(batch)
    names = {p.name for p in parameters}
    missing = [p.name for p in parameters if p.default is p.empty and p.kind is not p.VAR_POSITIONAL]
    missing = [name for name in missing if name not in batch]
    if missing:
        raise DataError(
            f"the batch is a dict with keys {sorted(map(str, batch))}, but forward of {type(model).__name__} "
            f"also needs {missing}: rename the keys or pass forward=lambda model, batch: ..."
        )
    return {name: value for name, value in batch.items() if name in names}


def _leading(model: nn.Module, batch: tuple[Any, ...] | list[Any]) -> tuple[Any, ...]:
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = _parameters(model)
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return tuple(batch)
    required = sum(p.kind in positional and p.default is p.empty for p in parameters)
    if not required:
        required = 1
    if len(batch) < required:
        raise DataError(
            f"the batch holds {len(batch)} elements, but forward of {type(model).__name__} requires "
            f"{required}: {[p.name for p in parameters][:required]}"
        )
    return tuple(batch[:required])


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors in a nest of tuples, lists and dicts, in order."""
    for leaf in torch.utils._pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf


def read_batches(
    model: nn.Module, calibration: Iterable[Any], forward: ForwardFunction | None = None
) -> list[Arguments]:
    """All calibration batches as arguments of the model; a clear error where there are none.

    Tensors are laid out in order (NCHW, say, also where they came as channels_last): kernels add up in another order in
    another layout, and rounding steps such as GPTQ make a model of its own of the last bit.
    """
    if isinstance(calibration, Tensor):
        calibration = [calibration]
    if not isinstance(calibration, Iterable):
        raise DataError(
            f"calibration must be an iterable of batches, not {type(calibration).__name__}; a single tensor "
            "is taken as one batch"
        )
    given = [batch_arguments(model, batch, forward) for batch in calibration]
    batches: list[Arguments] = torch.utils._pytree.tree_map_only(Tensor, Tensor.contiguous, given)
    if not batches:
        raise DataError("calibration is empty: give at least one batch (some hundred samples are usual)")
    first = _signature(batches[0])
    for index, batch in enumerate(batches):
        if any(t.ndim and t.shape[0] == 0 for t in tensors_of(batch)):
            raise DataError(f"calibration batch {index} holds no samples")
        if (found := _signature(batch)) != first:
            raise DataError(
                f"calibration batch {index} has inputs {found}, but the first batch has {first} "
                "(shapes without the batch dimension): all batches must agree"
            )
    return batches


def _signature(arguments: Arguments) -> list[str]:
    return [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape[1:])}" for t in tensors_of(arguments)]


def sample_count(arguments: Arguments) -> int:
    """How many samples a batch holds: the leading dimension of its first tensor."""
    return next((t.shape[0] if t.ndim else 1 for t in tensors_of(arguments)), 1)


def first_samples(arguments: Arguments, count: int) -> Arguments:
    """The first ``count`` samples of a batch."""
    return _cut(arguments, slice(count))


def last_samples(arguments: Arguments, count: int) -> Arguments:
    """The last ``count`` samples of a batch."""
    return _cut(arguments, slice(-count, None))


def sample(arguments: Arguments, index: int) -> Arguments:
    """One sample of a batch, as a batch of one."""
    return _cut(arguments, slice(index, index + 1))


def _cut(arguments: Arguments, samples: slice) -> Arguments:
    found = sample_count(arguments)
    cut = lambda t: t[samples] if t.ndim and t.shape[0] == found else t  # noqa: E731
    result: Arguments = torch.utils._pytree.tree_map_only(Tensor, cut, arguments)
    return result
