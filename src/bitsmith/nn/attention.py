"""Multi-head attention on grids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..calibrate.watching import WeightQuantizer
from ..capture.marks import LayerSpecs
from ..errors import RecipeError
from ..recipe import Recipe, load_recipe
from .module import Place, QuantModule, Spec, adopt, place_of, spec_of


class QuantMultiheadAttention(nn.MultiheadAttention, QuantModule):
    """``torch.nn.MultiheadAttention`` with both products and all projections on grids.

    ``weights`` is a TensorSpec or a recipe for the projections, ``activations`` for queries, keys, values, attention
    weights and what the output projection reads; ``recipe`` gives both; None takes the recipe of the whole model.
    ``outputs`` puts the result on a grid too.
    ``add_bias_kv`` and ``add_zero_attn`` are refused. The softmax is computed in float.

    >>> layer = QuantMultiheadAttention(8, 2, batch_first=True)
    >>> x = torch.randn(3, 5, 8)
    >>> layer(x, x, x)[0].shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self, *args: Any, recipe: str | Path | Recipe | None = None, weights: Spec = None, activations: Place = None,
        outputs: Place = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **kwargs)
        self._attach(recipe, weights, activations, outputs)

    @classmethod
    def from_float(cls, layer: nn.MultiheadAttention, *, outputs: Place = None) -> QuantMultiheadAttention:
        """The quantized layer around a float layer's own parameters."""
        new = adopt(cls, layer)
        new._attach(None, None, None, outputs)
        return new

    def _attach(
        self, recipe: str | Path | Recipe | None, weights: Spec, activations: Place, outputs: Place
    ) -> None:  # fmt: skip
        if self.bias_k is not None or self.add_zero_attn:
            raise RecipeError(
                "QuantMultiheadAttention has no add_bias_kv and add_zero_attn: they put float rows among quantized "
                "ones; leave this attention in float"
            )
        own = None if recipe is None else load_recipe(recipe)
        spec = spec_of(weights, "weights") or (own.weights if own else None)
        self.specs = LayerSpecs(spec, own.bias if own else None)
        self.weight_quantizers = nn.ModuleDict({n: WeightQuantizer(spec) for n in ("q", "k", "v", "out")})
        given: Place = activations if activations is not None else (own.activations if own else True)
        places = {name: place_of(given) for name in ("query", "key", "value", "q", "k", "v", "context")}
        places["attention"] = place_of(given, non_negative=True)
        self.value_quantizers = nn.ModuleDict({name: place for name, place in places.items() if place is not None})
        self.output_quantizer = place_of(outputs)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As ``torch.nn.MultiheadAttention``; needs a batch dimension."""
        if query.ndim != 3:
            raise RecipeError(f"QuantMultiheadAttention takes batches of sequences (3 axes), not {query.ndim} axes")
        q, k, v = self._project(query, key, value)  # (N, heads, T, head_dim)
        scores = (q @ k.transpose(-2, -1)) * float(self.head_dim) ** -0.5
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        for mask in (attn_mask, None if key_padding_mask is None else key_padding_mask[:, None, None]):
            if mask is not None:
                if mask.ndim == 3:  # (N * heads, T, S)
                    mask = mask.view(-1, self.num_heads, *mask.shape[1:])
                scores = scores.masked_fill(mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        attention = self.value_quantizers["attention"](F.softmax(scores, -1))
        attention = F.dropout(attention, self.dropout, self.training)
        context = (attention @ v).transpose(1, 2).flatten(2)  # (N, T, E)
        out = self.out_proj
        weight = self.weight_quantizers["out"](out.weight)
        y = F.linear(self.value_quantizers["context"](context), weight, out.bias)
        y = y if self.output_quantizer is None else self.output_quantizer(y)
        if not self.batch_first:
            y = y.transpose(0, 1)
        if not need_weights:
            return y, None
        return y, attention.mean(1) if average_attn_weights else attention

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Queries, keys and values on their grids, one row of heads each."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        seen: dict[int, Tensor] = {}  # self-attention reads one value three times: it has one grid
        projected = []
        for name, long_name, x, weight, bias in zip(
            ("q", "k", "v"), ("query", "key", "value"), (query, key, value), weights, biases
        ):
            if id(x) not in seen:
                seen[id(x)] = self.value_quantizers[long_name](x)
            y = F.linear(seen[id(x)], self.weight_quantizers[name](weight), bias)
            y = y if self.batch_first else y.transpose(0, 1)
            y = y.reshape(y.shape[0], y.shape[1], self.num_heads, self.head_dim).transpose(1, 2)
            projected.append(self.value_quantizers[name](y))
        return projected
