"""GPFQ: choose each column so that the quantized layer's output follows the float layer's so far.

Source: Zhang, Zhou, Saab, Post-training Quantization for Neural Networks with Provable Guarantees (arXiv 2201.11113),
algorithm 1: q_t = Q(<X~_t, u_(t-1) + w_t X_t> / |X~_t|^2), u_t = u_(t-1) + w_t X_t - q_t X~_t. Since u_(t-1) is the sum
of w_i X_i - q_i X~_i over i < t, H = X~^T X~ and G = X~^T X are all that is needed:
q_t = Q((sum over i <= t of G_ti w_i - sum over i < t of H_ti q_i) / H_tt).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..steps import Gpfq
from .column_steps import ColumnStep, aligned
from .feedback import Damped, Feedback

_DAMPING = 0.01  # of the comparison with the least error that is possible; not of the algorithm


class GpfqStep(ColumnStep[Gpfq]):
    """GPFQ from both streams."""

    name = "gpfq"

    def __init__(self, options: Gpfq) -> None:
        super().__init__(options, streams=("quantized", "float"))

    def prepare(self, w: Tensor, h: Tensor, g: Tensor | None, damping: float, notes: list[str]) -> Feedback:
        """The greedy path of algorithm 1."""
        assert g is not None
        return gpfq(w, h, g)


def gpfq(w: Tensor, h: Tensor, g: Tensor) -> Feedback:
    """What the shared loop needs for GPFQ: ``w`` (groups, columns, rows), ``h`` and ``g`` (groups, columns, columns).

    An input that is always 0 in the quantized stream leaves its weight as it is, and passes nothing on.
    """
    diagonal = h.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # (groups, columns, 1)
    dead = diagonal == 0
    safe = torch.where(dead, torch.ones_like(diagonal), diagonal)
    start = torch.where(dead, w, (g.tril() @ w) / safe)
    return Feedback(start=start, passes=(h / safe).mT, target=aligned(w, Damped.of(h, _DAMPING), g), of="rounded")
