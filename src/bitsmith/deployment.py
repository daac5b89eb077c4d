"""Running the integers: a quantized model or its file behind an engine, called like the model."""

from __future__ import annotations

import warnings
import weakref
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .errors import BitsmithError, DataError, ExportError
from .model import QuantizedModel
from .verify.engines import Engine, EngineName, open_engine, script_engine
from .verify.verify import input_names

if TYPE_CHECKING:
    from .dynamic import DynamicModel
    from .dynamic.torch_kernels import TorchDeployed
    from .evaluate.latency import Latency

ENGINES: tuple[EngineName, ...] = ("onnxruntime", "openvino", "torch")


class Deployed:
    """A model loaded into a runtime. Takes and returns tensors; ``engine`` says what runs it.

    ``module`` is there for engine ``torch``: the quantized layers, as they print. ``timings`` is there for engine
    ``auto``: what each engine took. ``note`` says where the engine rounds otherwise than the simulation. Engines of
    files see detached copies of the inputs.
    """

    def __init__(
        self, engine: Engine, folder: TemporaryDirectory[str] | None = None, model: QuantizedModel | None = None,
        module: nn.Module | None = None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.model = model
        self.module = module
        self.timings: dict[str, Latency] = {}
        self.note = "" if model is None else _rounding(model, engine.name)
        if folder is not None:  # holds the file for as long as the runtime may read it
            weakref.finalize(self, folder.cleanup)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in the model's own structure; of a file alone a tensor, or a tuple of tensors."""
        if self.model is not None:
            args, kwargs = self.model.arguments(args, kwargs)
            names = input_names(self.model)
            values = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            tensors = {n: t for n, t in zip(names, values) if n in self.engine.inputs}
        else:
            tensors = self._by_name(args, kwargs)
        outputs = self._run(tensors)
        if self.model is not None:
            return self.model.restructure(outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _run(self, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if self.engine.call is not None:
            results = self.engine.call(*(tensors[name].detach() for name in self.engine.inputs))
            return results if isinstance(results, tuple) else (results,)
        feeds = {name: np.ascontiguousarray(t.detach().cpu().numpy()) for name, t in tensors.items()}
        return tuple(torch.from_numpy(np.asarray(array)) for array in self.engine.run(feeds))

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Positional tensors in the order of the file's inputs, the others by name."""
        values = [t for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)]
        free = [name for name in self.engine.inputs if name not in kwargs]
        if len(values) != len(free) or not kwargs.keys() <= set(self.engine.inputs):
            named = f" ({', '.join(kwargs)} by name)" if kwargs else ""
            count = len(values) + len(kwargs)
            raise DataError(f"the file has inputs {self.engine.inputs}, but {count} tensors were given{named}")
        return {**dict(zip(free, values)), **kwargs}

    def __repr__(self) -> str:
        text = f"Deployed({self.engine.name} {self.engine.version}, inputs={self.engine.inputs})"
        if self.note:
            text += f"\nnote: {self.note}"
        if self.timings:
            text += "\nfastest of " + ", ".join(f"{n} {t.median_ms:.3g} ms" for n, t in self.timings.items())
        if self.module is not None:
            layers = "\n".join(f"  ({name}): {layer}" for name, layer in self.module.named_children())
            text += f"\n{layers}"
        return text


def deploy(
    q: QuantizedModel | DynamicModel | str | Path, engine: EngineName | Literal["auto"] | None = None, *,
    threads: int | None = None, inputs: Any = None,
) -> Deployed | TorchDeployed:  # fmt: skip
    """A callable that runs the quantized model, or an exported file, in ``engine``.

    ``"onnxruntime"`` and ``"openvino"`` run the ONNX file, weights of few bits in bytes; ``"torch"`` runs PyTorch's
    own int8 kernels. ``"auto"`` times those that are installed on ``inputs`` (default: one made-up sample; for a
    dynamic model the inputs that it was first called with) for about a second and takes the fastest; the answer's
    ``engine.name`` and ``timings`` say which. None is onnxruntime, or what reads the file.

    ``"ai8x"`` runs the checkpoint of a MAX78000. Dynamic models run on ``"torch"`` on the threads that torch has.

    Engines round alike only where a target's law says so: quantize for the target that is going to run the model. An
    engine that rounds otherwise than the simulation is warned of.

    >>> import bitsmith as bs
    >>> q = bs.quantize(torch.nn.Linear(4, 2), [torch.randn(32, 4)])
    >>> x = torch.randn(3, 4)
    >>> bool((deploy(q)(x) == q(x)).all())
    True
    """
    if engine not in (None, "auto", "ai8x", *ENGINES):
        raise DataError(f"engine={engine!r} is not known: choose 'onnxruntime', 'openvino', 'torch', 'ai8x' or 'auto'")
    if inputs is not None and engine != "auto":
        raise DataError("inputs are what engine='auto' measures with: leave them out, or choose 'auto'")
    if isinstance(q, str | Path):
        if engine == "auto":
            raise DataError("engine='auto' takes a quantized model: a file has the engine it was written for")
        return Deployed(open_engine(q, engine, threads))
    deployed = _fastest(q, threads, inputs) if engine == "auto" else _deploy(q, engine or "onnxruntime", threads)
    if isinstance(deployed, Deployed) and deployed.note:
        warnings.warn(deployed.note, stacklevel=2)
    return deployed


def _deploy(q: QuantizedModel | DynamicModel, engine: EngineName, threads: int | None) -> Deployed | TorchDeployed:
    if engine == "torch" and q.recipe.placement == "dynamic":
        from .dynamic.torch_kernels import TorchDeployed

        return TorchDeployed(q)  # type: ignore[arg-type]
    q = q.captured()
    return _deploy_torch(q, threads) if engine == "torch" else _deploy_file(q, engine, threads)


def _deploy_file(q: QuantizedModel, engine: EngineName, threads: int | None) -> Deployed:
    from .export import export_ai8x, export_onnx

    folder = TemporaryDirectory(prefix="bitsmith-deploy-")
    if engine == "ai8x":
        path = export_ai8x(q, Path(folder.name) / "model.pth.tar")
    else:
        style: Literal["qdq", "qcdq"] = "qcdq" if _needs_clip(q) else "qdq"
        # nobody keeps this file: in bytes, onnxruntime computes with codes of 4 bits in integers
        path = export_onnx(q, Path(folder.name) / "model.onnx", style=style, pack_int4=False)
    return Deployed(open_engine(path, engine, threads), folder, q)


def _deploy_torch(q: QuantizedModel, threads: int | None) -> Deployed:
    from .engines import build_torch, freeze, repacked, script

    module = build_torch(q)
    scripted = script(module, q)
    if all(getattr(layer, "repacks_alike", True) for layer in module.children()):
        scripted = repacked(scripted)
    return Deployed(script_engine(freeze(scripted), threads), None, q, module)


def _fastest(q: QuantizedModel | DynamicModel, threads: int | None, inputs: Any) -> Deployed | TorchDeployed:
    """The fastest of the engines that are installed and take the model."""
    from .evaluate.latency import interleaved_latency

    candidates: dict[str, Deployed | TorchDeployed] = {}
    reasons: list[str] = []
    for name in ENGINES:
        try:
            candidates[name] = _deploy(q, name, threads)
        except BitsmithError as error:
            reasons.append(f"{name}: {error}")
    if not candidates:
        raise ExportError("no engine takes this model: " + "; ".join(reasons))
    args, kwargs = _example(q) if inputs is None else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    runs = {name: partial(candidate, *args, **kwargs) for name, candidate in candidates.items()}
    timings = interleaved_latency(runs, seconds=1.0)
    best = candidates[min(timings, key=lambda name: timings[name].median_ms)]
    best.timings = timings
    return best


def _example(q: QuantizedModel | DynamicModel) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What to call a model with: for a dynamic one the inputs that its graph is made from."""
    from .engines import example_inputs

    if q.recipe.placement == "dynamic" and not isinstance(q, QuantizedModel):
        if q.example_inputs is None:
            raise DataError(
                "engine='auto' must run the model, whose inputs are not known yet: run it once, or pass inputs"
            )
        return q.example_inputs
    q = q.captured()
    spec: Any = q.graph.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    args, kwargs = torch.utils._pytree.tree_unflatten(list(example_inputs(q, 1)), spec)
    return args, kwargs


def _rounding(q: QuantizedModel, engine: str) -> str:
    """What to know of a model that an engine runs by other rounding than that it was simulated with."""
    if engine == q.target.engine:
        return ""
    return (
        f"simulated for target {q.target.name!r}; engine {engine!r} rounds otherwise, so that some codes differ from "
        f"the simulation's by a step: quantize with target={engine!r} for a simulation that is what runs"
    )


def _needs_clip(q: QuantizedModel) -> bool:
    """Whether an activation is narrower than the type that stores it."""
    from .grid import IntFormat, Quantizer

    quantizers = getattr(q.graph, "quantizers", torch.nn.Module()).modules()
    formats = [m.format for m in quantizers if isinstance(m, Quantizer)]
    return any(isinstance(f, IntFormat) and f.bits not in (8, 16) for f in formats)
