"""Sweeps: what is run, what the store keeps through kills, and that engines agree to the digit."""

from __future__ import annotations

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pydantic import ValidationError
from typer.testing import CliRunner

from bitsmith.cli import app
from bitsmith.errors import DataError, RecipeError
from bitsmith.options import CONSTRAINTS
from bitsmith.sweep import LocalEngine, Store, Sweep, best_rows, export_rows, load_sweep, run_sweep, write_sweep_page
from bitsmith.sweep.grid import Configuration, Constraint, ModelData
from bitsmith.sweep.work import run_configuration

DIGITS = {
    "model": "bitsmith.demo:digits_net",
    "calibration": "bitsmith.demo.data:calibration",
    "validation": "bitsmith.demo.data:validation",
    "calibration_samples": 50,
    "validation_samples": 50,
}
GRID = {"models": [DIGITS], "grid": {"weight-bit-width": [8, 4], "act-bit-width": [8, 4]}}


class InstantEngine:
    """Runs nothing: every configuration's result is its key."""

    def __init__(self, slots: int = 2) -> None:
        self.slots = slots
        self.given: list[str] = []
        self._open: list[str] = []

    def submit(self, key: str, work: dict[str, Any]) -> None:
        self.given.append(key)
        self._open.append(key)

    def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
        done, self._open = self._open, []
        return [(key, {"result": {"top1": 1.0}, "seconds": 0.0}) for key in done]

    def close(self) -> None:
        pass


def test_constraints_and_refusals_become_rows_with_their_reason(tmp_path: Path) -> None:
    sweep = Sweep.model_validate(
        {
            **GRID,
            "runs": [{"gpfq-p": 0.5}, {"weight-bit-width": 99}, {"gptq": True, "gpfq": True}],
            "constraints": [{"forbid": {"weight-bit-width": [4, 3], "act-bit-width": 4}, "reason": "too few bits"}],
        }
    )
    assert run_sweep(sweep, tmp_path, InstantEngine()) == {"done": 3, "skipped": 4}
    reasons = [row["reason"] for row in Store(tmp_path).rows() if row["status"] == "skipped"]
    assert reasons[0] == "too few bits"
    assert "gpfq-p" in reasons[1]
    assert "weight-bit-width: 99 is not from 2 to 16" in reasons[2]
    assert reasons[3] in {str(constraint) for constraint in CONSTRAINTS}  # as 'bitsmith evaluate' says it


def test_a_constraint_holds_only_where_all_its_options_do() -> None:
    constraint = Constraint(forbid={"a": [1, 2], "b": 3}, reason="r")
    assert constraint.forbids({"a": 2, "b": 3})
    assert not constraint.forbids({"a": 2, "b": 4})
    assert not constraint.forbids({"a": 2})


def test_finished_rows_are_not_run_again_and_what_means_the_same_is_one_row(tmp_path: Path) -> None:
    sweep = Sweep.model_validate({**GRID, "runs": [{"weight-bit-width": 8, "act-bit-width": 8}]})
    first, second = InstantEngine(), InstantEngine()
    assert run_sweep(sweep, tmp_path, first) == {"done": 4}
    wider = Sweep.model_validate({**GRID, "grid": {**GRID["grid"], "weight-bit-width": [8, 4, 3]}})  # type: ignore[dict-item]
    assert run_sweep(wider, tmp_path, second) == {"done": 6}
    assert (len(first.given), len(second.given)) == (4, 2)


def test_two_stores_on_one_file_never_claim_the_same_row(tmp_path: Path) -> None:
    one, two = Store(tmp_path), Store(tmp_path)
    work = {"model": {"model": "m"}, "seed": 0, "target": "onnxruntime", "recipe": {}}
    one.register(Configuration(str(i), work, {}, None) for i in range(20))
    claims = []
    while (claimed := (one, two)[len(claims) % 2].claim()) is not None:
        claims.append(claimed[0])
    assert sorted(claims, key=int) == [str(i) for i in range(20)]


def test_rows_of_a_dead_sweep_come_back_and_those_of_a_living_one_do_not(tmp_path: Path) -> None:
    work = {"model": {"model": "m"}, "seed": 0, "target": "onnxruntime", "recipe": {}}
    store, other = Store(tmp_path), Store(tmp_path)
    store.register([Configuration("a", work, {}, None), Configuration("b", work, {}, None)])
    other.owner = "elsewhere:1:?"
    store.claim()
    other.claim()
    third = Store(tmp_path)
    third.owner = "another:1:?"
    third.alive()
    assert third.counts() == {"running": 2}
    with sqlite3.connect(tmp_path / "sweep.sqlite") as db:
        db.execute("UPDATE runs SET seen = seen - 1000")
    third.alive()  # the one on this machine is a process that lives, silent or not
    assert third.counts() == {"running": 1, "pending": 1}


