"""Multi-head attention with its four projections quantized; the attention itself stays float."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..grid import TensorSpec
from .laws import Activations
from .layers import DynamicLayer, DynamicLinear


class DynamicMultiheadAttention(DynamicLayer):
    """``nn.MultiheadAttention``: called like it, with masks, biases of keys and values, and attention weights.

    Where query, key and value are one tensor, it is quantized once and the three projections are one product.
    """

    source = "MultiheadAttention"
    in_proj: DynamicLinear
    q_proj: DynamicLinear
    k_proj: DynamicLinear
    v_proj: DynamicLinear
    bias_k: Tensor | None
    bias_v: Tensor | None
    # What nn.TransformerEncoderLayer asks for; these keep it from its own fused kernel, which is float.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = False

    def __init__(self, layer: nn.MultiheadAttention, spec: TensorSpec, activations: Activations, name: str) -> None:
        super().__init__(activations)
        self.embed_dim, self.num_heads, self.batch_first = layer.embed_dim, layer.num_heads, layer.batch_first
        self.add_zero_attn, self.head_dim = layer.add_zero_attn, layer.head_dim
        bias = layer.in_proj_bias
        self.packed = layer.in_proj_weight is not None
        if self.packed:
            self.in_proj = DynamicLinear(layer.in_proj_weight, bias, spec, activations, f"{name}.in_proj")
        else:
            biases = [None] * 3 if bias is None else bias.chunk(3)
            for which, b in zip("qkv", biases):
                weight = getattr(layer, f"{which}_proj_weight")
                setattr(self, f"{which}_proj", DynamicLinear(weight, b, spec, activations, f"{name}.{which}_proj"))
        out = layer.out_proj
        self.out_proj = DynamicLinear(out.weight, out.bias, spec, activations, f"{name}.out_proj")
        self._constant("bias_k", layer.bias_k)
        self._constant("bias_v", layer.bias_v)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As in ``torch.nn``: the output and, if asked for, the attention weights."""
        if is_causal and attn_mask is None:
            raise DataError("MultiheadAttention: is_causal=True is a hint about attn_mask: pass the mask too")
        batched = query.ndim == 3
        one, pair = query is key and key is value, key is value
        if not batched or not self.batch_first:
            axis = 1 if batched else 0
            query = query.transpose(0, 1) if batched else query.unsqueeze(axis)
            key = query if one else key.transpose(0, 1) if batched else key.unsqueeze(axis)
            value = key if pair else value.transpose(0, 1) if batched else value.unsqueeze(axis)
        if not batched and key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        q, k, v = self._project(query, key, value)  # (batch, length, embed)
        mask = self._mask(attn_mask, key_padding_mask, q)
        k, v, mask = self._extended(k, v, mask)
        heads = (self.num_heads, self.head_dim)
        q, k, v = (t.unflatten(-1, heads).transpose(1, 2) for t in (q, k, v))  # type: ignore[no-untyped-call]
        weights = None
        if need_weights:
            scores = torch.matmul(q * math.sqrt(1.0 / self.head_dim), k.transpose(-2, -1))
            weights = torch.softmax(scores if mask is None else scores + mask, -1)
            attended = torch.matmul(weights, v)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask)
        out = self.out_proj(attended.transpose(1, 2).flatten(2))
        if weights is not None:
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        if not batched:
            return out.squeeze(0), weights
        return out if self.batch_first else out.transpose(0, 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        if not self.packed:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if query is key and key is value:
            return tuple(self.in_proj(query).chunk(3, -1))
        size = self.embed_dim
        if key is value:
            k, v = self.in_proj.rows(size, 3 * size)(key).chunk(2, -1)
            return self.in_proj.rows(0, size)(query), k, v
        values = (query, key, value)
        return tuple(self.in_proj.rows(i * size, (i + 1) * size)(x) for i, x in enumerate(values))

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """Both masks as numbers to be added to the scores ``(batch, heads, target, source)``."""

        def numbers(mask: Tensor) -> Tensor:
            if mask.dtype != torch.bool:
                return mask
            return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)

        total = None
        if attn_mask is not None:
            total = numbers(attn_mask)
            if total.ndim == 3:
                total = total.reshape(-1, self.num_heads, *total.shape[1:])
        if padding is not None:
            columns = numbers(padding)[:, None, None, :]
            total = columns if total is None else total + columns
        return total

    def _extended(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values with those that the layer itself adds at the end, which no mask hides."""
        added = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (torch.cat([t, b.expand(t.shape[0], 1, -1)], 1) for t, b in ((k, self.bias_k), (v, self.bias_v)))
            added += 1
        if self.add_zero_attn:
            k, v = (torch.cat([t, t.new_zeros(t.shape[0], 1, t.shape[2])], 1) for t in (k, v))
            added += 1
        return k, v, mask if mask is None or not added else F.pad(mask, (0, added))

    def extra_repr(self) -> str:
        """Sizes; the projections say the rest."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}"
