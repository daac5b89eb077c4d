"""A certificate passes the right file and fails every file that computes anything else, by however little."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from file_mutations import (
    TwoHeads,
    change_one_bias,
    change_one_code,
    change_scale,
    change_zero_point,
    drop_output,
    images,
    mutated,
    rename_input,
    set_scale,
    shift_a_kernel,
    swap_outputs,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from typer.testing import CliRunner

import bitsmith as bs
from bitsmith.cli.app import NOT_CERTIFIED, app
from bitsmith.errors import BitsmithError, CheckpointError, VerificationError
from bitsmith.verify import Certificate, open_engine, save_evidence, verify_folder
from bitsmith.verify.engines import Engine
from bitsmith.verify.folder import CERTIFICATE, EVIDENCE
from bitsmith.verify.verify import file_digest


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def q() -> Any:
    torch.manual_seed(0)
    return bs.quantize(TwoHeads(), [images(64)])


@pytest.fixture(scope="module")
def file(q: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bs.export_onnx(q, tmp_path_factory.mktemp("exported") / "model.onnx")


def test_the_right_file_passes_to_the_bit(q: Any, file: Path) -> None:
    certificate = bs.verify(q, file, [images(32, seed=1), images(5, seed=2)])
    assert certificate.passed
    assert certificate.allowed_max_lsb == 0
    assert certificate.max_lsb == 0
    assert certificate.samples == 37
    assert [o.name for o in certificate.outputs] == ["left", "right"]
    assert all(o.equal_fraction == 1 and o.max_integer_vs_simulation == 0 for o in certificate.outputs)
    assert certificate.top1_agreement == 1.0
    assert certificate.coverage == 1.0
    assert certificate.integer_kernels["QLinearConv"] == 2
    assert certificate.integer_kernels["QLinearAdd"] == 1
    assert certificate.integer_kernels["QGemm"] == 2
    assert certificate.float_compute_kernels == {}
    assert certificate.float_operators == []
    assert certificate.sha256 == file_digest(file)
    assert certificate.file_bytes == file.stat().st_size
    assert certificate.float_bytes == sum(p.numel() * 4 for p in TwoHeads().parameters())


MUTATIONS: dict[str, Callable[[onnx.ModelProto], None]] = {
    "a weight code of the first layer": partial(change_one_code, layer="stem"),
    "a weight code of the last layer": partial(change_one_code, layer="right"),
    "a bias of the last layer": partial(change_one_bias, layer="left"),
    "the last weight scale, by one ulp": lambda model: change_scale(model, "left.weight"),
    "the last input scale, by one ulp": lambda model: change_scale(model, "adaptive_avg_pool2d"),
    "an operand's scale in the add": lambda model: set_scale(model, 0.05, "conv_quantized"),
    "the input's zero point": lambda model: change_zero_point(model, "x_quantized"),
    "the order of the outputs": swap_outputs,
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_file_that_differs_fails(name: str, q: Any, file: Path, tmp_path: Path) -> None:
    path = mutated(file, tmp_path / "model.onnx", MUTATIONS[name])
    certificate = bs.verify(q, path, images(64, seed=1))
    assert not certificate.passed
    assert certificate.verdict.startswith("FAILED")
    assert certificate.max_lsb > 0
    assert min(o.equal_fraction for o in certificate.outputs) < 1


def test_the_model_of_other_weights_fails(file: Path) -> None:
    torch.manual_seed(1)
    other = bs.quantize(TwoHeads(), [images(64)])
    assert not bs.verify(other, file, images(16)).passed


REFUSED: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "not a number": (lambda model: set_scale(model, float("nan"), "left.weight"), "holds NaN"),
    "another number of outputs": (drop_output, "has outputs"),
    "another input": (rename_input, r"inputs \['pixels'\].*cannot be fed"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_cannot_be_compared_is_an_error(name: str, q: Any, file: Path, tmp_path: Path) -> None:
    change, words = REFUSED[name]
    with pytest.raises(VerificationError, match=words):
        bs.verify(q, mutated(file, tmp_path / "model.onnx", change), images(8))


def test_a_file_of_another_geometry_is_an_error(q: Any, tmp_path: Path) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3 * 5 * 5, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.fc(x.flatten(1))
            return y, y * 2

    torch.manual_seed(0)
    other = bs.quantize(Other(), [torch.randn(8, 3, 5, 5)])
    path = bs.export_onnx(other, tmp_path / "model.onnx")
    with pytest.raises(VerificationError, match="cannot run"):
        bs.verify(q, path, images(8))


def test_files_that_are_none_are_errors(q: Any, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    for content in (b"", b"this is no protobuf", b"\x08\x09" * 50):
        garbage.write_bytes(content)
        with pytest.raises(VerificationError, match=r"garbage\.onnx"):
            bs.verify(q, garbage, images(2))
    with pytest.raises(VerificationError, match="not a file"):
        bs.verify(q, tmp_path / "missing.onnx", images(2))
    with pytest.raises(VerificationError, match="not a file"):
        bs.verify(q, tmp_path, images(2))


def test_without_inputs_nothing_is_certified(q: Any, file: Path) -> None:
    with pytest.raises(VerificationError, match="no inputs"):
        bs.verify(q, file, [])


def test_labels_and_names_of_inputs_are_understood(q: Any, file: Path) -> None:
    x = images(4)
    for inputs in (x, (x,), [x], [(x, torch.zeros(4))], {"x": x}, [{"x": x}]):
        assert bs.verify(q, file, inputs).samples == 4


def test_a_linear_over_sequences_passes_to_the_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 5, 12)
    q = bs.quantize(nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 3)), [x])
    assert bs.verify(q, bs.export_onnx(q, tmp_path / "model.onnx"), x).passed


class Gelu(nn.Module):
    """A float operator between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.conv(x)))


