"""``prepare`` and ``convert`` of a model quantized by hand: its own code runs, its modules hold the Quantizers."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..calibrate.bias import set_bias_grid
from ..calibrate.calibrate import set_weight_grids
from ..calibrate.watching import WatchingQuantizer, WeightQuantizer
from ..capture import capture
from ..capture.hooked import HookedModel
from ..capture.inputs import Arguments, positional, sample_count
from ..capture.ops import module_of
from ..errors import CalibrationError, CaptureError, PlacementError, RecipeError
from ..flow import channels_last, finish
from ..grid import Grid, IntFormat
from ..model import QuantizedModel
from ..nn.module import QuantModule
from ..place.layers import QuantLayer
from ..place.place import Placed, place
from ..prepare import fold_batch_norm
from ..recipe import Recipe, load_recipe
from ..report.model import LayerReport, Report
from ..targets import Target
from .fuse import find_groups, fuse_modules
from .provenance import Provenance
from .swap import MAPPING, LayerMapping, has_stubs, swap

BY_HAND = "by hand"  # the placement in the report


class PreparedModules(nn.Module):
    """A copy of a model whose quantized modules watch; called like the model, it computes in float.

    ``module`` is that copy. Run the calibration batches through it, then ``bitsmith.convert`` it.
    """

    def __init__(
        self, module: nn.Module, recipe: Recipe, target: Target, *, example: Arguments,
        signature: inspect.Signature, notes: list[str],
    ) -> None:  # fmt: skip
        super().__init__()
        self.module, self.recipe, self.target = module, recipe, target
        self.example, self.signature, self.notes = example, signature, notes
        self.samples = 0
        for watcher in self.watchers().values():
            watcher.watch()
        self.eval()

    def watchers(self) -> dict[str, WatchingQuantizer]:
        """Every Quantizer of a value, by its path."""
        return {name: m for name, m in self.module.named_modules() if isinstance(m, WatchingQuantizer)}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float model's outputs."""
        arguments = positional(self.signature, args, kwargs)
        self.samples += sample_count(arguments)
        with torch.no_grad():
            return self.module(*arguments[0], **arguments[1])

    def merge(self, other: PreparedModules) -> None:
        """Take in what another copy of this prepared model saw, as if its batches had come after these."""
        mine, theirs = self.watchers(), other.watchers()
        if mine.keys() != theirs.keys():
            raise CalibrationError("only two preparations of the same model by the same recipe can be merged")
        for name, watcher in mine.items():
            watcher.merge(theirs[name])
        self.samples += other.samples

    def convert(self, memory: int) -> QuantizedModel:
        """The QuantizedModel: with a graph where the model can be captured, else its own modules."""
        if not self.samples:
            raise CalibrationError("no batch was run: call the prepared model on calibration batches, then convert it")
        self._drop_uncalled()
        try:
            q = graph_by_hand(
                self.module, self.example, self.recipe, self.target, signature=self.signature, notes=self.notes,
                grid_of=self._solve,
            )  # fmt: skip
        except CaptureError as error:
            return self._without_graph(str(error))
        q.report.samples = self.samples
        return q

    def _solve(self, name: str, watcher: WatchingQuantizer, non_negative: bool) -> Grid:
        try:
            return watcher.solve(non_negative=non_negative, unsigned_codes=self.target.unsigned_codes)
        except CalibrationError as error:
            raise type(error)(f"no range for {name.rpartition('.')[0]!r}: {error}") from error

    def _drop_uncalled(self) -> None:
        """Modules that calibration never called stay in float."""
        for name, module in list(self.module.named_modules()):
            if not isinstance(module, QuantModule):
                continue
            seen = [m.batches for m in module.modules() if isinstance(m, WatchingQuantizer)]
            if seen and not any(seen):
                module.leave_in_float()
                self.notes.append(f"{name} was never called in calibration: it stays in float")

    def _without_graph(self, reason: str) -> HookedModel:
        for name, watcher in self.watchers().items():
            if watcher.batches:
                watcher.set_grid(self._solve(name, watcher, False))
            watcher.statistic = None
        layers = []
        for name, module in self.module.named_modules():
            if isinstance(module, QuantModule) and module.specs.weights is not None:
                for inner in module.modules():
                    if isinstance(inner, WeightQuantizer):
                        inner.enabled = True
                bits = module.specs.weights.format.bits
                layers.append(LayerReport(name=name, type=type(module).__name__, weight_bits=bits))
        report = Report(
            recipe=self.recipe.name, target=self.target.name, placement=BY_HAND, samples=self.samples,
            layers=layers, notes=self.notes,
        )  # fmt: skip
        return HookedModel(self.module, self.recipe, self.target, report, self.signature, reason)


