"""Writing results so that a failure, a full disk or a kill never leaves half a file behind."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import OutputError

_REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space or choose another place",
    errno.EDQUOT: "your disk quota is used up: free some space or choose another place",
    errno.EFBIG: "the file would be larger than this system or user may write: choose another place",
    errno.EACCES: "you may not write there: change the folder's permissions or choose another place",
    errno.EPERM: "you may not write there: change the folder's permissions or choose another place",
    errno.EROFS: "that file system is read-only: choose another place",
    errno.ENOENT: "its folder does not exist: create it first",
    errno.ENOTDIR: "a part of that path is a file, not a folder: choose another place",
    errno.EISDIR: "a folder of that name is in the way: remove it or choose another name",
    errno.ENAMETOOLONG: "the name is too long for this file system: choose a shorter one",
}


def output_error(path: str | os.PathLike[str], error: OSError) -> OutputError:
    """The OutputError that says what ``error`` means for ``path`` and what to do."""
    remedy = _REMEDIES.get(error.errno or 0, "see that the place can be written to, or choose another")
    return OutputError(f"cannot write {os.fspath(path)!r}: {error.strerror or error}; {remedy}")


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; when the body ends well, it takes ``path``'s place in one step.

    When the body raises, or the process is killed, ``path`` keeps what it held before. An ``OSError`` becomes
    an OutputError that says what to do.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with atomic_write(Path(folder, "a.txt")) as temporary:
    ...         _ = temporary.write_text("whole or not at all")
    ...     Path(folder, "a.txt").read_text()
    'whole or not at all'
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        if target.is_dir():  # os.replace would only say so after all the work
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        # The suffix stays last: writers such as numpy and onnx choose the format, or add a name, by it.
        handle, name = tempfile.mkstemp(prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        _synchronize(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes files that only their owner can read
        os.replace(temporary, target)
        temporary = None
        _synchronize(target.parent)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def prepare_output_dir(path: str | os.PathLike[str]) -> Path:
    """Create the folder if it is not there, and prove that files can be written into it."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"the output folder {os.fspath(path)!r} is a file: name a folder, or remove the file first")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Permission bits do not tell (root, read-only mounts, quotas): only a write does.
        with tempfile.NamedTemporaryFile(prefix=".bitsmith-", dir=folder) as probe:
            probe.write(b"0" * 4096)
            probe.flush()
    except OSError as error:
        raise output_error(path, error) from error
    return folder


def _umask() -> int:
    """The process's file mode mask; reading it means setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _synchronize(path: Path) -> None:
    """Have the system put ``path`` on the disk: a name must not outlive its contents in a power cut."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync for folders
            raise
    finally:
        os.close(handle)


@contextmanager
def staged_dir(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder inside ``path``; when the body ends well, its entries move up into ``path``.

    When the body raises, ``path`` holds what it held before; files of other names are never touched.
    """
    existed = Path(path).exists()
    folder = prepare_output_dir(path)
    stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    try:
        yield stage
        try:
            for entry in sorted(stage.iterdir()):
                destination = folder / entry.name
                if destination.is_dir() and not destination.is_symlink():
                    shutil.rmtree(destination)  # os.replace takes a file's place, not a full folder's
                os.replace(entry, destination)
        except OSError as error:
            raise output_error(path, error) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if not existed:
            with suppress(OSError):  # rmdir refuses when it holds anything
                folder.rmdir()
