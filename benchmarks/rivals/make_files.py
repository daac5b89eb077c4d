"""Write what every quantizer starts from: weights, float ONNX file and calibration inputs of networks.

    python -m benchmarks.rivals.make_files --out DIR [NET ...]     # default: resnet18 mobilenet_v2

For each network: `NET.safetensors` (its state_dict), `NET-float.onnx` (BatchNorm folded, dynamic batch) and
`NET-calibration.npy` (float32, all calibration inputs).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import onnx
import torch
from safetensors.torch import save_file
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from benchmarks import nets

OPSET = 20


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with each BatchNorm that follows a convolution folded into it."""
    traced = fx.symbolic_trace(copy.deepcopy(model).eval())
    modules = dict(traced.named_modules())
    for node in list(traced.graph.nodes):
        norm = modules.get(node.target) if node.op == "call_module" else None
        if not isinstance(norm, nn.BatchNorm2d):
            continue
        before = node.args[0]
        conv = modules.get(before.target) if before.op == "call_module" else None
        if isinstance(conv, nn.Conv2d) and len(before.users) == 1:
            traced.set_submodule(before.target, fuse_conv_bn_eval(conv, norm))
            node.replace_all_uses_with(before)
            traced.graph.erase_node(node)
    traced.delete_all_unused_submodules()
    traced.recompile()
    return traced


def export_float(model: nn.Module, example: Tensor, path: Path) -> None:
    """Export `model` to a single ONNX file with input "input", output "output" and a dynamic batch."""
    program = torch.onnx.export(
        fold_batchnorm(model),
        (example,),
        input_names=["input"],
        output_names=["output"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        opset_version=OPSET,
        dynamo=True,
        verbose=False,
    )
    program.save(path, external_data=False)
    left = [node.name for node in onnx.load(path).graph.node if node.op_type == "BatchNormalization"]
    if left:
        raise RuntimeError(f"{path.name} still has BatchNormalization nodes: {', '.join(left)}")


def check_float(model: nn.Module, x: Tensor, path: Path) -> float:
    """Return the largest difference between the file and the model, relative to the largest output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = model(x).numpy()
    (got,) = session.run(None, {"input": x.numpy()})
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def main(argv: list[str] | None = None) -> None:
    """Write the files of each network named and print how far the ONNX file is from the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("nets", nargs="*", default=["resnet18", "mobilenet_v2"], metavar="NET")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.nets:
        model, calibration, test, _ = nets.load(name)
        save_file(model.state_dict(), args.out / f"{name}.safetensors")
        np.save(args.out / f"{name}-calibration.npy", torch.cat([x for x, _ in calibration]).numpy())
        path = args.out / f"{name}-float.onnx"
        export_float(model, calibration[0][0][:2], path)
        error = check_float(model, test[0][0][:3], path)
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, relative difference {error:.1e}")


if __name__ == "__main__":
    main()
