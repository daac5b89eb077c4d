"""Folders of images in ImageNet's form, and the usual preparation of an image for a network."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from ..errors import DataError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class Preprocess(BaseModel):
    """From an image to an input: shorter side to ``resize``, centre ``crop``, then (x / 255 - mean) / std.

    ``resize`` or ``crop`` 0 leaves that step out; with ``squash`` both sides become ``resize``. The defaults are those
    of most ImageNet networks, the pixels those that torchvision's ``Resize`` and ``CenterCrop`` make of a PIL image.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    resize: int = Field(default=256, ge=0)
    crop: int = Field(default=224, ge=0)
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: Interpolation = "bilinear"
    squash: bool = False

    def __str__(self) -> str:
        sides = "both sides" if self.squash else "shorter side"
        parts = [f"{sides} to {self.resize} ({self.interpolation})"] if self.resize else []
        parts += [f"centre {self.crop} x {self.crop}"] if self.crop else []
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return ", ".join([*parts, f"mean ({mean})", f"standard deviation ({std})"])

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
            short = min(width, height)
            width, height = (self.resize if self.squash else self.resize * side // short for side in (width, height))
            image = image.resize((width, height), Image.Resampling[self.interpolation.upper()])
        if self.crop:  # an image smaller than the crop gets black borders
            left, top = (_margin(side - self.crop) for side in (width, height))
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.array(image))
        return pixels.permute(2, 0, 1) if pixels.ndim == 3 else pixels.unsqueeze(0)


def _margin(difference: int) -> int:
    """Where the centre starts, rounded as torchvision does: half to even, and of missing borders the first is less."""
    return round(difference / 2) if difference >= 0 else -(-difference // 2)


def read_batches(
    batches: Sequence[Sequence[Path]], preprocess: Preprocess, everything: Sequence[Path], workers: int | None = None
) -> Iterator[Tensor]:
    """Each of ``batches`` as ``(N, C, H, W)``; the next one is read by ``workers`` threads while this one is used.

    Where an image cannot be read, all of ``everything`` is checked, so that one error names how many there are.
    ``workers`` None is one for each core, up to 16; 0 reads in this thread, when a batch is asked for.
    """
    from PIL import Image

    # Decompression bombs are an attack, not a picture; Pillow raises its own error type for them.
    unreadable = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)
    threads = min(16, os.cpu_count() or 1) if workers is None else workers
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(max_workers=threads) if threads else None
        if pool is not None:
            stack.callback(pool.shutdown, wait=True, cancel_futures=True)
        start = map if pool is None else pool.map
        waiting = [start(preprocess.read, paths) for paths in batches[:1]]
        for paths in [*batches[1:], None]:
            if paths is not None:
                waiting.append(start(preprocess.read, paths))
            try:
                images = list(waiting.pop(0))
            except unreadable:
                raise _unreadable(everything, preprocess, unreadable) from None
            yield _batch(images, preprocess)


def _batch(images: list[Tensor], preprocess: Preprocess) -> Tensor:
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
