"""Block reconstruction: every kind of layer, shared scales, seeds, small memory, and the gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.calibrate import block_steps
from bitsmith.errors import RecipeError
from bitsmith.grid import IntFormat, Quantizer, TensorSpec
from bitsmith.recipe import bits_recipe


def steps(**options: Any) -> tuple[Any, ...]:
    return ("fold_batch_norm", {"reconstruct": {"iterations": 250, "batch_size": 16, "drop": 0.0, **options}})


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(i, 6, 3, padding=1) for i in (3, 6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        y = F.relu(y + self.c(F.relu(self.b(y))))
        return self.head(y.mean((2, 3)))


NEAREST = ("fold_batch_norm",)


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).cumsum(-1)


@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise"])
@pytest.mark.parametrize("bits", [(4, 8), (3, 4)])
def test_it_loses_less_than_nearest_rounding(placement: Any, bits: tuple[int, int]) -> None:
    x = images()
    plain = bs.quantize(Residual(), [x], bits_recipe(*bits, steps=NEAREST), placement=placement)
    better = bs.quantize(Residual(), [x], bits_recipe(*bits, steps=steps()), placement=placement)
    assert better.report.output_sqnr_db > plain.report.output_sqnr_db
    assert all(entry.error_after < entry.error_before for entry in better.report.steps if not entry.undone)


NETS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (4, 12)),
    "conv3d": (nn.Conv3d(2, 4, 2), (2, 4, 5, 4)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, bias=False), (4, 5, 5)),
    "grouped": (nn.Conv2d(4, 8, 3, groups=2), (4, 6, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (4, 6, 6)),
    "linear": (nn.Linear(12, 6), (12,)),
}


@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
@pytest.mark.parametrize("name", NETS)
def test_it_takes_every_kind_of_layer_and_granularity(name: str, granularity: Any) -> None:
    layer, shape = NETS[name]
    torch.manual_seed(0)
    layer.reset_parameters()  # type: ignore[operator]
    net = nn.Sequential(layer, nn.ReLU())
    x = torch.randn(64, *shape).cumsum(-1)
    recipe = bits_recipe(3, 8, steps=NEAREST)
    spec = TensorSpec(format=IntFormat(3), granularity=granularity, group_size=4 if granularity == "group" else None)
    weights = recipe.model_copy(update={"weights": spec, "placement": "layerwise"})
    plain = bs.quantize(net, [x], weights)
    options = bits_recipe(3, 8, steps=steps(iterations=200)).steps
    better = bs.quantize(net, [x], weights.model_copy(update={"steps": options}))
    (entry,) = better.report.steps
    assert entry.error_after < entry.error_before
    assert better.report.output_sqnr_db > plain.report.output_sqnr_db


def test_behind_gptq_it_starts_from_there_and_is_never_worse() -> None:
    x = images()
    first = bs.quantize(Residual(), [x], bits_recipe(3, 4, steps=("fold_batch_norm", "gptq")))
    both = bs.quantize(Residual(), [x], bits_recipe(3, 4, steps=("fold_batch_norm", "gptq", steps()[1])))
    blocks = [entry for entry in both.report.steps if entry.step == "reconstruct"]
    assert len(blocks) == 2
    assert len([entry for entry in both.report.steps if entry.step == "gptq"]) == 4
    assert all(entry.undone or entry.error_after < entry.error_before for entry in blocks)
    assert both.report.output_sqnr_db > first.report.output_sqnr_db - 0.5


def test_it_learns_while_activations_are_dropped() -> None:
    x = images()
    plain = bs.quantize(Residual(), [x], bits_recipe(2, 4, steps=NEAREST))
    better = bs.quantize(Residual(), [x], bits_recipe(2, 4, steps=steps(drop=0.5)))
    assert better.report.output_sqnr_db > plain.report.output_sqnr_db


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    x, recipe = images(), bits_recipe(3, 4, steps=steps(iterations=30, drop=0.5))
    first, again = (bs.quantize(Residual(), [x], recipe).graph.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = bs.quantize(
        Residual(), [x], bits_recipe(3, 4, steps=steps(iterations=30, drop=0.5, seed=1))
    ).graph.state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_scales_that_are_shared_stay_shared_and_rates_of_zero_change_nothing() -> None:
    x = images()
    q = bs.quantize(Residual(), [x], bits_recipe(3, 4, steps=steps()), placement="fx")
    scales = {n: float(m.scale) for n, m in q.graph.named_modules() if isinstance(m, Quantizer) and "quantizers" in n}
    assert scales["quantizers.relu"] == scales["quantizers.c"]
    still = bs.quantize(Residual(), [x], bits_recipe(3, 4, steps=steps(lr_scale=0, lr_bias=0)))
    plain = bs.quantize(Residual(), [x], bits_recipe(3, 4, steps=NEAREST))
    before = plain.graph.state_dict()
    for key, value in still.graph.state_dict().items():
        if "quantizers" in key or key.endswith("layer.bias"):
            assert torch.equal(value, before[key]), key


def test_samples_past_the_memory_budget_are_read_in_parts() -> None:
    x = images(256)
    recipe = bits_recipe(3, 4, steps=steps())
    small = bs.quantize(Residual(), list(x.split(16)), recipe, memory=400_000)
    plain = bs.quantize(Residual(), [x], bits_recipe(3, 4, steps=NEAREST))
    assert small.report.output_sqnr_db > plain.report.output_sqnr_db


def test_bfloat16_and_a_device_by_name_learn_too() -> None:
    x = images()
    plain = bs.quantize(Residual(), [x], bits_recipe(3, 8, steps=NEAREST))
    half = bs.quantize(Residual(), [x], bits_recipe(3, 8, steps=steps(dtype="bfloat16", device="cpu")))
    assert half.report.output_sqnr_db > plain.report.output_sqnr_db
    with pytest.raises(RecipeError, match="device"):
        bs.quantize(Residual(), [x], bits_recipe(3, 8, steps=steps(device="cuda:99")))


def test_a_block_that_gets_worse_is_put_back_and_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def spoil(block: Any, batches: Any, options: Any, report: Any) -> None:
        block.write_back()
        for layer in block.layers.values():
            layer.weight.data.mul_(3.0)
            layer.bias.data.add_(1.0)

    x = images()
    monkeypatch.setattr(block_steps, "reconstruct", spoil)
    q = bs.quantize(Residual(), [x], bits_recipe(4, 8, steps=steps()))
    assert all(entry.undone for entry in q.report.steps)
    plain = bs.quantize(Residual(), [x], bits_recipe(4, 8, steps=NEAREST))
    torch.testing.assert_close(q(x), plain(x))


def test_samples_held_out_judge_a_block_and_are_not_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def spy(block: Any, batches: Any, options: Any, report: Any) -> None:
        seen.extend(value for batch in batches for node, value in batch.values.items() if node.op == "placeholder")

    x = images(64)
    x[56:] = 9.0
    monkeypatch.setattr(block_steps, "reconstruct", spy)
    q = bs.quantize(Residual(), list(x.split(8)), bits_recipe(4, 8, steps=steps(iterations=20)))
    assert seen
    assert not any(bool((value.flatten(1) == 9.0).all(1).any()) for value in seen)
    assert all(entry.undone for entry in q.report.steps)  # nothing was learned, so nothing became better


def test_nothing_is_learned_from_too_few_samples() -> None:
    """What other steps do is done as without it, and the report says why nothing was learned."""
    x = images(64)
    others = ("fold_batch_norm", "gptq", "bias_correction")
    learning = (*others[:2], {"reconstruct": {"iterations": 20, "least_samples": 65}}, others[2])
    q = bs.quantize(Residual(), [x], bits_recipe(4, 8, steps=learning))
    assert torch.equal(q(x), bs.quantize(Residual(), [x], bits_recipe(4, 8, steps=others))(x))
    notes = [note for note in q.report.notes if note.startswith("reconstruct: 0 of ")]
    assert notes
    assert "64 samples are too few to learn from (least_samples: 65): give more" in notes[0]
    enough = (*learning[:2], {"reconstruct": {"iterations": 20, "least_samples": 64}}, learning[3])
    done = bs.quantize(Residual(), [x], bits_recipe(4, 8, steps=enough)).report.steps
    assert not any(entry.skipped for entry in done if entry.step == "reconstruct")


def test_layers_with_shared_weights_keep_them() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(F.relu(self.a(x)))))

    net, x = Twice(), images()
    q = bs.quantize(net, [x], bits_recipe(3, 8, steps=steps(iterations=10)))
    weights = [m.layer.weight for n, m in q.graph.named_modules() if n.startswith("a") and hasattr(m, "layer")]
    assert all(torch.equal(weight, net.a.weight) for weight in weights)


def test_progress_tells_the_time_left() -> None:
    calls: list[tuple[int, int, str]] = []
    bs.quantize(Residual(), [images()], bits_recipe(4, 8, steps=steps()), progress=lambda *call: calls.append(call))
    assert any("iterations" in text and "s left" in text for _, _, text in calls)
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