def by_hand(
    model: nn.Module, recipe: Recipe, example: Arguments, mapping: Mapping[type[nn.Module], LayerMapping] | None = None
) -> nn.Module:
    """A copy of a model with its layers fused and swapped for quantized ones, as ``prepare`` makes it."""
    try:
        module = copy.deepcopy(model).eval().requires_grad_(False)
    except Exception as error:  # whatever the user's modules hold
        raise CaptureError(
            f"{type(model).__name__} cannot be copied ({error}): keep handles, locks and non-leaf tensors out of the "
            "model's attributes"
        ) from error
    if recipe.step("fold_batch_norm"):
        module = fuse_modules(module, find_groups(module, example), inplace=True)
    return swap(module, recipe, {**MAPPING, **(mapping or {})})


def prepare_by_hand(
    model: nn.Module, recipe: Recipe, target: Target, example: Arguments,
    mapping: Mapping[type[nn.Module], LayerMapping] | None = None,
) -> PreparedModules:  # fmt: skip
    """As ``bitsmith.prepare``, for a model with stubs, or one whose layers quantize their own inputs."""
    target.check(recipe)
    if not target.rescales:
        raise RecipeError(
            f"target {target.name} adds only operands of one scale, which modules by hand do not share: take the stubs "
            "out and let bitsmith.quantize place the Quantizers"
        )
    undone = [step.name for step in recipe.steps if step.name != "fold_batch_norm"]
    recipe = recipe.model_copy(update={"steps": tuple(s for s in recipe.steps if s.name == "fold_batch_norm")})
    notes = [f"quantized by hand, where the model's modules say; not done: {', '.join(undone)}"] if undone else []
    module = by_hand(model, recipe, example, mapping)
    if not any(isinstance(m, QuantModule) and m.specs.weights is not None for m in module.modules()):
        raise PlacementError(
            "nothing would be quantized: every layer is left in float by its recipe, or of no known type"
        )
    if recipe.placement != "layerwise" and recipe.activations is not None:
        check_stubs(module, example)
    return PreparedModules(
        module, recipe, target, example=example, signature=inspect.signature(model.forward), notes=notes
    )


def check_stubs(module: nn.Module, example: Arguments) -> None:
    """Run once; a quantized layer that reads a float value is a PlacementError that names it."""
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, torch.clone, example)  # a model may write into its inputs
    provenance = Provenance(module)
    try:
        with provenance, torch.no_grad():
            module(*args, **kwargs)
    finally:
        provenance.close()


def place_by_hand(
    module: nn.Module, example: Arguments, recipe: Recipe, target: Target
) -> tuple[fx.GraphModule, Placed]:
    """The graph of a model of quantized modules, with Quantizers where these have them and nowhere else."""
    graph = capture(module, example)
    keep_to_marks(graph)
    if recipe.step("fold_batch_norm"):
        fold_batch_norm(graph)
    placed = place(graph, recipe, target)
    channels_last(graph)
    return graph, placed


