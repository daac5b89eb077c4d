"""What a library's model states about the images it was trained for."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from torch import nn

from .images import IMAGENET_MEAN, IMAGENET_STD, Preprocess
from .models import PRETRAINED

USUAL = "usual for ImageNet"


def stated_preprocess(
    spec: str, model: nn.Module, weights: str | os.PathLike[str] | None = None
) -> tuple[Preprocess, str]:
    """The preparation of images that ``model`` states, and whose statement it is.

    torchvision's weights state their transforms: those whose file ``weights`` bears the name of, or the model's default
    ones. timm's models carry a data configuration, also inside a user's file (``pretrained_cfg``). For all others it
    is what is usual for ImageNet.

    >>> stated_preprocess("net.py:build", nn.Linear(2, 2))[1]
    'usual for ImageNet'
    """
    if spec.startswith("torchvision:"):
        return _torchvision(spec.partition(":")[2], weights)
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    if isinstance(config, dict) and "mean" in config and "std" in config:
        undone = "" if config.get("crop_mode") != "border" else ", with a centre crop in place of its borders"
        return _timm(config), f"stated by the model's own configuration{undone}"
    return Preprocess(), USUAL


def _torchvision(name: str, weights: str | os.PathLike[str] | None) -> tuple[Preprocess, str]:
    from torchvision import models  # load_model has imported it

    known = models.get_model_weights(name)
    entry = known.DEFAULT if len(known) else None
    if weights is not None and weights != PRETRAINED:
        entry = next((one for one in known if Path(one.url).name == Path(weights).name), entry)
    transforms: Any = entry.transforms() if entry is not None else None
    if type(transforms).__name__ != "ImageClassification":  # detection, segmentation and video have other ones
        return Preprocess(), USUAL
    preprocess = Preprocess(
        resize=transforms.resize_size[0],
        crop=transforms.crop_size[0],
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        interpolation=transforms.interpolation.value,
    )
    return preprocess, f"stated by torchvision's {entry}"


def _timm(config: dict[str, Any]) -> Preprocess:
    """timm scales the shorter side so that ``crop_pct`` of it are cropped."""
    size = config.get("input_size", (3, 224, 224))[-1]
    return Preprocess(
        resize=math.floor(size / (config.get("crop_pct") or 0.875)),
        crop=size,
        mean=tuple(config.get("mean", IMAGENET_MEAN)),
        std=tuple(config.get("std", IMAGENET_STD)),
        interpolation=config.get("interpolation", "bicubic"),
        squash=config.get("crop_mode") == "squash",
    )
