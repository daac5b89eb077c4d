"""Folders of images in ImageNet's form, and the usual preparation of an image for a network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"})
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Preprocess(BaseModel):
    """From an image to an input: shorter side to ``resize``, centre ``crop``, then (x / 255 - mean) / std.

    ``resize`` or ``crop`` 0 leaves that step out. The defaults are those of most ImageNet networks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int = Field(default=256, ge=0)
    crop: int = Field(default=224, ge=0)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    @model_validator(mode="after")
    def _consistent(self) -> Preprocess:
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean {self.mean} and std {self.std} need one number for grey or three for colour images each"
            )
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std {self.std} must be positive: pixels are divided by it")
        return self

    def normalize(self, pixels: Tensor) -> Tensor:
        """``(N, C, H, W)`` of 0 to 255 to the network's range."""
        channels = pixels.shape[1]
        if channels != len(self.mean):
            raise DataError(
                f"the images have {channels} channels, but mean and std are given for {len(self.mean)}: "
                f"set --mean and --std to {channels} numbers, separated by commas"
            )
        mean = torch.tensor(self.mean).view(1, -1, 1, 1)
        std = torch.tensor(self.std).view(1, -1, 1, 1)
        return (pixels.float() / 255.0 - mean) / std

    def read(self, path: Path) -> Tensor:
        """The image as uint8 ``(C, H, W)``, resized and cropped."""
        import numpy as np
        from PIL import Image

        with Image.open(path) as opened:
            image = opened.convert("RGB" if len(self.mean) == 3 else "L")
        width, height = image.size
        if self.resize:
            factor = self.resize / min(width, height)
            width, height = max(round(width * factor), self.resize), max(round(height * factor), self.resize)
            image = image.resize((width, height), Image.Resampling.BILINEAR)
        if self.crop:  # an image smaller than the crop gets black borders, as in torchvision
            left, top = (width - self.crop) // 2, (height - self.crop) // 2
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.unsqueeze(0)


def scan_folder(folder: Path) -> tuple[list[Path], list[int], list[str]]:
    """All images of a folder with one sub-folder per class: paths, class indices, and the classes' names.

    Classes are numbered in the sorted order of their folders' names, as torchvision and timm number them.
    """
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        loose = sum(entry.suffix.lower() in EXTENSIONS for entry in folder.iterdir())
        found = f"{loose} images lie directly in it" if loose else "it has no sub-folders and no images"
        raise DataError(
            f"the data folder {str(folder)!r} has no classes: {found}. It should have one sub-folder per "
            f"class, such as {folder / 'cat' / '001.jpg'}"
        )
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(file for file in (folder / name).rglob("*") if file.suffix.lower() in EXTENSIONS)
        paths += files
        labels += [label] * len(files)
    if not paths:
        raise DataError(
            f"the {len(classes)} class folders in {str(folder)!r} hold no images: "
            f"looked for {', '.join(sorted(EXTENSIONS))}"
        )
    return paths, labels, classes


def read_images(paths: Sequence[Path], preprocess: Preprocess, everything: Sequence[Path]) -> Tensor:
    """``paths`` as one batch ``(N, C, H, W)``; where one cannot be read, all of ``everything`` is checked."""
    from PIL import Image

    # Decompression bombs are an attack, not a picture; Pillow raises its own error type for them.
    unreadable = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        try:
            images = list(pool.map(preprocess.read, paths))
        except unreadable:
            raise _unreadable(everything, preprocess, unreadable) from None
    if len({image.shape for image in images}) > 1:
        sizes = sorted({tuple(image.shape[1:]) for image in images})
        raise DataError(
            f"the images come in several sizes ({', '.join(f'{h} x {w}' for h, w in sizes[:4])} ...): set --crop"
        )
    return preprocess.normalize(torch.stack(images))


def _unreadable(paths: Sequence[Path], preprocess: Preprocess, kinds: tuple[type[Exception], ...]) -> DataError:
    """Count all that fail: mending one file per run would be tedious."""

    def problem(path: Path) -> str | None:
        try:
            preprocess.read(path)
        except kinds as error:
            return str(error) or type(error).__name__
        return None

    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:
        problems = [(path, reason) for path, reason in zip(paths, pool.map(problem, paths)) if reason is not None]
    first, reason = problems[0] if problems else (paths[0], "it could be read the second time")
    return DataError(
        f"{len(problems)} of {len(paths)} images cannot be read. The first is {str(first)!r}: {reason}. "
        f"Repair or remove them"
    )
