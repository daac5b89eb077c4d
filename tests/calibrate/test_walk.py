"""One walk finds the ranges that the float model has, however the data is cut and wherever it is kept."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.calibrate import calibrate, parse_memory
from bitsmith.calibrate.walk import WalkLog
from bitsmith.capture import capture
from bitsmith.errors import CalibrationError, NonFiniteError
from bitsmith.grid import Quantizer
from bitsmith.place.place import place
from bitsmith.recipe import load_recipe
from bitsmith.targets import get_target


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Net(nn.Module):
    """A residual, a concat and a head; every module has a name, so that hooks can watch it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = (
            nn.Conv2d(3, 6, 3, padding=1),
            nn.Conv2d(6, 6, 1),
            nn.Conv2d(6, 4, 1),
        )
        self.act, self.act2, self.pool, self.head = (
            nn.ReLU(),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Linear(10 * 16, 5),
        )
        with torch.no_grad():  # eighths: every sum is exact in float32, in whatever order it is taken
            for index, parameter in enumerate(self.parameters()):
                draw = torch.randint(-4, 5, parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.copy_(draw / 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        y = self.act2(x + self.left(x))
        return self.head(self.pool(torch.cat([y, self.right(x)], 1)).flatten(1))


def images(count: int = 48, seed: int = 0) -> Tensor:
    return torch.randint(-16, 17, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed)) / 8


def walk(
    batches: list[Tensor],
    *,
    memory: int = 10**9,
    recipe: Any = "int8",
    placement: Any = "runtime",
    net: nn.Module | None = None,
    **options: Any,
) -> tuple[dict[str, tuple[Any, ...]], WalkLog]:
    """Every grid by its quantizer's name, and the log."""
    target, chosen = (
        get_target("onnxruntime"),
        load_recipe(recipe).model_copy(update={"placement": placement}),
    )
    graph = capture((net or Net()).eval(), (batches[0],))
    placed = place(graph, chosen, target)
    log = calibrate(graph, placed, [((b,), {}) for b in batches], target, memory=memory, **options)
    grids = {}
    for name, module in graph.named_modules():
        if isinstance(module, Quantizer):
            grid = module.require_grid()
            zero = None if grid.zero_point is None else grid.zero_point.tolist()
            grids[name] = (grid.format, grid.scale.tolist(), zero, grid.axis)
    return grids, log


@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise", "flexml"])
@pytest.mark.parametrize("memory", [0, 200_000])
def test_spilling_changes_nothing(memory: int, placement: str) -> None:
    batches = [images(24, seed) for seed in range(3)]
    resident, log = walk(batches, placement=placement)
    spilled, spilled_log = walk(batches, placement=placement, memory=memory)
    assert (log.spilled_bytes, spilled_log.spilled_bytes > 50_000) == (0, True)
    assert spilled == resident
    assert [n.db for n in spilled_log.noise.values()] == [n.db for n in log.noise.values()]
    assert spilled_log.output.db == log.output.db


def test_spilled_activations_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    walk([images()], memory=0)
    bad = images()
    bad[30, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError):
        walk([images(), bad], memory=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rule", ["minmax", "percentile", "mse", "histogram_l2", "kl"])
@pytest.mark.parametrize("placement", ["runtime", "fx"])
def test_grids_do_not_depend_on_how_the_data_is_cut(placement: str, rule: str) -> None:
    base = load_recipe("int8").model_dump()
    base["activations"]["range"] = {"name": rule}
    recipe, x = bs.Recipe.model_validate(base), images(48)
    whole, _ = walk([x], recipe=recipe, placement=placement)
    for sizes in ([16, 16, 16], [1, 40, 7]):
        cut, _ = walk(list(x.split(sizes)), recipe=recipe, placement=placement)
        if rule in ("minmax", "percentile"):
            assert cut == whole
        else:  # histograms are rescaled as the range grows
            for name, (fmt, scale, _, axis) in whole.items():
                assert (cut[name][0], cut[name][3]) == (fmt, axis)
                assert cut[name][1] == pytest.approx(scale, rel=0.05)


def order_statistic(values: Tensor, percentile: float) -> tuple[float, float]:
    """The value of rank ceil(p / 100 * n) from below, and its mirror image, by sorting."""
    ascending = values.flatten().sort().values
    rank = -int(-(percentile * ascending.numel()) // 100)
    return float(ascending[-rank]), float(ascending[rank - 1])


@pytest.mark.parametrize("percentile", [99.0, 99.9, 100.0])
def test_ranges_are_those_that_hooks_on_the_float_model_see(percentile: float) -> None:
    """Runtime placement: the percentile of each value, by sorting what hooks collected."""
    base = load_recipe("int8").model_dump()
    base["activations"]["range"] = {"name": "percentile", "percentile": percentile}
    x, net, seen = images(64), Net().eval(), {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda m, args, out, name=name: seen.setdefault(name, out))  # type: ignore[misc]
    with torch.no_grad():
        net(x)
    grids, _ = walk([x[:10], x[10:]], recipe=bs.Recipe.model_validate(base))
    watched = {
        "x": x,
        "relu": seen["act"],
        "left": seen["left"],
        "relu_1": seen["act2"],
        "right": seen["right"],
    }
    assert {n.removeprefix("quantizers.") for n in grids if n.startswith("quantizers.")} == {*watched, "cat"}
    for name, values in watched.items():
        _, scale, zero, _ = grids[f"quantizers.{name}"]
        low, high = order_statistic(values, percentile)
        if name.startswith("relu"):
            assert zero in (None, 0)
            assert scale == pytest.approx(high / 255, rel=1e-6)
        else:
            assert scale == pytest.approx((high - low) / 255, rel=1e-6)
            assert zero == round(-low / scale)


def test_a_view_of_the_input_is_not_quantized_in_place() -> None:
    """Two layers read a float tensor, one of them a slice of it: each range is that of the float values."""

    class Slices(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part, self.whole = nn.Conv2d(2, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x[:, :2]) + self.whole(x)

    x = images(16)
    x[:, :2] *= 0.013
    x[:, 2] *= 0.002
    kept = x.clone()
    grids, log = walk([x], placement="layerwise", net=Slices())
    assert torch.equal(x, kept)
    scale = (float(kept.max()) - float(kept.min())) / 255
    assert grids["quantizers.whole_input"][1] == pytest.approx(scale, rel=1e-6)
    assert all(noise.db is not None and noise.db > 25 for noise in log.noise.values())


def test_expanded_values_can_be_quantized() -> None:
    class Broadcast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.adaptive_avg_pool2d(x, 1).expand(-1, -1, 8, 8))

    grids, _ = walk([images(16)], net=Broadcast())
    assert "quantizers.adaptive_avg_pool2d" in grids


@pytest.mark.parametrize("placement", ["fx", "flexml"])
def test_operands_of_an_add_share_a_scale_and_keep_their_sign(placement: str) -> None:
    grids, _ = walk([images()], placement=placement, recipe="int8-sym")
    (_, relu_scale, relu_zero, _), (_, left_scale, left_zero, _) = (
        grids["quantizers.relu"],
        grids["quantizers.left"],
    )
    assert relu_scale == left_scale
    assert (relu_zero, left_zero) == (None, 128)


@pytest.mark.parametrize("placement", ["fx", "flexml"])
def test_operands_of_a_concat_share_their_grid(placement: str) -> None:
    grids, _ = walk([images()], placement=placement)
    assert grids["quantizers.relu_1"] == grids["quantizers.right"]


def test_with_own_scales_each_operand_uses_its_whole_range() -> None:
    grids, _ = walk([images()], placement="runtime")
    assert grids["quantizers.relu"][1] != grids["quantizers.left"][1]
    assert grids["quantizers.relu_1"] != grids["quantizers.right"]


def test_progress_moves_forward_to_the_end() -> None:
    calls: list[tuple[int, int, str]] = []
    walk([images()], progress=lambda done, total, what: calls.append((done, total, what)))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert len({call[1] for call in calls}) == 1
    assert calls[-1][0] == calls[-1][1] > 5
    assert all(call[2] for call in calls)


def test_noise_samples_bound_the_quantized_stream_not_the_ranges() -> None:
    batches = [images(12, seed) for seed in range(4)]
    all_grids, log = walk(batches, noise_samples=1000)
    few_grids, few = walk(batches, noise_samples=1)
    assert (log.samples, log.noise_samples) == (48, 48)
    assert few.samples == 48
    assert 1 <= few.noise_samples <= 12
    assert few_grids == all_grids


def test_noise_is_measured_at_every_layer_and_at_the_output() -> None:
    _, log = walk([images()])
    assert [node.name for node in log.noise] == ["stem", "left", "right", "head"]
    levels = [noise.db for noise in log.noise.values()]
    assert all(db is not None and 20 < db < 70 for db in levels)
    assert log.output.db == pytest.approx(levels[-1])  # type: ignore[arg-type]


class Overflow(nn.Module):
    """A float model that divides by zero on some batches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.second(y / (x[:, :1] != 9).float())


def test_a_layer_that_makes_infinities_is_named_with_its_batch() -> None:
    bad = images(4)
    bad[2, 0, 0, 0] = 9.0
    with pytest.raises(NonFiniteError, match=r"'div'.*samples 8 to 11"):
        walk([images(8), bad], net=Overflow())


def test_nan_in_the_data_is_named_by_its_input_and_batch() -> None:
    bad = images(8)
    bad[1, 1, 1, 1] = float("inf")
    with pytest.raises(NonFiniteError, match=r"input 'x'.*samples 8 to 15"):
        walk([images(8), bad])


def test_values_that_are_all_zero_name_the_layer() -> None:
    net = Net()
    with torch.no_grad():
        net.stem.weight.zero_()
        net.stem.bias.fill_(-1.0)  # type: ignore[union-attr]
    with pytest.raises(CalibrationError, match="'stem'"):
        walk([images()], net=net)


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("512MiB", 512 << 20), ("1.5 kB", 1500), ("100", 100), (77, 77), ("1tb", 10**12)],
)
def test_sizes_of_memory_are_read(text: Any, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["much", "", "2XB", "-1GB", "GB", "1.2.3GB", "0", "0GB", "0.1B", 0, -5])
def test_other_sizes_are_refused(text: Any) -> None:
    with pytest.raises(CalibrationError, match="2GB"):
        parse_memory(text)
