"""Knowledge distillation: the float model's outputs as a second target."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError


class Distillation:
    """What the outputs of a model that trains lack to those of a ``teacher``, mostly the float model that it came from.

    ``loss`` ``"kl"``: ``T^2 KL(softmax(z_t / T) || softmax(z / T))`` over axis 1 of every output, averaged over samples
    (and positions), with temperature ``T``; ``"mse"``: mean squared difference, for outputs that are no class scores.
    ``weight`` multiplies it. The teacher is copied, runs in eval mode and does not learn.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2.

    >>> distillation = Distillation(nn.Identity(), temperature=2.0)
    >>> scores = torch.tensor([[1.0, 2.0]])
    >>> float(distillation.loss(scores, distillation.target(scores)))
    0.0
    """

    def __init__(
        self, teacher: nn.Module, *, weight: float = 1.0, temperature: float = 1.0, loss: Literal["kl", "mse"] = "kl"
    ) -> None:
        if loss not in ("kl", "mse"):
            raise DataError(f"Distillation knows the losses 'kl' and 'mse', not {loss!r}")
        if temperature <= 0 or weight < 0:
            raise DataError(f"Distillation: temperature {temperature} must be above 0, and weight {weight} not below")
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.weight, self.temperature, self.kind = weight, temperature, loss

    def target(self, *args: Any, **kwargs: Any) -> Any:
        """What the teacher says."""
        with torch.no_grad():
            return self.teacher(*args, **kwargs)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """The weighted loss of outputs, summed over all of them that are float tensors."""
        pairs = zip(*(torch.utils._pytree.tree_leaves(value) for value in (outputs, targets)), strict=True)
        losses = [self._of(z, z_t) for z, z_t in pairs if isinstance(z, Tensor) and z.is_floating_point()]
        return self.weight * torch.stack(losses).sum()

    def _of(self, z: Tensor, z_t: Tensor) -> Tensor:
        if self.kind == "mse":
            return F.mse_loss(z, z_t)
        if z.ndim < 2:
            raise DataError(f"Distillation: an output of shape {list(z.shape)} has no classes along axis 1: loss='mse'")
        t = self.temperature
        logs, wanted = F.log_softmax(z / t, 1), F.log_softmax(z_t / t, 1)
        divergence = F.kl_div(logs, wanted, reduction="none", log_target=True).sum(1)
        return t * t * divergence.mean()
