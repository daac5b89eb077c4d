"""Image folders: pixels as torchvision makes them, classes by name or by a map, and what is wrong with a folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bitsmith as bs
from bitsmith.capture import read_batches
from bitsmith.errors import CheckpointError, DataError
from bitsmith.evaluate import Preprocess, load_data, load_model, stated_preprocess
from bitsmith.evaluate.data import FolderData
from bitsmith.evaluate.folders import read_label_map
from bitsmith.options import apply_options

HAS_VISION = all(importlib.util.find_spec(name) for name in ("timm", "torchvision"))
needs_vision = pytest.mark.skipif(not HAS_VISION, reason="the vision extra is not installed")
REGISTERED: list[torch.library.Library] = []


@pytest.fixture
def vision() -> None:
    """Schemas of torchvision's compiled operators, where it comes without them: models need no more."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            REGISTERED.append(library)


def photo(path: Path, width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with structure at all scales."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (7, 9, 3), dtype=np.uint8)).resize((width, height))
    noise = rng.integers(0, 40, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(np.clip(np.asarray(coarse, dtype=np.int64) + noise, 0, 255).astype(np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return image


@needs_vision
@pytest.mark.parametrize("size", [(300, 281), (281, 300), (100, 357), (61, 50), (256, 256)])
@pytest.mark.parametrize("name", ["resnet50", "vit_b_16", "efficientnet_b3"])
def test_pixels_are_those_of_torchvisions_own_transforms(
    vision: None, tmp_path: Path, size: tuple[int, int], name: str
) -> None:
    from torchvision import models

    image = photo(tmp_path / "cat" / "1.png", *size)
    weights = models.get_model_weights(name).DEFAULT
    preprocess, whose = stated_preprocess(f"torchvision:{name}", nn.Identity())
    assert whose == f"stated by torchvision's {weights}"
    (x, _) = next(iter(load_data(str(tmp_path), preprocess=preprocess)))
    torch.testing.assert_close(x[0], weights.transforms()(image), atol=1e-6, rtol=1e-6)


@needs_vision
def test_the_weights_file_says_which_transforms_hold(vision: None) -> None:
    model = nn.Identity()
    old, new = (stated_preprocess("torchvision:resnet50", model, f"/w/{file}")[0] for file in
                ("resnet50-0676ba61.pth", "resnet50-11ad3fa6.pth"))  # fmt: skip
    assert (old.resize, new.resize) == (256, 232)


@needs_vision
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_100", "vit_tiny_patch16_224", "tf_efficientnet_b0"])
def test_timm_models_state_their_own(vision: None, tmp_path: Path, name: str) -> None:
    import timm

    model = timm.create_model(name, pretrained=False)
    image = photo(tmp_path / "cat" / "1.png", 301, 250)
    preprocess, whose = stated_preprocess(f"timm:{name}", model)
    assert "own configuration" in whose
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    (x, _) = next(iter(load_data(str(tmp_path), preprocess=preprocess)))
    torch.testing.assert_close(x[0], transform(image), atol=1e-6, rtol=1e-6)


@needs_vision
def test_squashed_images_keep_no_ratio(vision: None, tmp_path: Path) -> None:
    model = nn.Identity()
    config = {"input_size": (3, 24, 24), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
    model.pretrained_cfg = {**config, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    photo(tmp_path / "cat" / "1.png", 50, 30)
    preprocess, _ = stated_preprocess("net.py:build", model)
    x, _ = next(iter(load_data(str(tmp_path), preprocess=preprocess)))
    whole = np.asarray(Image.open(tmp_path / "cat" / "1.png").resize((24, 24), Image.Resampling.BICUBIC))
    torch.testing.assert_close(x[0].permute(1, 2, 0), torch.from_numpy(whole.copy()) / 127.5 - 1, atol=1e-6, rtol=1e-6)


@needs_vision
def test_models_for_other_tasks_state_nothing_of_use(vision: None) -> None:
    for name in ("ssd300_vgg16", "fcn_resnet50", "r3d_18"):
        assert stated_preprocess(f"torchvision:{name}", nn.Identity())[1] == "usual for ImageNet"


class Published:
    """Weights as a library publishes them: a file at an address, which bears the beginning of its checksum."""

    def __init__(self, net: nn.Module, folder: Path, *, checksum: str | None = None) -> None:
        written = folder / "written.pth"
        torch.save(net.state_dict(), written)
        digest = hashlib.sha256(written.read_bytes()).hexdigest()[:8]
        self.url = written.rename(folder / f"net-{checksum or digest}.pth").as_uri()
        self.DEFAULT = self

    def __len__(self) -> int:
        return 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's cache of downloads, empty."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def offline(*_: object, **__: object) -> None:
    raise OSError("no route to host")


@needs_vision
def test_pretrained_weights_are_fetched_once(
    vision: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    net = models.squeezenet1_1(weights=None)
    published = Published(net, tmp_path)
    monkeypatch.setattr(models, "get_model_weights", lambda name: published)
    for _ in range(2):
        loaded = load_model("torchvision:squeezenet1_1", "pretrained")
        assert torch.equal(loaded.state_dict()["classifier.1.weight"], net.state_dict()["classifier.1.weight"])
        assert not loaded.training
        monkeypatch.setattr(torch.hub, "download_url_to_file", offline)  # from now on the cache must do
    assert [file.name for file in cache.iterdir()] == [Path(published.url).name]


@needs_vision
def test_pretrained_weights_that_cannot_be_had_are_refused_with_the_remedy(
    vision: None, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import models

    published = Published(models.squeezenet1_1(weights=None), tmp_path, checksum="00000000")
    monkeypatch.setattr(models, "get_model_weights", lambda name: published)
    with pytest.raises(CheckpointError, match=r"cannot be fetched: invalid hash value.*--weights"):
        load_model("torchvision:squeezenet1_1", "pretrained")
    assert list(cache.iterdir()) == []  # nothing half fetched is taken for the weights next time
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(CheckpointError, match=r"cannot be fetched: no route.*\(from file://.*--weights"):
        load_model("torchvision:squeezenet1_1", "pretrained")
    monkeypatch.setattr(models, "get_model_weights", lambda name: ())
    with pytest.raises(CheckpointError, match="torchvision has no pretrained weights for 'squeezenet1_1'"):
        load_model("torchvision:squeezenet1_1", "pretrained")


@needs_vision
def test_pretrained_weights_state_how_images_are_prepared(vision: None) -> None:
    from torchvision import models

    for name in ("resnet50", "efficientnet_b3", "squeezenet1_1"):
        weights = models.get_model_weights(name).DEFAULT
        preprocess, whose = stated_preprocess(f"torchvision:{name}", nn.Identity(), "pretrained")
        stated = weights.transforms()
        assert whose == f"stated by torchvision's {weights}"
        assert (preprocess.resize, preprocess.crop) == (stated.resize_size[0], stated.crop_size[0])
        assert (list(preprocess.mean), list(preprocess.std)) == (stated.mean, stated.std)


@needs_vision
def test_timm_is_asked_for_its_weights_and_its_failures_are_told(vision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create, asked = timm.create_model, []

    def fetched(name: str, *, pretrained: bool) -> nn.Module:
        asked.append((name, pretrained))
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", fetched)
    model = load_model("timm:resnet10t", "pretrained")
    assert asked == [("resnet10t", True)]
    assert stated_preprocess("timm:resnet10t", model, "pretrained")[0].mean == tuple(model.pretrained_cfg["mean"])
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(
        CheckpointError, match=r"timm:resnet10t cannot be fetched: no route.*huggingface.co/timm.*--wei"
    ):
        load_model("timm:resnet10t", "pretrained")
    monkeypatch.setattr(timm, "is_model_pretrained", lambda name: False)
    with pytest.raises(CheckpointError, match="timm has no pretrained weights for 'resnet10t'"):
        load_model("timm:resnet10t", "pretrained")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("m.txt", "dog 0\ncat 2\n"),
        ("m.csv", "dog,0\ncat,2\n"),
        ("m.csv", "0,dog\n2,cat\n"),
        ("m.txt", "dog\nbird\ncat\n"),
        ("m.json", json.dumps({"dog": 0, "cat": 2})),
        ("m.json", json.dumps({"0": ["dog", "a dog"], "2": ["cat", "a cat"]})),
        ("m.json", json.dumps({"0": "dog", "2": "cat"})),
        ("m.json", json.dumps(["dog", "bird", "cat"])),
        ("m.yaml", "dog: 0\ncat: 2\n"),
    ],
)
def test_label_maps_have_the_usual_forms(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    found = read_label_map(tmp_path / name)
    assert (found["dog"], found["cat"]) == (0, 2)


def test_folders_may_have_spaces(tmp_path: Path) -> None:
    (tmp_path / "m.txt").write_text("great white shark 2\ntench 0\n")
    assert read_label_map(tmp_path / "m.txt") == {"great white shark": 2, "tench": 0}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("m.txt", "", "is empty"),
        ("m.txt", "dog 0\ncat\n", "line 2"),
        ("m.txt", "dog 0\ndog 1\n", "gives 'dog' two classes: 0 and 1"),
        ("m.json", "{", "cannot be read"),
        ("m.json", "3", "holds no mapping"),
        ("m.json", '{"dog": 1.5}', "gives no class"),
        ("m.json", '{"dog": -1}', "gives no class"),
        ("m.json", '{"dog": null}', "gives no class"),
    ],
)
def test_wrong_label_maps_are_refused_with_the_place(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError) as refusal:
        read_label_map(tmp_path / name)
    assert words in str(refusal.value)


def test_a_folder_that_the_map_lacks_is_named(tmp_path: Path) -> None:
    photo(tmp_path / "data" / "cat" / "1.png", 8, 8)
    (tmp_path / "m.txt").write_text("dog 0\n")
    with pytest.raises(DataError, match=r"1 of the 1 class folders .* 'cat'; it has 'dog'"):
        load_data(str(tmp_path / "data"), label_map=tmp_path / "m.txt")


def test_batches_are_the_same_with_any_number_of_threads(tmp_path: Path) -> None:
    for label in ("a", "b"):
        for index in range(5):
            photo(tmp_path / label / f"{index}.png", 9, 8, index)
    small = Preprocess(resize=0, crop=8)
    runs = [list(load_data(str(tmp_path), preprocess=small, batch=3, workers=w)) for w in (None, 0, 3)]
    for run in runs[1:]:
        assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(runs[0], run, strict=True))
    assert [len(x) for x, _ in runs[0]] == [3, 3, 3, 1]


def test_a_reader_that_stops_early_leaves_no_threads_at_work(tmp_path: Path) -> None:
    for index in range(8):
        photo(tmp_path / "a" / f"{index}.png", 8, 8, index)
    for x, _ in load_data(str(tmp_path), preprocess=Preprocess(resize=0, crop=8), batch=2, workers=2):
        assert len(x) == 2
        break


def test_what_calibrates_takes_turns_between_classes_even_when_all_of_it_does(tmp_path: Path) -> None:
    for label in ("a", "b", "c"):
        for index in range(4):
            photo(tmp_path / label / f"{index}.png", 8, 8)
    data = load_data(str(tmp_path), samples=1000, preprocess=Preprocess(resize=0, crop=0), batch=3)
    assert all(sorted(y.tolist()) == [0, 1, 2] for _, y in data)


def test_one_set_of_images_gives_one_model_whatever_its_form_and_layout(tmp_path: Path) -> None:
    images = [photo(tmp_path / "images" / name / "1.png", 24, 24, seed) for seed, name in enumerate("abcdefgh")]
    pixels = np.stack([np.asarray(image) for image in images])
    np.savez(tmp_path / "nhwc.npz", x=pixels, y=np.arange(8))
    np.savez(tmp_path / "nchw.npz", x=pixels.transpose(0, 3, 1, 2), y=np.arange(8))
    preprocess = Preprocess(resize=0, crop=0)
    forms = [list(load_data(str(tmp_path / name), samples=8, preprocess=preprocess))
             for name in ("images", "nhwc.npz", "nchw.npz")]  # fmt: skip
    forms.append([(x.contiguous(memory_format=torch.channels_last), y) for x, y in forms[0]])
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 16, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8),
    ).eval()  # fmt: skip
    with torch.no_grad():  # of unequal channels, so that equalization, which amplifies a rounding, is kept
        spread = torch.logspace(-2.5, 0.5, 8).view(-1, 1, 1, 1)
        net[0].weight *= spread
        net[2].weight /= spread
    changes = {"weight-quant-granularity": "per_tensor", "graph-eq-iterations": 20, "weight-bit-width": 4, "gptq": True}
    recipe = apply_options(bs.load_recipe("int8"), changes)
    for batches in forms:  # the layout is what moves the last bits of sums on larger networks
        assert all(x.is_contiguous() for (x,), _ in read_batches(net, batches))
    models = [bs.quantize(net, batches, recipe) for batches in forms]
    assert not any("undone" in note for note in models[0].report.notes)
    first, *others = [model.state_dict() for model in models]
    for other in others:
        assert [name for name, value in first.items() if not torch.equal(value, other[name])] == []


def test_empty_classes_count_and_are_told(tmp_path: Path) -> None:
    photo(tmp_path / "b" / "1.png", 8, 8)
    (tmp_path / "a").mkdir()
    data = load_data(str(tmp_path))
    assert isinstance(data, FolderData)
    assert data.labels == [1]
    assert "1 of the 2 class folders" in str(data.note)
    assert "('a')" in str(data.note)


def test_corrupt_images_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    for index in range(3):
        photo(tmp_path / "a" / f"{index}.png", 8, 8)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"1 of 3 images cannot be read. The first is .*1\.png"):
            list(load_data(str(tmp_path), preprocess=Preprocess(crop=8), workers=workers))
