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
from .ops import dynamic_embedding, dynamic_linear, embedding
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


def _tracing() -> bool:
    """Whether a TorchScript file is being made."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _look_up(indices: Tensor, weight: Tensor, scale: Tensor | None) -> Tensor:
    """The dequantized rows; a TorchScript file, which runs without Bitsmith, has them in torch's own operators."""
    rows: Tensor = (embedding if _tracing() else dynamic_embedding)(indices, weight, scale)
    return rows


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
        return _look_up(indices, self.weight, self.weight_scale)


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
        if indices.ndim == 2 and offsets is None:
            return self._equal_bags(indices, per_sample_weights)
        if offsets is not None and (torch.compiler.is_compiling() or (_tracing() and self.padding_idx is not None)):
            return self._bags_for_files(indices, offsets, per_sample_weights)
        # Only the rows that are looked up are dequantized; equal indices stay equal, so that padding is found.
        used, places = torch.unique(indices, return_inverse=True)
        padding = None
        if self.padding_idx is not None and bool((hit := (used == self.padding_idx).nonzero()).numel()):
            padding = int(hit)
        return F.embedding_bag(
            places, _look_up(used, self.weight, self.weight_scale), offsets, mode=self.mode,
            per_sample_weights=per_sample_weights, include_last_offset=self.include_last_offset, padding_idx=padding,
        )  # fmt: skip

    def _equal_bags(self, indices: Tensor, per_sample_weights: Tensor | None) -> Tensor:
        """Bags of one length, in operators that every runtime has."""
        rows = _look_up(indices, self.weight, self.weight_scale)
        used = None if self.padding_idx is None else (indices != self.padding_idx).unsqueeze(-1)
        if self.mode == "max":
            return rows.amax(1) if used is None else _largest(rows, used)
        if used is not None:
            rows = rows * used.to(rows.dtype)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        if self.mode == "sum":
            return rows.sum(1)
        return rows.mean(1) if used is None else rows.sum(1) / used.to(rows.dtype).sum(1).clamp(min=1.0)

    def _bags_for_files(self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None) -> Tensor:
        """Bags by their offsets, which ONNX has no operator for: a matrix says which rows are in which bag."""
        rows = _look_up(indices, self.weight, self.weight_scale)
        first = offsets[:-1] if self.include_last_offset else offsets
        places = torch.arange(indices.shape[0], device=indices.device)
        begun = (places >= first.unsqueeze(1)).to(rows.dtype)  # (bags, indices)
        inside = begun - F.pad(begun[1:], (0, 0, 0, 1))  # begun here, and the next bag not yet
        if self.padding_idx is not None:
            inside = inside * (indices != self.padding_idx).to(rows.dtype)
        if self.mode == "max":
            return _largest(rows, inside.unsqueeze(-1) > 0)
        if self.mode == "mean":
            inside = inside / inside.sum(1, keepdim=True).clamp(min=1.0)
        return (inside if per_sample_weights is None else inside * per_sample_weights) @ rows


def _largest(rows: Tensor, used: Tensor) -> Tensor:
    """The maximum over the rows (axis 1) that are used, 0 where none is; both broadcast to ``(bags, rows, dim)``."""
    largest = torch.where(used, rows, -math.inf).amax(1)
    return torch.where(used.to(rows.dtype).amax(1) > 0, largest, 0.0)
