"""Every recorded run of the original program: tensors to the bit, keys in order, output to the character, status."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bitsmith.ai8x.checkpoint import read_checkpoint
from bitsmith.ai8x.command import main

DATA = Path(os.environ.get("BITSMITH_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "ai8x"
MANIFEST = json.loads((DATA / "manifest.json").read_text()) if (DATA / "manifest.json").is_file() else {"cases": []}
CASES = {case["id"]: case for case in MANIFEST["cases"] if not case.get("informational")}

# A later version of the original, or its published files, is what the default does; --compat is the recorded commit.
DEFAULT_ONLY = {"syn-qatv2-pr354", "mnist-unq-scale-published", "extrasmall-unq-scale-published"}
# The original stops here and Bitsmith has a result ...
WORKS = {
    *(f"mnist-clip-{method}-bias-crash" for method in ("avgmax", "max", "stddev", "scale")),
    "syn-two-level",
    "cifar10-bias-2020-two-level",
}
# ... or Bitsmith has another, on purpose.
OTHER_BITS = {"mnist-yaml-passthrough"}
OTHER_SHIFT = {"syn-qatv2"}
TRACEBACK = "Traceback (most recent call last):"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def call(case: dict[str, Any], *more: str) -> tuple[int, str, str, Path]:
        source = MANIFEST["inputs"][case["input"]]["pth"]
        for file in (source, *([case["yaml"]] if case["yaml"] else [])):
            (tmp_path / Path(file).name).symlink_to(DATA / file)
        monkeypatch.chdir(tmp_path)
        try:
            status = main([*case["argv"], *more])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err, tmp_path / case["argv"][1] if len(case["argv"]) > 1 else tmp_path

    return call


def recorded(case: dict[str, Any], kind: str) -> str:
    return (DATA / case[kind]).read_text() if kind in case else ""


def expectation(case: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    stem = case.get("same_tensors_as", case["id"])
    return load_file(DATA / "expected" / f"{stem}.safetensors"), json.loads(
        (DATA / "expected" / f"{case['id']}.json").read_text()
    )


def same_tensors(case: dict[str, Any], output: Path, ignore: str = "") -> None:
    found = read_checkpoint(output)
    state = found["state_dict"]
    tensors, rest = expectation(case)
    if "compare_only" in case:
        for key in case["compare_only"]:
            assert (state[key] + 0.0).numpy().tobytes() == (tensors[key] + 0.0).numpy().tobytes(), key
        return
    assert list(found) == rest["top_level_keys"]
    assert list(state) == [entry["key"] for entry in rest["state_dict"]]
    for entry in rest["state_dict"]:
        key = entry["key"]
        assert (str(state[key].dtype), list(state[key].shape)) == (f"torch.{entry['dtype']}", entry["shape"]) or (
            ignore and key.endswith(ignore)
        ), key
        if not ignore or not key.endswith(ignore):
            assert state[key].numpy().tobytes() == tensors[key].numpy().tobytes(), key
    for name, expected in rest.items():
        if name not in ("top_level_keys", "state_dict"):
            if isinstance(expected, dict) and "__opaque__" in expected:  # the input's own
                expected = plain(read_checkpoint(DATA / MANIFEST["inputs"][case["input"]]["pth"])[name], ignore)
            assert plain(found[name], ignore) == plain(expected, ignore), name


def plain(value: Any, ignore: str) -> Any:
    """As the recorded JSON writes it."""
    if isinstance(value, torch.Tensor):
        data = value.flatten().tolist()
        return {"__tensor__": str(value.dtype).removeprefix("torch."), "shape": list(value.shape), "data": data}
    if isinstance(value, type):
        return {"__class__": f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, dict):
        kept = {str(key): entry for key, entry in value.items() if not (ignore and str(key).endswith(ignore))}
        return {key: plain(entry, ignore) for key, entry in kept.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry, ignore) for entry in value]
    return value


@pytest.mark.skipif(not CASES, reason="no recorded MAX78000 cases: set BITSMITH_DATA")
def test_all_binding_cases_are_here():
    assert len(CASES) == 90


@pytest.mark.parametrize("name", sorted(set(CASES) - DEFAULT_ONLY))
def test_compat_repeats_the_original(name, run):
    case = CASES[name]
    status, out, err, output = run(case, "--compat")
    assert status == case["rc"]
    assert out == recorded(case, "stdout")
    expected = recorded(case, "stderr")
    if TRACEBACK in expected:
        head, _, trace = expected.partition(TRACEBACK)
        final = re.split(r"\n(?=\w+Error: )", trace)[-1]
        assert err == head + final
    else:
        assert err == expected
    if case["rc"]:
        assert not output.is_file()
    else:
        same_tensors(case, output)


@pytest.mark.parametrize("name", sorted(set(CASES) - WORKS - OTHER_BITS - OTHER_SHIFT))
def test_the_default_differs_only_in_weight_bits(name, run):
    case = CASES[name]
    status, out, err, output = run(case)
    assert status == case["rc"]
    if case["kind"] == "tool-output":
        assert out == recorded(case, "stdout")
        expected = recorded(case, "stderr").partition(TRACEBACK)[0].replace("quantize.py:", "bitsmith ai8x:")
        assert expected.replace("usage: quantize.py", "usage: bitsmith ai8x") in err
    if case["rc"]:
        assert not output.is_file()
        return
    same_tensors(case, output, ignore="" if "weight_bits is what was used" not in err else "weight_bits")


@pytest.mark.parametrize("name", sorted(WORKS & set(CASES)))
def test_the_default_has_a_result_where_the_original_stops(name, run):
    status, out, _, output = run(CASES[name])
    assert status == 0
    assert out.startswith(recorded(CASES[name], "stdout"))
    state = read_checkpoint(output)["state_dict"]
    for key, values in state.items():
        if key.endswith((".weight", ".bias")):
            assert bool((values == values.round()).all()), key
            assert values.min() >= (-128 if key.endswith("weight") else -(2**14))
    assert any(key.endswith(".bias_bits") for key in state)


def test_bits_go_to_the_layers_that_have_weights(run):
    if not CASES:
        pytest.skip("no recorded MAX78000 cases: set BITSMITH_DATA")
    _, out, err, output = run(CASES["mnist-yaml-passthrough"])
    assert re.findall(r"^(\S+)\.op\.weight .* bits: (\d)$", out, re.M) == [
        ("conv1", "8"),
        ("conv2", "4"),
        ("conv3", "2"),
        ("conv4", "1"),
        ("fc", "4"),
    ]
    assert "NOTICE: 1 of 6 layers of the YAML configuration take no weights" in err
    mixed, _ = expectation(CASES["mnist-yaml-mixed"])  # the same bits, without the layer between
    state = read_checkpoint(output)["state_dict"]
    for key, values in mixed.items():
        if not key.endswith("weight_bits"):
            assert torch.equal(state[key], values), key
    assert [state[f"{layer}.weight_bits"].item() for layer in ("conv1", "conv2", "conv3", "conv4", "fc")] == [
        8,
        4,
        2,
        1,
        4,
    ]
