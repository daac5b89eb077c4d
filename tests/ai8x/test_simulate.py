"""Recorded integer inference, network by network and layer by layer, and files that do not fit together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitsmith.ai8x.devices import MAX78000
from bitsmith.ai8x.network import NetworkError, parse_network
from bitsmith.ai8x.simulate import chip_program
from bitsmith.errors import BitsmithError

CARRIERS: tuple[Literal["float", "integer"], ...] = ("float", "integer")


@pytest.fixture(scope="module")
def recorded(data_folder: Path) -> Path:
    folder = data_folder / "ai8x" / "sim"
    if not folder.is_dir():
        pytest.skip(f"no recorded simulations at {folder}")
    return folder


def network(*layers: dict[str, Any]) -> Any:
    entries = [{"processors": 1, "out_offset": 0, **layer} for layer in layers]
    return parse_network({"arch": "net", "dataset": "data", "layers": entries}, MAX78000)


def described(layer: dict[str, Any], weight: Tensor) -> dict[str, Any]:
    """The description of a recorded layer."""
    entry: dict[str, Any] = {"op": layer["kind"], "activate": layer["activation"] or "none"}
    entry["output_width"] = 32 if layer["wide"] else 8
    if layer["kind"] != "linear":
        entry["pad"] = 1
        entry["kernel_size"] = weight.shape[2] if weight.ndim == 3 else "x".join(map(str, weight.shape[2:]))
    return entry


def differing(folder: Path, carrier: Literal["float", "integer"]) -> Iterator[str]:
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "layers.safetensors")
    for layer in manifest["layers"]:
        weight, stored, x, expected = (
            tensors[f"{layer['id']}.{name}"] for name in ("weight", "bias_stored", "input", "output_loader_sim")
        )
        state = {"l.op.weight": weight.float(), "l.op.bias": stored}
        state |= {f"l.{name}": torch.tensor([float(layer[name])]) for name in ("weight_bits", "output_shift")}
        found = chip_program(state, network(described(layer, weight)), carrier=carrier)(x)
        if not torch.equal(found[0].int(), expected):
            yield layer["id"]


@pytest.mark.parametrize("carrier", CARRIERS)
def test_all_recorded_layers_are_exact(recorded: Path, carrier: Literal["float", "integer"]) -> None:
    assert list(differing(recorded, carrier)) == []


@pytest.mark.parametrize("name", ["mnist", "mnist-extrasmall", "autoencoder"])
def test_recorded_networks_are_exact_in_every_layer(recorded: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITSMITH_DATA", str(recorded.parents[1]))
    from benchmarks.chip_checkpoints import chip

    tensors, run = load_file(recorded / f"{name}.safetensors"), chip(name)
    manifest = json.loads((recorded / "manifest.json").read_text(encoding="utf-8"))
    order = next(net for net in manifest["nets"] if net["net"] == name)["order_of_layers"]
    assert torch.equal(run(tensors["input"]).flatten().int(), tensors["output"].flatten())
    for layer, values in zip(order, run.layers(tensors["input"]).values(), strict=True):
        assert torch.equal(values[0].flatten().int(), tensors[f"layer.{layer}"].flatten()), layer


@pytest.mark.parametrize("name", ["mnist", "mnist-extrasmall", "cifar10", "autoencoder"])
def test_the_float_forward_of_training_equals_the_chip(
    recorded: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITSMITH_DATA", str(recorded.parents[1]))
    from benchmarks.chip_checkpoints import NETS, compare, mnist_test

    codes = torch.randint(-128, 128, (8, *NETS[name][0]), generator=torch.Generator().manual_seed(1)).float()
    if name.startswith("mnist"):
        codes = torch.cat([codes, mnist_test()[0][:40]])
    floats, chip = compare(name, codes)
    assert floats.numel() > 0
    assert torch.equal(floats.double(), chip.double())


@pytest.mark.parametrize(
    ("layers", "state", "words"),
    [
        ([{"op": "linear"}], {}, "1 layers with weights, but the checkpoint holds 0"),
        ([{"op": "linear"}], {"a.op.weight": torch.full((1, 2), 128.0)}, "more than 8 bits hold"),
        ([{"op": "linear", "quantization": 2}], {"a.op.weight": torch.full((1, 2), 2.0)}, "more than 2 bits hold"),
        ([{"op": "linear"}], {"a.bn.weight": torch.ones(4)}, "belongs to a batch norm"),
        ([{"op": "conv2d"}], {"a.op.weight": torch.ones(4, 3)}, "which is no conv2d"),
        ([{"op": "conv2d", "kernel_size": "1x1"}], {"a.op.weight": torch.ones(4, 3, 3, 3)}, "no conv2d with kernel"),
        (
            [{"op": "linear"}],
            {"a.op.weight": torch.ones(1, 2), "a.output_shift": torch.tensor([16.0])},
            "shifts by 16, not -15 to 15",
        ),
        (
            [{"op": "linear"}],
            {"a.op.weight": torch.ones(1, 2), "a.op.bias": torch.tensor([20000.0])},
            "must lie within -128 and 127",
        ),
        (
            [{"op": "linear", "output_width": 32, "activate": "relu"}],
            {"a.op.weight": torch.ones(1, 2)},
            "must be 8 where there is an activation",
        ),
        ([{"op": "none", "eltwise": "add"}], {}, "2 operands, but reads 1 layers"),
        ([{"op": "none", "in_sequences": 3}], {}, "reads layer 3, which has not run"),
        ([{"op": "none", "next_sequence": 7}], {}, "leads to layer 7"),
        ([{"op": "none", "activate": "relu"}], {}, "without weights has no activation"),
    ],
)
def test_files_that_do_not_fit_together_are_told(
    layers: list[dict[str, Any]], state: dict[str, Tensor], words: str
) -> None:
    with pytest.raises(BitsmithError, match=words):
        chip_program(state, network(*layers))


def test_layers_run_in_the_order_that_the_description_gives() -> None:
    layers: list[dict[str, Any]] = [
        {"op": "none", "next_sequence": 2}, {"op": "none", "next_sequence": "stop"}, {"op": "none", "next_sequence": 1},
    ]  # fmt: skip
    assert list(chip_program({}, network(*layers)).nodes) == [0, 2, 1]
    with pytest.raises(NetworkError):
        chip_program({}, network({"op": "none", "next_sequence": 0}))


def test_weights_of_another_layer_are_used_again() -> None:
    layers: list[dict[str, Any]] = [{"op": "linear", "name": "first"}, {"op": "linear", "weight_source": "first"}]
    run = chip_program({"a.op.weight": torch.tensor([[0.0, 64.0], [64.0, 0.0]])}, network(*layers))
    assert run(torch.tensor([[8, 100]])).tolist() == [[2, 25]]
