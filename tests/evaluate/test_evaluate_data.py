"""Calibration and validation data by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from bitsmith.errors import DataError
from bitsmith.evaluate import ArrayData, Preprocess, balanced_indices, load_data

PLAIN = Preprocess(resize=0, crop=0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes of 6, 4 and 2 images, each filled with its own grey value; one stray text file."""
    value = 0
    for name, number in (("cat", 6), ("ant", 4), ("dog", 2)):
        (tmp_path / name).mkdir()
        for index in range(number):
            Image.new("RGB", (8, 6), (value, value, value)).save(tmp_path / name / f"{index}.png")
            value += 1
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def batches(data: object) -> tuple[torch.Tensor, torch.Tensor]:
    """All of a data set."""
    parts = list(data)  # type: ignore[call-overload]
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def test_classes_are_numbered_in_sorted_order(folder: Path) -> None:
    x, y = batches(load_data(str(folder), preprocess=PLAIN, batch=5))
    assert Counter(y.tolist()) == {0: 4, 1: 6, 2: 2}  # ant, cat, dog
    assert x.shape == (12, 3, 6, 8)
    # cat images were drawn first, with grey values 0 to 5
    assert (x[y == 1][:, 0, 0, 0] * 255).round().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_calibration_sample_takes_turns_among_classes(folder: Path) -> None:
    data = load_data(str(folder), samples=6, preprocess=PLAIN)
    _, y = batches(data)
    assert Counter(y.tolist()) == {0: 2, 1: 2, 2: 2}


def test_the_seed_decides_the_sample(folder: Path) -> None:
    def drawn(seed: int) -> torch.Tensor:
        return batches(load_data(str(folder), samples=6, preprocess=PLAIN, seed=seed))[0]

    assert torch.equal(drawn(0), drawn(0))
    assert any(not torch.equal(drawn(0), drawn(seed)) for seed in range(1, 5))


def test_a_balanced_sample_of_more_than_all_is_all() -> None:
    assert sorted(balanced_indices([0, 0, 1], 10)) == [0, 1, 2]


def test_preprocessing_is_that_of_torchvision(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = Preprocess(resize=0, crop=10, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    image = found.normalize(found.read(tmp_path / "a.png").unsqueeze(0))[0]
    # the formula: centre crop of rows 5..15 and columns 10..20, then (x / 255 - mean) / std
    expected = (pixels[5:15, 10:20] / 255 - np.array([0.5, 0.4, 0.3])) / np.array([0.2, 0.3, 0.4])
    assert np.allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "expected"), [((40, 20), (20, 10)), ((20, 40), (10, 20)), ((5, 7), (10, 14))])
def test_the_shorter_side_is_resized(tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]) -> None:
    Image.new("RGB", size).save(tmp_path / "a.png")
    read = Preprocess(resize=10, crop=0).read(tmp_path / "a.png")
    assert (read.shape[2], read.shape[1]) == expected


def test_grey_networks_get_grey_images(folder: Path) -> None:
    grey = Preprocess(resize=0, crop=0, mean=(0.0,), std=(1.0,))
    assert batches(load_data(str(folder), preprocess=grey))[0].shape == (12, 1, 6, 8)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_arrays_come_back_as_they_are(tmp_path: Path, suffix: str) -> None:
    x, y = torch.randn(7, 1, 4, 4), torch.arange(7)
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, x=x.numpy(), y=y.numpy().astype(np.uint8))
    else:
        save_file({"x": x, "y": y}, path)
    data = load_data(str(path), batch=3)
    assert len(data) == 3
    found_x, found_y = batches(data)
    assert torch.equal(found_x, x)
    assert torch.equal(found_y, y)


def test_uint8_arrays_are_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)  # NHWC
    np.savez(tmp_path / "a.npz", x=pixels, y=np.zeros(4, np.int64))
    x, _ = batches(load_data(str(tmp_path / "a.npz"), preprocess=PLAIN))
    assert np.allclose(x.numpy(), pixels.transpose(0, 3, 1, 2) / 255.0)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (np.zeros((4, 5, 6, 3), np.uint8), ("is uint8", "NHWC to NCHW", "divided by 255", "mean (0, 0, 0)")),
        (np.zeros((4, 3, 5, 6), np.uint8), ("is uint8", "deviation (1, 1, 1)")),
        (np.zeros((4, 2), np.float64), ("is float64", "float32 without any scaling")),
        (np.zeros((4, 2), np.float16), ("is float16",)),
        (np.zeros((4, 2), np.float32), ()),
        (np.zeros((4, 2), np.int64), ()),
    ],
)
def test_conversions_are_told(tmp_path: Path, x: np.ndarray, words: tuple[str, ...]) -> None:
    np.savez(tmp_path / "a.npz", x=x)
    for data in (load_data(str(tmp_path / "a.npz"), preprocess=PLAIN), load_data(str(tmp_path / "a.npz"), samples=2)):
        assert isinstance(data, ArrayData)
        assert (data.note is None) == (not words)
    note = load_data(str(tmp_path / "a.npz"), preprocess=PLAIN).note or ""  # type: ignore[attr-defined]
    assert all(word in note for word in words)


def test_unlabelled_arrays_give_inputs_alone(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 2), np.float32))
    (batch,) = list(load_data(str(tmp_path / "a.npz")))
    assert batch.shape == (4, 2)


def test_the_same_file_calibrates_and_validates_without_overlap(tmp_path: Path) -> None:
    path = str(tmp_path / "a.npz")
    np.savez(path, x=np.arange(10, dtype=np.float32)[:, None], y=np.arange(10) % 2)
    calibration = load_data(path, samples=4)
    validation = load_data(path, samples=None, exclude=calibration)
    used, judged = batches(calibration)[0], batches(validation)[0]
    assert sorted([*used[:, 0].tolist(), *judged[:, 0].tolist()]) == list(range(10))
    with pytest.raises(DataError, match="--calibration-samples"):
        load_data(path, exclude=load_data(path, samples=10))


def test_a_factory_gives_any_iterable_and_is_cut(tmp_path: Path) -> None:
    (tmp_path / "loader.py").write_text(
        "import torch\n"
        "def loader():\n    return [(torch.zeros(4, 2), torch.zeros(4)) for _ in range(5)]\n"
        "def stream():\n    yield from loader()\n"
    )
    data = load_data(f"{tmp_path / 'loader.py'}:loader", samples=6)
    assert [len(x) for x, _ in data] == [4, 2]
    stream = load_data(f"{tmp_path / 'loader.py'}:stream", samples=10)
    assert [len(x) for x, _ in stream] == [4, 4, 2]
    assert [len(x) for x, _ in stream] == [4, 4, 2]  # a generator, and yet again
    assert len(stream) == 3


def test_data_in_memory_can_be_used_directly() -> None:
    data = ArrayData(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), batch=2)
    assert len(data) == len(list(data)) == 3
