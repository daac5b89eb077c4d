"""Block reconstruction at its turn in the walk: held against the block as it was, and undone where it does harm."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor

from ..capture.ops import module_of
from ..errors import RecipeError
from ..grid import Quantizer
from ..optimize.reconstruct import reconstruct
from ..optimize.trainable import TrainableBlock
from ..optimize.visit import StepLog
from ..steps import LearnedRounding, Reconstruct
from .bias import set_bias_grid
from .blocks import Block
from .samples import Samples
from .state import State

if TYPE_CHECKING:
    from .walk import Progress, Walk


def learns_from_minibatches(step: Any) -> TypeGuard[Reconstruct | LearnedRounding]:
    """Whether a step is carried out here: on blocks, or on layers with their activation functions."""
    return isinstance(step, Reconstruct) or (isinstance(step, LearnedRounding) and step.target == "activation")


_HELD_OUT = 0.15  # of the samples: they judge what was learned from the others


def _never_back(progress: Progress) -> Progress:
    """A block's stages are reported while it learns, and again when they are run: these do not count back."""
    reached = 0

    def report(done: int, total: int, what: str) -> None:
        nonlocal reached
        reached = max(reached, done)
        progress(reached, total, what)

    return report


class BlockSteps:
    """Runs a step that learns from minibatches, on one block after the other."""

    def __init__(self, walk: Walk, step: Reconstruct | LearnedRounding | None) -> None:
        self.walk, self.step = walk, step
        if step is not None and walk.progress is not None:
            walk.progress = _never_back(walk.progress)
        self.device = _device(step)
        self.learned, self.judged = _split(walk.counts[: walk.quantized_chunks], _HELD_OUT)
        self.too_few = _too_few(step, sum(walk.counts[: walk.quantized_chunks]))
        self.log: list[StepLog] = []

    def run(self, block: Block, index: int) -> None:
        """Reconstruct a block whose grids are set; both streams stand at its start, the float one also at its end."""
        if self.step is None or not block.layers:
            return
        if self.too_few:
            self.log.append(StepLog(self.step.name, block.name, skipped=self.too_few))
            return
        log = StepLog(self.step.name, block.name)
        originals = self._round_first(block)
        piece, state = f"block-{index:03}", State(block.stages)
        saved = self.walk.resume.load(piece) if self.walk.resume is not None else None
        if saved is not None:
            tensors, notes = saved
            state.take(tensors)
            log = StepLog(**notes)
        else:
            self._learn_or_undo(block, state, log, index, originals)
        self._set_bias_grids(block)
        self._remember_grids(block)
        if self.walk.resume is not None and saved is None:
            self.walk.resume.save(piece, state.tensors(), asdict(log))
        self.log.append(log)

    def _learn_or_undo(
        self, block: Block, state: State, log: StepLog, index: int, originals: dict[int, Tensor]
    ) -> None:
        """Reconstruct; where the block's output has not become better on samples held out, the block is put back."""
        start, before = time.perf_counter(), state.copy()
        log.before = self._error(block)
        self._learn(block, index, originals)
        self._set_bias_grids(block)
        log.after = self._error(block)
        if not log.after < log.before:
            state.restore(*before)
            log.undone = True
        log.seconds = time.perf_counter() - start

    def _round_first(self, block: Block) -> dict[int, Tensor]:
        """Let the recipe's steps on layers round the block's weights; returns the weights from before."""
        if not self.walk.steps.rounding:
            return {}
        layers = [stage.layer for stage in block.layers if stage.layer is not None]
        originals = {id(layer): layer.weight.detach().clone() for layer in layers}
        for stage in block.stages:
            self.walk.try_out(stage)
        return originals

    def _learn(self, block: Block, index: int, originals: dict[int, Tensor]) -> None:
        assert self.step is not None
        walk, options = self.walk, _as_reconstruct(self.step)
        seed = options.seed * 1_000_003 + index
        first, began = walk.stages.index(block.stages[0]), time.perf_counter()

        def report(done: int, of: int) -> None:
            if walk.progress is not None:
                stages = len(block.stages) * done // of  # learning takes nearly all of the time of a block's stages
                left = (time.perf_counter() - began) / max(done, 1) * (of - done)
                # the time first: where there is little room, what comes behind is cut off
                text = (f"{left:.0f} s left in " if done else "") + f"{block.name}: {done} of {of} iterations"
                walk.progress(first + stages, len(walk.stages), text)

        float_inputs = isinstance(self.step, LearnedRounding) and self.step.inputs == "float"
        samples = Samples(walk, block, self.device, self.learned, float_inputs=float_inputs)
        batches = samples.minibatches(options.batch_size, options.iterations, seed)
        with self._on_device(block), torch.enable_grad():
            trainable = TrainableBlock(
                walk.graph, block.nodes, block.ends, form=options.form, frozen=walk.steps.is_shared,
                shared=lambda q: self._scale_key(block, q), drop=options.drop, seed=seed,
                originals=originals,
            )  # fmt: skip
            reconstruct(trainable, batches, options, report)

    @contextmanager
    def _on_device(self, block: Block) -> Iterator[None]:
        """The block's modules on the device that was asked for, and back where they were."""
        modules = [m for node in block.nodes if (m := module_of(node)) is not None] if self.device is not None else []
        home = next((t.device for m in modules for t in (*m.parameters(), *m.buffers())), torch.device("cpu"))
        for module in modules:
            module.to(self.device)
        try:
            yield
        finally:
            for module in modules:
                module.to(home)

    def _scale_key(self, block: Block, quantizer: Quantizer) -> int | None:
        """What Quantizers of one scale have in common; None where some of them lie outside the block."""
        group = self.walk.group_of.get(id(quantizer))
        if group is None:
            return id(quantizer)
        inside = {id(stage.quantizer) for stage in block.stages if stage.observes}
        return id(group) if all(id(member) in inside for member in group.members) else None

    def _set_bias_grids(self, block: Block) -> None:
        for stage in block.layers:
            assert stage.layer is not None
            set_bias_grid(stage.layer, stage.compute, self.walk.target.bias_unit)

    def _remember_grids(self, block: Block) -> None:
        for stage in block.stages:
            if stage.observes and stage.quantizer is not None:
                self.walk.grids[id(stage.quantizer)] = stage.quantizer.require_grid()

    @torch.no_grad()
    def _error(self, block: Block) -> float:
        """The squared error of the block's ends over the samples held out, as the walk itself will run it."""
        walk, total = self.walk, 0.0
        for chunk in self.judged:
            env = {node: walk.read("quantized", node, chunk) for node in [*block.sides, *block.sources]}
            for node in block.nodes:
                value = walk.call("quantized", node, env)
                env[node] = value
            for end in block.ends:
                exact = walk.store.get(("float", end.name, chunk))
                total += float((env[end] - exact).square().sum(dtype=torch.float64))
        return total


