"""Dynamic quantization on real sequence models, beside onnxruntime's and torch.ao's own.

    python -m benchmarks.dynamic accuracy [--nets silero charlstm minilm] [--csv rows.csv]
    python -m benchmarks.dynamic latency [--nets lstm encoder charlstm minilm] [--csv rows.csv]

Accuracy runs the deployed files at batch 1, as such models are served; `--recipe` names another one. Latency is
interleaved as in `benchmarks.latency`; its baseline is the faster of the rivals, onnxruntime's `quantize_dynamic`
(signed weights, of the file that `torch.onnx.export` wrote, per tensor and per channel) and torch.ao's.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import math
import tempfile
import time
import warnings
import wave
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import bitsmith as bs
from benchmarks.data import data_file
from benchmarks.latency import interleave
from benchmarks.nets.char_lstm import CharLSTM
from benchmarks.nets.sentence_encoder import SentenceEncoder
from benchmarks.nets.silero_vad import CHUNK, CONTEXT, SileroVAD
from benchmarks.rows import append

THREADS = 2
Model = Callable[..., Any]


@dataclass(frozen=True)
class Accuracy:
    """One line of the accuracy table; `difference` is to the float model."""

    net: str
    checkpoint: str
    variant: str
    measure: str
    value: float
    difference: float
    samples: int
    megabytes: float
    seconds: float


@dataclass(frozen=True)
class Latency:
    """One line of the latency table; `ratio` is to the fastest rival, above 1 is faster."""

    net: str
    variant: str
    input_shape: str
    threads: int
    median_ms: float
    min_ms: float
    ratio: float
    baseline: str
    megabytes: float


def load(model: nn.Module, checkpoint: str) -> nn.Module:
    """The trained model in eval mode; `pooler.*`, which sentence vectors do not use, is left out."""
    weights = {k: v.float() for k, v in load_file(data_file(checkpoint)).items() if not k.startswith("pooler.")}
    model.load_state_dict(weights)
    return model.eval()


def speech() -> Tensor:
    """The 937 chunks of 30 s of speech, each behind the 64 samples before it: `(937, 1, 576)`."""
    with wave.open(str(data_file("silero_test_30s.wav"))) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), np.int16).astype(np.float32) / 32768
    padded = np.concatenate([np.zeros(CONTEXT, np.float32), samples])
    count = len(samples) // CHUNK
    chunks = [padded[i * CHUNK : i * CHUNK + CHUNK + CONTEXT] for i in range(count)]
    return torch.from_numpy(np.stack(chunks)).unsqueeze(1)


def voice(model: Model) -> Tensor:
    """The probability of voice in each chunk, the state carried from one to the next."""
    h = c = torch.zeros(1, 128)
    found = []
    for chunk in speech():
        p, h, c = model(chunk, h, c)
        found.append(p)
    return torch.cat(found)


def bits_per_character(model: Model, size: int) -> tuple[float, int]:
    """Mean -log2 of the probability of the right next character, in batches of `size`."""
    with np.load(data_file("charlstm_eval.npz")) as file:
        x, y = (torch.from_numpy(file[k].astype(np.int64)) for k in ("x", "y"))
    total = sum(float(F.cross_entropy(model(a), b, reduction="sum")) for a, b in zip(x.split(size), y.split(size)))
    return total / len(y) / math.log(2), len(y)


def sentence_vectors(model: Model) -> tuple[Tensor, Tensor]:
    """The unit vectors of both sides of the STS-B test pairs, one sentence a time."""
    with np.load(data_file("stsb_minilm_tokens.npz")) as file:
        sides = [file[f"test_{side}"].astype(np.int64) for side in "ab"]
    a, b = (torch.cat([model(torch.from_numpy(row[row > 0])[None]) for row in side]) for side in sides)
    return a, b


def sentence_spearman(a: Tensor, b: Tensor) -> tuple[float, int]:
    """100 x Spearman's rank correlation of the pairs' cosine and human score."""
    with np.load(data_file("stsb_minilm_tokens.npz")) as file:
        scores = file["test_score"]
    return 100 * spearman((a * b).sum(1).numpy(), scores), len(scores)


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Rank correlation, equal values sharing their mean rank.

    >>> spearman(np.array([1.0, 2.0, 3.0]), np.array([10.0, 30.0, 20.0]))
    0.5
    """

    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return round(float(np.corrcoef(ranks(x), ranks(y))[0, 1]), 12)


