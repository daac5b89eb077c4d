"""LSTM, GRU and plain recurrent layers and cells on integer weights, called like those of ``torch.nn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ..errors import DataError
from ..grid import TensorSpec
from .laws import Activations
from .layers import DynamicLayer, DynamicLinear
from .ops import dynamic_recurrent
from .recurrence import cell, packed
from .weights import quantize_state_weight, quantize_weight


def recurrent_kind(layer: nn.Module) -> str:
    """``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``."""
    name = type(layer).__name__.lower().removesuffix("cell")
    return f"rnn_{layer.nonlinearity}" if name == "rnn" else name


class DynamicRecurrent(DynamicLayer):
    """``nn.LSTM``, ``nn.GRU`` or ``nn.RNN``: any number of layers, one or two directions, packed sequences too.

    Weights of layer ``l``, both directions stacked: ``weight_ih_l{l}`` int8 ``(directions, gates * hidden, in)``,
    ``weight_hh_l{l}`` ``(directions, gates * hidden, hidden)``; ``bias_l{l}`` ``(directions, 2, gates * hidden)``.
    """

    def __init__(self, layer: nn.RNNBase, spec: TensorSpec, activations: Activations, name: str) -> None:
        super().__init__(activations)
        self.kind, self.source = recurrent_kind(layer), type(layer).__name__
        self.input_size, self.hidden_size, self.num_layers = layer.input_size, layer.hidden_size, layer.num_layers
        self.batch_first, self.bidirectional = layer.batch_first, layer.bidirectional
        suffixes = ("", "_reverse") if layer.bidirectional else ("",)
        for index in range(layer.num_layers):
            for part, quantize in (("weight_ih", quantize_weight), ("weight_hh", quantize_state_weight)):
                rows = [getattr(layer, f"{part}_l{index}{suffix}") for suffix in suffixes]
                found = [self._quantize(w, spec, f"{part}_l{index} of {name}", quantize) for w in rows]
                scales = [scale for _, scale in found if scale is not None]
                codes = torch.stack([codes for codes, _ in found])
                self._store(f"{part}_l{index}", codes, torch.stack(scales) if scales else None)
            bias = None
            if layer.bias:
                names = [(f"bias_ih_l{index}{suffix}", f"bias_hh_l{index}{suffix}") for suffix in suffixes]
                bias = torch.stack([torch.stack([getattr(layer, n) for n in pair]) for pair in names])
            self._constant(f"bias_l{index}", bias)

    def parameters_of(self, index: int) -> tuple[Tensor | None, ...]:
        """Input weight and scale, state weight and scale, bias of one layer."""
        ih, hh = f"weight_ih_l{index}", f"weight_hh_l{index}"
        names = (ih, f"{ih}_scale", hh, f"{hh}_scale", f"bias_l{index}")
        return tuple(getattr(self, name) for name in names)

    def forward(self, x: Any, hx: Any = None) -> Any:
        """As in ``torch.nn``: ``(output, h_n)``, for an LSTM ``(output, (h_n, c_n))``."""
        if isinstance(x, PackedSequence):
            return self._packed(x, hx)
        batched = x.ndim == 3
        h, c = self._states(hx, batched)
        if not batched:
            x = x.unsqueeze(1)
        elif self.batch_first:
            x = x.transpose(0, 1)
        if x.ndim != 3 or x.shape[-1] != self.input_size:
            raise DataError(
                f"{self.source}: the input's last axis must be {self.input_size}, its rank 2 or 3, not {list(x.shape)}"
            )
        last_h, last_c = [], []
        for index in range(self.num_layers):
            weights = self.parameters_of(index)
            start = [None if s is None else self._part(s, index) for s in (h, c)]
            x, hn, cn = dynamic_recurrent(self.kind, x, *start, *weights, self.activations)
            last_h.append(hn)
            last_c.append(cn)
        if not batched:
            x, last_h, last_c = x.squeeze(1), [s.squeeze(1) for s in last_h], self._squeezed(last_c)
        elif self.batch_first:
            x = x.transpose(0, 1)
        return self._results(x, last_h, last_c)

    def _squeezed(self, cells: list[Tensor]) -> list[Tensor]:
        return [s.squeeze(1) for s in cells] if self.kind == "lstm" else cells

    def _part(self, state: Tensor, index: int) -> Tensor:
        directions = 2 if self.bidirectional else 1
        return state if self.num_layers == 1 else state[index * directions : (index + 1) * directions]

    def _states(self, hx: Any, batched: bool) -> tuple[Tensor | None, Tensor | None]:
        h, c = (hx if hx is not None else (None, None)) if self.kind == "lstm" else (hx, None)
        if batched or h is None:
            return h, c
        return h.unsqueeze(1), None if c is None else c.unsqueeze(1)

    def _results(self, x: Any, h: list[Tensor], c: list[Tensor]) -> Any:
        last = h[0] if len(h) == 1 else torch.cat(h)
        if self.kind != "lstm":
            return x, last
        return x, (last, c[0] if len(c) == 1 else torch.cat(c))

    def _packed(self, x: PackedSequence, hx: Any) -> Any:
        h, c = self._states(hx, True)
        if x.sorted_indices is not None:
            h, c = (None if s is None else s.index_select(1, x.sorted_indices) for s in (h, c))
        data, sizes = x.data, x.batch_sizes.tolist()
        last_h, last_c = [], []
        for index in range(self.num_layers):
            start = [None if s is None else self._part(s, index) for s in (h, c)]
            arguments: Any = (*start, *self.parameters_of(index), self.activations)
            data, hn, cn = packed(self.kind, data, sizes, *arguments)
            last_h.append(hn)
            last_c.append(cn)
        if x.unsorted_indices is not None:
            last_h = [s.index_select(1, x.unsorted_indices) for s in last_h]
            last_c = [s.index_select(1, x.unsorted_indices) for s in last_c] if self.kind == "lstm" else last_c
        out = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return self._results(out, last_h, last_c)

    def extra_repr(self) -> str:
        """Sizes, and how weights and activations are quantized."""
        more = "".join(f", {name}=True" for name in ("batch_first", "bidirectional") if getattr(self, name))
        layers = f", num_layers={self.num_layers}" if self.num_layers > 1 else ""
        kind = "float16" if self.weight_ih_l0_scale is None else "int8"
        sizes = f"{self.input_size}, {self.hidden_size}{layers}{more}"
        return f"{self.source}, {sizes}, weights={kind}, activations={self.activations}"


class DynamicCell(DynamicLayer):
    """``nn.LSTMCell``, ``nn.GRUCell`` or ``nn.RNNCell``: two dynamic linear layers and the gates in float."""

    def __init__(self, layer: nn.RNNCellBase, spec: TensorSpec, activations: Activations, name: str) -> None:
        super().__init__(activations)
        self.kind, self.source, self.hidden_size = recurrent_kind(layer), type(layer).__name__, layer.hidden_size
        self.input = DynamicLinear(layer.weight_ih, None, spec, activations, f"{name}.weight_ih")
        self.state = DynamicLinear(layer.weight_hh, None, spec, activations, f"{name}.weight_hh")
        self._constant("bias", torch.stack([layer.bias_ih, layer.bias_hh]) if layer.bias else None)

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        """One step: the new ``h``, for an LSTM ``(h, c)``."""
        if hx is None:
            zeros = x.new_zeros(*x.shape[:-1], self.hidden_size)
            hx = (zeros, zeros) if self.kind == "lstm" else zeros
        h, c = hx if self.kind == "lstm" else (hx, None)
        bias = self.bias
        assert bias is None or isinstance(bias, Tensor)
        state = cell(self.kind, self.input(x), self.state(h), (h, c), bias)
        return state if self.kind == "lstm" else state[0]

    def extra_repr(self) -> str:
        """The float layer's type; the linear layers say the rest."""
        return self.source
