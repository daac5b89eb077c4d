"""Run the exported file in an independent engine and hold it against integer executor and simulation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, fx

from ..capture.inputs import Arguments, positional, sample_count
from ..capture.ops import op_of, quantizer_of
from ..errors import VerificationError
from ..grid import FloatFormat, IntFormat
from ..model import QuantizedModel
from ..targets import Target
from .certificate import Certificate, OutputComparison, judge, judge_contract
from .engines import Engine, EngineName, companion_files, engine_for, engine_of, open_verifiable

if TYPE_CHECKING:
    from ..dynamic import DynamicModel


@dataclass(frozen=True)
class Bounds:
    """How far a file may be from the executor, in LSB of its outputs: at most, and on average."""

    largest: float
    mean: float


# Sums in another order differ in the last bit of a float. Where codes follow, that moves some across a tie.
ROUNDING = Bounds(1.0, 0.02)  # no code of 8 bits or less follows: float noise alone
TIES = Bounds(8.0, 0.15)
SMALL_FLOAT_TIES = Bounds(16.0, 0.4)  # a step of FP8 is up to an eighth of the value
_PASSIVE = {"reshape", "transpose", "slice", "getitem", "max_pool", "pad", "resize_nearest"}


def verify(
    q: QuantizedModel | DynamicModel, path: str | Path, inputs: Any, *, engine: EngineName | None = None,
    max_lsb: float | None = None, progress: Callable[[int, int, str], None] | None = None,
) -> Certificate:  # fmt: skip
    """Hold an exported file against the model it came from, on ``inputs`` (batches, as for calibration).

    ``max_lsb`` overrides the difference that is allowed: 0 where the target's law is known for every operator of
    the model, else ``Bounds`` by what follows the operators that the runtime computes in float. The certificate says
    whether it passed; nothing is raised for a difference, only for a file that cannot be run.
    """
    q = q.captured()
    runtime = open_verifiable(path, engine_of(path, engine, engine_for(q.target.engine)))
    batches = _batches(q, inputs)
    executor, comparison = q.integer_executor(), _Comparison(q, runtime)
    for done, batch in enumerate(batches):
        if progress is not None:
            progress(done, len(batches), "verifying the file")
        comparison.add(batch, executor)
    return certify(q, Path(path), runtime, comparison.outputs(), comparison.samples, comparison.top1(), max_lsb)


def _batches(q: QuantizedModel, inputs: Any) -> list[Arguments]:
    """A tensor, tuple or dict is one batch; any other iterable holds batches, whose labels are left out."""
    if isinstance(inputs, Tensor | tuple | Mapping):
        inputs = [inputs]
    count = q.graph.graph._codegen.pytree_info.in_spec.child(0).num_children  # type: ignore[attr-defined]
    batches: list[Arguments] = []
    for batch in inputs:
        if isinstance(batch, Mapping):
            batches.append(positional(q.signature, (), dict(batch)))
        else:
            batches.append(((batch,) if isinstance(batch, Tensor) else tuple(batch)[:count], {}))
    if not batches:
        raise VerificationError("there are no inputs to verify with: give at least one batch")
    return batches


def certify(
    q: QuantizedModel, path: Path, runtime: Engine, outputs: list[OutputComparison], samples: int,
    top1: float | None, max_lsb: float | None = None,
) -> Certificate:  # fmt: skip
    """The certificate of measured differences."""
    floats = float_operators(q)
    exact = q.target.exact and runtime.name == q.target.engine and not floats and not runtime.float_compute_kernels
    bounds = Bounds(0.0, 0.0) if exact else _bounds(q, runtime)
    if max_lsb is not None:
        bounds = Bounds(max_lsb, max_lsb)
    passed, verdict = judge(outputs, floats or list(runtime.float_compute_kernels), exact, bounds.largest, bounds.mean)
    contract = check_contract(q.target, path)
    passed, verdict = judge_contract(contract, passed, verdict)
    return Certificate(
        file=path.name, sha256=file_digest(path), companions=companion_digests(path, runtime.name),
        engine=runtime.name, engine_version=runtime.version,
        target=q.target.name, recipe=q.recipe.name, samples=samples, outputs=outputs, top1_agreement=top1,
        coverage=q.report.coverage.fraction, integer_kernels=runtime.integer_kernels,
        float_compute_kernels=runtime.float_compute_kernels, float_operators=floats,
        file_bytes=file_bytes(path), float_bytes=float_bytes(q), allowed_max_lsb=bounds.largest,
        allowed_mean_lsb=bounds.mean, contract=contract, passed=passed, verdict=verdict,
    )  # fmt: skip


def check_contract(target: Target, path: Path) -> list[str]:
    """What the target's own import would refuse in an ONNX file."""
    if target.tidl is None or path.suffix != ".onnx":
        return []
    from ..targets.tidl_contract import check_tidl

    return check_tidl(path, target.tidl)


