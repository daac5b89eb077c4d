"""Running the integers: a quantized model or its file behind an engine, called like the model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .model import QuantizedModel
from .verify.engines import Engine, EngineName, open_engine
from .verify.verify import input_names

if TYPE_CHECKING:
    from .dynamic import DynamicModel
    from .dynamic.torch_kernels import TorchDeployed


class Deployed:
    """A file loaded into a runtime. Takes and returns tensors; ``engine`` says what runs it."""

    def __init__(
        self, engine: Engine, folder: TemporaryDirectory[str] | None = None, model: QuantizedModel | None = None
    ) -> None:
        self.engine = engine
        self.model = model
        self._folder = folder  # holds the file for as long as the runtime may read it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs in the model's own structure; of a file alone a tensor, or a tuple of tensors."""
        if self.model is not None:
            args, kwargs = self.model.arguments(args, kwargs)
            names = input_names(self.model)
            values = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            tensors = {n: t for n, t in zip(names, values) if n in self.engine.inputs}
        else:
            tensors = self._by_name(args, kwargs)
        feeds = {name: np.ascontiguousarray(t.detach().cpu().numpy()) for name, t in tensors.items()}
        outputs = tuple(torch.from_numpy(np.asarray(array)) for array in self.engine.run(feeds))
        if self.model is not None:
            return self.model.restructure(outputs)
        return outputs[0] if len(outputs) == 1 else outputs

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
        return f"Deployed({self.engine.name} {self.engine.version}, inputs={self.engine.inputs})"


def deploy(
    q: QuantizedModel | DynamicModel | str | Path, engine: EngineName | Literal["torch"] = "onnxruntime", *,
    threads: int | None = None,
) -> Deployed | TorchDeployed:  # fmt: skip
    """A callable that runs the quantized model, or an exported file, in ``engine``.

    ``torch`` runs models of ``quantize_dynamic``, on the threads that torch has.

    >>> import bitsmith as bs
    >>> q = bs.quantize(torch.nn.Linear(4, 2), [torch.randn(32, 4)])
    >>> x = torch.randn(3, 4)
    >>> bool((deploy(q)(x) == q(x)).all())
    True
    """
    if engine == "torch" and not isinstance(q, str | Path) and q.recipe.placement == "dynamic":
        from .dynamic.torch_kernels import TorchDeployed

        return TorchDeployed(q)  # type: ignore[arg-type]
    if engine not in ("onnxruntime", "openvino", "ai8x"):
        raise DataError(f"engine={engine!r} is not known: choose 'onnxruntime', 'openvino' or 'ai8x'")
    if isinstance(q, str | Path):
        return Deployed(open_engine(q, engine, threads))
    from .export import export_ai8x, export_onnx

    q = q.captured()
    folder = TemporaryDirectory(prefix="bitsmith-deploy-")
    if engine == "ai8x":
        path = export_ai8x(q, Path(folder.name) / "model.pth.tar")
        return Deployed(open_engine(path, engine, threads), folder, q)
    path = export_onnx(q, Path(folder.name) / "model.onnx", style="qcdq" if _needs_clip(q) else "qdq")
    return Deployed(open_engine(path, engine, threads), folder, q)


def _needs_clip(q: QuantizedModel) -> bool:
    """Whether an activation is narrower than the type that stores it."""
    from .grid import IntFormat, Quantizer

    quantizers = getattr(q.graph, "quantizers", torch.nn.Module()).modules()
    formats = [m.format for m in quantizers if isinstance(m, Quantizer)]
    return any(isinstance(f, IntFormat) and f.bits not in (8, 16) for f in formats)
