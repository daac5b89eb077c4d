"""Running the integers: a quantized model or its file behind an engine, called like the model."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import DataError
from .model import QuantizedModel
from .verify.engines import Engine, EngineName, open_engine


class Deployed:
    """A file loaded into a runtime. Takes and returns tensors; ``engine`` says what runs it."""

    def __init__(self, engine: Engine, folder: TemporaryDirectory[str] | None = None) -> None:
        self.engine = engine
        self._folder = folder  # holds the file for as long as the runtime may read it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Outputs as a tensor, or a tuple of tensors where the file has several."""
        tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if len(tensors) != len(self.engine.inputs):
            raise DataError(f"the file has inputs {self.engine.inputs}, but {len(tensors)} tensors were given")
        feeds = {n: np.ascontiguousarray(t.detach().cpu().numpy()) for n, t in zip(self.engine.inputs, tensors)}
        outputs = tuple(torch.from_numpy(np.asarray(array)) for array in self.engine.run(feeds))
        return outputs[0] if len(outputs) == 1 else outputs

    def __repr__(self) -> str:
        return f"Deployed({self.engine.name} {self.engine.version}, inputs={self.engine.inputs})"


def deploy(
    q: QuantizedModel | str | Path, engine: EngineName = "onnxruntime", *, threads: int | None = None
) -> Deployed:
    """A callable that runs the quantized model, or an exported file, in ``engine``.

    >>> import bitsmith as bs
    >>> q = bs.quantize(torch.nn.Linear(4, 2), [torch.randn(32, 4)])
    >>> x = torch.randn(3, 4)
    >>> bool((deploy(q)(x) == q(x)).all())
    True
    """
    if engine not in ("onnxruntime", "openvino"):
        raise DataError(f"engine={engine!r} is not known: choose 'onnxruntime' or 'openvino'")
    if not isinstance(q, QuantizedModel):
        return Deployed(open_engine(q, engine, threads))
    from .export import export_onnx

    folder = TemporaryDirectory(prefix="bitsmith-deploy-")
    path = export_onnx(q, Path(folder.name) / "model.onnx", style="qcdq" if _needs_clip(q) else "qdq")
    return Deployed(open_engine(path, engine, threads), folder)


def _needs_clip(q: QuantizedModel) -> bool:
    """Whether an activation is narrower than the type that stores it."""
    from .grid import IntFormat, Quantizer

    quantizers = getattr(q.graph, "quantizers", torch.nn.Module()).modules()
    formats = [m.format for m in quantizers if isinstance(m, Quantizer)]
    return any(isinstance(f, IntFormat) and f.bits not in (8, 16) for f in formats)
