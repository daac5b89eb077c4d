"""Saved models that are damaged or made to harm: told in words, never executed, never a crash."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import bitsmith as bs
from bitsmith.errors import BitsmithError, CheckpointError
from bitsmith.storage import MANIFEST, RECIPE, STATE


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))


@pytest.fixture(scope="module")
def q() -> Any:
    return bs.quantize(net(), [torch.randn(16, 4)])


@pytest.fixture
def folder(q: Any, tmp_path: Path) -> Path:
    return bs.save(q, tmp_path / "saved")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def edit_state(folder: Path, **tensors: torch.Tensor) -> None:
    state = load_file(folder / STATE)
    save_file({**state, **{k.replace("__", "."): v for k, v in tensors.items()}}, folder / STATE)


def structure(kind: str, context: Any) -> str:
    leaf = {"type": None, "context": None, "children_spec": []}
    inner = {"type": kind, "context": context, "children_spec": [leaf]}
    keywords = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    return json.dumps([1, {"type": "builtins.tuple", "context": "null", "children_spec": [inner, keywords]}])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "no manifest": lambda f: (f / MANIFEST).unlink(),
    "no weights": lambda f: (f / STATE).unlink(),
    "no recipe": lambda f: (f / RECIPE).unlink(),
    "truncated weights": lambda f: (f / STATE).write_bytes((f / STATE).read_bytes()[:-7]),
    "weights cut in their header": lambda f: (f / STATE).write_bytes((f / STATE).read_bytes()[:40]),
    "empty weights": lambda f: (f / STATE).write_bytes(b""),
    "a header of 2**60 bytes": lambda f: (f / STATE).write_bytes((2**60).to_bytes(8, "little") + b"{}"),
    "a pickle for weights": lambda f: torch.save({"a": torch.zeros(3)}, f / STATE),
    "a manifest that is no JSON": lambda f: (f / MANIFEST).write_text("{'version': 1"),
    "a manifest in another encoding": lambda f: (f / MANIFEST).write_bytes(b"\xff\xfe{}"),
    "a manifest that is a list": lambda f: (f / MANIFEST).write_text("[]"),
    "a manifest nested without end": lambda f: (f / MANIFEST).write_text("[" * 200_000),
    "another version": lambda f: edit(f, lambda m: m.update(version=99)),
    "no quantizers": lambda f: edit(f, lambda m: m.pop("quantizers")),
    "no target": lambda f: edit(f, lambda m: m.pop("target")),
    "a target with unknown fields": lambda f: edit(f, lambda m: m["target"].update(command="rm -rf /")),
    "a report of another kind": lambda f: edit(f, lambda m: m.update(report={"layers": 3})),
    "a format of 99 bits": lambda f: edit(f, lambda m: m["quantizers"]["quantizers.input_1"]["format"].update(bits=99)),
    "a quantizer without a format": lambda f: edit(f, lambda m: m["quantizers"].update({"quantizers.input_1": {}})),
    "a quantizer that is forgotten": lambda f: edit(f, lambda m: m["quantizers"].pop("quantizers.input_1")),
    "an input of a petabyte": lambda f: edit(f, lambda m: m["inputs"]["leaves"][0].update(shape=[2, 10**15])),
    "an input of negative size": lambda f: edit(f, lambda m: m["inputs"]["leaves"][0].update(shape=[-2, 4])),
    "an input with text for a shape": lambda f: edit(f, lambda m: m["inputs"]["leaves"][0].update(shape="wide")),
    "an input of a type that is a function": lambda f: edit(f, lambda m: m["inputs"]["leaves"][0].update(dtype="load")),
    "fewer inputs than the structure has": lambda f: edit(f, lambda m: m["inputs"].update(leaves=[])),
    "no structure": lambda f: edit(f, lambda m: m["inputs"].pop("structure")),
    "a structure of numbers": lambda f: edit(f, lambda m: m["inputs"].update(structure="[1, 2]")),
    "a structure of an unknown type": lambda f: edit(
        f, lambda m: m["inputs"].update(structure=structure("os.system", "null"))
    ),
    "a scale that is not a number": lambda f: edit_state(f, quantizers__input_1__scale=torch.tensor(float("nan"))),
    "a scale of zero": lambda f: edit_state(f, quantizers__input_1__scale=torch.tensor(0.0)),
    "a scale in integers": lambda f: edit_state(f, quantizers__input_1__scale=torch.tensor(1)),
    "several scales for one tensor": lambda f: edit_state(f, quantizers__input_1__scale=torch.ones(4)),
    "a weight of another shape": lambda f: edit_state(f, **{"0__layer__weight": torch.zeros(9, 9)}),
    "a weight too many": lambda f: edit_state(f, extra=torch.zeros(1)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_told_and_nothing_is_loaded(name: str, folder: Path) -> None:
    DAMAGE[name](folder)
    with pytest.raises(CheckpointError, match=r"."):
        bs.load(folder, net())


@pytest.mark.parametrize(
    "text",
    ["weights: [", "- 1", "name: x\nsteps: [execute]", "!!python/object/apply:os.system ['true']", "\x00"],
)
def test_a_damaged_recipe_is_told(text: str, folder: Path) -> None:
    (folder / RECIPE).write_text(text)
    with pytest.raises(BitsmithError, match=r"recipe\.yaml"):
        bs.load(folder, net())


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that is on the path and must not be imported."""
    (tmp_path / "trap_module.py").write_text("import enum\nclass Factory(enum.Enum):\n    A = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "trap_module"
    sys.modules.pop("trap_module", None)


def test_a_structure_cannot_have_modules_imported(folder: Path, trap: str) -> None:
    """torch's reader of pytrees imports the module of a defaultdict's factory and of an enum."""
    factory = {"default_factory_module": trap, "default_factory_name": "Factory", "dict_context": ["a"]}
    enum = json.dumps([{"__enum__": True, "fqn": f"{trap}:Factory", "name": "A"}])
    for kind, context in (("collections.defaultdict", factory), ("builtins.dict", enum)):
        edit(
            folder,
            lambda m, kind=kind, context=context: m["inputs"].update(structure=structure(kind, context)),
        )
        with pytest.raises(CheckpointError):
            bs.load(folder, net())
        assert trap not in sys.modules


def test_names_in_the_manifest_are_no_paths(folder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    edit(folder, lambda m: m["quantizers"].update({"../../outside": m["quantizers"]["quantizers.input_1"]}))
    assert isinstance(bs.load(folder, net()), bs.QuantizedModel)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_is_none_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"give a folder that bitsmith\.save wrote"):
        bs.load(tmp_path / "nowhere", net())