@pytest.mark.parametrize(
    ("recipe", "placement", "net", "bound"),
    [
        ("int16", "runtime", TwoHeads, 1.0),
        ("w8a16", "runtime", TwoHeads, 1.0),
        ("int8", "runtime", Gelu, 8.0),
        ("fp8", "runtime", TwoHeads, 16.0),
    ],
)
def test_float_kernels_are_held_to_a_bound_and_named(
    recipe: str, placement: Any, net: Any, bound: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    q = bs.quantize(net(), [images(32)], recipe=recipe, placement=placement)
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    certificate = bs.verify(q, path, images(32, seed=1))
    assert certificate.passed
    assert certificate.allowed_max_lsb == bound
    assert certificate.float_operators or certificate.float_compute_kernels
    assert all(o.max_integer_vs_simulation == 0 for o in certificate.outputs)
    broken = mutated(path, tmp_path / "broken.onnx", lambda m: set_scale(m, 1.0, "conv.weight"))
    assert not bs.verify(q, broken, images(32, seed=1)).passed


def test_a_float_layer_at_the_end_does_not_excuse_the_layers_before_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 4))
    x = torch.randn(32, 3, 8, 8)
    q = bs.quantize(net, [x], overrides=[bs.Override(match="last", exclude=True)])
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    assert bs.verify(q, path, x).passed
    broken = mutated(path, tmp_path / "broken.onnx", partial(shift_a_kernel, layer="0"))
    assert not bs.verify(q, broken, x).passed


def test_the_allowed_difference_can_be_chosen(q: Any, file: Path, tmp_path: Path) -> None:
    path = mutated(file, tmp_path / "model.onnx", partial(change_one_code, layer="stem"))
    certificate = bs.verify(q, path, images(32), max_lsb=1e6)
    assert certificate.passed
    assert certificate.allowed_max_lsb == 1e6
    assert not bs.verify(q, path, images(32), max_lsb=certificate.max_lsb * 0.99).passed


def test_without_scores_there_is_no_agreement_of_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    q = bs.quantize(Gelu(), [images(16)])
    path = bs.export_onnx(q, tmp_path / "model.onnx")
    assert bs.verify(q, path, images(4)).top1_agreement is None


# The folder


@pytest.fixture
def folder(q: Any, file: Path, tmp_path: Path) -> Path:
    """What ``bitsmith quantize`` leaves behind, as far as verification goes."""
    shutil.copy(file, tmp_path / "model.onnx")
    batch = ((images(16, seed=3),), {})
    save_evidence(tmp_path, q, bs.verify(q, tmp_path / "model.onnx", batch[0][0]), batch)
    return tmp_path


def test_a_folder_is_verified_without_the_model(folder: Path) -> None:
    certificate = verify_folder(folder)
    assert certificate.passed
    assert certificate.max_lsb == 0
    assert certificate.samples == 16


def test_another_file_than_the_certified_one_is_refused(folder: Path) -> None:
    mutated(folder / "model.onnx", folder / "model.onnx", partial(change_one_code, layer="stem"))
    with pytest.raises(VerificationError, match="SHA-256 differs"):
        verify_folder(folder)


def test_a_certificate_made_to_fit_does_not_help_a_wrong_file(folder: Path) -> None:
    mutated(folder / "model.onnx", folder / "model.onnx", partial(change_one_code, layer="stem"))
    forge(folder, sha256=file_digest(folder / "model.onnx"), passed=True)
    certificate = verify_folder(folder)
    assert not certificate.passed
    assert certificate.verdict.startswith("FAILED")


def forge(folder: Path, **changes: Any) -> None:
    recorded = Certificate.model_validate_json((folder / CERTIFICATE).read_text())
    (folder / CERTIFICATE).write_text(recorded.model_copy(update=changes).model_dump_json())


def evidence_without(folder: Path, name: str) -> None:
    tensors = load_file(folder / EVIDENCE)
    save_file({k: v for k, v in tensors.items() if k != name}, folder / EVIDENCE)


