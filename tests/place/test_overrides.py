"""Overrides reach the layers they name; what cannot be done is refused with the layer's name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from policy_nets import Depthwise, Residual, SqueezeExcite, placed, quantized_values
from torch import Tensor, fx, nn

from bitsmith.errors import PlacementError, UnsupportedOperatorError
from bitsmith.grid import IntFormat, Quantizer, TensorSpec
from bitsmith.place.layers import QuantLayer
from bitsmith.recipe import Override

FOUR = TensorSpec(format=IntFormat(4), granularity="channel")
FOUR_ACTIVATIONS = TensorSpec(format=IntFormat(4, signed=False), symmetric=False)


def weight_bits(graph: fx.GraphModule) -> dict[str, int]:
    """Bits of every layer's weight; 32 where it stays float."""
    found = {}
    for name, module in graph.named_modules():
        if isinstance(module, QuantLayer) and module.weight_quantizer is not None:
            found[name] = module.weight_quantizer.spec.format.bits
        elif isinstance(module, nn.Conv2d | nn.Linear) and not name.endswith(".layer"):
            found[name] = 32
    return found


def activation_bits(graph: fx.GraphModule) -> dict[str, int]:
    return {
        name.removeprefix("quantizers."): module.spec.format.bits
        for name, module in graph.named_modules()
        if isinstance(module, Quantizer) and name.startswith("quantizers.")
    }


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ("conv2", {"conv1": 8, "conv2": 4, "fc": 8}),
        ("conv*", {"conv1": 4, "conv2": 4, "fc": 8}),
        ("*", {"conv1": 4, "conv2": 4, "fc": 4}),
        ("type:Linear", {"conv1": 8, "conv2": 8, "fc": 4}),
        ("type:Conv2d", {"conv1": 4, "conv2": 4, "fc": 8}),
        ("first", {"conv1": 4, "conv2": 8, "fc": 8}),
        ("last", {"conv1": 8, "conv2": 8, "fc": 4}),
    ],
)
def test_overrides_find_their_layers(match: str, expected: dict[str, int]) -> None:
    graph, _ = placed(Residual, overrides=(Override(match=match, weights=FOUR),))
    assert weight_bits(graph) == expected


def test_the_only_layer_is_first_and_last() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    for match in ("first", "last"):
        graph, _ = placed(net, overrides=(Override(match=match, weights=FOUR),))
        assert weight_bits(graph) == {"0": 4}


def test_later_overrides_win() -> None:
    overrides = (
        Override(match="*", weights=FOUR),
        Override(match="first", weights=TensorSpec(format=IntFormat(6))),
    )
    graph, _ = placed(Residual, overrides=overrides)
    assert weight_bits(graph) == {"conv1": 6, "conv2": 4, "fc": 4}


def test_an_excluded_layer_stays_as_it_was() -> None:
    graph, found = placed(SqueezeExcite, overrides=(Override(match="squeeze", exclude=True),))
    assert weight_bits(graph) == {"conv": 8, "squeeze": 32, "excite": 8, "out": 8}
    assert type(graph.squeeze) is nn.Conv2d
    assert "squeeze" not in [node.name for node in found.layers]
    assert "adaptive_avg_pool2d" not in quantized_values(graph)  # it was quantized for that layer alone


def test_exclusion_wins_over_other_overrides() -> None:
    overrides = (Override(match="conv2", weights=FOUR), Override(match="conv2", exclude=True))
    graph, _ = placed(Residual, overrides=overrides)
    assert weight_bits(graph)["conv2"] == 32


def test_an_activations_override_is_for_what_the_layer_reads() -> None:
    graph, _ = placed(Depthwise, overrides=(Override(match="depth", activations=FOUR_ACTIVATIONS),))
    assert activation_bits(graph) == {"x": 8, "relu6": 4, "relu6_1": 8, "project": 8}


def test_layerwise_overrides_touch_the_layers_own_input_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    graph, _ = placed(Two(), "layerwise", overrides=(Override(match="b", activations=FOUR_ACTIVATIONS),))
    assert activation_bits(graph) == {"a_input": 8, "b_input": 4}


def test_an_activations_override_sees_through_moves() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    graph, _ = placed(net, overrides=(Override(match="last", activations=FOUR_ACTIVATIONS),))
    assert sorted(activation_bits(graph).values()) == [4, 8]


def test_an_override_that_matches_nothing_lists_the_layers() -> None:
    with pytest.raises(PlacementError, match=r"'layer7\.\*' matches no layer; layers are conv1, conv2, fc"):
        placed(Residual, overrides=(Override(match="layer7.*", exclude=True),))


class TestCoverage:
    def test_a_model_without_compute_layers_is_refused(self) -> None:
        with pytest.raises(PlacementError, match=r"nothing would be quantized.*zero of its multiply-accumulates"):
            placed(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)))

    def test_excluding_everything_is_refused(self) -> None:
        with pytest.raises(PlacementError, match="every compute layer is excluded"):
            placed(Residual, overrides=(Override(match="*", exclude=True),))

    def test_less_than_the_recipe_promises_is_refused_with_what_is_left_out(self) -> None:
        """conv1 has 3 * 8 * 9 * 64 of 3 * 8 * 9 * 64 + 8 * 8 * 9 * 64 + 8 * 4 products: 27.3 %."""
        exclude = (Override(match="conv1", exclude=True),)
        with pytest.raises(PlacementError, match=r"72\.7%.*min_coverage 90\.0%.*conv1"):
            placed(Residual, overrides=exclude, min_coverage=0.9)
        placed(Residual, overrides=exclude, min_coverage=0.7)

    @pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise", "flexml"])
    def test_weights_computed_at_run_time_are_named(self, placement: str) -> None:
        class Dynamic(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.conv, self.scale = nn.Conv2d(3, 3, 1), nn.Parameter(torch.ones(3, 1, 1, 1))

            def forward(self, x: Tensor) -> Tensor:
                x = self.conv(x)
                return F.conv2d(x, x.mean((0, 2, 3)).view(3, 1, 1, 1) * self.scale, groups=3)

        with pytest.raises(UnsupportedOperatorError, match=r"conv2d_1 \(conv\).*computed at run time.*exclude: true"):
            placed(Dynamic(), placement)
        graph, _ = placed(Dynamic(), placement, overrides=(Override(match="conv2d_1", exclude=True),))
        assert weight_bits(graph) == {"conv": 8}
