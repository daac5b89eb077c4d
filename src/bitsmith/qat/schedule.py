"""What changes in the course of training: when batch norms and ranges freeze, and bit widths by epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..errors import DataError
from .graph import QATGraph


class QATSchedule:
    """Freezes batch norms, then ranges, after so many epochs or optimizer steps; ``step()`` counts them.

    Give ``total_epochs`` and call ``step()`` at the end of every epoch, or ``total_steps`` and call it behind every
    ``optimizer.step()``, or let ``follow(optimizer)`` do that. Nothing is counted by calls of ``train()``.

    ``freeze_bn``: batch statistics learn during so many epochs (or steps); then outputs are normalized as they will be
    in the file. 0 freezes them from the start, ``total_epochs`` never; default: half of the total. ``freeze_ranges``:
    the same for the ranges of quantizers; default: moving averages one epoch (a twentieth of the steps) later than the
    norms, while learned scales go on to learn. ``bits``: widths by epoch or step, as ``{0: 8, 4: 6, 8: 4}``: every
    quantizer has that many bits then, or the recipe's where these are more, which is where they must end.

    Source: Krishnamoorthi, Quantizing deep convolutional networks (arXiv 1806.08342), section 3.2.2, for the freezing.

    >>> schedule = QATSchedule(10)
    >>> schedule.freeze_bn, schedule.freeze_ranges
    (5, 6)
    >>> QATSchedule(10, freeze_bn=0).freeze_bn
    0
    """

    def __init__(
        self, total_epochs: int | None = None, *, total_steps: int | None = None, freeze_bn: int | None = None,
        freeze_ranges: int | None = None, bits: Mapping[int, int] | None = None,
    ) -> None:  # fmt: skip
        if (total_epochs is None) == (total_steps is None):
            raise DataError("a QATSchedule takes total_epochs or total_steps, one of the two")
        self.unit = "epochs" if total_steps is None else "steps"
        self.total = int(total_epochs if total_steps is None else total_steps)  # type: ignore[arg-type]
        after = 1 if total_steps is None else max(1, self.total // 20)
        self.freeze_bn = self.total // 2 if freeze_bn is None else freeze_bn
        self.freezes_learned = freeze_ranges is not None
        self.freeze_ranges = min(self.freeze_bn + after, self.total) if freeze_ranges is None else freeze_ranges
        for name, value in (
            ("total", self.total),
            ("freeze_bn", self.freeze_bn),
            ("freeze_ranges", self.freeze_ranges),
        ):
            if value < 0:
                raise DataError(f"QATSchedule: {name} is {value}, but {self.unit} are counted from 0")
        self.bits = dict(sorted((bits or {}).items()))
        if self.bits and (min(self.bits) or not all(2 <= width <= 16 for width in self.bits.values())):
            raise DataError(f"QATSchedule: bits={dict(bits or {})} must begin at 0 and hold widths of 2 to 16")
        self.count = 0
        self.models: list[QATGraph] = []

    def attach(self, model: QATGraph) -> None:
        """Let this schedule govern ``model``, from where it stands; ``prepare_qat(..., schedule=...)`` does it."""
        self.models.append(model)
        self._apply(model)

    def step(self) -> None:
        """One epoch, or one optimizer step, is over."""
        if not self.models:
            raise DataError("this QATSchedule governs no model: give it to prepare_qat(..., schedule=schedule)")
        self.count += 1
        changes = self.count in (self.freeze_bn, self.freeze_ranges, *self.bits)
        for model in self.models:
            model.progress = self.progress
            if changes:
                self._apply(model)

    @property
    def progress(self) -> float:
        """How much of the training is over, 0 to 1."""
        return min(self.count / self.total, 1.0) if self.total else 1.0

    def follow(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps of an optimizer."""
        if self.unit != "steps":
            raise DataError("this QATSchedule counts epochs: call step() at the end of each, or give total_steps")
        optimizer.register_step_post_hook(lambda *_: self.step())

    def _apply(self, model: QATGraph) -> None:
        """Bring a model to where the count stands."""
        model.progress = self.progress
        model.freeze_norms(self.count >= self.freeze_bn)
        if self.count >= self.freeze_ranges:
            model.freeze_ranges(learned=self.freezes_learned)
        if due := [width for at, width in self.bits.items() if at <= self.count]:
            model.set_bits(due[-1])

    def state_dict(self) -> dict[str, Any]:
        """How far it is."""
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.count = int(state["count"])
        for model in self.models:
            self._apply(model)

    def __repr__(self) -> str:
        freezing = f"freeze_bn={self.freeze_bn}, freeze_ranges={self.freeze_ranges}"
        return f"QATSchedule({self.count} of {self.total} {self.unit}, {freezing})"