def keep_to_marks(graph: fx.GraphModule) -> None:
    """Let ``place`` quantize what the model's own modules quantize, and nothing else."""
    graph.meta["handwritten"] = dataclasses.replace(graph.meta["handwritten"], alone=True)


def structure(
    model: nn.Module, recipe: Recipe, example: Arguments, mapping: Mapping[type[nn.Module], LayerMapping] | None = None
) -> nn.Module:
    """The modules that are captured: the model's own, those by hand, or those of ``mapping``."""
    if has_stubs(model):
        return by_hand(model, recipe, example, mapping)
    return swap(copy.deepcopy(model).eval(), recipe, mapping) if mapping else model


def assigned(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of a model of quantized layers in which those that know no recipe yet have this one."""
    module = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, QuantModule) and layer.assigned is None:
            layer.assign(recipe)
    return module


def graph_by_hand(
    module: nn.Module, example: Arguments, recipe: Recipe, target: Target, *, signature: inspect.Signature,
    notes: list[str], grid_of: Callable[[str, WatchingQuantizer, bool], Grid],
) -> QuantizedModel:  # fmt: skip
    """The QuantizedModel of quantized modules; ``grid_of(name, quantizer, non_negative)`` finds the grids."""
    graph, placed = place_by_hand(module, example, recipe, target)
    for name, quantizers in placed.marks.items():
        watcher = module.get_submodule(name)
        assert isinstance(watcher, WatchingQuantizer)
        grid = grid_of(name, watcher, any(q.non_negative for q in quantizers))
        for quantizer in (watcher, *quantizers):
            quantizer.set_grid(grid)
    set_weight_grids(placed, target)
    for node in placed.layers:
        layer = module_of(node)
        if isinstance(layer, QuantLayer):
            set_bias_grid(layer, node)
    q = finish(graph, recipe, target, placed, None, notes, {}, signature)
    q.report.placement = BY_HAND
    return q


def quantize_by_hand(
    model: nn.Module, batches: list[Arguments], recipe: Recipe, target: Target, example: Arguments
) -> QuantizedModel:
    """``bitsmith.quantize`` of a model with stubs."""
    prepared = prepare_by_hand(model, recipe, target, example)
    for args, kwargs in batches:
        prepared(*args, **kwargs)
    return prepared.convert(0)


def convert_calibrated(model: nn.Module, example: Arguments, recipe: Recipe | None, target: Target) -> QuantizedModel:
    """A model of quantized layers that was calibrated, and perhaps trained, in place: its grids are kept."""

    def grid_of(name: str, quantizer: WatchingQuantizer, _: bool) -> Grid:
        if quantizer.grid is None:
            raise CalibrationError(
                f"{name.rpartition('.')[0] or 'the model'!r} has no grid yet: run first "
                "bitsmith.nn.calibrate(model, batches)"
            )
        return stored_grid(quantizer.grid, unsigned=target.unsigned_codes)

    known = [m.assigned for m in model.modules() if isinstance(m, QuantModule) and m.assigned is not None]
    recipe = recipe or (known[0] if known else load_recipe("int8"))
    module = assigned(model, recipe)
    recipe = recipe.model_copy(update={"steps": tuple(s for s in recipe.steps if s.name == "fold_batch_norm")})
    return graph_by_hand(
        module, example, recipe, target, signature=inspect.signature(model.forward), notes=[], grid_of=grid_of
    )


def stored_grid(grid: Grid, *, unsigned: bool) -> Grid:
    """The same real numbers with the codes that a target stores."""
    fmt = grid.format
    if not unsigned or not isinstance(fmt, IntFormat) or not fmt.signed:
        return grid
    zero = torch.zeros_like(grid.scale, dtype=torch.int32) if grid.zero_point is None else grid.zero_point
    half = 1 << (fmt.bits - 1)
    return dataclasses.replace(
        grid, format=IntFormat(fmt.bits, signed=False, narrow=fmt.narrow), zero_point=zero + half
    )
