"""Linear and embedding layers whose weights are integers and whose inputs are quantized as they arrive."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import DataError
from ..grid import TensorSpec
from .laws import Activations, dequantized
from .ops import dynamic_embedding, dynamic_linear
from .weights import quantize_weight

_Quantize = Callable[[Tensor, TensorSpec, str], tuple[Tensor, Tensor | None]]


class DynamicLayer(nn.Module):
    """What all dynamic layers have in common; integers and scales are buffers, so ``state_dict`` carries them.

    ``activations`` says how inputs are quantized, ``parts`` are the names of the quantized weights, each with its
    scales in ``NAME_scale`` (None: float16), and ``source`` is the type of the float layer.
    """

    source = ""
    parts: tuple[str, ...] = ()

    def __init__(self, activations: Activations) -> None:
        super().__init__()
        self.activations = activations
        self._signal = self._noise = 0.0  # sums of squares, for the report

    def _quantize(
        self, weight: Tensor, spec: TensorSpec, where: str, quantize: _Quantize = quantize_weight
    ) -> tuple[Tensor, Tensor | None]:
        codes, scale = quantize(weight, spec, where)
        self._signal += float(weight.detach().double().square().sum())
        self._noise += float((dequantized(codes, scale) - weight.detach()).double().square().sum())
        return codes, scale

    def _keep(self, name: str, weight: Tensor, spec: TensorSpec, where: str) -> None:
        self._store(name, *self._quantize(weight, spec, f"{name} of {where}"))

    def _store(self, name: str, codes: Tensor, scale: Tensor | None) -> None:
        self.register_buffer(name, codes)
        self._constant(f"{name}_scale", scale)
        self.parts = (*self.parts, name)

    def _constant(self, name: str, value: Tensor | None) -> None:
        if value is None:
            setattr(self, name, None)  # torch.export 2.13 miscounts buffers that are None
        else:
            self.register_buffer(name, value.detach().clone())

    def _family(self) -> list[DynamicLayer]:
        return [module for module in self.modules() if isinstance(module, DynamicLayer)]

    def weights(self) -> Iterator[Tensor]:
        """The quantized weights, those of layers inside included."""
        return (getattr(layer, part) for layer in self._family() for part in layer.parts)

    def weight_sqnr_db(self) -> float | None:
        """Signal to quantization noise over all weights; None where none is lost."""
        signal, noise = (sum(getattr(layer, name) for layer in self._family()) for name in ("_signal", "_noise"))
        return 10 * math.log10(signal / noise) if signal and noise else None

    def extra_repr(self) -> str:
        """Shapes and numbers of the weights."""
        shapes = ", ".join(f"{name}={list(getattr(self, name).shape)}" for name in self.parts)
        kind = "float16" if getattr(self, self.parts[0]).dtype == torch.float16 else "int8"
        return f"{shapes}, weights={kind}, activations={self.activations}"


class DynamicLinear(DynamicLayer):
    """``nn.Linear`` with weights on a grid; each input is quantized with a scale of its own.

    ``weight``: int8 ``(out, in)`` with ``weight_scale`` ``(out,)`` or ``()``; float16 without a scale.
    """

    source = "Linear"
    weight: Tensor
    weight_scale: Tensor | None
    bias: Tensor | None

    def __init__(
        self, weight: Tensor, bias: Tensor | None, spec: TensorSpec, activations: Activations, name: str = "the layer"
    ) -> None:
        super().__init__(activations)
        self._keep("weight", weight, spec, name)
        self._constant("bias", bias)

    @property
    def in_features(self) -> int:
        """As in ``nn.Linear``."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """As in ``nn.Linear``."""
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return dynamic_linear(x, self.weight, self.weight_scale, self.bias, self.activations)  # type: ignore[no-any-return]

    def rows(self, start: int, end: int) -> DynamicLinear:
        """The layer that yields a part of the outputs, on the same integers."""
        part = DynamicLinear.__new__(DynamicLinear)
        DynamicLayer.__init__(part, self.activations)
        scale = self.weight_scale
        part._store("weight", self.weight[start:end], scale if scale is None or not scale.ndim else scale[start:end])
        part._constant("bias", None if self.bias is None else self.bias[start:end])
        return part


class DynamicEmbedding(DynamicLayer):
    """``nn.Embedding`` with 8-bit (or float16) rows; rows are dequantized as they are looked up."""

    source = "Embedding"
    weight: Tensor
    weight_scale: Tensor | None

    def __init__(self, layer: nn.Embedding, spec: TensorSpec, name: str) -> None:
        super().__init__("float")
        if layer.max_norm is not None:
            raise DataError(
                f"{name}: an embedding with max_norm changes its weights at each call and cannot be quantized: "
                "leave it out with an override {match: NAME, exclude: true}"
            )
        self._keep("weight", layer.weight, spec, name)
        self.padding_idx = layer.padding_idx

    def forward(self, indices: Tensor) -> Tensor:
        """Indices of any shape to vectors along a new last axis."""
        return dynamic_embedding(indices, self.weight, self.weight_scale)  # type: ignore[no-any-return]


class DynamicEmbeddingBag(DynamicLayer):
    """``nn.EmbeddingBag`` with 8-bit (or float16) rows."""

    source = "EmbeddingBag"
    weight: Tensor
    weight_scale: Tensor | None

    def __init__(self, layer: nn.EmbeddingBag, spec: TensorSpec, name: str) -> None:
        super().__init__("float")
        if layer.max_norm is not None:
            raise DataError(f"{name}: an embedding bag with max_norm changes its weights at each call: exclude it")
        self._keep("weight", layer.weight, spec, name)
        self.mode, self.padding_idx = layer.mode, layer.padding_idx
        self.include_last_offset = layer.include_last_offset

    def forward(
        self, indices: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """Bags ``(batch, length)``, or one flat list of indices with the offset of each bag, to ``(batch, dim)``."""
        if indices.ndim == 2 and offsets is None and self.mode != "max":
            return self._equal_bags(indices, per_sample_weights)
        # Only the rows that are looked up are dequantized; equal indices stay equal, so that padding is found.
        used, places = torch.unique(indices, return_inverse=True)
        padding = None
        if self.padding_idx is not None and bool((hit := (used == self.padding_idx).nonzero()).numel()):
            padding = int(hit)
        return F.embedding_bag(
            places, dynamic_embedding(used, self.weight, self.weight_scale), offsets, mode=self.mode,
            per_sample_weights=per_sample_weights, include_last_offset=self.include_last_offset, padding_idx=padding,
        )  # fmt: skip

    def _equal_bags(self, indices: Tensor, per_sample_weights: Tensor | None) -> Tensor:
        """Sum or mean over bags of one length, in operators that every runtime has."""
        rows: Tensor = dynamic_embedding(indices, self.weight, self.weight_scale)
        counts: Tensor | None = None
        if self.padding_idx is not None:
            used = (indices != self.padding_idx).to(rows.dtype)
            rows, counts = rows * used.unsqueeze(-1), used.sum(1, keepdim=True).clamp(min=1.0)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        if self.mode == "sum":
            return rows.sum(1)
        return rows.mean(1) if counts is None else rows.sum(1) / counts