def _accuracy_silero(recipe: str) -> Iterator[Accuracy]:
    checkpoint = "silero_vad_16k.safetensors"
    net = load(SileroVAD(), checkpoint)
    with torch.inference_mode():
        exact = voice(net)
    example = (torch.zeros(1, CHUNK + CONTEXT), torch.zeros(1, 128), torch.zeros(1, 128))
    for variant, model, size in variants(net, recipe, example):
        start = time.perf_counter()
        with torch.inference_mode():
            found = voice(model)
        seconds = time.perf_counter() - start
        same = float(((found > 0.5) == (exact > 0.5)).double().mean() * 100)
        difference = float((found - exact).abs().mean())
        yield Accuracy(
            "silero", checkpoint, variant, "% same decision; mean |dp|", same, difference, len(exact), size, seconds
        )


def _accuracy_charlstm(recipe: str) -> Iterator[Accuracy]:
    checkpoint = "charlstm_textgenrnn.safetensors"
    net = load(CharLSTM(), checkpoint)
    with torch.inference_mode():
        exact, _ = bits_per_character(net, 500)
    for variant, model, size in variants(net, recipe, (torch.ones(1, 40, dtype=torch.int64),)):
        start = time.perf_counter()
        with torch.inference_mode():
            found, samples = bits_per_character(model, 500 if variant == "float" else 1)
        seconds = time.perf_counter() - start
        yield Accuracy("charlstm", checkpoint, variant, "bits/char", found, found - exact, samples, size, seconds)


def _accuracy_minilm(recipe: str) -> Iterator[Accuracy]:
    checkpoint = "minilm_l6_v2_fp16.safetensors"
    net = load(SentenceEncoder(), checkpoint)
    exact: tuple[Tensor, Tensor] | None = None
    for variant, model, size in variants(net, recipe, (torch.randint(1, 3000, (1, 12)),)):
        start = time.perf_counter()
        with torch.inference_mode():
            vectors = sentence_vectors(model)
        seconds = time.perf_counter() - start
        exact = vectors if exact is None else exact
        found, samples = sentence_spearman(*vectors)
        difference = found - sentence_spearman(*exact)[0]
        apart = 1 - float(torch.cat([x * y for x, y in zip(vectors, exact)]).double().sum(1).mean())
        for measure, value, against in (("100 x Spearman", found, difference), ("1 - cosine to float", apart, apart)):
            yield Accuracy("minilm", checkpoint, variant, measure, value, against, samples, size, seconds)


