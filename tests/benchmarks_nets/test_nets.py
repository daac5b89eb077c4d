"""The benchmark networks load and score as published; calibration and test data are kept apart."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # `benchmarks` is not installed

from benchmarks import data, nets  # noqa: E402
from benchmarks.nets.torchvision_nets import random_net  # noqa: E402

TRAINED = ("resnet20", "resnet32", "shufflenetv2_x0_5", "mobilenet_v1_025", "mcunet_in4", "dscnn_kws")
RANDOM = ("resnet18", "mobilenet_v2")


@cache
def load_random(name: str) -> nets.Benchmark:
    if find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return nets.load(name)


def load_or_skip(name: str) -> nets.Benchmark:
    if name in RANDOM:
        return load_random(name)
    try:
        return nets.load(name)
    except data.DataMissing as missing:
        pytest.skip(str(missing))


def test_every_network_is_either_trained_or_random():
    assert set(nets.names()) == {*TRAINED, *RANDOM}


@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_scores_as_published_on_a_sample(name):
    model, _, test, info = load_or_skip(name)
    sample = test[:: max(1, len(test) // 2)][:2]
    count = sum(len(y) for _, y in sample)
    p = info.reference_top1 / 100
    error = 100 * (p * (1 - p) / count) ** 0.5
    assert abs(nets.top1(model, sample) - info.reference_top1) < 4 * error


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_a_trained_network_scores_as_published(name):
    model, calibration, test, info = load_or_skip(name)
    judged = calibration + test if info.reference_over == "all" else test
    assert nets.top1(model, judged) == pytest.approx(info.reference_top1, abs=0.011)


@pytest.mark.parametrize("name", [*TRAINED, *RANDOM])
def test_batches_have_the_announced_shape_and_the_model_is_in_eval_mode(name):
    model, calibration, test, info = load_or_skip(name)
    assert not model.training
    for x, y in (*calibration, *test):
        assert x.dtype == torch.float32
        assert x.shape == (len(y), *info.input_shape)
        assert y.dtype == torch.int64
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "calibrate", "judge"),
    [("resnet20", 1000, 10_000), ("mcunet_in4", 100, 900), ("dscnn_kws", 100, 900)],
)
def test_as_many_samples_calibrate_and_judge_as_the_tables_say(name, calibrate, judge):
    _, calibration, test, _ = load_or_skip(name)
    assert (sum(len(y) for _, y in calibration), sum(len(y) for _, y in test)) == (calibrate, judge)


def test_no_imagenet_image_both_calibrates_and_judges():
    _, calibration, test, _ = load_or_skip("mcunet_in4")
    both = [torch.cat([y for _, y in batches]) for batches in (calibration, test)]  # one image a class
    assert sorted(torch.cat(both).tolist()) == list(range(1000))


@pytest.mark.parametrize("name", RANDOM)
def test_random_networks_are_the_same_each_time_and_leave_the_generator_alone(name):
    first = load_random(name).model.state_dict()
    torch.rand(1)  # a state that no seed gave
    before = torch.get_rng_state()
    second = random_net(name).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in first.items():
        torch.testing.assert_close(second[key], value)


def test_random_networks_have_batchnorm_statistics_of_their_own_activations():
    model = load_or_skip("resnet18").model
    seen = {}
    model.bn1.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    with torch.inference_mode():
        model(data.random_images(8, seed=7))
    variance = seen["x"].var(dim=(0, 2, 3))
    assert torch.allclose(variance, model.bn1.running_var, rtol=0.1)


def test_absent_data_is_named_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(data.DataMissing, match=r"nowhere.*BITSMITH_DATA"):
        nets.load("resnet20")
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path))
    with pytest.raises(data.DataMissing, match=r"cifar10_resnet20_akamaster.safetensors is not in"):
        nets.load("resnet20")


def test_an_unknown_network_is_answered_with_the_known_ones():
    with pytest.raises(KeyError, match=r"'resnet19'.*resnet20"):
        nets.load("resnet19")


def test_a_checkpoint_of_another_network_is_refused_with_its_keys(monkeypatch, tmp_path):
    from safetensors.torch import save_file

    from benchmarks.nets import registry
    from benchmarks.nets.dscnn_kws import DSCNN

    save_file({"stem.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    monkeypatch.setenv("BITSMITH_DATA", str(tmp_path))
    with pytest.raises(KeyError, match=r"other.safetensors does not fit DSCNN.*conv1.weight.*stem.weight"):
        registry.load_weights(DSCNN(), "other.safetensors")


def test_decoded_arrays_are_cached_and_a_failed_decoding_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("BITSMITH_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source.bin"
    source.write_bytes(b"1234")
    calls = []

    def decode(path: Path) -> np.ndarray:
        calls.append(path)
        return np.arange(4)

    def fail(path: Path) -> np.ndarray:
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        data.cached(source, "kind", fail)
    assert list((tmp_path / "cache").iterdir()) == []
    for _ in range(2):
        assert data.cached(source, "kind", decode).tolist() == [0, 1, 2, 3]
    assert calls == [source]


def test_normalized_is_channels_first_and_centred():
    images = np.array([[[[0, 255, 51]]]], dtype=np.uint8)  # one pixel: (1, 1, 1, 3)
    x = data.normalized(images, (0.5, 0.5, 0.2), (0.5, 0.25, 1.0))
    torch.testing.assert_close(x, torch.tensor([-1.0, 2.0, 0.0]).view(1, 3, 1, 1))
