"""What a model becomes on a chip, what does not fit, and that memories do not overlap."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bitsmith.capture import capture
from bitsmith.errors import PlacementError
from bitsmith.place.chip_layer import ChipLayer
from bitsmith.place.chip_memory import ChipPlan, kernel_words, processor_count
from bitsmith.place.place import place
from bitsmith.recipe import load_recipe
from bitsmith.targets import get_target


class Function(nn.Module):
    """A model of some layers and a function of them."""

    def __init__(self, how: Any, *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.how = nn.ModuleList(layers), how

    def forward(self, x: Tensor) -> Any:
        return self.how(x, *self.layers)


def planned(model: nn.Module, *shape: int, target: str = "max78000") -> ChipPlan:
    graph = capture(model.eval(), ((torch.randn(2, *shape),), {}))
    plan = place(graph, load_recipe("ai8x"), get_target(target)).chip
    assert plan is not None
    return plan


def conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **{"padding": kernel // 2, **options})


CONV = conv(3, 4)
REFUSED: list[tuple[nn.Module, tuple[int, ...], str]] = [
    (conv(3, 4, 5), (3, 8, 8), r"'conv2d'|kernel 5 x 5; conv2d has 1 x 1 and 3 x 3"),
    (conv(3, 4, padding=3), (3, 8, 8), "pads by 3; the chip pads by 0 to 2"),
    (conv(3, 4, dilation=2), (3, 8, 8), "dilation 2; conv2d has 1 at most"),
    (conv(3, 4, 1, padding=1), (3, 8, 8), "pads by 1 with kernel 1 x 1; padding is smaller"),
    (conv(3, 1030), (3, 4, 4), "writes 1030 channels; the chip has 1024"),
    (conv(3, 4, stride=(1, 2)), (3, 8, 8), "strides are the same in both directions"),
    (nn.Sequential(CONV, nn.MaxPool2d(3, 2, padding=1)), (3, 8, 8), "the chip pools without padding"),
    (nn.Sequential(CONV, nn.AvgPool2d(20)), (3, 40, 40), "pools 20 x 20 with stride 20; the chip pools up to 16"),
    (nn.Sequential(CONV, nn.Flatten(), nn.Linear(4 * 400, 5)), (3, 20, 20), "flattens 20 x 20 pixels .* flattens 256"),
    (
        nn.Sequential(conv(3, 80), nn.MaxPool2d(2)),
        (3, 8, 8),
        "pools 80 channels without a convolution; the chip pools 64",
    ),
    (nn.Sequential(CONV, nn.Sigmoid(), conv(4, 4)), (3, 8, 8), "the chip has no sigmoid"),
    (nn.Sequential(CONV, nn.Softmax(1)), (3, 8, 8), "the chip has no softmax"),
    (Function(lambda x, a, b: torch.cat([a(x), b(x)], 1), CONV, conv(3, 4)), (3, 8, 8), "the chip has no cat"),
    (Function(lambda x, a: (a(x), a(x)), CONV), (3, 8, 8), "1 inputs and 2 outputs; the chip one of each"),
    (Function(lambda x, a: a(x)[:, :, 1:], CONV), (3, 8, 8), "it cuts out a part"),
    (Function(lambda x, a: a(F.pad(x, (1, 1, 1, 1))), CONV), (3, 8, 8), "it pads pixels"),
    (Function(lambda x, a: a(F.avg_pool2d(x, 2).abs()), CONV), (3, 8, 8), "Abs is the activation function of"),
    (
        Function(lambda x, a: a(F.avg_pool2d(x, 2).relu()), CONV),
        (3, 8, 8),
        "an activation function follows a convolution",
    ),
    (Function(lambda x, a, b: a(x) + b(x), CONV, conv(3, 1)), (3, 8, 8), "its operands have shapes"),
    (nn.ConvTranspose2d(3, 4, 3, stride=1, padding=1), (3, 8, 8), "have stride 2 and output padding 1"),
    (conv(3, 8), (3, 100, 100), "its values .* do not fit beside what is still read"),
    (nn.Sequential(*(conv(3, 3) for _ in range(33))), (3, 4, 4), "33 layers, .* the chip has 32. Leave out blocks"),
    (nn.Sequential(conv(3, 256), conv(256, 256)), (3, 4, 4), "kernel words of 9 bytes on a processor, which has 768"),
    (nn.Sequential(conv(3, 600, 1), conv(600, 10, 1)), (3, 2, 2), "600 biases do not fit"),
]


@pytest.mark.parametrize(("model", "shape", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_told(model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(PlacementError, match=words):
        planned(model, *shape)


def test_all_violations_are_told_at_once_with_their_layers() -> None:
    model = nn.Sequential(conv(3, 4, 5), nn.ReLU(), conv(4, 4, 7), nn.ReLU(), conv(4, 4, padding=4))
    with pytest.raises(PlacementError, match="4 violations") as told:
        planned(model, 3, 16, 16)
    assert all(name in str(told.value) for name in ("'0'", "'2'", "'4'"))


def names(plan: ChipPlan) -> list[tuple[str, str]]:
    return [(layer.name, layer.op) for layer in plan.layers]


def test_pools_and_sums_are_taken_up_by_who_reads_them() -> None:
    model = Function(lambda x, a, b: b(F.max_pool2d(a(x).relu(), 2)), CONV, conv(4, 4))
    plan = planned(model, 3, 8, 8)
    assert names(plan) == [("layers.0", "conv2d"), ("layers.1", "conv2d")]
    assert plan.layers[1].pool is not None
    assert plan.layers[1].pool.kernel == (2, 2)
    assert plan.layers[1].read == (4, 8, 8)

    model = Function(lambda x, a, b, c: c(a(x) + b(x)), CONV, conv(3, 4), conv(4, 4))
    plan = planned(model, 3, 8, 8)
    assert names(plan) == [(f"layers.{i}", "conv2d") for i in range(3)]
    assert plan.layers[2].eltwise == "add"
    assert [layer.write_gap for layer in plan.layers] == [1, 1, 0]


def test_a_stride_becomes_pooling_of_one_pixel() -> None:
    plan = planned(nn.Sequential(conv(3, 4, stride=2), nn.ReLU(), conv(4, 4)), 3, 9, 9)
    first, second = plan.layers
    assert first.written == (4, 9, 9)
    assert second.pool is not None
    assert (second.pool.kernel, second.pool.stride) == ((1, 1), (2, 2))
    assert second.written == (4, 5, 5)


def test_depthwise_convolutions_are_spread_out_where_the_chip_has_none() -> None:
    model = nn.Sequential(conv(8, 8, groups=8), nn.ReLU(), conv(8, 4, 1))
    assert [planned(model, 8, 8, 8, target=t).layers[0].dense for t in ("max78000", "max78002")] == [True, False]


def test_values_that_are_alive_together_do_not_overlap() -> None:
    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.a, self.b = conv(channels, channels), conv(channels, channels)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.b(F.relu(self.a(x))))

    model = nn.Sequential(conv(3, 20), nn.ReLU(), Block(20), Block(20), conv(20, 70), nn.ReLU(), conv(70, 10))
    plan = planned(model, 3, 10, 10, target="max78002")
    partners = {n: set(layer.sources) for layer in plan.layers if layer.eltwise for n in layer.sources}
    for number, layer in enumerate(plan.layers):
        later = [s for other in plan.layers[number:] for s in other.sources if s < number]
        written = plan.written[number]
        for alive in set(later) | set(layer.sources):
            other = plan.written[alive]
            if alive in partners.get(number, set()) or not written.processors & other.processors:
                continue
            apart = written.offset >= other.offset + other.size or other.offset >= written.offset + written.size
            assert apart, (layer.name, number, alive)
        for source in layer.sources:
            assert plan.written[source].processors == plan.read(layer).processors
        assert written.processors.bit_count() == processor_count(layer.written[0], get_target("max78002").limits)  # type: ignore[arg-type]


def test_weight_memory_is_counted_in_words_of_nine_bytes() -> None:
    limits = get_target("max78000").limits
    assert limits is not None
    assert limits.weight_bytes == 442_368

    def words(**keys: Any) -> int:
        fields: dict[str, Any] = {"read": (64, 8, 8), "written": (10, 8, 8), "kernel": (3, 3), **keys}
        return kernel_words(ChipLayer("x", fields.pop("op", "conv2d"), [0], **fields), limits)

    assert words() == 10
    assert words(bits=2) == 3
    assert words(kernel=(1, 1)) == 2
    assert words(read=(65, 8, 8)) == 20  # two passes
    assert words(op="linear", kernel=(), read=(64, 3, 3)) == 10
    assert words(read=(64, 8, 8), groups=64) == 1
    assert words(op="none") == 0