def _bounds(q: QuantizedModel, runtime: Engine) -> Bounds:
    """The bounds where the runtime computes something in float, or rounds as it likes."""
    activations = q.recipe.activations
    if activations is not None and isinstance(activations.format, FloatFormat):
        return SMALL_FLOAT_TIES
    if any(str(n.target).startswith("bitsmith.dynamic") and "float" not in n.args for n in q.graph.graph.nodes):
        return TIES
    floats = set(_float_nodes(q))
    unknown = (
        not q.target.exact or runtime.name != q.target.engine or bool(runtime.float_compute_kernels and not floats)
    )
    tainted: set[fx.Node] = set()
    for node in q.graph.graph.nodes:
        if not (node in floats or any(source in tainted for source in node.all_input_nodes)):
            continue
        tainted.add(node)
        grid = quantizer.grid if (quantizer := quantizer_of(node)) is not None else None
        if grid is not None and grid.format.bits <= 8:
            return TIES
    return TIES if unknown else ROUNDING


def float_operators(q: QuantizedModel) -> list[str]:
    """Operators with arithmetic that the target computes in float, where no law holds to the bit."""
    return [str(node.target) if node.op == "call_module" else node.name for node in _float_nodes(q)]


def _float_nodes(q: QuantizedModel) -> list[fx.Node]:
    return [
        node
        for node, kernel in q.program.kernels.items()
        if kernel in ("float", "fake_quantize")
        and node.op in ("call_function", "call_module")
        and op_of(node).name not in _PASSIVE
        and quantizer_of(node) is None
        and any(isinstance(leaf, Tensor) for leaf in torch.utils._pytree.tree_leaves(node.meta.get("val")))
    ]


def flat_inputs(batch: Arguments) -> list[Tensor]:
    """The tensors of a batch in the order of the file's inputs."""
    leaves: Iterable[Any] = torch.utils._pytree.tree_leaves(batch)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def feeds_for(runtime: Engine, tensors: list[Tensor], names: list[str]) -> dict[str, Any]:
    """Arrays by the file's input names; inputs that the file has no use for are left out."""
    by_name = dict(zip(names, tensors))
    missing = [name for name in runtime.inputs if name not in by_name]
    if missing:
        raise VerificationError(f"the file has inputs {runtime.inputs}, the model {names}: {missing} cannot be fed")
    return {name: np.ascontiguousarray(by_name[name].detach().cpu().numpy()) for name in runtime.inputs}


def input_names(q: QuantizedModel) -> list[str]:
    """The names under which the model's tensors enter an exported file."""
    nodes = q.graph.graph.find_nodes(op="placeholder")
    return [str(node.target) for node in nodes if isinstance(node.meta.get("val"), Tensor)]


