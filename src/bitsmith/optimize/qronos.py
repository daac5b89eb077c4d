"""Qronos: take back the error of the layers before, then spread the error of each column over those to come.

Source: Zhang et al., Qronos (arXiv 2505.11695). With H = X~^T X~ and G = X~^T X of the quantized and the float stream,
|X w - X~ q|^2 is, but for a constant, |X~ (w* - q)|^2 with w* = H^-1 G w. The first column is chosen for the weights as
they are, q_1 = Q((G_1 w - sum over j > 1 of H_1j w_j) / H_11); what is left is the best for that choice, which is w*
less q_1's error spread as in GPTQ; from there on it is GPTQ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..steps import Qronos
from .column_steps import ColumnStep, aligned
from .feedback import Damped, Feedback


class QronosStep(ColumnStep[Qronos]):
    """Qronos from both streams."""

    name = "qronos"

    def __init__(self, options: Qronos) -> None:
        super().__init__(options, streams=("quantized", "float"))

    def prepare(self, w: Tensor, h: Tensor, g: Tensor | None, damping: float, notes: list[str]) -> Feedback:
        """w*, the first column's own value, and GPTQ's way to spread errors."""
        assert g is not None
        return qronos(w, Damped.of(h, damping, notes), g)


def qronos(w: Tensor, h: Damped, g: Tensor) -> Feedback:
    """What the shared loop needs for Qronos: ``w`` is (groups, columns, rows), ``g`` (groups, columns, columns)."""
    best = aligned(w, h, g)
    # damping is added to H and G alike: it holds the weights where they are
    g_first = g[:, :1] + torch.nn.functional.pad(h.added[:, :1], (0, w.shape[1] - 1)).unsqueeze(1)
    rest = h.h[:, :1].clone()
    rest[..., 0] = 0
    first = ((g_first - rest) @ w)[:, 0] / h.h[:, 0, 0, None]
    return Feedback(start=best, passes=h.passes(), target=best, first=first)
