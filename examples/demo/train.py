"""Train the demo's network on scikit-learn's digits and write its weights.

Seeded; about half a minute:

python examples/demo/train.py [OUTPUT.safetensors]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from bitsmith.demo import WEIGHTS, DigitsNet, digits, one_thread

EPOCHS = 40
BATCH = 50


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Move every image of the batch by up to one pixel: 1,000 images are few."""
    padded = F.pad(x, (1, 1, 1, 1))
    rows, columns = torch.randint(0, 3, (2, len(x)), generator=generator).tolist()
    moved = [image[:, r : r + 8, c : c + 8] for image, r, c in zip(padded, rows, columns)]
    return torch.stack(moved)


def accuracy(net: DigitsNet, x: Tensor, y: Tensor) -> float:
    """Top-1 in percent."""
    net.eval()
    with torch.no_grad():
        return 100.0 * (net(x).argmax(1) == y).double().mean().item()


def train(seed: int = 0) -> DigitsNet:
    """The trained network, the same for the same seed and machine."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    (x, y), (x_test, y_test) = digits()
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    steps = EPOCHS * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
    for epoch in range(EPOCHS):
        net.train()
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            loss = F.cross_entropy(net(shift(x[index], generator)), y[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if epoch % 10 == 9:
            print(f"epoch {epoch + 1:3d}  loss {loss.item():.4f}  test {accuracy(net, x_test, y_test):.2f} %")
    return net


def main() -> None:
    """Train, report, write."""
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else WEIGHTS
    with one_thread():
        net = train()
    save_file(net.state_dict(), path)
    _, (x_test, y_test) = digits()
    print(f"test top-1 {accuracy(net, x_test, y_test):.2f} % -> {path} ({path.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main()
