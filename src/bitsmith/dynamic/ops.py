"""Dynamically quantized operators under names of their own, so that capture keeps them whole.

``bitsmith::dynamic_linear``, ``dynamic_embedding`` and ``dynamic_recurrent`` compute by ``laws`` and ``recurrence``;
the ONNX writer has a row for each (``export/onnx/ops_dynamic.py``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import laws, recurrence

_LIBRARY = torch.library.Library("bitsmith", "DEF")  # type: ignore[no-untyped-call]
_RECURRENT = (
    "(str kind, Tensor x, Tensor? h, Tensor? c, Tensor w_ih, Tensor? s_ih, Tensor w_hh, Tensor? s_hh, Tensor? bias,"
    " str activations) -> (Tensor, Tensor, Tensor)"
)


def embedding(indices: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The rows of an 8-bit (or float16) table, dequantized."""
    rows = weight[indices].float()
    if scale is None:
        return rows
    return rows * (scale[indices].unsqueeze(-1) if scale.ndim else scale)


def _define(schema: str, compute: object, fake: object) -> None:
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=[torch.Tag.pt2_compliant_tag])  # type: ignore[no-untyped-call]
    _LIBRARY.impl(name, compute, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"bitsmith::{name}", fake, lib=_LIBRARY)  # type: ignore[arg-type]


def _fake_linear(x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, activations: str) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _fake_embedding(indices: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    return torch.empty(*indices.shape, weight.shape[1], device=weight.device)


def _fake_recurrent(
    kind: str, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, s_ih: Tensor | None, w_hh: Tensor,
    s_hh: Tensor | None, bias: Tensor | None, activations: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    directions, hidden = w_hh.shape[0], w_hh.shape[2]
    steps, batch = x.shape[:2]
    state = x.new_empty(directions, batch, hidden)
    cell = torch.empty_like(state) if kind == "lstm" else x.new_empty(0)
    return x.new_empty(steps, batch, directions * hidden), state, cell


_define(
    "dynamic_linear(Tensor x, Tensor weight, Tensor? scale, Tensor? bias, str activations) -> Tensor",
    laws.linear,
    _fake_linear,
)
_define("dynamic_embedding(Tensor indices, Tensor weight, Tensor? scale) -> Tensor", embedding, _fake_embedding)
_define("dynamic_recurrent" + _RECURRENT, recurrence.recurrent, _fake_recurrent)

dynamic_linear = torch.ops.bitsmith.dynamic_linear.default
dynamic_embedding = torch.ops.bitsmith.dynamic_embedding.default
dynamic_recurrent = torch.ops.bitsmith.dynamic_recurrent.default