def _split(counts: list[int], share: float) -> tuple[range, range]:
    """Chunks to learn from, and the last of them, which judge; a single chunk does both.

    >>> _split([10] * 10, 0.15), _split([64], 0.15)
    ((range(0, 8), range(8, 10)), (range(0, 1), range(0, 1)))
    """
    first = len(counts)
    while first > 1 and sum(counts[first:]) < share * sum(counts):
        first -= 1
    return range(first), range(first if first < len(counts) else 0, len(counts))


def _too_few(step: Reconstruct | LearnedRounding | None, samples: int) -> str:
    """Why nothing is to be learned from so many samples; empty where it is."""
    if not isinstance(step, Reconstruct) or samples >= step.least_samples:
        return ""
    return (
        f"{samples} samples are too few to learn from (least_samples: {step.least_samples}): give more, or raise "
        "noise_samples where that bounds them"
    )


def _as_reconstruct(step: Reconstruct | LearnedRounding) -> Reconstruct:
    """Learned rounding of layers is reconstruction of one layer at a time, of its rounding alone."""
    if isinstance(step, Reconstruct):
        return step
    own = step.model_dump(exclude={"name", "target", "inputs", "batch_size"})
    return Reconstruct(**own, layers=1, batch_size=step.batch_size or 32, drop=0.0, lr_bias=0.0, lr_scale=0.0)


def _device(step: Reconstruct | LearnedRounding | None) -> torch.device | None:
    if step is None or step.device is None:
        return None
    try:
        device = torch.device(step.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"the step {step.name} asks for device {step.device!r}, which is not here: {error}"
        ) from error
    return device
