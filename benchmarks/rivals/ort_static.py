"""onnxruntime's own static quantization: unsigned activations, signed weights per channel, QDQ.

python -m benchmarks.rivals.ort_static NET-float.onnx NET-calibration.npy NET-ort.onnx
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process


class Samples(CalibrationDataReader):
    """Feeds the rows of an array in batches of `size` to the input called `name`."""

    def __init__(self, name: str, samples: np.ndarray, size: int = 8):
        self.batches = ({name: samples[i : i + size]} for i in range(0, len(samples), size))

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def quantize(source: Path, samples: np.ndarray, out: Path) -> None:
    """Write the U8S8, per-channel, QDQ file of `source`; min-max ranges, `quantize_static`'s default."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(source), str(prepared))
        name = onnx.load(prepared, load_external_data=False).graph.input[0].name
        quantize_static(
            str(prepared),
            str(out),
            Samples(name, samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )


def main(argv: list[str] | None = None) -> None:
    """Quantize one file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="float ONNX file")
    parser.add_argument("samples", type=Path, help=".npy of calibration inputs")
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    quantize(args.source, np.load(args.samples), args.out)
    size, before = args.out.stat().st_size, args.source.stat().st_size
    print(f"{args.out}: {size / 1e6:.2f} MB (float {before / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