def evidence_with(folder: Path, name: str, value: Tensor) -> None:
    save_file({**load_file(folder / EVIDENCE), name: value}, folder / EVIDENCE)


DAMAGE: dict[str, tuple[Callable[[Path], Any], type[BitsmithError], str]] = {
    "no evidence": (lambda f: (f / EVIDENCE).unlink(), VerificationError, f"holds no {EVIDENCE}"),
    "no certificate": (lambda f: (f / CERTIFICATE).unlink(), VerificationError, f"holds no {CERTIFICATE}"),
    "no file": (lambda f: (f / "model.onnx").unlink(), VerificationError, "model.onnx"),
    "truncated evidence": (
        lambda f: (f / EVIDENCE).write_bytes((f / EVIDENCE).read_bytes()[:-9]),
        CheckpointError,
        "damaged",
    ),
    "empty evidence": (lambda f: (f / EVIDENCE).write_bytes(b""), CheckpointError, "damaged"),
    "a pickle as evidence": (lambda f: torch.save({"a": 1}, f / EVIDENCE), CheckpointError, "damaged"),
    "a certificate that is no JSON": (
        lambda f: (f / CERTIFICATE).write_text("{"),
        CheckpointError,
        "damaged",
    ),
    "a certificate of something else": (
        lambda f: (f / CERTIFICATE).write_text("[1]"),
        CheckpointError,
        "damaged",
    ),
    "a certificate in another encoding": (
        lambda f: (f / CERTIFICATE).write_bytes(b"\xff\xfe"),
        CheckpointError,
        "damaged",
    ),
    "no input": (lambda f: evidence_without(f, "input.x"), VerificationError, "lacks 'input.x'"),
    "no output": (lambda f: evidence_without(f, "integer.1"), VerificationError, "lacks 'integer.1'"),
    "an output of another size": (
        lambda f: evidence_with(f, "simulation.0", torch.zeros(1)),
        VerificationError,
        "elements",
    ),
    "an input of another size": (
        lambda f: evidence_with(f, "input.x", torch.zeros(2, 3, 5)),
        VerificationError,
        "cannot run",
    ),
    "fewer outputs in the certificate": (lambda f: forge(f, outputs=[]), VerificationError, "outputs"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder_is_told(name: str, folder: Path) -> None:
    damage, error, words = DAMAGE[name]
    damage(folder)
    with pytest.raises(error, match=words):
        verify_folder(folder)


def test_the_command_says_by_its_exit_status_whether_the_file_passed(folder: Path) -> None:
    runner = CliRunner()
    assert runner.invoke(app, ["verify", str(folder)]).exit_code == 0
    mutated(folder / "model.onnx", folder / "model.onnx", partial(change_one_code, layer="stem"))
    forge(folder, sha256=file_digest(folder / "model.onnx"))
    result = runner.invoke(app, ["verify", str(folder)])
    assert result.exit_code == NOT_CERTIFIED != 0
    assert "FAILED" in result.output


# Engines and deployment


def test_an_engine_says_what_it_made_of_the_file(file: Path) -> None:
    engine = open_engine(file)
    assert (engine.name, engine.inputs, engine.outputs) == ("onnxruntime", ["x"], ["left", "right"])
    assert engine.version.count(".") == 2


def test_kernels_are_told_apart_by_what_they_multiply() -> None:
    from collections import Counter

    kernels = Counter(QLinearConv=3, QGemm=1, FusedConv=2, MatMul=1, Softmax=1, DequantizeLinear=4)
    engine = Engine("onnxruntime", "1", [], [], lambda feeds: [], kernels)
    assert engine.integer_kernels == {"QGemm": 1, "QLinearConv": 3}
    assert engine.float_compute_kernels == {"FusedConv": 2, "MatMul": 1}


def test_a_deployed_model_is_called_like_the_model(q: Any, file: Path) -> None:
    x = images(6, seed=4)
    for deployed in (bs.deploy(q), bs.deploy(file), bs.deploy(str(file), threads=1)):
        assert all(torch.equal(a, b) for a, b in zip(deployed(x), q(x)))


def test_deploying_is_refused_in_words(q: Any, file: Path) -> None:
    with pytest.raises(BitsmithError, match=r"'tensorrt' is not known.*onnxruntime"):
        bs.deploy(q, engine="tensorrt")  # type: ignore[arg-type]
    with pytest.raises(BitsmithError, match="2 tensors were given"):
        bs.deploy(file)(images(1), images(1))


def test_narrow_activations_are_deployed_with_a_clip() -> None:
    torch.manual_seed(0)
    q = bs.quantize(
        TwoHeads(),
        [images(32)],
        recipe=bs.Recipe.from_yaml(
            "weights: {format: {bits: 4}, granularity: channel}\nactivations: {format: {bits: 4}}"
        ),
    )
    x = images(8, seed=1)
    for found, expected in zip(bs.deploy(q)(x), q(x)):
        assert float((found - expected).abs().max()) <= float(expected.abs().max()) * 1e-4
