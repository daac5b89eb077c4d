"""Quantization by hand: stubs, arithmetic, recipes on modules, and clear words where something is forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, CaptureError, ExportError, PlacementError, RecipeError
from bitsmith.grid import RangeRule
from bitsmith.recipe import Recipe, bits_recipe


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.act, self.point, self.skip = nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1), bs.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.skip.add_relu(x, self.point(self.act(self.norm(self.conv(x)))))


class Net(nn.Module):
    """Stubs, a residual block, pooling, a linear; ``branches`` makes it one that no tracer can follow."""

    def __init__(self, *, stub: bool = True, branches: bool = False) -> None:
        super().__init__()
        self.quant, self.dequant = bs.QuantStub(), bs.DeQuantStub()
        self.stem, self.norm, self.act = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()
        self.block, self.pool, self.head = Block(12), nn.AdaptiveAvgPool2d(1), nn.Linear(12, 5)
        self.stub, self.branches = stub, branches

    def forward(self, x: Tensor) -> Tensor:
        if self.stub:
            x = self.quant(x)
        x = self.block(self.act(self.norm(self.stem(x))))
        if self.branches and float(x.mean()) > 1e6:
            x = x * 2
        return self.dequant(self.head(torch.flatten(self.pool(x), 1)))


def images(count: int, seed: int) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


BATCHES = [images(32, 1), images(32, 2)]


def make(**options: bool) -> Net:
    torch.manual_seed(0)
    net = Net(**options)
    for module in net.modules():  # batch norms that are not the identity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    return net.eval()


def by_hand(net: nn.Module, recipe: str | Recipe = "int8", **options: object) -> bs.QuantizedModel:
    prepared = bs.prepare(net, recipe, BATCHES[0], **options)  # type: ignore[arg-type]
    for batch in BATCHES:
        prepared(batch)
    return bs.convert(prepared)


def sqnr(exact: Tensor, found: Tensor) -> float:
    exact, found = exact.detach(), found.detach()
    return float(10 * torch.log10(exact.square().sum() / (exact - found).square().sum()))


def test_a_model_by_hand_is_a_quantized_model_like_any_other(tmp_path: Path) -> None:
    net, x = make(), images(16, 3)
    q = by_hand(net)
    assert sqnr(net(x), q(x)) > 25
    assert q.report.coverage.fraction == 1.0
    assert q.report.placement == "by hand"
    assert any("not done: reestimate_batch_norm" in note for note in q.report.notes)
    path = bs.export_onnx(q, tmp_path / "net.onnx")
    certificate = bs.verify(q, path, x)
    assert certificate.passed
    assert certificate.max_lsb == 0
    assert torch.equal(bs.deploy(q)(x), q(x))
    bs.save(q, tmp_path / "saved")
    assert torch.equal(bs.load(tmp_path / "saved", make())(x), q(x))
    assert torch.equal(bs.quantize(net, BATCHES)(x), q(x))


def test_the_grids_are_those_of_torch_s_eager_mode() -> None:
    """The same observers on the same fused model give the same scales and zero points."""
    import torch.ao.quantization as ao

    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)]
    ours = nn.Sequential(bs.QuantStub(), *layers, bs.DeQuantStub()).eval()
    theirs = nn.Sequential(ao.QuantStub(), *layers, ao.DeQuantStub()).eval()
    theirs = ao.fuse_modules(theirs, [["1", "2", "3"]])
    theirs.qconfig = ao.QConfig(
        ao.MinMaxObserver.with_args(dtype=torch.quint8, eps=1e-12),
        ao.MinMaxObserver.with_args(dtype=torch.qint8, qscheme=torch.per_tensor_symmetric, eps=1e-12),
    )
    ao.prepare(theirs, inplace=True)
    recipe = bits_recipe(8, 8, granularity="tensor")
    minmax = recipe.activations.model_copy(update={"range": RangeRule(name="minmax")})  # type: ignore[union-attr]
    prepared = bs.prepare(ours, recipe.model_copy(update={"activations": minmax}), BATCHES[0])
    for batch in BATCHES:
        theirs(batch)
        prepared(batch)
    q = bs.convert(prepared)
    ao.convert(theirs, inplace=True)
    found = {name: quantizer.grid for name, quantizer in q.graph.quantizers.named_children()}
    assert len(found) == 3
    for layer, grid in zip((theirs[0], theirs[1], theirs[4]), found.values()):
        assert float(grid.scale) == pytest.approx(float(layer.scale), rel=1e-5)
        assert int(grid.zero_point or 0) == int(layer.zero_point)


def test_a_forgotten_stub_is_told_by_the_name_of_the_module() -> None:
    with pytest.raises(PlacementError, match=r"'stem' \(QuantConv2d\) .* the model's input.*QuantStub"):
        bs.prepare(make(stub=False), "int8", BATCHES[0])
    net = make()
    net.block.recipe = net.pool.recipe = None
    with pytest.raises(PlacementError, match=r"'head' .* comes from add\(\) in 'block.skip'"):
        bs.prepare(net, "int8", BATCHES[0])


def test_arithmetic_without_a_float_functional_is_told() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.a, self.b = bs.QuantStub(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            return self.b(x + self.a(x))

    with pytest.raises(PlacementError, match=r"'b' .* add\(\) in the model's forward.*FloatFunctional"):
        bs.prepare(Adds().eval(), "int8", BATCHES[0])


def test_parts_left_in_float_stay_what_they_are() -> None:
    net = make()
    net.block.recipe = net.pool.recipe = net.head.recipe = None
    q, x = by_hand(net), images(8, 3)
    bits = {layer.name: layer.weight_bits for layer in q.report.layers}
    assert bits == {"stem": 8, "block.conv": None, "block.point": None, "head": None}
    assert sqnr(net(x), q(x)) > 30


def test_a_module_s_recipe_holds_for_what_is_inside() -> None:
    net = make()
    net.block.recipe = bits_recipe(4, 8)
    net.block.point.recipe = "int8"
    by_name = {layer.name: layer.weight_bits for layer in by_hand(net).report.layers}
    assert by_name == {"stem": 8, "block.conv": 4, "block.point": 8, "head": 8}
    net.block.recipe = "int9"
    with pytest.raises(RecipeError, match=r"block\.recipe: no recipe is called 'int9'"):
        by_hand(net)


def test_module_recipes_hold_without_stubs_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.relu(self.a(x)))

    net = Plain().eval()
    net.b.recipe = bits_recipe(4, 8)
    net.b[1].recipe = None
    q = bs.quantize(net, BATCHES)
    assert [layer.weight_bits for layer in q.report.layers] == [8, 4, None]
    assert torch.equal(by_hand(net)(BATCHES[0]), q(BATCHES[0]))


def test_overrides_hold_by_hand() -> None:
    q = by_hand(make(), overrides=(bs.Override(match="block.*", exclude=False, weights=bits_recipe(4, 8).weights),))
    assert [layer.weight_bits for layer in q.report.layers] == [8, 4, 4, 8]


def test_a_model_that_no_tracer_follows_simulates(tmp_path: Path) -> None:
    net, x = make(branches=True), images(16, 3)
    q = by_hand(net)
    assert sqnr(net(x), q(x)) > 25
    exact = by_hand(make())
    assert sqnr(exact(x), q(x)) > 25
    with pytest.raises(ExportError, match="no graph to export"):
        bs.export_onnx(q, tmp_path / "net.onnx")


def test_without_stubs_an_untraceable_model_needs_the_layerwise_placement() -> None:
    net = make(stub=False, branches=True)
    net.quant = nn.Identity()
    with pytest.raises(CaptureError, match=r"QuantStub and DeQuantStub"):
        bs.prepare(net, "int8", BATCHES[0])
    q = by_hand(net, placement="layerwise")
    whole = bs.quantize(net, BATCHES, placement="layerwise")
    assert sqnr(whole(BATCHES[0]), q(BATCHES[0])) > 30


def test_what_calibration_never_calls_stays_in_float() -> None:
    net = make()
    net.extra = nn.Conv2d(3, 3, 1)
    q = by_hand(net)
    assert any("extra was never called" in note for note in q.report.notes)


def test_every_float_functional_runs_in_a_file(tmp_path: Path) -> None:
    class Everything(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant = bs.QuantStub()
            self.f = nn.ModuleList(bs.FloatFunctional() for _ in range(7))

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            y = self.f[0].add(x, self.f[1].mul(x, x))
            y = self.f[2].add_relu(x, self.f[3].cat([y[:, :2], x[:, 2:]], 1))
            return self.f[4].mul_scalar(self.f[5].add_scalar(self.f[6].matmul(x, y), 0.5), 2.0)

    class WithLayer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.arithmetic, self.head = Everything(), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.arithmetic(x))

    torch.manual_seed(0)
    net, x = WithLayer().eval(), images(4, 3)
    q = by_hand(net)
    assert sqnr(net(x), q(x)) > 20
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "net.onnx"), x).passed


def test_recurrent_and_attention_modules_by_hand(tmp_path: Path) -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quant, self.dequant, self.skip = bs.QuantStub(), bs.DeQuantStub(), bs.FloatFunctional()
            self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
            self.rnn, self.head = nn.LSTM(8, 4, batch_first=True, bidirectional=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.quant(x)
            x = self.norm(self.skip.add(x, self.attention(x, x, x)[0]))
            return self.dequant(self.head(self.rnn(x)[0]))

    torch.manual_seed(0)
    net, x = Sequence().eval(), torch.randn(32, 3, 8)
    prepared = bs.prepare(net, "int8", x)
    prepared(x)
    q = bs.convert(prepared)
    assert sqnr(net(x), q(x)) > 25
    assert q.report.coverage.fraction == 1.0
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "net.onnx"), x).passed


@pytest.mark.parametrize("recipe", ["int8-tensor", "int8-sym", "int8-po2", "w8a16", "fp8"])
def test_every_recipe_holds_by_hand(recipe: str, tmp_path: Path) -> None:
    net, x = make(), images(8, 3)
    q = by_hand(net, recipe)
    assert sqnr(net(x), q(x)) > 15
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "net.onnx"), x).passed


def test_targets_that_cannot_rescale_are_refused() -> None:
    generic = bs.get_target("generic").model_copy(update={"rescales": False})
    with pytest.raises(RecipeError, match="operands of one scale"):
        bs.prepare(make(), "int8", BATCHES[0], generic)


def test_merged_preparations_are_one() -> None:
    parts = [bs.prepare(make(), "int8", BATCHES[0]) for _ in BATCHES]
    for part, batch in zip(parts, BATCHES):
        part(batch)
    parts[0].merge(parts[1])  # type: ignore[arg-type]
    assert torch.equal(bs.convert(parts[0])(BATCHES[0]), by_hand(make())(BATCHES[0]))


def test_nothing_to_quantize_is_an_error() -> None:
    net = make()
    net.recipe = None
    with pytest.raises(PlacementError, match="nothing would be quantized"):
        bs.prepare(net, "int8", BATCHES[0])
    with pytest.raises(BitsmithError, match="no batch was run"):
        bs.convert(bs.prepare(make(), "int8", BATCHES[0]))
