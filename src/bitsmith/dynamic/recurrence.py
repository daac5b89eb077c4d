"""Recurrent layers step by step, on quantized weights and quantized inputs.

One layer, one or two directions. The input's product is formed for all time steps at once, with the scale of the
whole input; the state is quantized anew at each step. That is what onnxruntime's DynamicQuantizeLSTM and PyTorch's
dynamic kernels do. Gates are in torch's order: LSTM i, f, g, o; GRU r, z, n.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import laws

GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
State = tuple[Tensor, Tensor | None]


def cell(kind: str, x: Tensor, product: Tensor, state: State, bias: Tensor | None) -> State:
    """The next state. ``x`` and ``product``: the input's and the state's products, ``(batch, gates * hidden)``.

    ``bias``: ``(2, gates * hidden)``, that of the input and that of the state.
    """
    h, c = state
    if kind == "gru":
        if bias is not None:
            x, product = x + bias[0], product + bias[1]
        (xr, xz, xn), (hr, hz, hn) = x.chunk(3, -1), product.chunk(3, -1)
        z = torch.sigmoid(xz + hz)
        candidate = torch.tanh(xn + torch.sigmoid(xr + hr) * hn)
        return (1 - z) * candidate + z * h, None
    gates = x + product
    if bias is not None:
        gates = gates + (bias[0] + bias[1])
    if kind != "lstm":
        return torch.tanh(gates) if kind == "rnn_tanh" else torch.relu(gates), None
    assert c is not None
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def recurrent(
    kind: str, x: Tensor, h: Tensor | None, c: Tensor | None, w_ih: Tensor, s_ih: Tensor | None, w_hh: Tensor,
    s_hh: Tensor | None, bias: Tensor | None, activations: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """One recurrent layer over ``x`` ``(time, batch, in)``.

    Weights have a leading axis of directions; scales are ``(directions, gates * hidden)`` or ``(directions,)``, or
    None for float16 weights; ``bias`` is ``(directions, 2, gates * hidden)``. Returns outputs ``(time, batch,
    directions * hidden)`` and the last states ``(directions, batch, hidden)``; the third is empty but for an LSTM.
    """
    steps, batch = x.shape[:2]
    sizes = [int(batch)] * int(steps)
    return packed(kind, x.flatten(0, 1), sizes, h, c, w_ih, s_ih, w_hh, s_hh, bias, activations, time_major=True)


def packed(
    kind: str, data: Tensor, sizes: list[int], h: Tensor | None, c: Tensor | None, w_ih: Tensor, s_ih: Tensor | None,
    w_hh: Tensor, s_hh: Tensor | None, bias: Tensor | None, activations: str, *, time_major: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same over a packed sequence: ``data`` ``(elements, in)``, ``sizes`` active samples at each step."""
    directions, hidden = w_hh.shape[0], w_hh.shape[2]
    outputs, states, cells = [], [], []
    for d in range(directions):
        start = [
            data.new_zeros(sizes[0], hidden) if s is None else s[d]
            for s in ((h, c) if kind == "lstm" else (h,))
        ]  # fmt: skip
        products = laws.linear(data, w_ih[d], _of(s_ih, d), None, activations)
        weight, scale, both = w_hh[d], _of(s_hh, d), _of(bias, d)
        if activations == "float":
            weight, scale = laws.dequantized(weight, scale), None

        def step(x: Tensor, state: State, weight=weight, scale=scale, both=both) -> State:  # type: ignore[no-untyped-def]
            return cell(kind, x, laws.linear(state[0], weight, scale, None, activations), state, both)

        y, last = _run(torch.split(products, sizes), start, step, reverse=d == 1)
        outputs.append(y)
        states.append(last[0])
        cells.extend(last[1:])
    out = torch.cat(outputs, -1)
    if time_major:
        out = out.reshape(len(sizes), sizes[0], -1)
    return out, torch.stack(states), torch.stack(cells) if cells else data.new_empty(0)


def _of(tensor: Tensor | None, direction: int) -> Tensor | None:
    return None if tensor is None else tensor[direction]


def _run(
    products: tuple[Tensor, ...], start: list[Tensor], step: Callable[[Tensor, State], State], *, reverse: bool
) -> tuple[Tensor, list[Tensor]]:
    """All steps of one direction; a sample that has ended keeps its state, one that begins later its first one.

    ``products`` shrink over time, since packed samples are sorted by their length.
    """
    states = [s.clone() for s in start]
    outputs: list[Tensor] = []
    for x in reversed(products) if reverse else products:
        active = len(x)
        new = step(x, (states[0][:active], states[1][:active] if len(states) > 1 else None))
        outputs.append(new[0])
        for i, value in enumerate(new[: len(states)]):
            assert value is not None
            states[i] = value if active == len(states[i]) else torch.cat([value, states[i][active:]])
    return torch.cat(outputs[::-1] if reverse else outputs), states
