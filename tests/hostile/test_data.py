"""Data that are empty, damaged, foreign or malicious: an error that names the first and says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bitsmith.demo import digits_net
from bitsmith.errors import DataError
from bitsmith.evaluate import ArrayData, Preprocess, evaluate, load_data

SMALL = Preprocess(resize=8, crop=8)


def picture(path: Path, size: tuple[int, int] = (16, 16)) -> Path:
    """A readable image with contents that do not compress to nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_without_classes_shows_the_form(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"no classes: 1 images lie directly in it.*one sub-folder per class"):
        load_data(str(tmp_path))


def test_an_empty_folder_has_no_classes(tmp_path: Path) -> None:
    (tmp_path / ".hidden").mkdir()
    with pytest.raises(DataError, match="no sub-folders and no images"):
        load_data(str(tmp_path))


def test_classes_without_images_are_counted(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "cat" / "cat.txt").write_text("meow")
    with pytest.raises(DataError, match=r"2 class folders.*hold no images: looked for .*\.jpg"):
        load_data(str(tmp_path))


def test_unreadable_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    for index in range(4):
        picture(tmp_path / "cat" / f"{index}.jpg")
    content = (tmp_path / "cat" / "1.jpg").read_bytes()
    (tmp_path / "cat" / "1.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "cat" / "3.jpg").write_bytes(b"")
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "4.png").write_text("<html>404</html>")
    with pytest.raises(DataError, match=r"3 of 5 images cannot be read\. The first is '.*cat/1\.jpg'"):
        list(load_data(str(tmp_path), preprocess=SMALL, batch=2))


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(tmp_path / "cat" / "bomb.png", (32, 32))
    with pytest.raises(DataError, match="1 of 1 images cannot be read"):
        list(load_data(str(tmp_path), preprocess=SMALL))


def test_images_of_several_sizes_ask_for_a_crop(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "a.png", (8, 9))
    picture(tmp_path / "cat" / "b.png", (9, 9))
    with pytest.raises(DataError, match="--crop"):
        list(load_data(str(tmp_path), preprocess=Preprocess(resize=0, crop=0)))


@pytest.mark.parametrize("spec", ["nowhere", "nowhere.npz", "nowhere/val", "nowhere.safetensors"])
def test_data_that_do_not_exist_are_quoted(spec: str) -> None:
    with pytest.raises(DataError, match=rf"'{spec}' does not exist"):
        load_data(spec)


def test_a_foreign_file_is_told_the_forms(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1,2")
    with pytest.raises(DataError, match=r"data\.csv' is not data that Bitsmith reads.*npz"):
        load_data(str(tmp_path / "data.csv"))


class Attack:
    """Unpickling this creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_code_in_an_npz_is_never_executed(tmp_path: Path) -> None:
    evil = np.empty(1, dtype=object)
    evil[0] = Attack(tmp_path / "executed")
    np.savez(tmp_path / "evil.npz", x=evil)
    with pytest.raises(DataError, match="were not loaded"):
        load_data(str(tmp_path / "evil.npz"))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("keep", [0.0, 0.4, 0.95])
def test_a_truncated_file_is_an_error(tmp_path: Path, suffix: str, keep: float) -> None:
    path = tmp_path / f"cut{suffix}"
    if suffix == ".npz":
        np.savez(path, x=np.zeros((50, 8), np.float32))
    else:
        save_file({"x": torch.zeros(50, 8)}, path)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(DataError, match="Write it again"):
        load_data(str(path))


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"images": np.zeros((3, 2))}, "no array 'x'"),
        ({"x": np.zeros((3, 2), np.float32), "y": np.zeros(4, np.int64)}, "3 samples, but y has 4"),
        ({"x": np.zeros((0, 2), np.float32)}, "empty"),
        ({"x": np.float32(1.0)}, "single number"),
        ({"x": np.zeros((3, 2), bool)}, "bool"),
        ({"x": np.zeros((3, 2), np.complex64)}, "complex64"),
        ({"x": np.array(["a", "b"])}, "corrupt, cut short or of another kind"),
        ({"x": np.zeros((3, 2), np.uint8)}, r"images are \(N, C, H, W\)"),
        (
            {"x": np.array([[1.0], [np.nan], [np.inf]], np.float32)},
            "2 of 3 samples .* NaN or infinity, first sample 1",
        ),
    ],
)
def test_arrays_that_are_no_data_are_explained(tmp_path: Path, arrays: dict[str, np.ndarray], words: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=words):
        load_data(str(tmp_path / "a.npz"))


def test_wrong_channels_ask_for_mean_and_std(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 1, 4, 4), np.uint8))
    with pytest.raises(DataError, match="--mean and --std to 1 numbers"):
        list(load_data(str(tmp_path / "a.npz")))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 3", "returned a int"),
        ("raise OSError('gone')", "OSError: gone"),
        ("return iter(())", "no samples"),
    ],
)
def test_a_factory_that_gives_no_data(tmp_path: Path, body: str, words: str) -> None:
    (tmp_path / "loader.py").write_text(f"def data():\n    {body}\n")
    with pytest.raises(DataError, match=words):
        evaluate(lambda x: x, load_data(f"{tmp_path / 'loader.py'}:data"))


def test_no_samples_cannot_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="at least one"):
        load_data(str(tmp_path), samples=0)


@pytest.mark.parametrize("batch", [{"x": torch.zeros(1)}, "text", ()])
def test_batches_that_are_not_understood(batch: object) -> None:
    class Odd(list):  # type: ignore[type-arg]
        name = "odd data"

    with pytest.raises(DataError, match="not understood"):
        evaluate(lambda x: x, Odd([batch]))  # type: ignore[arg-type]


def test_a_model_without_tensors_is_not_judged() -> None:
    with pytest.raises(DataError, match="without any tensor"):
        evaluate(lambda x: "hello", ArrayData(torch.zeros(2, 2)))


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 3, 8, 8), r"float32 \(2, 3, 8, 8\) from pictures: RuntimeError.*trained with"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.long), r"int64 \(2, 1, 8, 8\) from pictures"),
    ],
)
def test_a_batch_of_the_wrong_shape_or_type_is_described(x: torch.Tensor, words: str) -> None:
    with pytest.raises(DataError, match=words):
        evaluate(digits_net(), ArrayData(x, name="pictures"))
