"""Quantization-aware training on the demo's digits, in seconds: 2-bit weights and 3-bit activations, from end to end.

python examples/qat.py [FILE.onnx]
"""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.demo import digits, digits_net, one_thread
from bitsmith.recipe import bits_recipe

RECIPE = bits_recipe(2, 3, steps=("fold_batch_norm", "qronos", "reestimate_batch_norm"))
EPOCHS, BATCH, RATE = 5, 50, 3e-3


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    with torch.no_grad():
        return 100.0 * float((model(x).argmax(1) == y).float().mean())


def train(model: bs.QATModel, x: Tensor, y: Tensor, epochs: int) -> None:
    """A plain loop; what is of quantization in it are ``penalty`` (the teacher's) and ``step``."""
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        model.train()
        for index in torch.randperm(len(x)).split(BATCH):
            optimizer.zero_grad()
            (F.cross_entropy(model(x[index]), y[index]) + model.penalty()).backward()
            optimizer.step()
        rates.step()
        model.step()


def main(path: str = "digits_qat.onnx", epochs: int = EPOCHS) -> None:
    """Post-training quantization, training from its result, and the file."""
    torch.manual_seed(0)
    (x, y), test = digits()
    net = digits_net()
    print(f"float           {accuracy(net, *test):.2f} %")
    ptq = bs.quantize(net, [x[:256]], RECIPE)
    print(f"post-training   {accuracy(ptq, *test):.2f} %")
    model = bs.QATModel(ptq, total_epochs=epochs, teacher=net)
    train(model, x, y, epochs)
    q = model.convert()
    print(f"after training  {accuracy(q, *test):.2f} %, {epochs} epochs")
    certificate = bs.verify(q, model.export(path, style="qcdq"), test[0][:64])
    print(f"{path}: certificate {'passed' if certificate.passed else certificate.verdict}")


if __name__ == "__main__":
    with one_thread():
        main(*sys.argv[1:])
