"""Residual CIFAR-10 nets on the simulated chips: float, simulated, and the exported files.

    python -m benchmarks.chip_cifar [--csv benchmarks/results/chip_cifar.csv]

A small residual net that fits into a MAX78000 is trained on the 10,000 training images that the benchmarks have (some
minutes, on one core; its weights are kept in the benchmarks' cache), and ResNet-20 with its published weights goes to a
MAX78002. Both are quantized without training, written, read back and judged on the 10,000 test images.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bitsmith as bs
from benchmarks import nets
from benchmarks.data import cache_dir, cifar10

FIELDS = ("net", "target", "parameters", "layers", "float_top1", "chip_top1", "agreement", "file_agrees", "verdict")
_MEAN, _STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
EPOCHS, BATCH = 12, 100


class Residual(nn.Module):
    """Two 3 x 3 convolutions beside their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The shape stays."""
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ChipNet(nn.Module):
    """A net of ordinary PyTorch that a MAX78000 takes: 3 x 3 kernels, stride 1, max pooling, sums."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 16, 32, 48, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for b in widths[1:])
        self.residuals = nn.ModuleList([Residual(48), Residual(64)])
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores for images of 32 x 32."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = F.max_pool2d(x, 2) if index else x
            x = F.relu(norm(conv(x)))
            x = self.residuals[index - 2](x) if index >= 2 else x
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def images(split: str) -> tuple[Tensor, Tensor]:
    """Normalized images, channels first, and labels."""
    pixels, labels = cifar10(split)
    x = (torch.from_numpy(pixels).float() / 255 - torch.tensor(_MEAN)) / torch.tensor(_STD)
    return x.permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels).long()


def train(seed: int = 0) -> ChipNet:
    """The trained net; AdamW, one cycle, flips and shifts."""
    torch.manual_seed(seed)
    x, y = images("train")
    net = ChipNet()
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=EPOCHS * (len(x) // BATCH))
    for epoch in range(EPOCHS):
        for index in torch.randperm(len(x)).split(BATCH):
            rows, columns = torch.randint(0, 5, (2,)).tolist()
            batch = F.pad(x[index], (2, 2, 2, 2))[:, :, rows : rows + 32, columns : columns + 32]
            batch = batch.flip(3) if torch.rand(()) < 0.5 else batch
            loss = F.cross_entropy(net(batch), y[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1:2d}  loss {loss.item():.3f}", flush=True)
    return net.eval()


def trained() -> ChipNet:
    """The net from the cache, trained where it is not there."""
    path = cache_dir() / f"chip-cifar-{EPOCHS}.safetensors"
    if not path.exists():
        save_file(train().state_dict(), path)
    net = ChipNet()
    net.load_state_dict(load_file(path))
    return net.eval()


def measure(
    name: str, net: nn.Module, target: str, calibration: Any, test: list[tuple[Tensor, Tensor]]
) -> dict[str, Any]:
    """One row."""
    q = bs.quantize(net, calibration, target=target)
    labels = torch.cat([y for _, y in test])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        floats = torch.cat([net(x) for x, _ in test])
        chips = torch.cat([q(x) for x, _ in test])
        certificate = bs.verify(q, bs.export_ai8x(q, Path(folder, "net.pth.tar")), [test[0][0][:100]])
    layers = next(note for note in q.report.notes if " layers, " in note)
    return {
        "net": name,
        "target": target,
        "parameters": sum(p.numel() for p in net.parameters()),
        "layers": layers.split(" of ")[0],
        "float_top1": f"{_top1(floats, labels):.2f}",
        "chip_top1": f"{_top1(chips, labels):.2f}",
        "agreement": f"{_top1(chips, floats.argmax(1)):.2f}",
        "file_agrees": certificate.outputs[0].equal_fraction,
        "verdict": certificate.verdict,
    }


def _top1(outputs: Tensor, labels: Tensor) -> float:
    return float((outputs.argmax(1) == labels).double().mean()) * 100


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/chip_cifar.csv"))
    options = parser.parse_args()
    x, y = images("test")
    rows = [
        measure("chipnet", trained(), "max78000", [images("train")[0][:1000]], list(zip(x.split(500), y.split(500))))
    ]
    model, calibration, test, _ = nets.load("resnet20")
    rows.append(measure("resnet20", model, "max78002", calibration, test))
    for row in rows:
        print("  ".join(f"{key} {row[key]}" for key in FIELDS))
    with options.csv.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
