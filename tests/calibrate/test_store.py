"""What the store gives back is what was put in, bit for bit and stride for stride, on disk or not."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bitsmith.calibrate.store import Store
from bitsmith.errors import OutputError


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Temporary folders are made here."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def as_bytes(value: Tensor) -> bytes:
    return bytes(value.contiguous().flatten().view(torch.uint8).tolist())


VALUES: dict[str, Tensor] = {
    "float32": torch.randn(3, 4, 5),
    "channels_last": torch.randn(2, 8, 5, 7).contiguous(memory_format=torch.channels_last),
    "channels_last 3d": torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
    "transposed": torch.randn(4, 6).t(),
    "a single channel": torch.randn(2, 1, 5, 5),
    "every second": torch.randn(10, 6)[::2],
    "expanded": torch.randn(3, 1).expand(3, 7),
    "bool": torch.randn(9) > 0,
    "uint8": torch.randint(0, 256, (5, 5), dtype=torch.uint8),
    "int16": torch.randint(-99, 99, (5, 5), dtype=torch.int16),
    "int64": torch.randint(-(2**62), 2**62, (7,)),
    "float64": torch.randn(6, dtype=torch.float64),
    "float16": torch.randn(6).half(),
    "bfloat16": torch.randn(6).bfloat16(),
    "scalar": torch.tensor(3.5),
    "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
}


@pytest.mark.parametrize("name", VALUES)
def test_tensors_come_back_from_disk_bit_for_bit(name: str, temporary: Path) -> None:
    value = VALUES[name]
    with Store(budget=0) as store:
        store.put(("float", "x", 0), value)
        assert len(files(temporary)) == 1
        found = store.get(("float", "x", 0))
    assert (found.dtype, found.shape) == (value.dtype, value.shape)
    assert as_bytes(found) == as_bytes(value)


@pytest.mark.parametrize("name", ["float32", "channels_last", "channels_last 3d", "transposed"])
def test_memory_formats_survive_the_disk(name: str) -> None:
    """Another layout would choose another convolution algorithm, and with it other roundings."""
    with Store(budget=0) as store:
        store.put(("float", "x", 0), VALUES[name])
        assert store.get(("float", "x", 0)).stride() == VALUES[name].stride()


def test_what_is_read_from_disk_can_be_read_again_and_written_to() -> None:
    with Store(budget=0) as store:
        store.put(("float", "x", 0), torch.ones(4))
        store.get(("float", "x", 0)).zero_()
        assert store.get(("float", "x", 0)).tolist() == [1, 1, 1, 1]


def test_within_the_budget_nothing_touches_the_disk(temporary: Path) -> None:
    with Store(budget=400) as store:
        value = torch.zeros(100)
        store.put(("float", "x", 0), value)
        assert store.get(("float", "x", 0)) is value
        assert store.spilled_bytes == 0
        assert list(temporary.iterdir()) == []


def test_the_least_recently_used_go_first_and_the_budget_holds() -> None:
    with Store(budget=250) as store:
        for name in "abcd":
            store.put(("float", name, 0), torch.full((25,), ord(name), dtype=torch.float32))
            if name == "b":
                store.get(("float", "a", 0))
            assert store.resident_bytes <= 250
        assert store.spilled_bytes == 200
        assert [name for name in "abcd" if ("float", name, 0) in store._spilled] == ["a", "b"]
        assert [int(store.get(("float", name, 0))[0]) for name in "abcd"] == [ord(c) for c in "abcd"]


def test_what_is_no_tensor_is_kept_and_costs_nothing() -> None:
    with Store(budget=0) as store:
        store.put(("float", "x", 0), (1, "two", torch.zeros(3)))
        store.put(("float", "y", 0), torch.zeros(0, 3))
        assert store.get(("float", "x", 0))[1] == "two"
        assert store.get(("float", "y", 0)).shape == (0, 3)


def test_drop_removes_values_files_and_bytes(temporary: Path) -> None:
    with Store(budget=100) as store:
        for chunk in range(3):
            store.put(("float", "x", chunk), torch.zeros(20))
        store.put(("quantized", "x", 2), torch.zeros(5))
        assert len(files(temporary)) == 2
        store.drop("float", "x", 3)
        assert files(temporary) == []
        assert store.resident_bytes == 20
        with pytest.raises(KeyError):
            store.get(("float", "x", 0))
        assert store.get(("quantized", "x", 2)).tolist() == [0] * 5


def test_the_folder_is_gone_at_the_end(temporary: Path) -> None:
    with Store(budget=0) as store:
        store.put(("float", "x", 0), torch.zeros(5))
        assert files(temporary)
    assert list(temporary.iterdir()) == []


def test_the_folder_is_gone_after_an_error(temporary: Path) -> None:
    with pytest.raises(KeyError, match="missing"), Store(budget=0) as store:
        assert store.put(("float", "x", 0), torch.zeros(5)) or store.get(("float", "missing", 0))
    assert list(temporary.iterdir()) == []


class FullDisk:
    def tofile(self, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_with_what_to_do(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "numpy", lambda self: FullDisk())
    with (
        pytest.raises(OutputError, match=r"No space left.*TMPDIR.*memory budget.*fewer samples"),
        Store(0) as store,
    ):
        store.put(("float", "x", 0), torch.zeros(5))
    assert list(temporary.iterdir()) == []