class _Comparison:
    """Differences summed over batches."""

    def __init__(self, q: QuantizedModel, runtime: Engine) -> None:
        self.q, self.runtime = q, runtime
        self.names = input_names(q)
        self.samples = 0
        self._file: list[list[Tensor]] = []
        self._integer: list[list[Tensor]] = []
        self._simulation: list[list[Tensor]] = []

    def add(self, batch: Arguments, executor: Any) -> None:
        """Run one batch through all three."""
        args, kwargs = batch
        self._integer.append(_leaves(executor(*args, **kwargs)))
        self._simulation.append(_leaves(self.q(*args, **kwargs)))
        feeds = feeds_for(self.runtime, flat_inputs(batch), self.names)
        self._file.append([torch.from_numpy(np.asarray(array)) for array in self.runtime.run(feeds)])
        self.samples += sample_count(batch)

    def outputs(self) -> list[OutputComparison]:
        """One comparison per output."""
        output = next(n for n in self.q.graph.graph.nodes if n.op == "output")
        nodes = [n for n in torch.utils._pytree.tree_leaves(output.args[0]) if hasattr(n, "meta")]
        names = self.runtime.outputs
        if len(names) != len(self._simulation[0]):
            raise VerificationError(f"the file has outputs {names}, the model {len(self._simulation[0])} of them")
        return [self._compare(index, name, nodes[index]) for index, name in enumerate(names)]

    def _compare(self, index: int, name: str, node: Any) -> OutputComparison:
        file, integer, simulation = (
            torch.cat([batch[index].flatten().double() for batch in stream])
            for stream in (self._file, self._integer, self._simulation)
        )
        quantizer = quantizer_of(node)
        grid = quantizer.grid if quantizer is not None else None
        if grid is not None and isinstance(grid.format, IntFormat):
            lsb = float(grid.scale)
        else:
            lsb = float(simulation.max() - simulation.min()) / 255 or 1.0
        return compare_output(name, lsb, file, integer, simulation)

    def top1(self) -> float | None:
        """Agreement of the largest score, where the first output is a table of scores."""
        if any(batch[0].ndim != 2 or batch[0].shape[1] < 2 for batch in self._simulation):
            return None
        same = [(f[0].argmax(1) == s[0].argmax(1)) for f, s in zip(self._file, self._simulation)]
        return float(torch.cat(same).double().mean())


def compare_output(name: str, lsb: float, file: Tensor, integer: Tensor, simulation: Tensor) -> OutputComparison:
    """Differences of one output in LSBs."""
    if not file.shape == integer.shape == simulation.shape:
        raise VerificationError(
            f"output {name!r} of the file has {file.numel()} elements, the model's {simulation.numel()}"
        )
    if not bool(file.isfinite().all()):
        raise VerificationError(f"output {name!r} of the file holds NaN or infinite values")
    against_integer, against_simulation = (file - integer).abs() / lsb, (file - simulation).abs() / lsb
    return OutputComparison(
        name=name, lsb=lsb, elements=file.numel(),
        max_file_vs_integer=float(against_integer.max()), mean_file_vs_integer=float(against_integer.mean()),
        max_file_vs_simulation=float(against_simulation.max()),
        mean_file_vs_simulation=float(against_simulation.mean()),
        max_integer_vs_simulation=float(((integer - simulation).abs() / lsb).max()),
        equal_fraction=float((file == integer).double().mean()),
    )  # fmt: skip


def _leaves(outputs: Any) -> list[Tensor]:
    return [leaf.detach().cpu() for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def companion_digests(path: Path, engine: str) -> dict[str, str]:
    """SHA-256 of the files that belong to the one at ``path``, by name."""
    return {file.name: file_digest(file) for file in companion_files(path, engine)}


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_bytes(path: Path) -> int:
    """Size of a file with its external data."""
    external = path.with_name(path.name + ".data")
    return path.stat().st_size + (external.stat().st_size if external.is_file() else 0)


def float_bytes(q: QuantizedModel) -> int:
    """Bytes of the float parameters, each counted once."""
    if "float_bytes" in q.graph.meta:
        return int(q.graph.meta["float_bytes"])
    unique = {id(p): p.numel() * p.element_size() for p in q.graph.parameters()}
    return sum(unique.values())
