"""Output that cannot be written, and writers that are killed: a clear error, and the old files stay whole."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from bitsmith.errors import OutputError
from bitsmith.files import atomic_write, prepare_output_dir, staged_dir, write_text


def entries(folder: Path) -> list[str]:
    """All names in a folder, hidden ones too."""
    return sorted(os.listdir(folder))


def fail_in(place: AbstractContextManager[Path], error: Exception) -> None:
    """Write half of ``model.onnx`` into what ``place`` yields, then fail."""
    with place as path:
        (path / "model.onnx" if path.is_dir() else path).write_text("half")
        raise error


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with pytest.raises(KeyError):
        fail_in(atomic_write(path), KeyError())
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["model.onnx"]


def test_a_written_file_has_the_usual_permissions(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "{}")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "disk is full"),
        (errno.EACCES, "may not write there"),
        (errno.EROFS, "read-only"),
        (errno.EIO, "see that the place can be written to"),
    ],
)
def test_the_systems_error_becomes_advice(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(OutputError, match=words):
        fail_in(atomic_write(tmp_path / "a"), OSError(number, os.strerror(number)))
    assert entries(tmp_path) == []


def test_a_file_that_may_not_grow_leaves_nothing(tmp_path: Path) -> None:
    """A real short write: the system refuses what exceeds the limit."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, old[1]))
    try:
        with pytest.raises(OutputError, match="larger than"):
            write_text(tmp_path / "a", "x" * 100_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert entries(tmp_path) == []


def test_a_full_device_is_named() -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    with pytest.raises(OSError, match="No space") as full, open("/dev/full", "w") as file:
        file.write("x")
    from bitsmith.files import output_error

    assert "the disk is full" in str(output_error("out/model.onnx", full.value))


def test_places_that_cannot_hold_the_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    cases = {
        "folder": "folder of that name",
        "absent/a": "does not exist",
        "file/a": "is a file",
        "x" * 300: "too long",
    }
    for name, words in cases.items():
        with pytest.raises(OutputError, match=words):
            write_text(tmp_path / name, "")


def test_an_output_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match=r"'.*out' is a file: name a folder"):
        prepare_output_dir(tmp_path / "out")
    with pytest.raises(OutputError, match="is a file"):
        prepare_output_dir(tmp_path / "out" / "deeper")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_output_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def refuse(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    # tests may run as root, whom permission bits do not stop
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(OutputError, match="may not write there"):
        prepare_output_dir(tmp_path)


def test_a_read_only_system_folder() -> None:
    if not Path("/proc/version").exists():
        pytest.skip("no /proc here")
    with pytest.raises(OutputError, match="/proc/bitsmith"):
        prepare_output_dir("/proc/bitsmith")


def test_a_staged_folder_arrives_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "state").mkdir(parents=True)
    (out / "state" / "old").write_text("old")
    (out / "keep.txt").write_text("the user's own")
    with staged_dir(out) as stage:
        (stage / "state").mkdir()
        (stage / "state" / "new").write_text("new")
        (stage / "model.onnx").write_text("new")
        assert not (out / "model.onnx").exists()
    assert entries(out) == ["keep.txt", "model.onnx", "state"]
    assert entries(out / "state") == ["new"]


def test_a_failed_staged_folder_leaves_everything_as_it_was(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(KeyError):
        fail_in(staged_dir(out), KeyError())
    assert entries(tmp_path) == []
    out.mkdir()
    (out / "model.onnx").write_text("old")
    with pytest.raises(KeyError):
        fail_in(staged_dir(out), KeyError())
    assert entries(out) == ["model.onnx"]
    assert (out / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("writer", ["atomic_write(out / 'model.onnx')", "staged_dir(out)"])
def test_a_kill_in_mid_write_leaves_the_old_file(tmp_path: Path, writer: str) -> None:
    (tmp_path / "model.onnx").write_text("old")
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom bitsmith.files import atomic_write, staged_dir\n"
        "out = Path(sys.argv[1])\n"
        f"with {writer} as place:\n"
        "    place = place / 'model.onnx' if place.is_dir() else place\n"
        "    with open(place, 'w') as file:\n"
        "        file.write('new, but only ha')\n        file.flush()\n"
        "        print('writing', flush=True)\n        time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    assert process.wait(timeout=30) == -signal.SIGKILL
    process.stdout.close()
    time.sleep(0.01)
    assert (tmp_path / "model.onnx").read_text() == "old"
    # what the killed process left is hidden, and the next run is not disturbed by it
    write_text(tmp_path / "model.onnx", "new")
    assert [name for name in entries(tmp_path) if not name.startswith(".")] == ["model.onnx"]
