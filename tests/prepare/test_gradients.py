"""What the outputs feel of a change, beside Jacobians sample by sample and beside making the change."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from bitsmith.capture import capture, read_batches
from bitsmith.prepare.channels import ChannelFlow
from bitsmith.prepare.gradients import SHIFTS, Gradients


def _found(model: nn.Module, x: Tensor, *, clips: bool = False, centred: bool = False) -> Gradients:
    batches = read_batches(model, [x])
    graph = capture(model.eval(), batches[0])
    flow = ChannelFlow(graph).follow(read_batches(model, [x[:1]])[0])
    links = {name: link for name, link in flow.links.items() if link.reads is not None}
    return Gradients(graph, links, flow.clips if clips else [], centred=centred).take(batches, len(x))


def _jacobians(model: nn.Module, name: str, x: Tensor) -> Tensor:
    """Of the model's one output, by sample."""
    own = model.get_parameter(name)
    output = lambda value, sample: functional_call(model, {name: value}, (sample[None],)).sum()  # noqa: E731
    return torch.stack([jacrev(output)(own, sample) for sample in x]).detach().double()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_weights_are_felt_as_their_jacobians_say(groups: int, centred: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 2, groups=groups), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, 1)
    )
    x = torch.randn(5, 3, 6, 6)
    found = _found(model, x, centred=centred)
    weights = _jacobians(model, "2.weight", x)  # (sample, out, in / groups, *taps)
    if centred:
        read = model[1](model[0](x)).mean((0, 2, 3)).detach().double()
        means = read.view(groups, 1, -1).expand(groups, 8 // groups, -1).reshape(1, 8, -1, 1, 1)
        weights = weights - means * _jacobians(model, "2.bias", x).view(5, 8, 1, 1, 1)
    expected = weights.square().sum((0, 3, 4)).view(groups, 8 // groups, 4 // groups)
    torch.testing.assert_close(found.layers["2"].weights, expected, rtol=1e-4, atol=1e-6)


def test_inputs_are_felt_value_by_value() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)), torch.randn(6, 4)
    found = _found(model, x)
    inside = (model[1].weight @ model[0].weight).detach().double()[0]
    torch.testing.assert_close(found.layers["0"].inputs, 6 * inside.square(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(found.layers["0"].peaks, x.abs().amax(0).double())


def test_what_a_clip_costs_that_cuts_elsewhere() -> None:
    """One channel at a time, with nothing but a linear layer behind: there first order is all there is."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(4 * 9, 1))
    x = 10 * torch.randn(7, 3, 3, 3)
    found = _found(model, x, clips=True)
    (table,) = found.clipped.values()
    assert bool((table[len(SHIFTS) // 2] == 0).all())
    with torch.no_grad():
        before, exact = model[0](x), model(x)
        for row, scale in zip(table, SHIFTS.exp().tolist()):
            for channel in range(4):
                scales = torch.ones(1, 4, 1, 1)
                scales[0, channel] = scale
                changed = model[3]((model[1](before * scales) / scales).flatten(1))
                cost = float((changed - exact).double().square().sum())
                assert float(row[channel]) == pytest.approx(cost, rel=1e-3, abs=1e-6)
