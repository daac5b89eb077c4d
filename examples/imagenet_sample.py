"""Real weights and images for the examples, where they are: they do not come with the project."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from bitsmith.evaluate import ArrayData

WEIGHTS, IMAGES = "imagenet_mobilenet_v1_0.25_224.safetensors", "imagenet_sample1000_256.tar"
SIDE = 224


def find_data(folder: str | None) -> Path | None:
    """The folder that holds the weights and the images, or None, with words on what is missing."""
    named = folder or os.environ.get("BITSMITH_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data"
    missing = [name for name in (WEIGHTS, IMAGES) if not Path(named, name).is_file()]
    if not missing:
        return Path(named)
    print(
        f"skipped: {' and '.join(missing)} not found in {named}; name the folder that holds them, or set BITSMITH_DATA"
    )
    return None


def load_weights(model: nn.Module, folder: Path) -> nn.Module:
    """The checkpoint, in float; it lacks only the counters of the batch norms."""
    missing, unexpected = model.load_state_dict(load_file(folder / WEIGHTS), strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    return model.eval()


def images(folder: Path, count: int = 1000) -> tuple[ArrayData, ArrayData]:
    """``count`` images of as many classes, in a seeded order: 100 of them, or half, calibrate; the others judge."""
    calibrate = min(100, count // 2)
    order = np.random.default_rng(0).permutation(1000)[:count]
    with tarfile.open(folder / IMAGES) as tar:
        members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
        pixels = np.stack([_pixels(tar.extractfile(members[i]).read()) for i in order])  # type: ignore[union-attr]
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    y = torch.from_numpy(order.astype(np.int64))  # the files are sorted by class
    return ArrayData(x[:calibrate], y[:calibrate]), ArrayData(x[calibrate:], y[calibrate:])


def _pixels(data: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    left, top = (image.width - SIDE) // 2, (image.height - SIDE) // 2
    return np.asarray(image.crop((left, top, left + SIDE, top + SIDE)))
