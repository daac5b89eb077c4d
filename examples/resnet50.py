"""ResNet-50 on ImageNet folders: static quantization, size, accuracy and speed, saved as TorchScript.

python examples/resnet50.py WEIGHTS TRAIN VALIDATION

WEIGHTS is torchvision's checkpoint (.pth or .safetensors); TRAIN and VALIDATION are folders with one sub-folder of
images per class.
"""

from __future__ import annotations

import sys
from pathlib import Path

import bitsmith as bs
from bitsmith.errors import MissingExtraError
from bitsmith.evaluate import Preprocess, evaluate, load_data, load_model, model_size


def main(weights: str = "", train: str = "", validation: str = "", output: str = "resnet50_int8.pt") -> None:
    """Float, then int8 on PyTorch's kernels."""
    given = {"WEIGHTS": weights, "TRAIN": train, "VALIDATION": validation}
    if missing := [path or name for name, path in given.items() if not path or not Path(path).exists()]:
        print(f"skipped: {', '.join(missing)} not found; usage: {(__doc__ or '').splitlines()[2]}")
        return
    try:
        net = load_model("torchvision:resnet50", weights)
    except MissingExtraError as error:
        print(f"skipped: {error}")
        return
    preprocess = Preprocess(resize=256, crop=224)
    test = load_data(validation, preprocess=preprocess)
    q = bs.quantize(net, load_data(train, preprocess=preprocess, samples=512))
    for name, model in (("float", net), ("int8", bs.deploy(q, engine="torch"))):
        found = evaluate(model, test, what=name, show_progress=None)
        size = model_size(net if name == "float" else q) / 1e6
        speed = f"{found.images_per_second:.1f} images/s"
        print(f"{name:6} top-1 {found.top1:.2f}  top-5 {found.top5:.2f}  {size:.1f} MB  {speed}")
    bs.export_torchscript(q, output, style="int8")
    print(f"saved as TorchScript: {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
