"""NNCF's post-training int8 quantization to OpenVINO IR.

python -m benchmarks.rivals.nncf_openvino NET-float.onnx NET-calibration.npy NET-nncf.xml
python -m benchmarks.rivals.nncf_openvino --net resnet18 NET-calibration.npy NET-nncf.xml
"""

from __future__ import annotations

import argparse
from pathlib import Path

import nncf
import numpy as np
import openvino as ov


def from_net(name: str, example: np.ndarray) -> ov.Model:
    """Convert a benchmark network directly from PyTorch; the batch is dynamic."""
    import torch

    from benchmarks import nets

    model = ov.convert_model(nets.load(name).model, example_input=torch.from_numpy(example))
    model.reshape([-1, *example.shape[1:]])
    return model


def quantize(model: ov.Model, samples: np.ndarray, preset: str) -> ov.Model:
    """Return the int8 model; every sample is used, one at a time, the rest is NNCF's default."""
    dataset = nncf.Dataset([samples[i : i + 1] for i in range(len(samples))])
    return nncf.quantize(model, dataset, preset=nncf.QuantizationPreset(preset), subset_size=len(samples))


def main(argv: list[str] | None = None) -> None:
    """Quantize one network and write the IR (.xml and .bin)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="float ONNX file (or --net)")
    parser.add_argument("samples", type=Path, help=".npy of calibration inputs")
    parser.add_argument("out", type=Path, help="the .xml to write")
    parser.add_argument("--net", help="a benchmark network instead of a file")
    parser.add_argument("--preset", choices=("performance", "mixed"), default="performance")
    args = parser.parse_args(argv)
    if (args.source is None) == (args.net is None):
        parser.error("give either a float ONNX file or --net NAME")
    samples = np.load(args.samples)
    model = from_net(args.net, samples[:1]) if args.net else ov.convert_model(args.source)
    ov.save_model(quantize(model, samples, args.preset), args.out)
    size = args.out.stat().st_size + args.out.with_suffix(".bin").stat().st_size
    print(f"{args.out}: {size / 1e6:.2f} MB with its .bin")


if __name__ == "__main__":
    main()
