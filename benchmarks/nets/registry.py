"""Every benchmark network by name: the trained model, what calibrates it, what judges it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks import data
from benchmarks.data import Batches
from benchmarks.nets.dscnn_kws import DSCNN
from benchmarks.nets.mcunet_in4 import MCUNet
from benchmarks.nets.mobilenet_v1_025 import MobileNetV1
from benchmarks.nets.resnet_cifar import resnet20, resnet32
from benchmarks.nets.shufflenetv2_cifar import shufflenetv2_x0_5
from benchmarks.nets.torchvision_nets import SEED, random_net

HALF = (0.5, 0.5, 0.5)  # mean and std of x / 127.5 - 1


@dataclass(frozen=True)
class Info:
    """What a row of a table must say about where its numbers come from.

    `reference_top1` is the float top-1 (percent) in the data's README: over the test samples, or over all
    samples, those that calibrate included, where `reference_over` is "all". None where the labels are the
    float model's own answers.
    """

    name: str
    checkpoint: str
    samples: str
    seed: int | None
    input_shape: tuple[int, ...]
    reference_top1: float | None
    reference_over: str


class Benchmark(NamedTuple):
    """A model in eval mode and lists of (inputs, labels)."""

    model: nn.Module
    calibration: Batches
    test: Batches
    info: Info


def names() -> tuple[str, ...]:
    """Return the names that `load` takes."""
    return tuple(_LOADERS)


def load(name: str, draw: int = 0) -> Benchmark:
    """Return (model, calibration batches, test batches, info) of the network called `name`.

    `draw` counts seeded choices of the samples that calibrate. CIFAR-10 nets take them from the training images, the
    first 1,000 or a choice of the other 9,000; where one set serves for both, all others judge. Raises `DataMissing`
    where its data is not on this machine.

    Example:
        >>> names()[:3]
        ('resnet20', 'resnet32', 'shufflenetv2_x0_5')
    """
    if name not in _LOADERS:
        raise KeyError(f"no benchmark network {name!r}; there are {', '.join(_LOADERS)}")
    return _LOADERS[name](name, draw)


def top1(model: nn.Module, batches: Batches) -> float:
    """Return the percentage of `batches` on which the highest score is the label's."""
    with torch.inference_mode():
        hits = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches)
    return 100 * hits / sum(len(y) for _, y in batches)


def load_weights(model: nn.Module, checkpoint: str) -> nn.Module:
    """Load a checkpoint as float32, return the model in eval mode; only `num_batches_tracked` may lack."""
    weights = {key: value.float() for key, value in load_file(data.data_file(checkpoint)).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = [key for key in missing if not key.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise KeyError(f"{checkpoint} does not fit {type(model).__name__}: {missing=}, {unexpected=}")
    return model.eval()


def _cifar(build: Callable[[], nn.Module], checkpoint: str, mean, std, reference: float):
    def loader(name: str, draw: int) -> Benchmark:
        model = load_weights(build(), checkpoint)
        (train, train_y), (test, test_y) = data.cifar10("train"), data.cifar10("test")
        chosen = np.arange(1000) if draw == 0 else 1000 + np.random.default_rng(draw).permutation(9000)[:1000]
        calibration = data.batches(data.normalized(train[chosen], mean, std), train_y[chosen], 100)
        judged = data.batches(data.normalized(test, mean, std), test_y, 250)
        samples = "CIFAR-10: first 1,000 training images calibrate, 10,000 test images judge"
        info = Info(name, checkpoint, samples, None, (3, 32, 32), reference, "test")
        return Benchmark(model, calibration, judged, info)

    return loader


def _imagenet(build: Callable[[], nn.Module], checkpoint: str, crop: int, resize, reference: float):
    def loader(name: str, draw: int) -> Benchmark:
        model = load_weights(build(), checkpoint)
        images, labels = data.imagenet_sample(crop, resize)
        first, rest = data.seeded_split(len(images), 100, draw)
        calibration = data.batches(data.normalized(images[first], HALF, HALF), labels[first], 50)
        judged = data.batches(data.normalized(images[rest], HALF, HALF), labels[rest], 100)
        samples = "ImageNet sample of 1,000: a seeded 100 calibrate, the other 900 judge"
        info = Info(name, checkpoint, samples, 0, (3, crop, crop), reference, "all")
        return Benchmark(model, calibration, judged, info)

    return loader


def _keywords(name: str, draw: int) -> Benchmark:
    checkpoint = "kws12_dscnn.safetensors"
    model = load_weights(DSCNN(), checkpoint)
    mfcc, labels = data.keywords()
    first, rest = data.seeded_split(len(mfcc), 100, draw)
    calibration = data.batches(torch.from_numpy(mfcc[first]), labels[first], 50)
    judged = data.batches(torch.from_numpy(mfcc[rest]), labels[rest], 100)
    samples = "Speech Commands, 1,000 test samples: a seeded 100 calibrate, the other 900 judge"
    info = Info(name, checkpoint, samples, 0, (1, 49, 10), 91.3, "all")
    return Benchmark(model, calibration, judged, info)


def _random(name: str, draw: int) -> Benchmark:
    model = random_net(name)
    calibration = data.batches(data.random_images(64, seed=1 + 2 * draw), torch.zeros(64, dtype=torch.int64), 16)
    images = data.random_images(64, seed=2).split(16)
    with torch.inference_mode():
        judged = [(x, model(x).argmax(1)) for x in images]
    samples = "random images: 64 calibrate (labels 0), 64 judge (labels are the float model's answers)"
    checkpoint = f"torchvision {name}, random weights"
    info = Info(name, checkpoint, samples, SEED, (3, 224, 224), None, "test")
    return Benchmark(model, calibration, judged, info)


RESNET_NORM = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHUFFLENET_NORM = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
NORMS = {"resnet20": RESNET_NORM, "resnet32": RESNET_NORM, "shufflenetv2_x0_5": SHUFFLENET_NORM}

_LOADERS: dict[str, Callable[[str, int], Benchmark]] = {
    "resnet20": _cifar(resnet20, "cifar10_resnet20_akamaster.safetensors", *RESNET_NORM, 91.73),
    "resnet32": _cifar(resnet32, "cifar10_resnet32_akamaster.safetensors", *RESNET_NORM, 92.62),
    "shufflenetv2_x0_5": _cifar(
        shufflenetv2_x0_5, "cifar10_shufflenetv2_x0_5_chenyaofo.safetensors", *SHUFFLENET_NORM, 90.64
    ),
    "mobilenet_v1_025": _imagenet(MobileNetV1, "imagenet_mobilenet_v1_0.25_224.safetensors", 224, None, 57.1),
    "mcunet_in4": _imagenet(MCUNet, "imagenet_mcunet_in4_160_bnfolded_bf16.safetensors", 160, 182, 78.5),
    "dscnn_kws": _keywords,
    "resnet18": _random,
    "mobilenet_v2": _random,
}
