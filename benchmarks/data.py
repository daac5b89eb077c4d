"""Real images and keywords for measuring: found, decoded once, cached as `.npy`.

The data is not part of the repository. It is looked for in `$BITSMITH_DATA`, else in `../shared/data` beside
the repository; decoded arrays are kept in `$BITSMITH_CACHE`, else in `~/.cache/bitsmith-benchmarks`.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]

Batches = list[tuple[Tensor, Tensor]]


class DataMissing(FileNotFoundError):
    """The benchmark data is not on this machine."""


def data_dir() -> Path:
    """Return the folder of the benchmark data, or raise `DataMissing` with what to do about it."""
    named = os.environ.get("BITSMITH_DATA")
    folder = Path(named).expanduser() if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        hint = "BITSMITH_DATA names it" if named else "set BITSMITH_DATA to the folder that holds it"
        raise DataMissing(f"benchmark data not found: no folder {folder} ({hint})")
    return folder


def data_file(name: str) -> Path:
    """Return the path of one benchmark file, or raise `DataMissing` naming it."""
    path = data_dir() / name
    if not path.is_file():
        raise DataMissing(f"benchmark data incomplete: {name} is not in {path.parent}")
    return path


def cache_dir() -> Path:
    """Return the folder for decoded arrays, creating it."""
    named = os.environ.get("BITSMITH_CACHE")
    folder = Path(named).expanduser() if named else Path.home() / ".cache" / "bitsmith-benchmarks"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def cached(source: Path, kind: str, decode: Callable[[Path], np.ndarray]) -> np.ndarray:
    """Return `decode(source)`, from the cache when this source (by name and size) was decoded before."""
    path = cache_dir() / f"{source.stem}-{source.stat().st_size}-{kind}.npy"
    if not path.exists():
        array = decode(source)
        handle, part = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as out:
                np.save(out, array)
            os.replace(part, path)  # a reader never sees half a file
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
    return np.load(path)


def cifar10(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return CIFAR-10 `train` or `test`: uint8 images (10000, 32, 32, 3) and int64 labels."""
    if split not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test', not {split!r}")
    source = data_file("cifar10_10k10k.npz")

    def decode(path: Path) -> np.ndarray:
        with np.load(path) as file:
            packed, offsets = file[f"{split}_webp"], file[f"{split}_offsets"]
        sheets = [packed[a:b].tobytes() for a, b in pairwise(offsets)]
        return np.concatenate([_sheet(data) for data in sheets])

    with np.load(source) as file:
        labels = file[f"{split}_labels"].astype(np.int64)
    return cached(source, split, decode), labels


def _sheet(data: bytes) -> np.ndarray:
    """Cut one sheet of 25 rows x 40 columns of 32 x 32 images into (1000, 32, 32, 3)."""
    sheet = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    return sheet.reshape(25, 32, 40, 32, 3).transpose(0, 2, 1, 3, 4).reshape(1000, 32, 32, 3)


def imagenet_sample(crop: int, resize: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,000 ImageNet images, one per class: uint8 (1000, crop, crop, 3) and int64 labels.

    Each 256 x 256 image is resized to `resize` (PIL, bilinear) where given, then cropped at the centre.
    """
    source = data_file("imagenet_sample1000_256.tar")

    def prepare(data: bytes) -> np.ndarray:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if resize is not None:
            image = image.resize((resize, resize), Image.Resampling.BILINEAR)
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        return np.asarray(image.crop((left, top, left + crop, top + crop)))

    def decode(path: Path) -> np.ndarray:
        with tarfile.open(path) as tar:
            members = sorted((m for m in tar if m.isfile()), key=lambda m: m.name)
            return np.stack([prepare(tar.extractfile(m).read()) for m in members])  # type: ignore[union-attr]

    images = cached(source, f"{resize or 256}-{crop}", decode)
    return images, np.arange(len(images), dtype=np.int64)  # the name's first three digits are the class


def keywords() -> tuple[np.ndarray, np.ndarray]:
    """Return the 1,000 spoken keywords as float32 MFCC (1000, 1, 49, 10) and int64 labels 0..11."""
    with np.load(data_file("kws12_mfcc_test1000.npz")) as file:
        mfcc = (file["mfcc_int8"].astype(np.float32) - 83) * np.float32(0.5847029)
        return mfcc[:, None], file["labels"].astype(np.int64)


def normalized(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Turn uint8 NHWC images into float32 NCHW: (x / 255 - mean) / std."""
    x = torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)


def batches(x: Tensor, y: Tensor | np.ndarray, size: int) -> Batches:
    """Cut samples and labels into a list of (x, y) batches of at most `size`."""
    return list(zip(x.split(size), torch.as_tensor(y).split(size)))


def seeded_split(count: int, calibrate: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return disjoint, sorted indices to calibrate and to judge on, drawn by a seeded permutation."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[:calibrate]), np.sort(order[calibrate:])


def random_images(count: int, side: int = 224, seed: int = 0) -> Tensor:
    """Return seeded standard normal images (count, 3, side, side), as if normalized."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))
