"""The contracts of quantizers and layer mappings: ours keep them, and broken ones are caught."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.eager.fuse import fuse_modules
from bitsmith.eager.swap import MAPPING
from bitsmith.grid import IntFormat, TensorSpec
from bitsmith.testing import check_layer_mapping, check_quantizer

LAYERS: list[tuple[nn.Module, tuple[int, ...]]] = [
    (nn.Conv1d(4, 6, 3), (8, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1, groups=2), (8, 4, 6, 6)),
    (nn.Conv3d(2, 4, 3), (4, 2, 5, 5, 5)),
    (nn.ConvTranspose1d(4, 6, 3), (8, 4, 9)),
    (nn.ConvTranspose2d(4, 6, 3, stride=2), (8, 4, 5, 5)),
    (nn.ConvTranspose3d(2, 4, 3), (4, 2, 3, 3, 3)),
    (nn.Linear(6, 4), (16, 6)),
    (fuse_modules(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), ["0", "1"])[0], (8, 3, 6, 6)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda v: type(v).__name__)
def test_our_mappings_keep_the_contract(layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    check_layer_mapping(layer, MAPPING[type(layer)], torch.randn(shape))


def test_our_quantizer_keeps_the_contract() -> None:
    check_quantizer(bs.nn.WatchingQuantizer)


class Shifts(bs.nn.WatchingQuantizer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 0.01


class Forgets(bs.nn.WatchingQuantizer):
    def merge(self, other: bs.nn.WatchingQuantizer) -> None:
        pass


class Detaches(bs.nn.WatchingQuantizer):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.detach()) + 0 * x


class Clips(bs.nn.WatchingQuantizer):
    def solve(self, **options: bool) -> bs.nn.WatchingQuantizer:
        grid = super().solve(**options)
        return dataclasses.replace(grid, scale=grid.scale / 8)


@pytest.mark.parametrize(
    ("kind", "words"),
    [(Shifts, "changes values"), (Forgets, "merging"), (Detaches, "gradient"), (Clips, "relative error")],
)
def test_broken_quantizers_are_caught(kind: type[bs.nn.WatchingQuantizer], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_quantizer(kind)


def test_broken_mappings_are_caught() -> None:
    layer, x = nn.Linear(6, 4), torch.randn(16, 6)
    with pytest.raises(AssertionError, match=r"without a bitsmith\.nn\.QuantModule"):
        check_layer_mapping(layer, lambda module, recipe: module, x)
    with pytest.raises(AssertionError, match="before calibration"):
        check_layer_mapping(layer, lambda module, recipe: bs.nn.QuantLinear(6, 4), x)

    def copies(module: nn.Linear, recipe: object) -> nn.Module:
        made = bs.nn.QuantLinear(6, 4, outputs=True)
        made.load_state_dict(module.state_dict())
        return made

    with pytest.raises(AssertionError, match="does not hold the float layer's weight, bias"):
        check_layer_mapping(layer, copies, x)
    two = TensorSpec(format=IntFormat(2))
    with pytest.raises(AssertionError, match="not near, or float"):
        check_layer_mapping(layer, lambda m, r: bs.nn.QuantLinear.from_float(m, weights=two, outputs=True), x)
