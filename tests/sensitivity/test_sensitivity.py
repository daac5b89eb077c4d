"""What each layer costs, against models quantized with overrides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.calibrate.noise import Noise
from bitsmith.errors import DataError
from bitsmith.recipe import Recipe, bits_recipe, load_recipe


class Net(nn.Module):
    """Four layers and a residual; the third has weights of very different size in its channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 16)
        self.c, self.d = nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.c.weight[0] *= 30

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x + self.b(x).relu()
        return self.d(self.c(x).relu())


NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def net() -> Net:
    return Net().eval()


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    return [torch.randn(128, 8, generator=torch.Generator().manual_seed(1))]


def recipe(**fields: object) -> Recipe:
    return bits_recipe(4, 8, granularity="tensor", steps=(), placement="layerwise", bias=None).model_copy(update=fields)


def output_db(net: Net, data: list[Tensor], overrides: list[bs.Override], weights_only: bool = False) -> float:
    """SQNR at the outputs of the model that ``quantize`` makes with these overrides."""
    chosen = recipe(activations=None) if weights_only else recipe()
    q = bs.quantize(net, data, chosen, overrides=overrides)
    noise = Noise()
    with torch.no_grad():
        noise.update(net(data[0]), q.graph(data[0]))
    assert noise.db is not None
    return noise.db


def test_it_is_what_quantizing_with_overrides_gives(net: Net, data: list[Tensor]) -> None:
    """Placement ``layerwise`` puts Quantizers at layers alone, so that an override leaves exactly one layer out."""
    found = bs.sensitivity(net, data, recipe(), samples=128)
    assert found.all_db == pytest.approx(output_db(net, data, []), abs=0.05)
    for layer in found.layers:
        rest = [bs.Override(match=name, exclude=True) for name in NAMES if name != layer.name]
        assert layer.alone_db == pytest.approx(output_db(net, data, rest), abs=0.05)
        one = [bs.Override(match=layer.name, exclude=True)]
        assert layer.left_out_db == pytest.approx(output_db(net, data, one), abs=0.05)
    assert found.weights_only_db == pytest.approx(output_db(net, data, [], weights_only=True), abs=0.05)
    assert found.activations_only_db is not None
    assert found.activations_only_db > found.weights_only_db + 6


def test_the_proposal_gains_what_it_says(net: Net, data: list[Tensor]) -> None:
    found = bs.sensitivity(net, data, recipe(), samples=128, goal_db=1.0)
    assert found.proposal.layers
    assert found.proposal.keep == "float"
    assert found.proposal.sqnr_db[-1] >= found.all_db + 1.0
    assert output_db(net, data, found.proposal.overrides) == pytest.approx(found.proposal.sqnr_db[-1], abs=0.05)
    pasted = Recipe.from_yaml(recipe().to_yaml() + found.proposal.to_yaml())
    assert pasted.overrides == tuple(found.proposal.overrides)


def test_chunks_do_not_change_the_numbers(net: Net, data: list[Tensor]) -> None:
    whole, cut = (bs.sensitivity(net, d, recipe(), samples=128) for d in (data, list(data[0].split(32))))
    for one, other in zip(whole.layers, cut.layers):
        assert one.alone_db == pytest.approx(other.alone_db, abs=1e-3)


def test_a_target_with_16_bits_gets_16_bits(net: Net, data: list[Tensor]) -> None:
    from bitsmith.targets import list_targets

    wide = next(t for t in list_targets() if 16 in t.integer_bits and t.limits is None)
    found = bs.sensitivity(net, data, wide.default_recipe, wide, goal_db=1.0)
    assert found.proposal.keep == "16 bits"
    for override in found.proposal.overrides:
        assert override.weights is not None
        assert override.weights.format.bits == 16
    q = bs.quantize(net, data, wide.default_recipe, wide, overrides=found.proposal.overrides)
    assert {layer.name for layer in q.report.layers if layer.weight_bits == 16} == set(found.proposal.layers)


def test_steps_that_round_do_not_blur_it(net: Net, data: list[Tensor]) -> None:
    fast = load_recipe("w4a8-fast")
    nearest = fast.model_copy(update={"steps": ()})
    one, other = (bs.sensitivity(net, data, r) for r in (fast, nearest))
    assert [layer.alone_db for layer in one.layers] == [layer.alone_db for layer in other.layers]


def test_a_quantized_model_is_taken_while_its_float_layers_are_there(net: Net, data: list[Tensor]) -> None:
    q = bs.quantize(net, data, recipe())
    assert bs.sensitivity(q, data).all_db == bs.sensitivity(net, data, recipe()).all_db
    with pytest.raises(DataError, match=r"changed parameters"):
        bs.sensitivity(bs.quantize(net, data, "w4a8-fast"), data)
    with pytest.raises(DataError, match="leave them out"):
        bs.sensitivity(q, data, "int8")


def test_the_model_is_left_as_it_was(data: list[Tensor]) -> None:
    net = Net().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen: list[tuple[int, int]] = []
    found = bs.sensitivity(net, data, progress=lambda done, total, what: seen.append((done, total)))
    assert net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert seen[-1] == (4, 4)
    text = str(found)
    assert "proposal:" in text
    assert max(map(len, text.splitlines())) <= 100
    assert type(found).model_validate_json(found.model_dump_json()) == found
