"""What dynamic quantization did, layer by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..recipe import Recipe
from ..report.model import Coverage, LayerReport, Report
from ..targets import Target
from .layers import DynamicEmbedding, DynamicEmbeddingBag, DynamicLayer

if TYPE_CHECKING:
    from .model import DynamicModel

_NOTE = "multiply-accumulates are for one position: how long a sequence is shows at run time only"


def build_dynamic_report(
    recipe: Recipe, target: Target, q: DynamicModel | None = None, notes: list[str] | None = None
) -> Report:
    """The Report; without a model only what was asked for."""
    report = Report(recipe=recipe.name, target=target.name, placement=recipe.placement, notes=notes or [])
    if q is None:
        return report
    rows = report.layers = [_layer(name, layer) for name, layer in q.dynamic_layers()]
    report.coverage = Coverage(
        total_macs=sum(row.macs for row in rows),
        quantized_macs=sum(row.macs for row in rows if row.input_bits),
        integer_macs=sum(row.macs for row in rows if row.integer),
        float_layers=[row.name for row in rows if row.macs and not row.integer],
    )
    report.notes.append(_NOTE)
    return report


def _layer(name: str, layer: DynamicLayer) -> LayerReport:
    parts = list(layer.weights())
    half = parts[0].dtype == torch.float16
    lookup = isinstance(layer, DynamicEmbedding | DynamicEmbeddingBag)
    dynamic = layer.activations != "float"
    note = f"a scale per {layer.activations}, at run time" if dynamic else "weights only"
    return LayerReport(
        name=name or layer.source,
        type=layer.source,
        weight_bits=16 if half else 8,
        input_bits=8 if dynamic and not half else None,
        macs=0 if lookup else sum(codes.numel() for codes in parts),
        integer=dynamic and not half,
        weight_sqnr_db=layer.weight_sqnr_db(),
        note=note,
    )
