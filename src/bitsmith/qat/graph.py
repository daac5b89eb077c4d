"""A model that trains on its grids, in the user's own loop."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from ..calibrate import calibrate
from ..calibrate.calibrate import set_weight_grids
from ..capture import copy_graph
from ..capture.inputs import Arguments, positional
from ..errors import CalibrationError, DataError
from ..grid import IntFormat
from ..model import QuantizedModel
from ..place.place import Placed, moved
from ..recipe import Recipe
from ..targets import Target
from .build import initialize, layers_of
from .convert import convert_trained, take_parameters
from .distillation import Distillation
from .layers import FreezableNorm, TrainedLayer
from .oscillation import Oscillation, OscillationTracker
from .quantizers import TrainingQuantizer

_MEMORY = 4_000_000_000  # bytes of activations kept while ranges are found


class Template:
    """The placed graph that a trained model is converted into, outside of what trains."""

    def __init__(self, graph: fx.GraphModule, placed: Placed, recipe: Recipe, target: Target) -> None:
        self.graph, self.placed, self.recipe, self.target = graph, placed, recipe, target

    def copy(self) -> Template:
        """Another one, to be filled."""
        graph = copy_graph(self.graph)
        return Template(graph, moved(self.placed, self.graph, graph), self.recipe, self.target)

    def __deepcopy__(self, memo: dict[int, Any]) -> Template:
        return self.copy()


class QATGraph(nn.Module):
    """A model whose weights and activations pass through TrainingQuantizers; called and trained like the model.

    In train mode it computes what the float model computes in train mode (batch statistics, dropout), on the grids of
    its quantizers. In eval mode it is the simulation of what ``bitsmith.convert`` will give.

    Its state_dict holds weights, batch norms, ranges and what is frozen. ``notes`` say what differs from the user's
    model.
    """

    def __init__(
        self, graph: fx.GraphModule, template: Template, signature: inspect.Signature, notes: list[str]
    ) -> None:
        super().__init__()
        self.graph = graph
        self._codegen = template.graph.graph._codegen  # knows the structure of the model's outputs
        self.template, self.signature, self.notes = template, signature, notes
        self.ranges_found: Tensor
        self.register_buffer("ranges_found", torch.tensor(False))
        self._has_ranges = False  # what is known of it without asking a GPU
        self.distillation: Distillation | None = None
        self.damping, self.progress = 0.0, 1.0  # of oscillations, and how much of the training is over
        self._compared: tuple[Any, Any] | None = None  # outputs and the teacher's, of the last run in train mode
        self.bits = {name: _width(quantizer) for name, quantizer in self.named_quantizers()}

    @property
    def has_ranges(self) -> bool:
        """Whether ranges have their start."""
        self._has_ranges = self._has_ranges or bool(self.ranges_found)
        return self._has_ranges

    @property
    def recipe(self) -> Recipe:
        """The recipe that it was prepared by."""
        return self.template.recipe

    @property
    def target(self) -> Target:
        """The target that it was prepared for."""
        return self.template.target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the model computes, on its grids."""
        arguments = positional(self.signature, args, kwargs)
        if not self.has_ranges:
            if not self.training:
                raise CalibrationError(
                    "this model has no ranges yet: run a batch of training data through it in train mode first, or "
                    "prepare it with calibration=batches"
                )
            self.calibrate([arguments])
        outputs = self._codegen.process_outputs(self.graph(*torch.utils._pytree.tree_leaves(arguments)))
        if self.training and self.distillation is not None:
            self._compared = outputs, self.distillation.target(*arguments[0], **arguments[1])
        return outputs

    def penalty(self) -> Tensor:
        """What to add to the loss of the batch that was just run: ``loss = criterion(p(x), y) + p.penalty()``.

        That of distillation and that of oscillating weights, where they are on; else 0.
        """
        total = next(self.graph.parameters()).new_zeros(())
        if self.distillation is not None:
            if self._compared is None:
                raise DataError("penalty() is that of the batch before it: run one in train mode first")
            total = total + self.distillation.loss(*self._compared)
            self._compared = None
        if self.damping and self.progress:
            strength = self.damping * (1 - math.cos(math.pi * self.progress)) / 2
            total = total + strength * torch.stack([layer.damping_loss() for layer in self.layers().values()]).sum()
        return total

    def watch_oscillations(self, oscillation: Oscillation) -> None:
        """Damp or freeze weights that oscillate."""
        self.damping = oscillation.damping
        if oscillation.threshold is None:
            return
        for layer in self.layers().values():
            if layer.weight_quantizer is not None:
                shape = cast(Tensor, layer.layer.weight).shape
                tracker = OscillationTracker(shape, threshold=oscillation.threshold, momentum=oscillation.momentum)
                layer.oscillation = tracker.to(cast(Tensor, layer.layer.weight).device)

    def calibrate(self, batches: list[Arguments]) -> None:
        """Start all ranges from batches, given as ``(args, kwargs)``; all processes take those of the first."""
        trial = self.template.copy()
        take_parameters(trial.graph, self)  # a checkpoint may have been loaded since the model was prepared
        calibrate(trial.graph, trial.placed, batches, self.target, memory=_MEMORY, noise_samples=1)
        self.start_from(trial.graph)

    def start_weights(self) -> None:
        """Give weights their ranges, which need no data; optimizers and DDP see the Parameters that they will have."""
        trial = self.template.copy()
        set_weight_grids(trial.placed, self.target)
        initialize(self.graph, trial.graph)

    def start_from(self, calibrated: fx.GraphModule) -> None:
        """Take the grids of a calibrated graph."""
        initialize(self.graph, calibrated)
        self.ranges_found.fill_(True)
        if dist.is_available() and dist.is_initialized():
            for tensor in self._range_state():
                dist.broadcast(tensor, 0)

    def _range_state(self) -> Iterator[Tensor]:
        for quantizer in self.quantizers():
            yield from (p.data for p in quantizer.parameters())
            yield from quantizer.buffers()

    def quantizers(self) -> Iterator[TrainingQuantizer]:
        """All quantizers, of weights and of activations."""
        yield from (quantizer for _, quantizer in self.named_quantizers())

    def named_quantizers(self) -> Iterator[tuple[str, TrainingQuantizer]]:
        """The same with their paths."""
        yield from ((name, m) for name, m in self.graph.named_modules() if isinstance(m, TrainingQuantizer))

    # What a schedule does

    def freeze_norms(self, frozen: bool = True) -> None:
        """Stop batch norms from learning statistics (their weights still train): outputs are normalized as they will
        be in the file."""
        for module in self.modules():
            if isinstance(module, TrainedLayer | FreezableNorm):
                module.norm_frozen = frozen

    def freeze_ranges(self, frozen: bool = True, *, learned: bool = True) -> None:
        """Stop ranges from moving; ``learned`` False: only those that follow the data, not those that learn."""
        for quantizer in self.quantizers():
            if bool(quantizer.frozen) != frozen and (learned or quantizer.kind == "moving-average"):
                quantizer.freeze() if frozen else quantizer.unfreeze()

    def set_bits(self, bits: int) -> None:
        """Give every quantizer of integers ``bits`` bits, or as many as the recipe does where that is more."""
        for name, quantizer in self.named_quantizers():
            final = self.bits[name]
            if final is not None and quantizer.format.bits != max(final, bits):
                quantizer.set_bits(max(final, bits))

    # The end

    def convert(self) -> QuantizedModel:
        """The quantized model on the grids of this moment; training may go on."""
        if not self.has_ranges:
            raise CalibrationError("nothing to convert: no batch has been run, so there are no ranges yet")
        self._check_bits()
        return convert_trained(self)

    def _check_bits(self) -> None:
        wide = [name for name, q in self.named_quantizers() if self.bits[name] not in (None, q.format.bits)]
        if wide:
            raise CalibrationError(
                f"{len(wide)} quantizers, {wide[0]!r} first, have other bit widths than the recipe: the schedule's "
                "bits have not come to their end; call step() to there, or set_bits(2), and train on"
            )

    # State

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._has_ranges = False  # the state says

    def layers(self) -> dict[str, TrainedLayer]:
        """The layers on grids, by path."""
        return layers_of(self.graph)

    def _apply(self, fn: Any, recurse: bool = True) -> QATGraph:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.template.graph._apply(fn)  # type: ignore[no-untyped-call]
        if self.distillation is not None:
            self.distillation.teacher._apply(fn)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_compared": None}


def _width(quantizer: TrainingQuantizer) -> int | None:
    """Bits that the recipe gives an integer format."""
    return quantizer.format.bits if isinstance(quantizer.format, IntFormat) else None