def variants(net: nn.Module, recipe: str, example: tuple[Tensor, ...]) -> Iterator[tuple[str, Model, float]]:
    """The float model and what is made of it: Bitsmith in each engine, onnxruntime's own file; with megabytes."""
    bytes_of = sum(p.numel() * p.element_size() for p in net.parameters())
    yield "float", net, bytes_of / 1e6
    q = bs.quantize_dynamic(net, recipe, example_inputs=example)
    with tempfile.TemporaryDirectory() as folder:
        path = bs.export_onnx(q, Path(folder, "ours.onnx"))
        yield f"bitsmith {recipe} onnxruntime", bs.deploy(q, threads=torch.get_num_threads()), _megabytes(path)
    with tempfile.TemporaryDirectory() as folder:
        q = bs.quantize_dynamic(net, recipe, target="torch")
        bs.save(q, folder)
        yield (
            f"bitsmith {recipe} torch",
            bs.deploy(q, engine="torch"),
            _megabytes(Path(folder, "quantized.safetensors")),
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            for name, path in onnxruntime_files(net, example, Path(folder)):
                yield name, bs.deploy(path, threads=torch.get_num_threads()), _megabytes(path)
        except Exception as error:  # torch's, onnx's and onnxruntime's own families
            print(f"onnxruntime's quantize_dynamic fails on {type(net).__name__}: {str(error).splitlines()[0]}")


def onnxruntime_files(net: nn.Module, example: tuple[Tensor, ...], folder: Path) -> Iterator[tuple[str, Path]]:
    """onnxruntime's `quantize_dynamic` with signed weights, per tensor and per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = folder / "float.onnx"
    axes: Any = None
    names = [f"x{i}" for i in range(len(example))]
    if example[0].dtype == torch.int64:
        axes = {names[0]: {1: "length"}}
    export = partial(torch.onnx.export, copy.deepcopy(net).eval(), example, str(source), input_names=names)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        try:  # the older exporter's files are those whose LSTM onnxruntime's tool quantizes
            export(dynamo=False, opset_version=17, dynamic_axes=axes)
        except torch.onnx.errors.OnnxExporterError:
            export(dynamo=True, opset_version=18, verbose=False)
    logging.getLogger().setLevel(logging.ERROR)
    for per_channel in (False, True):
        path = folder / f"theirs-{per_channel}.onnx"
        quantize_dynamic(str(source), str(path), per_channel=per_channel, weight_type=QuantType.QInt8)
        yield f"onnxruntime per {'channel' if per_channel else 'tensor'}", path


def _megabytes(path: Path) -> float:
    return path.stat().st_size / 1e6


class _LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(512, 512, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
    net = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False).eval()
    for p in net.parameters():  # else all layers are copies of one, and its weights stay in the cache
        if p.ndim > 1:
            nn.init.xavier_uniform_(p)
    return net


def _timed(name: str) -> tuple[nn.Module, list[tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    if name == "lstm":
        return _LSTM().eval(), [(torch.randn(1, 50, 512),)]
    if name == "encoder":
        return _encoder(), [(torch.randn(1, 128, 512),)]
    if name == "charlstm":
        return load(CharLSTM(), "charlstm_textgenrnn.safetensors"), [(torch.randint(1, 400, (1, 40)),)]
    net = load(SentenceEncoder(), "minilm_l6_v2_fp16.safetensors")
    return net, [(torch.randint(1000, 3000, (1, length)),) for length in (16, 32, 128)]


def latency(name: str, rounds: int, seconds: float) -> list[Latency]:
    """All variants of one network, side by side."""
    torch.backends.mha.set_fastpath_enabled(False)  # torch.ao's encoder and the older exporter fail on it
    net, inputs = _timed(name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        built = list(_sessions(net, inputs[0], folder))
        rows = []
        for x in inputs:
            runs = [partial(run, *x) for _, run, _ in built]
            visits = interleave(runs, rounds, seconds)
            rivals = [i for i, (label, _, _) in enumerate(built) if label.startswith(("onnxruntime", "torch.ao"))]
            best = min(rivals, key=lambda i: median(visits[i]))
            for (label, _, size), found in zip(built, visits):
                ratio = median(b / v for b, v in zip(visits[best], found))
                shape = "x".join(map(str, x[0].shape))
                rows.append(
                    Latency(
                        name, label, shape, THREADS, round(median(found), 4), round(min(found), 4), round(ratio, 4),
                        built[best][0], round(size, 3),
                    )
                )  # fmt: skip
    return rows


def _sessions(net: nn.Module, x: tuple[Tensor, ...], folder: Path) -> Iterator[tuple[str, Callable[..., Any], float]]:
    import torch.ao.quantization as ao

    size = sum(p.numel() * p.element_size() for p in net.parameters()) / 1e6
    for label, recipe in (("bitsmith onnxruntime", "int8-dynamic"), ("bitsmith per tensor", "int8-dynamic-tensor")):
        q = bs.quantize_dynamic(net, recipe, example_inputs=x)
        ours = bs.export_onnx(q, folder / f"{recipe}.onnx")
        yield label, _session(ours), _megabytes(ours)
    yield "bitsmith torch", bs.deploy(bs.quantize_dynamic(net, target="torch"), engine="torch"), _megabytes(ours)
    for label, path in onnxruntime_files(net, x, folder):
        yield label, _session(path), _megabytes(path)
    for backend in ("x86", "fbgemm"):
        torch.backends.quantized.engine = backend
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield f"torch.ao {backend}", torch.inference_mode()(ao.quantize_dynamic(net)), size / 4
    yield "torch float", torch.inference_mode()(net), size


def _session(path: Path) -> Callable[..., Any]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    return lambda *tensors: session.run(None, {n: t.numpy() for n, t in zip(names, tensors)})


ACCURACY = {"silero": _accuracy_silero, "charlstm": _accuracy_charlstm, "minilm": _accuracy_minilm}
LATENCY = ("lstm", "encoder", "charlstm", "minilm")


def main(argv: list[str] | None = None) -> None:
    """Print the rows as they are measured; `--csv` appends them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("accuracy", "latency"))
    parser.add_argument("--nets", nargs="+", choices=sorted({*ACCURACY, *LATENCY}))
    parser.add_argument("--recipe", default="int8-dynamic")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=0.15, help="measured time of one visit")
    parser.add_argument("--csv", type=Path, help="append the rows to this file")
    args = parser.parse_args(argv)
    table = ACCURACY if args.what == "accuracy" else LATENCY
    for name in args.nets or table:
        found = ACCURACY[name](args.recipe) if args.what == "accuracy" else latency(name, args.rounds, args.seconds)
        for row in found:
            print(row, flush=True)
            if args.csv:
                values = {k: round(v, 5) if isinstance(v, float) else v for k, v in asdict(row).items()}
                append(args.csv, list(values), values)


if __name__ == "__main__":
    main()
