"""What training loops do with a model: resume, average, copy, run in several processes."""

from __future__ import annotations

import copy
import io
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bitsmith as bs
from bitsmith.qat import Distillation, Oscillation, QATGraph


def small_net() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)]
    return nn.Sequential(*convs, nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(64, 5))


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.randint(5, (16,), generator=generator)


class Loop:
    """A user's training: model, optimizer, schedule; its state is theirs."""

    def __init__(self, recipe: str, kind: str, **options: Any) -> None:
        self.schedule = bs.QATSchedule(total_steps=8, bits={0: 8, 2: 4} if recipe == "w4a4-fast" else None)
        self.p = bs.prepare_qat(small_net(), recipe, batch(0)[0], kind=kind, schedule=self.schedule, **options)
        self.optimizer = torch.optim.Adam(self.p.parameters(), lr=0.002)
        self.schedule.follow(self.optimizer)

    def run(self, steps: range) -> None:
        for step in steps:
            torch.manual_seed(step)  # of the dropout
            x, y = batch(step)
            self.optimizer.zero_grad()
            (F.cross_entropy(self.p(x), y) + self.p.penalty()).backward()
            self.optimizer.step()

    def save(self) -> bytes:
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in (self.p, self.optimizer, self.schedule)], buffer)
        return buffer.getvalue()

    def load(self, state: bytes) -> None:
        for part, saved in zip((self.p, self.optimizer, self.schedule), torch.load(io.BytesIO(state))):
            part.load_state_dict(saved)


def assert_same_state(left: nn.Module, right: nn.Module) -> None:
    states = left.state_dict(), right.state_dict()
    assert states[0].keys() == states[1].keys()
    assert [k for k in states[0] if not torch.equal(states[0][k], states[1][k])] == []


@pytest.mark.parametrize(
    ("recipe", "kind", "options"),
    [
        ("int8", "moving-average", {}),
        ("w4a4-fast", "auto", {"oscillation": Oscillation(0.1, 0.02)}),
        ("int8-po2", "lsq", {}),
    ],
)
def test_resumed_after_any_step_it_is_the_same_to_the_bit(recipe: str, kind: str, options: dict[str, Any]) -> None:
    whole = Loop(recipe, kind, **options)
    states = []
    for step in range(8):
        states.append(whole.save())
        whole.run(range(step, step + 1))
    for step in range(8):
        resumed = Loop(recipe, kind, **options)
        resumed.load(states[step])
        resumed.run(range(step, 8))
        assert_same_state(resumed.p, whole.p)
    assert torch.equal(bs.convert(resumed.p)(batch(9)[0]), bs.convert(whole.p)(batch(9)[0]))


@pytest.mark.parametrize("kind", ["moving-average", "lsq", "lsq+"])
@pytest.mark.parametrize("begun", [0, 1])
def test_exponential_moving_average(kind: str, begun: int) -> None:
    """The copy is made before or after ranges have started, and goes through all that a schedule does."""
    loop = Loop("int8", kind)
    loop.schedule.freeze_ranges, loop.schedule.freezes_learned = 5, True
    loop.run(range(begun))
    ema = AveragedModel(loop.p, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(begun, 8):
        loop.run(range(step, step + 1))
        ema.update_parameters(loop.p)
    x = batch(9)[0]
    averaged = ema.module
    assert isinstance(averaged, QATGraph)
    assert torch.allclose(bs.convert(averaged)(x), averaged.eval()(x), atol=0.02)
    weights = [m.layers()["0"].layer.weight for m in (averaged, loop.p)]
    assert not torch.equal(*weights)


def test_modes_at_any_depth() -> None:
    p = Loop("int8", "moving-average").p
    x = batch(0)[0]
    p(x)
    p.eval()
    p.graph.get_submodule("0").train()
    before = p.layers()["0"].norm.running_mean.clone(), p.layers()["3"].norm.running_mean.clone()
    p(x)
    assert not torch.equal(p.layers()["0"].norm.running_mean, before[0])
    assert torch.equal(p.layers()["3"].norm.running_mean, before[1])


def test_copies_train_apart() -> None:
    loop = Loop("int8", "lsq", teacher=small_net())
    loop.run(range(2))
    other = copy.deepcopy(loop.p)
    state = {k: v.clone() for k, v in other.state_dict().items()}
    loop.run(range(2, 4))
    assert all(torch.equal(v, state[k]) for k, v in other.state_dict().items())
    assert bs.convert(other).report.coverage.fraction == 1.0


def test_distillation_is_the_divergence_from_the_teacher() -> None:
    teacher = small_net().eval()
    p = bs.prepare_qat(small_net(), "int8", batch(0)[0], teacher=Distillation(teacher, weight=3.0, temperature=2.0))
    x, _ = batch(1)
    z, z_t = p(x), teacher(x).detach()
    soft, wanted = F.softmax(z / 2, 1), F.softmax(z_t / 2, 1)
    expected = 3.0 * 4.0 * (wanted * (wanted / soft).log()).sum(1).mean()
    assert torch.allclose(p.penalty(), expected, atol=1e-6)
    assert not any("teacher" in name for name in p.state_dict())
    assert len(list(p.parameters())) == len(list(bs.prepare_qat(small_net(), "int8", x).parameters()))
    with pytest.raises(bs.BitsmithError, match="batch before it"):
        p.penalty()


def _train_in_one_process(rank: int, port: int, recipe: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        p = bs.prepare_qat(small_net(), recipe, batch(0)[0])
        parallel = nn.parallel.DistributedDataParallel(p)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.01)
        for step in range(4):
            x, y = batch(2 * step + rank)  # each process has data of its own
            optimizer.zero_grad()
            F.cross_entropy(parallel(x * (1 + rank)), y).backward()
            optimizer.step()
            if step == 2:
                p.freeze_norms()
                p.freeze_ranges()
        torch.save(p.state_dict(), Path(folder, f"{rank}.pt"))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("recipe", ["int8", "w4a4-fast"])
def test_two_processes_have_the_same_ranges_and_weights(recipe: str, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train_in_one_process, (port, recipe, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    differing = [k for k in first if "running" not in k and not torch.equal(first[k], second[k])]
    assert differing == []  # running statistics are each process's own, as in any DDP training
