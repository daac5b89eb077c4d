"""Damaged, malicious and odd files: a message, status 1, the old output as it was, and nothing is ever run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from bitsmith.ai8x.archive import Unusual, read_archive, write_archive
from bitsmith.ai8x.checkpoint import read_checkpoint, read_stored, to_torch, write_checkpoint
from bitsmith.ai8x.command import main
from bitsmith.errors import CheckpointError


def checkpoint(**changes):
    state = OrderedDict(
        [
            ("c.output_shift", torch.zeros(1)),
            ("c.op.weight", torch.linspace(-0.5, 0.7, 18).reshape(2, 1, 3, 3)),
            ("c.op.bias", torch.tensor([0.1, -0.2])),
        ]
    )
    return {"epoch": 1, "arch": "a", "state_dict": state, "extras": {}, **changes}


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out.pth").write_bytes(b"what was there before")
    return tmp_path


def convert(*more: str) -> int:
    return main(["in.pth", "out.pth", "--device", "MAX78000", *more])


def fails(capsys, *messages: str) -> None:
    assert convert() == 1
    err = capsys.readouterr().err
    assert err.startswith("ERROR: ")
    assert "Traceback" not in err
    for message in messages:
        assert message in err
    assert Path("out.pth").read_bytes() == b"what was there before"
    assert sorted(entry.name for entry in Path().iterdir() if entry.name.startswith(".")) == []


class Bomb:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_code_is_never_run(work, capsys, legacy):
    torch.save(checkpoint(extras={"x": Bomb()}), "in.pth", _use_new_zipfile_serialization=not legacy)
    fails(capsys, "would run code", "system")
    assert not Path("ran").exists()


def test_a_bare_pickle_is_never_run(work, capsys):
    Path("in.pth").write_bytes(pickle.dumps(Bomb()))
    fails(capsys, "in.pth")
    assert not Path("ran").exists()


def test_an_optimizer_class_is_named_but_not_made(work):
    class Made:
        def __reduce__(self):
            return torch.optim.SGD, ([torch.zeros(1)],)

    torch.save(checkpoint(optimizer_type=Made()), "in.pth")
    with pytest.raises(Unusual):
        read_archive(Path("in.pth").read_bytes())


@pytest.mark.parametrize("part", [0, 1, 4, 100, 0.5, 0.9, -1])
def test_a_truncated_file(work, capsys, part):
    torch.save(checkpoint(), "in.pth")
    data = Path("in.pth").read_bytes()
    Path("in.pth").write_bytes(data[: part if isinstance(part, int) else int(len(data) * part)])
    fails(capsys, "'in.pth'")


def test_flipped_bytes_never_give_a_traceback(work, capsys):
    torch.save(checkpoint(), "in.pth")
    data = bytearray(Path("in.pth").read_bytes())
    random = np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(data)
        for position in random.integers(0, len(data), 3):
            damaged[position] ^= int(random.integers(1, 256))
        Path("in.pth").write_bytes(damaged)
        assert convert() in (0, 1)
        assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_dict": None}, "`state_dict`"),
        ({"state_dict": {1: torch.zeros(1)}}, "`state_dict`"),
        ({"extras": 3}, "`extras`"),
        ({"compression_sched": 3}, "`compression_sched`"),
        ({"state_dict": {"c.op.weight": 3}}, "c.op.weight"),
        ({"state_dict": {"c.op.weight": torch.zeros(2, 2, dtype=torch.int8)}}, "c.op.weight holds int8"),
        ({"state_dict": {"c.op.weight": torch.zeros(0, 2)}}, "c.op.weight has the shape (0, 2)"),
        ({"state_dict": {"c.op.weight": torch.tensor(1.0)}}, "c.op.weight has the shape ()"),
        ({"state_dict": {"c.op.weight": torch.tensor([[float("nan")]])}}, "c.op.weight holds NaN"),
        ({"state_dict": {"c.op.weight": torch.ones(1, 1), "c.op.bias": torch.tensor([torch.inf])}}, "c.op.bias holds"),
        ({"state_dict": {"c.op.weight": torch.ones(1), "c.weight_bits": torch.ones(2)}}, "c.weight_bits"),
        ({"state_dict": {"c.op.weight": torch.ones(1), "c.weight_bits": torch.tensor([-3])}}, "-3 bits"),
        ({"state_dict": {"c.op.weight": torch.ones(1), "c.shift_quantile": torch.tensor([1.5])}}, "c.shift_quantile"),
        ({"state_dict": {"c.op.weight": torch.ones(1).to_sparse()}}, "c.op.weight"),
        ({"state_dict": {"c.op.weight": torch.zeros(1).expand(10**6, 10**6)}}, "1000000"),
    ],
)
def test_odd_contents(work, capsys, changes, message):
    torch.save(checkpoint(**changes), "in.pth")
    fails(capsys, message)


def test_missing_and_misplaced_files(work, capsys):
    fails(capsys, "'in.pth' does not exist")
    Path("in.pth").mkdir()
    fails(capsys, "'in.pth' is a folder")


def test_a_list_is_no_checkpoint(work, capsys):
    torch.save([1, 2], "in.pth")
    fails(capsys, "holds a list")


def test_a_folder_that_takes_no_files(work, capsys, monkeypatch):
    torch.save(checkpoint(), "in.pth")
    assert main(["in.pth", "nowhere/out.pth", "--device", "85"]) == 1
    assert "its folder does not exist" in capsys.readouterr().err
    Path("folder").mkdir()
    assert main(["in.pth", "folder", "--device", "85"]) == 1
    assert "a folder of that name is in the way" in capsys.readouterr().err
    if os.geteuid():
        Path("folder").chmod(0o500)
        assert main(["in.pth", "folder/out.pth", "--device", "85"]) == 1
        assert "you may not write there" in capsys.readouterr().err


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES"])
def test_a_disk_that_is_full_or_read_only_keeps_the_old_output(work, capsys, monkeypatch, number):
    import errno

    torch.save(checkpoint(), "in.pth")

    def refuse(self, data):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert convert() == 1
    assert "ERROR: cannot write 'out.pth'" in capsys.readouterr().err
    monkeypatch.undo()
    assert (work / "out.pth").read_bytes() == b"what was there before"


def test_a_file_size_limit_of_the_system_keeps_the_old_output(work):
    resource = pytest.importorskip("resource")
    torch.save(checkpoint(more=torch.zeros(10_000)), "in.pth")
    code = "from bitsmith.cli import main\nimport sys\nsys.argv[1:] = 'ai8x in.pth out.pth --device 85'.split()\nmain()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 1
    assert done.stderr.startswith("ERROR: cannot write 'out.pth'")
    assert [entry.name for entry in sorted(work.iterdir())] == ["in.pth", "out.pth"]
    assert Path("out.pth").read_bytes() == b"what was there before"


def test_a_file_nested_without_end(work, capsys):
    deep = 10**5
    text = b"X\x0a\x00\x00\x00state_dict}X\x06\x00\x00\x00extras}X\x01\x00\x00\x00x" + b"]" * deep + b"a" * (deep - 1)
    with zipfile.ZipFile("in.pth", "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}(" + text + b"su.")
        archive.writestr("a/version", "3\n")
    fails(capsys, "nested deeper than any training checkpoint")


def test_names_that_no_terminal_can_print(work):
    torch.save(checkpoint(state_dict={"\udc80.op.weight": torch.ones(1, 1)}), "in.pth")
    code = (
        "from bitsmith.cli import main\nimport sys\nsys.argv[1:] = 'ai8x in.pth out.pth --device 85 -v'.split()\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_a_file_in_place_may_be_input_and_output(work):
    torch.save(checkpoint(), "in.pth")
    assert main(["in.pth", "in.pth", "--device", "85"]) == 0
    assert read_checkpoint("in.pth")["state_dict"]["c.weight_bits"].item() == 8


def test_ctrl_c_ends_quietly_as_in_the_original(work, monkeypatch):
    monkeypatch.setattr("bitsmith.ai8x.command.run", lambda arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert convert() == 0


def odd_values():
    base = torch.arange(12.0)
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    return {
        "views": [base, base[2:8:2], base.reshape(3, 4).T],
        "parameter": parameter,
        "kinds": [torch.tensor([1], dtype=kind) for kind in (torch.uint8, torch.int16, torch.bool, torch.float16)],
        "empty": [torch.zeros(0), torch.zeros(2, 0, 3), torch.tensor(3.0)],
        "numbers": [0, -1, 255, -256, 2**31, -(2**70), 1.5, float("inf"), True, None],
        "texts": ["", "ä", "x" * 300],
        "nested": ((), (1,), (1, (2, [3, {}]))),
        "class": torch.optim.Adam,
        7: OrderedDict(a=OrderedDict()),
    }


def same(left, right) -> bool:
    if isinstance(left, torch.Tensor):
        return (
            type(left) is type(right)
            and (left.dtype, left.shape, left.stride(), left.requires_grad)
            == (right.dtype, right.shape, right.stride(), right.requires_grad)
            and bool(torch.equal(left, right))
        )
    if isinstance(left, dict):
        return type(left) is type(right) and list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return type(left) is type(right) and len(left) == len(right) and all(map(same, left, right))
    return left == right and type(left) is type(right)


@pytest.mark.parametrize("mapped", [False, True])
def test_files_go_through_without_torch_unchanged(tmp_path, mapped):
    file = tmp_path / "a.pth"
    torch.save(odd_values(), file)
    again = tmp_path / "b.pth"
    again.write_bytes(write_archive(read_archive(file.read_bytes())))
    with torch.serialization.safe_globals([torch.optim.Adam]):
        found = torch.load(again, weights_only=True, mmap=mapped)
    assert same(found, odd_values())
    base, *views = found["views"]
    assert all(view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr() for view in views)
    with zipfile.ZipFile(again) as archive:
        assert archive.testzip() is None


def test_what_torch_alone_can_read_goes_through_torch(tmp_path):
    file = tmp_path / "a.pth"
    values = checkpoint(extras={"size": torch.Size([1, 2]), "half": torch.ones(2, dtype=torch.bfloat16)})
    torch.save(values, file)
    assert same(read_stored(file), values)
    write_checkpoint({**values, "new": np.ones(2, np.float32)}, tmp_path / "b.pth")
    assert same(read_checkpoint(tmp_path / "b.pth"), {**values, "new": torch.ones(2)})
    torch.save(checkpoint(), file)
    assert same(to_torch(read_stored(file)), checkpoint())


def test_not_a_file_of_torch(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("a/data.txt", "hello")
    with pytest.raises(CheckpointError):
        read_stored(tmp_path / "a.pth")


def test_neither_torch_nor_the_command_lines_libraries_are_imported(work):
    torch.save(checkpoint(), "in.pth")
    code = (
        "import sys\nfrom bitsmith.cli import main\nsys.argv[1:] = 'ai8x in.pth out.pth --device MAX78000 -v'.split()\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0, stop.code\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'pydantic', 'typer', 'rich', 'yaml'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_a_changed_weight_is_noticed_by_its_checksum(work, capsys):
    torch.save(checkpoint(), "in.pth")
    data = bytearray(Path("in.pth").read_bytes())
    position = data.index(np.float32(-0.5).tobytes())
    data[position] ^= 1
    Path("in.pth").write_bytes(data)
    fails(capsys, "the checksum of in/data/1 is wrong")