def test_failures_are_rows_and_are_run_again_on_request(tmp_path: Path) -> None:
    broken = Sweep.model_validate({"models": [{**DIGITS, "model": "bitsmith.demo:nothing"}], "runs": [{}]})
    assert run_sweep(broken, tmp_path, LocalEngine(1)) == {"failed": 1}
    assert "has no 'nothing'" in Store(tmp_path).rows()[0]["reason"]
    engine = InstantEngine()
    assert run_sweep(broken, tmp_path, engine) == {"failed": 1}
    assert run_sweep(broken, tmp_path, engine, retry_failed=True) == {"done": 1}


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    class Killing(LocalEngine):
        killed = False

        def submit(self, key: str, work: dict[str, Any], attempt: int = 0) -> None:
            super().submit(key, work, attempt)
            if not self.killed:
                self.killed = True
                next(iter(self._busy.values()))[0].kill()

    sweep = Sweep.model_validate(GRID)
    assert run_sweep(sweep, tmp_path / "a", Killing(1)) == {"done": 4}
    assert run_sweep(sweep, tmp_path / "b", LocalEngine(2)) == {"done": 4}
    assert _results(tmp_path / "a") == _results(tmp_path / "b")


def test_kill_9_loses_and_doubles_nothing(tmp_path: Path) -> None:
    """20 times at random moments, all processes of a real sweep at once."""
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    kills = json.loads(done.stdout)
    assert sum(kills) == 20
    whole = _results(tmp_path / "whole")
    for number, killed in enumerate(kills, 1):
        assert _results(tmp_path / str(number)) == whole
        rows = Store(tmp_path / str(number)).rows()
        assert len({row["key"] for row in rows}) == len(rows) == 48
        # of each kill, only what the two workers had in hand is done again
        assert 48 <= sum(row["attempts"] for row in rows) <= 48 + 2 * killed


