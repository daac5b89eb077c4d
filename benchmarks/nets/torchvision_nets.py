"""torchvision's own definitions with seeded random weights and BatchNorm statistics that fit them.

For latency, file size and memory, where the weights do not matter.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch
from torch import nn

from benchmarks.data import random_images

SEED = 0
NMS = "{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_libraries: list[torch.library.Library] = []  # a schema lives as long as its library


def import_torchvision_models() -> ModuleType:
    """Import `torchvision.models`, also where torchvision's compiled operators do not load."""
    try:
        return importlib.import_module("torchvision.models")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    # Its Python part only wants the schemas of two operators, which no classifier calls.
    _libraries.append(torch.library.Library("torchvision", "DEF"))
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            _libraries[-1].define(NMS.format(name=name))
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]  # left behind by the import that failed
    return importlib.import_module("torchvision.models")


def random_net(name: str) -> nn.Module:
    """Build `torchvision.models.<name>` in eval mode; the same name gives the same weights."""
    models = import_torchvision_models()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(SEED)
        net = getattr(models, name)(weights=None)
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
        for norm in norms:
            norm.weight.uniform_(0.5, 1.5)  # all ones would fold into alike channels
            norm.bias.uniform_(-0.5, 0.5)
        settle_batchnorm(net, norms)
    return net.eval()


def settle_batchnorm(net: nn.Module, norms: list[nn.BatchNorm2d], passes: int = 4, size: int = 8) -> None:
    """Let each BatchNorm's running statistics become the mean over a few batches of random images."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative mean
    net.train()
    for seed in range(passes):
        net(random_images(size, seed=1000 + seed))
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum
