"""What the rules look at: the model, its graph, and what is known of its training and its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, fx, nn

from ..capture import capture, copy_graph, evaluation_mode
from ..capture.inputs import Arguments, first_samples, sample_count
from ..capture.ops import op_of
from ..errors import CaptureError
from ..place.macs import size_of
from ..prepare.fold_batch_norm import fold_batch_norm
from ..targets import Target, TidlDevice

_RANGED = 64  # samples that activation ranges are taken on
_KEPT = 1 << 16  # elements of an activation that its tail is judged on


class TrainingPlan(BaseModel):
    """How the model was, and will be, trained; what is None is not judged.

    ``float_optimizer``: the type that trained the float model (``"SGD"``). ``qat``: the optimizer given to ``doctor``
    is that of quantization-aware training, ``epochs`` long, with batch norms and ranges frozen after ``freeze_bn``
    and ``freeze_ranges`` epochs. ``averaged``: an exponential moving average (EMA) copies the model as it trains.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    float_optimizer: str | None = None
    qat: bool = False
    epochs: int | None = None
    freeze_bn: int | None = None
    freeze_ranges: int | None = None
    averaged: bool = False


@dataclass
class Seen:
    """One value over the calibration data: its ends, and a sample of its magnitudes."""

    low: float = float("inf")
    high: float = float("-inf")
    magnitudes: list[Tensor] = field(default_factory=list)

    def add(self, value: Tensor) -> None:
        """Take one batch in."""
        self.low, self.high = min(self.low, float(value.min())), max(self.high, float(value.max()))
        flat = value.detach().abs().flatten()
        step = max(1, flat.numel() // _KEPT)
        self.magnitudes.append(flat[::step].clone())

    @property
    def largest(self) -> float:
        """The greatest magnitude."""
        return max(abs(self.low), abs(self.high))

    def quantile(self, share: float) -> float:
        """The magnitude below which ``share`` of the values lie."""
        values = torch.cat(self.magnitudes)
        return float(values.kthvalue(max(1, round(share * values.numel()))).values)


@dataclass
class Subject:
    """A model under examination. What costs time is done when the first rule asks for it."""

    model: nn.Module
    arguments: Arguments
    target: Target
    optimizer: torch.optim.Optimizer | None = None
    training: TrainingPlan | None = None
    batches: list[Arguments] | None = None
    file: Path | None = None

    @property
    def device(self) -> TidlDevice | None:
        """The rules of TI's import, where the target has them."""
        return self.target.tidl

    @cached_property
    def _captured(self) -> fx.GraphModule | str:
        try:
            return capture(self.model, self.arguments)
        except CaptureError as error:
            return str(error)

    @property
    def capture_error(self) -> str | None:
        """Why the model cannot be read as a graph, or None."""
        return self._captured if isinstance(self._captured, str) else None

    @property
    def graph(self) -> fx.GraphModule:
        """The LayerGraph; only rules that need one ask."""
        assert isinstance(self._captured, fx.GraphModule)
        return self._captured

    @cached_property
    def folded(self) -> fx.GraphModule:
        """A copy of the graph with its batch norms folded."""
        graph = copy_graph(self.graph)
        with torch.no_grad():
            fold_batch_norm(graph)
        return graph

    @cached_property
    def calls(self) -> Counter[str]:
        """How often one forward pass calls each module, by its first name."""
        counts: Counter[str] = Counter()
        names = {id(module): name for name, module in self.model.named_modules()}
        hooks = [
            module.register_forward_hook(lambda m, *_: counts.update([names[id(m)]]))
            for module in self.model.modules()
            if not any(True for _ in module.children())
        ]
        args, kwargs = first_samples(self.arguments, 1)
        try:
            with evaluation_mode(self.model), torch.no_grad():
                self.model(*args, **kwargs)
        finally:
            for hook in hooks:
                hook.remove()
        return counts

    @cached_property
    def seen(self) -> dict[str, Seen]:
        """Every float value of the folded graph over the calibration data, by its node's name."""
        found: dict[str, Seen] = {}

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                value = super().run_node(n)
                is_value = isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1
                if is_value and n.op in ("placeholder", "call_module", "call_function"):
                    found.setdefault(n.name, Seen()).add(value)
                return value

        left = _RANGED
        with torch.no_grad():
            for args, kwargs in self.batches or []:
                leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs))
                Watch(self.folded).run(*(leaf[:left] if isinstance(leaf, Tensor) else leaf for leaf in leaves),
                                       enable_io_processing=False)  # fmt: skip
                left -= sample_count((args, kwargs))
                if left <= 0:
                    break
        return found

    @property
    def samples(self) -> int:
        """How many calibration samples there are."""
        return sum(sample_count(batch) for batch in self.batches or [])

    def nodes(self, *names: str) -> Iterator[fx.Node]:
        """The graph's operators of these kinds (all calls if none is named)."""
        for node in self.graph.graph.nodes:
            if node.op in ("call_module", "call_function") and (not names or op_of(node).name in names):
                yield node

    def where(self, node: fx.Node) -> str:
        """The module that an operator belongs to, and the operator where that is not the module itself."""
        if node.op == "call_module":
            return str(node.target)
        path = innermost(node)[0]
        return f"{path} ({node.name})" if path else node.name

    def source(self, node: fx.Node) -> str:
        """The line of the user's code that an operator stems from: the innermost that is not torch's own."""
        lines = (node.meta.get("stack_trace") or "").strip().splitlines()
        frames = [(head.strip(), text.strip()) for head, text in pairwise(lines) if head.strip().startswith("File")]
        own = [frame for frame in frames if "/torch/nn/" not in frame[0] and "/torch/_" not in frame[0]]
        if not own:
            return ""
        place, text = own[-1]
        name, line = place.split('"')[1], place.split("line ")[1].split(",")[0]
        return f"{Path(name).name}:{line}: {text}"


def innermost(node: fx.Node) -> tuple[str, str]:
    """Path and type of the module whose forward makes an operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack or stack[-1][0].startswith("_empty"):
        return "", ""
    path, kind = stack[-1]
    return path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"


def shape_of(node: Any) -> list[int]:
    """The shape of a value for one sample."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return [size_of(d) for d in value.shape] if isinstance(value, Tensor) else []


__all__ = ["Seen", "Subject", "TrainingPlan", "innermost", "shape_of"]
