"""Latencies are interleaved and paired with their round's baseline; what cannot be compared is refused."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `benchmarks` is not installed

from benchmarks import latency  # noqa: E402
from benchmarks.latency import Entry  # noqa: E402

ENTRIES = [Entry("slow", "fake", Path("slow.onnx")), Entry("fast", "fake", Path("fast.onnx"))]


@pytest.fixture
def fake_visits(monkeypatch):
    """Two files measured over three rounds in which the machine gets ever slower."""
    monkeypatch.setitem(latency.ENGINES, "fake", lambda path, batch, threads: path.stem)
    monkeypatch.setattr(latency, "interleave", lambda *_: [[2.0, 4.0, 8.0], [1.0, 2.0, 4.0]])


def test_the_order_of_visits_rotates_and_every_round_visits_all(monkeypatch):
    order = []
    monkeypatch.setattr(latency, "visit", lambda run, warm, seconds, clock: order.append(run) or 1.0)
    latency.interleave(["a", "b", "c"], rounds=3, seconds=0)
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_the_ratio_is_paired_within_rounds(fake_visits):
    slow, fast = latency.measure(ENTRIES, 1, baseline="slow")
    assert (slow.median_ms, fast.median_ms) == (4.0, 2.0)
    assert (slow.ratio, fast.ratio) == (1.0, 2.0)


def test_rows_are_appended_under_one_header(fake_visits, tmp_path):
    rows = latency.measure(ENTRIES, 1)
    for _ in range(2):
        latency.write_csv(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["label"] for row in read] == ["slow", "fast", "slow", "fast"]
    assert read[0]["ratio"] == ""  # no baseline


@pytest.mark.parametrize(
    ("shape", "message"),
    [([], "no batch dimension"), ([4, 3], "fixed batch 4"), (["N", 3, "H"], "more than its batch dynamic")],
)
def test_an_input_that_cannot_get_the_batch_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        latency.random_input(Path("net.onnx"), "x", shape, 8, float)


def test_a_baseline_that_is_not_measured_is_refused(fake_visits):
    with pytest.raises(ValueError, match=r"'other'.*slow, fast"):
        latency.measure(ENTRIES, 1, baseline="other")


def test_onnxruntime_and_openvino_run_the_same_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    shape = ["batch", 3]
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in "xy")
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "relu.onnx"
    onnx.save(model, path)
    entries = [Entry(engine, engine, path) for engine in latency.ENGINES]
    rows = latency.measure(entries, 4, rounds=2, seconds=0.001, baseline="onnxruntime")
    assert [row.engine for row in rows] == ["onnxruntime", "openvino", "openvino-f32"]
    assert all(row.median_ms > 0 and row.batch == 4 for row in rows)
