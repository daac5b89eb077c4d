"""What is saved comes back bit for bit, into the model that it came from and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import bitsmith as bs
from bitsmith import files
from bitsmith.errors import CheckpointError, OutputError
from bitsmith.storage import MANIFEST, RECIPE, STATE


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Residual(nn.Module):
    """A layer and a batch norm used twice, a residual, a concat."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.stem, self.conv = (
            nn.Conv2d(3, width, 3, padding=1),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(2 * width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(x + self.conv(F.relu(self.conv(x))))
        return self.head(torch.cat([y, self.norm(x)], 1).mean((2, 3)))


class Scaled(nn.Module):
    """Parameters of its own that bear the names that grids have."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.scale, self.inner.zero_point = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x * self.inner.scale + self.inner.zero_point)  # type: ignore[operator]


class Structured(nn.Module):
    """Nested inputs, a keyword that is no tensor, several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, pair: tuple[Tensor, dict[str, Tensor]], double: bool = False) -> dict[str, Any]:
        x, more = pair
        y = self.a(x) + more["bias"]
        return {"scores": self.b(y * 2 if double else y), "parts": (y,)}


def images(count: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def made(net: Any) -> Any:
    torch.manual_seed(0)
    return net()


def assert_same(a: Any, b: Any) -> None:
    leaves_a, leaves_b = (torch.utils._pytree.tree_leaves(value) for value in (a, b))
    assert len(leaves_a) == len(leaves_b)
    assert all(torch.equal(x, y) for x, y in zip(leaves_a, leaves_b))


@pytest.mark.parametrize("recipe", ["int8", "int8-tensor", "int8-sym", "int8-po2", "w8a16", "int16", "fp8"])
@pytest.mark.parametrize("placement", ["runtime", "fx", "layerwise"])
def test_models_come_back_bit_for_bit(recipe: str, placement: Any, tmp_path: Path) -> None:
    q = bs.quantize(made(Residual), [images()], recipe=recipe, placement=placement)
    assert bs.save(q, tmp_path / "saved") == tmp_path / "saved"
    back = bs.load(tmp_path / "saved", Residual())
    x = images(8, seed=1)
    assert_same(back(x), q(x))
    assert_same(back.integer_executor()(x), q.integer_executor()(x))
    assert (back.recipe, back.target, back.report) == (q.recipe, q.target, q.report)
    assert not any(p.requires_grad for p in back.parameters())


def test_excluded_layers_come_back(tmp_path: Path) -> None:
    q = bs.quantize(made(Residual), [images()], overrides=[bs.Override(match="head", exclude=True)])
    bs.save(q, tmp_path)
    assert_same(bs.load(tmp_path, Residual())(images()), q(images()))


def test_parameters_named_like_grids_come_back(tmp_path: Path) -> None:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    q = bs.quantize(made(Scaled), [x])
    bs.save(q, tmp_path)
    assert_same(bs.load(tmp_path, Scaled())(x), q(x))


def test_structured_inputs_and_outputs_come_back(tmp_path: Path) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    batch = {"pair": (x, {"bias": x * 0.1}), "double": True}
    q = bs.quantize(made(Structured), [batch])
    bs.save(q, tmp_path)
    assert_same(bs.load(tmp_path, Structured())(**batch), q(**batch))


def test_a_loaded_model_exports_the_same_file(tmp_path: Path) -> None:
    q = bs.quantize(made(Residual), [images()], placement="fx")
    bs.save(q, tmp_path)
    back = bs.load(tmp_path, Residual())
    files = [bs.export_onnx(m, tmp_path / f"{n}.onnx").read_bytes() for n, m in (("a", q), ("b", back))]
    assert len(files[0]) == len(files[1])
    assert bs.verify(back, tmp_path / "a.onnx", images(8, seed=1)).max_lsb == 0


def test_loading_leaves_the_float_model_alone(tmp_path: Path) -> None:
    bs.save(bs.quantize(made(Residual), [images()]), tmp_path)
    net = Residual().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    bs.load(tmp_path, net)
    assert net.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_saving_twice_is_saving_once(tmp_path: Path) -> None:
    q = bs.quantize(made(Residual), [images()])
    bs.save(q, tmp_path / "a")
    bs.save(bs.load(tmp_path / "a", Residual()), tmp_path / "b")
    for name in (MANIFEST, RECIPE):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text()
    a, b = (load_file(tmp_path / folder / STATE) for folder in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


class Other(Residual):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.extra(super().forward(x))


class Fewer(Residual):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.stem(x))


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Other, r"missing \['extra\.layer\.bias', 'extra\.layer\.weight'\]"),
        (Fewer, r"unexpected \[.*'conv\.layer\.weight'"),
        (lambda: Residual(7), r"other shapes \[.*'conv\.layer\.weight'"),
    ],
)
def test_another_model_is_refused_with_the_keys(net: Any, words: str, tmp_path: Path) -> None:
    bs.save(bs.quantize(made(Residual), [images()]), tmp_path)
    with pytest.raises(CheckpointError, match=f"does not fit this float model.*{words}"):
        bs.load(tmp_path, net())


def test_the_manifest_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any step, the folder holds no manifest yet, or a complete model."""
    written: list[str] = []
    replace = files.os.replace
    monkeypatch.setattr(files.os, "replace", lambda a, b: (written.append(Path(b).name), replace(a, b)))
    bs.save(bs.quantize(made(Residual), [images()]), tmp_path)
    assert written == [STATE, RECIPE, MANIFEST]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([STATE, RECIPE, MANIFEST])


@pytest.mark.parametrize("fails_at", [STATE, RECIPE, MANIFEST])
def test_an_interrupted_save_leaves_no_half_written_file(fails_at: str, tmp_path: Path, monkeypatch: Any) -> None:
    q = bs.quantize(made(Residual), [images()])
    replace = files.os.replace

    def failing(source: Any, target: Any) -> None:
        if Path(target).name == fails_at:
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", failing)
    with pytest.raises(OutputError, match="disk is full"):
        bs.save(q, tmp_path)
    left = {p.name for p in tmp_path.iterdir()}
    assert left < {STATE, RECIPE, MANIFEST}
    assert MANIFEST not in left
    with pytest.raises(CheckpointError, match=MANIFEST):
        bs.load(tmp_path, Residual())


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="is a file"):
        bs.save(bs.quantize(made(Residual), [images()]), tmp_path / "file")


def test_the_manifest_says_what_a_reader_needs(tmp_path: Path) -> None:
    bs.save(bs.quantize(made(Residual), [images()]), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["version"] == 1
    assert manifest["target"]["name"] == "onnxruntime"
    assert manifest["inputs"]["leaves"] == [{"shape": [2, 3, 8, 8], "dtype": "float32"}]
    assert manifest["quantizers"]["stem.weight_quantizer"]["axis"] == 0
    assert manifest["quantizers"]["quantizers.x"]["format"]["bits"] == 8
