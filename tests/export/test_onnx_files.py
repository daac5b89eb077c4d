"""Files on disk, refusals, and graphs of unusual shape."""

from __future__ import annotations

import os
from pathlib import Path

import onnx
import pytest
import torch
from onnx_helpers import float_graph, op_types, run_onnx
from torch import Tensor, nn

from bitsmith.errors import ExportError, OutputError, UnsupportedOperatorError
from bitsmith.export.onnx import build_onnx, save_onnx


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 20)).eval()


X = torch.randn(2, 3, 8, 8)


def test_a_saved_file_runs(tmp_path: Path) -> None:
    net = small_net()
    path = save_onnx(build_onnx(float_graph(net, X)), tmp_path / "m.onnx")
    torch.testing.assert_close(run_onnx(path, X)[0], net(X).detach(), atol=1e-5, rtol=1e-4)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx"]


def test_a_large_model_keeps_its_weights_beside_it(tmp_path: Path) -> None:
    net = small_net()
    path = save_onnx(build_onnx(float_graph(net, X)), tmp_path / "m.onnx", size_limit=1000)
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "m.onnx.data"]
    assert path.stat().st_size < 6000 < (tmp_path / "m.onnx.data").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    torch.testing.assert_close(run_onnx(path, X)[0], net(X).detach(), atol=1e-5, rtol=1e-4)


def test_a_failed_write_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"older")

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for limit in (1 << 31, 1000):
        with pytest.raises(OutputError, match="No space left"):
            save_onnx(build_onnx(float_graph(small_net(), X)), path, size_limit=limit)
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert path.read_bytes() == b"older"


def test_a_missing_folder_is_named() -> None:
    with pytest.raises(OutputError, match=r"/nowhere/m\.onnx"):
        save_onnx(build_onnx(float_graph(small_net(), X)), "/nowhere/m.onnx")


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sort(x, dim=-1).values


def test_an_unknown_operator_is_named_with_its_node() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"aten\.sort.* at node 'sort'"):
        build_onnx(float_graph(Sorted(), X))


@pytest.mark.parametrize("opset", [12, 99])
def test_an_opset_out_of_range_is_refused(opset: int) -> None:
    with pytest.raises(ExportError, match="13 to"):
        build_onnx(float_graph(small_net(), X), opset=opset)


def test_wrong_numbers_of_names_are_refused() -> None:
    graph = float_graph(small_net(), X)
    with pytest.raises(ExportError, match="input_names"):
        build_onnx(graph, input_names=["a", "b"])
    with pytest.raises(ExportError, match="output_names"):
        build_onnx(graph, output_names=[])
    with pytest.raises(ExportError, match="another tensor"):
        build_onnx(graph, output_names=["input"])


class ManyOutputs(nn.Module):
    def forward(self, image: Tensor, other: Tensor) -> dict[str, Tensor | tuple[Tensor, ...] | None]:
        y = image + 1
        return {"same": image, "twice": (y, y), "other": other.sum(1), "none": None}


def test_inputs_and_outputs_of_any_structure() -> None:
    x, y = torch.randn(2, 3), torch.randn(2, 4)
    file = build_onnx(float_graph(ManyOutputs(), x, y))
    assert [i.name for i in file.graph.input] == ["image", "other"]
    same, first, second, total = run_onnx(file, x, y)
    torch.testing.assert_close(same, x)
    torch.testing.assert_close(first, x + 1)
    torch.testing.assert_close(second, first)
    torch.testing.assert_close(total, y.sum(1))


def test_a_dead_branch_is_not_written() -> None:
    class Dead(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            _, b = x.chunk(2, 1)
            return b.max(1).values

    assert op_types(build_onnx(float_graph(Dead(), torch.randn(2, 4)))) == ["Split", "ReduceMax"]


def test_a_layer_used_twice_is_stored_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    net, x = Twice().eval(), torch.randn(2, 4)
    file = build_onnx(float_graph(net, x))
    assert [t.name for t in file.graph.initializer] == ["fc.weight", "fc.bias"]
    assert [n.name for n in file.graph.node] == ["fc", "relu", "fc_1"]
    torch.testing.assert_close(run_onnx(file, x)[0], net(x).detach(), atol=1e-5, rtol=1e-4)
