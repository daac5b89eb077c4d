"""The main job in Python: quantize the demo's network, write it, verify the file.

python examples/demo/quantize.py [OUTPUT.onnx]
"""

from __future__ import annotations

import sys

import bitsmith as bs
from bitsmith.demo import digits, digits_net
from bitsmith.evaluate import ArrayData, evaluate


def main(path: str = "digits.onnx") -> None:
    """Quantize, export, verify, and compare with float."""
    (images, labels), test = digits()
    net = digits_net()
    q = bs.quantize(net, ArrayData(images, labels))
    bs.export_onnx(q, path)
    certificate = bs.verify(q, path, images[:32])
    print(certificate.verdict)
    for name, model in (("float", net), ("deployed", bs.deploy(path))):
        print(f"{name:9} top-1 {evaluate(model, ArrayData(*test)).top1:.2f} %")


if __name__ == "__main__":
    main(*sys.argv[1:])