def test_tables_leave_as_csv_and_parquet(tmp_path: Path) -> None:
    rows = [{"key": "a", "top1": 1.5, "option.bias": "None"}, {"key": "b", "option.bias": 3}]
    export_rows(rows, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open() as file:
        assert [row["top1"] for row in csv.DictReader(file)] == ["1.5", ""]
    with pytest.raises(DataError, match="csv or"):
        export_rows(rows, tmp_path / "t.xls")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow, of the extra 'sweep', is not installed")
    export_rows(rows, tmp_path / "t.parquet")
    assert parquet.read_table(tmp_path / "t.parquet").to_pylist()[1] == {"key": "b", "top1": None, "option.bias": "3"}


def test_the_best_are_told_apart_by_what_hardware_must_have() -> None:
    row = {"status": "done", "weight_bits": 8, "activation_bits": 8, "format": "int", "seed": 0, "sqnr_db": 30.0}
    rows = [
        {**row, "key": "a", "top1": 90.0, "recipe": "a"},
        {**row, "key": "b", "top1": 90.0, "recipe": "b", "sqnr_db": 31.0},
        {**row, "key": "c", "top1": 99.0, "recipe": "c", "format": "float"},
        {**row, "key": "d", "top1": 99.0, "recipe": "d", "status": "failed"},
        *(
            {**row, "key": f"e{seed}", "top1": 80.0 + seed, "recipe": "e", "seed": seed, "weight_bits": 4}
            for seed in (0, 1)
        ),
    ]
    best = best_rows(rows)
    assert [(row["key"], row.get("mean"), row["runs"]) for row in best] == [
        ("e1", 80.5, 2),
        ("b", None, 1),
        ("c", None, 1),
    ]


def test_the_page_has_all_rows_and_refuses_costs_that_are_none(tmp_path: Path) -> None:
    run_sweep(Sweep.model_validate(GRID), tmp_path, InstantEngine())
    rows = Store(tmp_path).rows()
    page = write_sweep_page(rows, tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(row["key"][:8] in page for row in rows)
    assert "W8A4" in page
    exact = [row["float_top1"] for row in rows if row.get("float_top1") is not None]
    assert f'"float":{exact[0] if len(set(exact)) == 1 else "null"}' in page
    with pytest.raises(DataError, match="weight_bits"):
        write_sweep_page(rows, tmp_path / "report.html", cost="colour")


def test_files_that_say_nothing_are_refused_by_field(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    path.write_text("models: []\ngrdi: {}\n")
    with pytest.raises(RecipeError, match="grdi"):
        load_sweep(path)


def test_a_dry_run_says_what_is_to_do_and_what_is_skipped_and_does_nothing(tmp_path: Path) -> None:
    rule = {"forbid": {"weight-bit-width": 8, "act-bit-width": 4}, "reason": "not wanted"}
    file, store = tmp_path / "grid.yaml", tmp_path / "store"
    file.write_text(yaml.safe_dump({**GRID, "constraints": [rule]}))
    typed = ["sweep", "run", str(file), "--output", str(store), "--dry-run"]
    said = CliRunner().invoke(app, typed).stdout
    assert said.splitlines() == ["3 to run, 0 finished, 1 skipped", "skipped 1: not wanted"]
    assert not store.exists()
    run_sweep(Sweep.model_validate({**GRID, "grid": {"weight-bit-width": [8], "act-bit-width": [8]}}), store,
              InstantEngine())  # fmt: skip
    assert CliRunner().invoke(app, typed).stdout.startswith("2 to run, 1 finished, 1 skipped")


STATING = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    net.pretrained_cfg = {"input_size": (3, 8, 8), "crop_pct": 0.8, "mean": (0.1, 0.2, 0.3), "std": (0.2, 0.3, 0.4)}
    return net
"""


def test_a_row_is_what_evaluate_says_of_folders_with_a_label_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("calibration", 6), ("validation", 40)):
        for level, name in enumerate(("ant", "bee", "cat")):
            (tmp_path / part / name).mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(60 * level, 60 * level + 120, (12, 11, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{index}.png")
    (tmp_path / "net.py").write_text(STATING)
    (tmp_path / "map.txt").write_text("cat 0\nbee 1\nant 2\n")
    monkeypatch.chdir(tmp_path)
    folders = {"calibration": "calibration", "validation": "validation"}
    model = {"model": "net.py:build", **folders, "label_map": "map.txt", "preprocess": {"crop": 7}}
    (one,) = Sweep.model_validate({"models": [model], "runs": [{"weight-bit-width": 3}]}).configurations()
    threads = torch.get_num_threads()
    outcome = run_configuration(one.work)
    torch.set_num_threads(threads)
    assert outcome.get("error") is None, outcome
    places = [f"--{part}={part}" for part in folders]
    typed = ["evaluate", "net.py:build", *places, "--label-map=map.txt", "--crop=7", "--weight-bit-width=3", "--json"]
    said = json.loads(CliRunner().invoke(app, typed).stdout)["metrics"]
    assert outcome["result"]["top1"] == pytest.approx(said["simulated"]["top1"], abs=1e-5)
    assert outcome["result"]["float_top1"] == pytest.approx(said["float"]["top1"], abs=1e-5)
    assert outcome["result"]["sqnr_db"] == pytest.approx(said["simulated"]["sqnr_db"], abs=1e-4)
    other = ModelData.model_validate({**model, "calibration": "a.npz", "validation": "b.npz"})
    (lost,) = Sweep(models=(other,), runs=({},)).configurations()
    assert "label_map 'map.txt' is about folders" in run_configuration(lost.work)["error"]
    torch.set_num_threads(threads)


def test_what_prepares_images_is_checked_when_the_file_is_read() -> None:
    with pytest.raises(ValidationError, match="croop"):
        ModelData(model="m", calibration="c", validation="v", preprocess={"croop": 7})


@pytest.mark.slow
def test_ray_gives_the_same_rows_though_a_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray, of the extra 'sweep', is not installed")
    from bitsmith.sweep.ray_engine import RayEngine

    class Killing(RayEngine):
        """Kills, once two workers are at it, one that computes."""

        killed: int | None = None

        def wait(self, seconds: float) -> list[tuple[str, dict[str, Any]]]:
            finished = super().wait(seconds)
            if finished and self.killed is None and (at_work := _ray_workers("ray::_run")):
                assert len(_ray_workers("ray::")) >= 2
                self.killed = at_work[0]
                os.kill(self.killed, signal.SIGKILL)
            return finished

    sweep = Sweep.model_validate({**GRID, "grid": {**GRID["grid"], "gptq": [False, True]}})  # type: ignore[dict-item]
    assert run_sweep(sweep, tmp_path / "local", LocalEngine(2)) == {"done": 8}
    engine = Killing(2)
    assert run_sweep(sweep, tmp_path / "ray", engine) == {"done": 8}
    assert engine.killed is not None
    assert _results(tmp_path / "local") == _results(tmp_path / "ray")


def _ray_workers(title: str) -> list[int]:
    """Our processes of that title: workers that run a task are called after it."""
    found = subprocess.run(["pgrep", "-f", f"^{title}"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if _descends(int(pid), os.getpid())]


def _descends(pid: int, ancestor: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def _results(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "attempts")} for row in Store(folder).rows()]
