"""Oscillating weights: the algorithm on sequences made by hand, and in a model."""

from __future__ import annotations

import torch
from torch import nn

import bitsmith as bs
from bitsmith.grid import Grid, IntFormat
from bitsmith.qat import Oscillation
from bitsmith.qat.oscillation import OscillationTracker, codes, damping_loss


def test_frequencies_follow_algorithm_1() -> None:
    sequences = torch.tensor([
        [0, 1, 0, 1, 0, 1],  # oscillates from the third on
        [0, 1, 2, 3, 4, 5],  # only grows
        [0, 1, 1, 0, 0, 1],  # goes back later: that counts too
        [3, 3, 3, 3, 3, 3],
    ]).float()  # fmt: skip
    happens = torch.tensor([[0, 0, 1, 1, 1, 1], [0] * 6, [0, 0, 0, 1, 0, 1], [0] * 6]).float()
    m, tracker = 0.25, OscillationTracker(torch.Size([4]), threshold=10.0, momentum=0.25)
    f, ema = torch.zeros(4), sequences[:, 0].clone()
    for t in range(6):
        tracker.observe(sequences[:, t])
        if t:
            f, ema = m * happens[:, t] + (1 - m) * f, m * sequences[:, t] + (1 - m) * ema
    assert torch.allclose(tracker.f, f)
    assert torch.allclose(tracker.w_ema, ema)


def test_a_frozen_weight_keeps_its_average_code() -> None:
    tracker = OscillationTracker(torch.Size([2]), threshold=0.3, momentum=0.2)
    for t in range(12):
        tracker.observe(torch.tensor([4.0 + t % 2, 1.0]))
    assert tracker.frozen.tolist() == [True, False]
    held = tracker.w_ema[0].round()
    for _ in range(20):
        tracker.observe(torch.tensor([9.0, 1.0]))
    weight = torch.tensor([1.3, 0.2], requires_grad=True)
    kept = tracker.hold(weight, Grid(IntFormat(8), torch.tensor(0.5)))
    kept.sum().backward()
    assert kept.tolist() == [float(held) * 0.5, weight[1].item()]
    assert weight.grad.tolist() == [0.0, 1.0]


def test_damping_draws_weights_to_the_middle_of_their_codes() -> None:
    grid = Grid(IntFormat(3), torch.tensor([1.0, 0.5]), None, 0)
    weight = torch.tensor([[0.3, -0.6, 9.0], [0.3, 0.4, -9.0]], requires_grad=True)
    loss = damping_loss(weight, grid)
    loss.backward()
    assert torch.allclose(loss, torch.tensor(0.3**2 + 0.4**2 + 0.2**2 + 0.1**2))
    assert torch.allclose(weight.grad, torch.tensor([[0.6, 0.8, 0.0], [-0.4, -0.2, 0.0]]))
    assert codes(weight, grid).tolist() == [[0.0, -1.0, 3.0], [1.0, 1.0, -4.0]]


def test_observes_optimizer_steps_and_converts_what_it_holds() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    x = torch.randn(32, 3, 8, 8)
    p = bs.prepare_qat(net, "w4a4-fast", calibration=[x], oscillation=Oscillation(threshold=0.05, damping=0.1))
    tracker = p.layers()["0"].oscillation
    assert tracker is not None
    optimizer = torch.optim.Adam(p.parameters(), lr=0.01)
    for _ in range(20):
        optimizer.zero_grad()
        (p(x).square().mean() + p.penalty()).backward()
        p(x)  # no step between: not counted
        optimizer.step()
    p(x)
    tracker.frozen[:2] = True
    q = bs.convert(p)
    layer = q.graph.get_submodule("0")
    held = codes(layer.weight, layer.weight_quantizer.grid)[:2]
    assert torch.equal(held, tracker.w_ema[:2].round().clamp(-128, 127))
    assert torch.allclose(q(x), p.eval()(x), atol=float(q(x).abs().max()) / 50)
