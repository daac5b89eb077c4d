"""Files of weights and models that are damaged, foreign or malicious: a clear error, and nothing runs."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from bitsmith.demo import WEIGHTS, digits_net
from bitsmith.errors import BitsmithError, CheckpointError
from bitsmith.evaluate import load_model, load_weights, read_checkpoint


class Attack:
    """Unpickling this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def loot(tmp_path: Path) -> Path:
    """What a successful attack would create."""
    return tmp_path / "executed"


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("writer", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_is_never_executed(tmp_path: Path, loot: Path, suffix: str, writer: str) -> None:
    path = tmp_path / f"evil{suffix}"
    evil = {"state_dict": nn.Linear(2, 2).state_dict(), "extra": Attack(loot)}
    if writer == "plain":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=writer == "zip")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert not loot.exists()
    assert "evil" in str(error.value)
    if writer != "plain":
        assert "would run code, " in str(error.value)
        assert "state_dict()" in str(error.value)


def test_a_whole_pickled_model_is_refused_with_what_to_do(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="save only the weights"):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("keep", [0, 1, 7, 100, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_an_error(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    state = digits_net().state_dict()
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match="again"):
        read_checkpoint(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_garbage_is_an_error(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"noise{suffix}"
    path.write_bytes(bytes(range(256)) * 40)
    with pytest.raises(CheckpointError, match="10,240 bytes"):
        read_checkpoint(path)


def test_flipped_bytes_give_an_error_or_tensors_never_a_crash(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "ok.pt")
    content = bytearray((tmp_path / "ok.pt").read_bytes())
    for position in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[position] ^= 0xFF
        (tmp_path / "flip.pt").write_bytes(damaged)
        try:
            found = read_checkpoint(tmp_path / "flip.pt")
        except CheckpointError:
            continue
        assert all(isinstance(value, torch.Tensor) for value in found.values())


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([1, 2, 3], "holds a list"),
        (torch.zeros(3), "holds a Tensor"),
        ({}, "no tensors"),
        ({"epoch": 3, "lr": 0.1}, "'epoch', 'lr'"),
    ],
)
def test_a_file_without_weights_says_what_it_holds(tmp_path: Path, saved: object, words: str) -> None:
    torch.save(saved, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=words):
        read_checkpoint(tmp_path / "w.pt")


def test_paths_that_are_no_files_of_weights(tmp_path: Path) -> None:
    (tmp_path / "w.txt").write_text("hello")
    for path, words in (
        (tmp_path, "folder"),
        (tmp_path / "no.pt", "does not exist"),
        (tmp_path / "w.txt", "w.txt"),
    ):
        with pytest.raises(CheckpointError, match=words):
            read_checkpoint(path)


def test_keys_that_do_not_match_are_listed(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    state = net.state_dict()
    del state["0.bias"]
    state["fc.weight"] = torch.zeros(1)
    state["1.weight"] = torch.zeros(5)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(CheckpointError) as error:
        load_weights(net, tmp_path / "w.pt")
    message = str(error.value)
    assert "1 missing from the file:\n    0.bias" in message
    assert "1 not in the model:\n    fc.weight" in message
    assert "1.weight: (5,) in the file, (3,) in the model" in message


def test_a_long_list_of_keys_is_cut(tmp_path: Path) -> None:
    torch.save({f"layer{i}.weight": torch.zeros(1) for i in range(50)}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"50 not in the model(.|\n)*and 42 more"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt")


def test_the_wrong_models_weights_leave_the_model_unloaded() -> None:
    with pytest.raises(CheckpointError, match="do not fit the model Linear"):
        load_weights(nn.Linear(2, 2), WEIGHTS)


class TestPt2:
    """``.pt2`` files: torch's own reader would unpickle parts of them."""

    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        """A good file."""
        path = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)), path)
        return path

    def rewrite(self, path: Path, change: dict[str, bytes]) -> None:
        """Replace members whose name ends so, or add them."""
        with zipfile.ZipFile(path) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        root = next(iter(members)).split("/")[0]
        for ending, content in change.items():
            hits = [name for name in members if name.endswith(ending)] or [f"{root}/{ending}"]
            members.update(dict.fromkeys(hits, content))
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)

    def test_a_pickle_among_its_parts_is_never_executed(self, path: Path, loot: Path) -> None:
        buffer = io.BytesIO()
        torch.save((Attack(loot),), buffer)
        with zipfile.ZipFile(path) as archive:
            inputs = next(name for name in archive.namelist() if "sample_inputs" in name)
        self.rewrite(path, {inputs.split("/", 1)[1]: buffer.getvalue()})
        with pytest.raises(CheckpointError):
            load_model(str(path))
        assert not loot.exists()

    @pytest.mark.parametrize("name", ["data/constants/opaque_obj_0", "data/aotinductor/model/x.so"])
    def test_objects_and_compiled_code_are_refused(self, path: Path, loot: Path, name: str) -> None:
        self.rewrite(path, {name: pickle.dumps(Attack(loot))})
        with pytest.raises(CheckpointError, match="would run on loading"):
            load_model(str(path))
        assert not loot.exists()

    def test_the_environment_is_left_as_it_was(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        load_model(str(path))
        assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ

    @pytest.mark.parametrize("keep", [0.0, 0.5, 0.98])
    def test_a_truncated_file_is_an_error(self, path: Path, keep: float) -> None:
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
        with pytest.raises(CheckpointError, match="again"):
            load_model(str(path))

    def test_a_missing_or_foreign_file_is_an_error(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
            archive.writestr("readme.txt", "hello")
        for name in ("other.pt2", "absent.pt2"):
            with pytest.raises(BitsmithError, match=name):
                load_model(str(tmp_path / name))
