"""Why a quantized model has lost its signal, in words: where it happened first, and what would help there."""

from __future__ import annotations

from .model import LayerReport, Report

_LOST_DB = 6.0  # at a layer: half of the amplitude is noise
_COARSE_DB = 12.0  # of a weight alone


def diagnose(report: Report) -> str:
    """What was lost first, why, and what to do.

    >>> layers = [LayerReport(name="a", type="Linear", sqnr_db=30.0, weight_bits=8, weight_sqnr_db=40.0, input_bits=8),
    ...           LayerReport(name="b", type="Linear", sqnr_db=-1.0, weight_bits=2, weight_sqnr_db=4.0, input_bits=8)]
    >>> print(diagnose(Report(output_sqnr_db=-1.0, layers=layers)))  # doctest: +ELLIPSIS
    the quantized model is at chance level: output SQNR -1.0 dB. It falls to -1.0 dB at layer 'b', from 30.0 dB ...
    """
    start = f"the quantized model is at chance level: output SQNR {report.output_sqnr_db:.1f} dB."
    measured = [layer for layer in report.layers if layer.sqnr_db is not None]
    first = next((i for i, layer in enumerate(measured) if (layer.sqnr_db or 0.0) < _LOST_DB), None)
    if first is None:
        return f"{start} Every layer keeps it; look at the operators behind the last one, and at the output's range"
    layer, before = measured[first], measured[first - 1] if first else None
    fall = f"It falls to {layer.sqnr_db:.1f} dB at layer {layer.name!r}"
    fall += f", from {before.sqnr_db:.1f} dB before it" if before is not None else ", the first one"
    return f"{start} {fall}. {remedy(layer)}"


def remedy(layer: LayerReport) -> str:
    """What would help one layer."""
    if layer.weight_sqnr_db is not None and layer.weight_sqnr_db < _COARSE_DB:
        return (
            f"The layer's {layer.weight_bits}-bit weight alone has {layer.weight_sqnr_db:.1f} dB: use a scale per "
            "channel, the steps equalize or gptq, or more bits for it by an override"
        )
    if layer.input_bits is not None and layer.input_bits < 8:
        return f"What it reads has {layer.input_bits} bits: give its activations 8 by an override, or range mse"
    return (
        "Its weight is fine: its channels or its input differ much in range, or errors add up from layer to layer. "
        "Use the steps equalize and bias_correction, look at the calibration data, or leave the layer in float"
    )
