"""An LSTM on grids, written out step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate.watching import WeightQuantizer
from ..capture.marks import LayerSpecs
from ..errors import DataError, RecipeError
from ..recipe import Recipe, load_recipe
from .module import Place, QuantModule, Spec, place_of, spec_of

_State = tuple[Tensor, Tensor]


class QuantLSTM(nn.LSTM, QuantModule):
    """``torch.nn.LSTM`` with weights, inputs and hidden states on grids; gates and cell state stay in float.

    ``weights`` and ``activations`` are TensorSpecs or recipes, ``recipe`` gives both, None takes the recipe of the
    whole model. It is captured as its steps, one after the other: the files of long sequences are large. Projections
    (``proj_size``) and packed sequences are refused.

    >>> layer = QuantLSTM(4, 8, batch_first=True)
    >>> y, (h, c) = layer(torch.randn(2, 5, 4))
    >>> y.shape, h.shape
    (torch.Size([2, 5, 8]), torch.Size([1, 2, 8]))
    """

    def __init__(
        self, *args: Any, recipe: str | Path | Recipe | None = None, weights: Spec = None, activations: Place = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._attach(recipe, weights, activations)

    @classmethod
    def from_float(cls, layer: nn.LSTM) -> QuantLSTM:
        """The quantized layer around a float layer's own parameters."""
        new = cls(
            layer.input_size, layer.hidden_size, layer.num_layers, layer.bias, layer.batch_first, layer.dropout,
            layer.bidirectional, layer.proj_size,
        )  # fmt: skip
        for name, parameter in layer.named_parameters():
            setattr(new, name, parameter)
        return new.train(layer.training)

    def _attach(self, recipe: str | Path | Recipe | None, weights: Spec, activations: Place) -> None:
        if self.proj_size:
            raise RecipeError("QuantLSTM has no projections: build it with proj_size=0, or leave this LSTM in float")
        own = None if recipe is None else load_recipe(recipe)
        spec = spec_of(weights, "weights") or (own.weights if own else None)
        self.specs = LayerSpecs(spec, own.bias if own else None)
        names = [name for name, _ in self.named_parameters() if name.startswith("weight")]
        self.weight_quantizers = nn.ModuleDict({name: WeightQuantizer(spec) for name in names})
        given: Place = activations if activations is not None else (own.activations if own else True)
        places = {f"input_l{k}": place_of(given) for k in range(self.num_layers)}
        places |= {f"hidden{name.removeprefix('weight_hh')}": place_of(given) for name in names if "_hh_" in name}
        places |= {"output": place_of(given)} if self.bidirectional else {}
        self.value_quantizers = nn.ModuleDict({name: place for name, place in places.items() if place is not None})

    def forward(self, input: Tensor, hx: _State | None = None) -> tuple[Tensor, _State]:  # type: ignore[override]
        """As ``torch.nn.LSTM``."""
        if not isinstance(input, Tensor) or input.ndim != 3:
            raise DataError("QuantLSTM takes a batch of sequences of one length (3 axes), not packed or single ones")
        x = input if self.batch_first else input.transpose(0, 1)  # (N, T, features)
        directions = 2 if self.bidirectional else 1
        states: list[_State] = []
        for layer in range(self.num_layers):
            x = self.value_quantizers[f"input_l{layer}"](x)
            results = []
            for direction in range(directions):
                index = layer * directions + direction
                start = None if hx is None else (hx[0][index], hx[1][index])
                y, state = self._run(x, start, f"_l{layer}{'_reverse' * direction}")
                results.append(y)
                states.append(state)
            x = torch.cat(results, -1) if directions == 2 else results[0]
            if layer < self.num_layers - 1:
                x = F.dropout(x, self.dropout, self.training)
            elif directions == 2:
                x = self.value_quantizers["output"](x)  # two grids, side by side
        x = x if self.batch_first else x.transpose(0, 1)
        h, c = (torch.stack(parts) for parts in zip(*states))
        return x, (h, c)

    def _run(self, x: Tensor, state: _State | None, suffix: str) -> tuple[Tensor, _State]:
        """One direction of one layer: i, f, g, o = W_ih x + b_ih + W_hh h + b_hh; without a state h and c are 0."""

        def weight(kind: str) -> tuple[Tensor, Tensor | None]:
            value = getattr(self, f"weight_{kind}{suffix}")
            return self.weight_quantizers[f"weight_{kind}{suffix}"](value), getattr(self, f"bias_{kind}{suffix}", None)

        gates_of_input = F.linear(x, *weight("ih"))  # (N, T, 4 hidden)
        (recurrent, bias), place = weight("hh"), self.value_quantizers[f"hidden{suffix}"]
        steps = range(x.shape[1])
        outputs = []
        h, c = (None, None) if state is None else (place(state[0]), state[1])
        for t in reversed(steps) if suffix.endswith("_reverse") else steps:
            gates = gates_of_input[:, t]
            if h is not None:
                gates = gates + F.linear(h, recurrent, bias)
            elif bias is not None:
                gates = gates + bias
            i, f, g, o = gates.chunk(4, -1)
            new = torch.sigmoid(i) * torch.tanh(g)
            c = new if c is None else torch.sigmoid(f) * c + new
            h = place(torch.sigmoid(o) * torch.tanh(c))
            outputs.append(h)
        if suffix.endswith("_reverse"):
            outputs.reverse()
        assert h is not None
        assert c is not None
        return place(torch.stack(outputs, 1)), (h, c)  # they are on this grid already, which a graph cannot see
