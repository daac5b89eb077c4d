"""``QATModel``: quantization-aware training in the style of TI's wrapper."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..capture import ForwardFunction
from ..errors import CheckpointError, DataError
from ..model import QuantizedModel
from ..qat import Distillation, Kinds, Oscillation, QATSchedule, prepare_qat
from ..recipe import Override, PlacementName, Recipe
from ..targets import Target
from .export import export

_LISTED = 4


class QATModel(nn.Module):
    """``prepare_qat``, a ``QATSchedule`` and ``convert`` in one module that trains in any loop.

    Call ``step()`` at the end of every epoch: it alone counts, ``train()`` and ``eval()`` may be called as often as a
    loop likes. With ``total_steps`` instead of ``total_epochs`` optimizer steps are counted: call ``step()`` behind
    each, or once ``schedule.follow(optimizer)``. ``freeze_bn``, ``freeze_ranges`` and ``bits`` are those of
    ``bitsmith.QATSchedule`` (0 means 0), all else that of ``bitsmith.prepare_qat``, whose result is ``module``.
    Add ``penalty()`` to the loss where there is a ``teacher`` or damping of ``oscillation``.

    ``recipe`` None is that of the target, or of a model that ``bitsmith.quantize`` made.

    The state_dict holds weights, batch norms, ranges and the schedule's count, so that training goes on where it was.
    ``load_state_dict`` also takes that of ``module`` and that of the float model.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> model = QATModel(net, "int8", total_epochs=2, example_inputs=torch.randn(2, 3, 8, 8))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    >>> for epoch in range(2):
    ...     for _ in range(3):
    ...         model(torch.randn(16, 3, 8, 8)).square().mean().backward()
    ...         optimizer.step()
    ...         optimizer.zero_grad()
    ...     model.step()
    >>> model.convert().report.coverage.fraction
    1.0
    """

    def __init__(
        self, model: nn.Module, recipe: str | Path | Recipe | None = None, total_epochs: int | None = None,
        example_inputs: Any = None, target: str | Target = "onnxruntime", *, total_steps: int | None = None,
        freeze_bn: int | None = None, freeze_ranges: int | None = None, bits: Mapping[int, int] | None = None,
        kind: str | Kinds = "auto", calibration: Iterable[Any] | None = None,
        teacher: nn.Module | Distillation | None = None, oscillation: Oscillation | None = None,
        placement: PlacementName | None = None, overrides: Iterable[Override] = (),
        forward: ForwardFunction | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.schedule = QATSchedule(
            total_epochs, total_steps=total_steps, freeze_bn=freeze_bn, freeze_ranges=freeze_ranges, bits=bits
        )
        overrides = tuple(overrides)
        self.module = prepare_qat(
            model, recipe, example_inputs, target, calibration=calibration, kind=kind, schedule=self.schedule,
            teacher=teacher, oscillation=oscillation, placement=placement, overrides=overrides, forward=forward,
        )  # fmt: skip
        # what reads a checkpoint of the float model; in a tuple, so that it is no part of this module
        self._float = (None if isinstance(model, QuantizedModel) else model,)
        self._options = {"example_inputs": example_inputs, "placement": placement, "overrides": overrides,
                         "kind": kind, "forward": forward, "target": target, "recipe": recipe,
                         "oscillation": oscillation}  # fmt: skip

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes, on its grids."""
        return self.module(*args, **kwargs)

    def step(self) -> None:
        """One epoch is over (or one optimizer step, where ``total_steps`` was given)."""
        self.schedule.step()

    def penalty(self) -> Tensor:
        """What to add to the loss of the batch that was just run; 0 without a teacher and damping."""
        return self.module.penalty()

    def convert(self) -> QuantizedModel:
        """The quantized model on the grids of this moment; training may go on."""
        q = self.module.convert()
        if not self.schedule.count and self.schedule.freeze_bn:
            q.report.notes.append(
                "the schedule never counted, so batch norms and ranges never froze: call step() at the end of every "
                "epoch"
            )
        return q

    def export(self, path: str | Path, **options: Any) -> Path:
        """Convert and write ``.onnx`` or ``.pt2``, by ``bitsmith.export_onnx`` or ``export_pt2`` with ``options``."""
        return export(self.convert(), path, **options)

    # State

    def get_extra_state(self) -> Tensor:
        """How far the schedule is."""
        return torch.tensor(self.schedule.count)

    def set_extra_state(self, state: Tensor) -> None:
        """Go on from there."""
        self.schedule.load_state_dict({"count": int(state)})

    def load_weights(self, path: str | os.PathLike[str]) -> QATModel:
        """Load a ``.safetensors``, ``.pt`` or ``.pth`` file as ``load_state_dict`` does; nothing in it is executed."""
        from ..evaluate.checkpoint import read_checkpoint

        self.load_state_dict(read_checkpoint(path))
        return self

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take a state of this module, of ``module`` within it, or of the float model.

        Weights of the float model are copied into the Parameters that an optimizer may hold already; ranges then start
        anew from the next batch in train mode. Raises CheckpointError where the keys are those of none of the three.
        """
        if any(key.startswith("module.graph.") for key in state_dict):
            return super().load_state_dict(state_dict, strict, assign)
        if any(key.startswith("graph.") for key in state_dict):
            return self.module.load_state_dict(state_dict, strict, assign)
        return self._load_float(state_dict, strict)

    def _load_float(self, state_dict: Mapping[str, Any], strict: bool) -> Any:
        if self._float[0] is None:
            raise DataError(
                "this QATModel came from a quantized model, whose layers are no longer those of the float model: load "
                "the weights into the float model, quantize it, and wrap the result"
            )
        model = copy.deepcopy(self._float[0])
        prefix = "module." if all(key.startswith("module.") for key in state_dict) else ""
        plain = {key.removeprefix(prefix): value for key, value in state_dict.items()}
        if not plain.keys() & model.state_dict().keys():
            names = ", ".join(list(state_dict)[:_LISTED])
            raise CheckpointError(
                f"no key of the state is one of the float model {type(model).__name__} or of this QATModel: it has "
                f"{names}"
            )
        found = model.load_state_dict(plain, strict)
        fresh = prepare_qat(model, **self._options).to(next(self.parameters()).device)
        self.module.load_state_dict(fresh.state_dict())
        self.module.template = fresh.template  # the weights that ranges will be found with
        self.schedule.load_state_dict(self.schedule.state_dict())  # freezes what it had frozen
        return found
