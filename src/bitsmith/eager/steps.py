"""The job in steps: prepare a model, run batches through it, convert it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from ..calibrate import parse_memory
from ..calibrate.watching import WatchingQuantizer
from ..capture import ForwardFunction, capture, evaluation_mode, read_batches
from ..capture.ops import op_of
from ..errors import CaptureError, DataError
from ..flow import channels_last, check_arguments, held_out, resolve
from ..model import QuantizedModel
from ..nn import QuantModule
from ..place.place import place
from ..place.plan import layer_name
from ..prepare.prepare import prepare as rewrite
from ..recipe import Override, PlacementName, Recipe, load_recipe
from ..targets import Target, get_target
from .captured import PreparedGraph
from .modules import PreparedModules, convert_calibrated, prepare_by_hand, structure
from .swap import LayerMapping, has_stubs, module_overrides

if TYPE_CHECKING:
    from ..qat import QATGraph


def prepare(
    model: nn.Module, recipe: str | Path | Recipe = "int8", example_inputs: Any = None,
    target: str | Target = "onnxruntime", *, placement: PlacementName | None = None,
    overrides: Iterable[Override] = (), forward: ForwardFunction | None = None, noise_samples: int | None = None,
    mapping: Mapping[type[nn.Module], LayerMapping] | None = None,
    quantizer: type[WatchingQuantizer] = WatchingQuantizer,
) -> PreparedGraph | PreparedModules:  # fmt: skip
    """A copy of ``model`` that watches what it computes: run calibration batches through it, then ``convert`` it.

    ``example_inputs`` is one batch; the other arguments are those of ``bitsmith.quantize``. A model that can be read as
    a graph is quantized as there. One with a ``QuantStub`` is quantized by hand: between QuantStub and DeQuantStub,
    module by module, with what the modules' attributes ``recipe`` say (None: float). A model of neither kind needs
    ``placement="layerwise"``, where each layer quantizes what it reads.

    ``mapping`` (from a module's type to a function ``(module, recipe) -> quantized module``) and ``quantizer`` (a
    subclass of ``bitsmith.nn.WatchingQuantizer``) put in pieces of your own. Raises PlacementError with the name of a
    module that reads a value on no grid: a stub was forgotten.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    >>> p = prepare(net, "int8", torch.randn(2, 3, 8, 8))
    >>> for _ in range(4):
    ...     _ = p(torch.randn(16, 3, 8, 8))
    >>> convert(p)(torch.randn(2, 3, 8, 8)).shape
    torch.Size([2, 8, 6, 6])
    """
    check_arguments(model, noise_samples)
    if example_inputs is None:
        raise DataError("prepare needs example_inputs: one batch, as the model takes it")
    recipe, target = resolve(recipe, placement, overrides), get_target(target)
    with evaluation_mode(model):
        example = read_batches(model, [example_inputs], forward)[0]
        if has_stubs(model):
            return _with_quantizer(prepare_by_hand(model, recipe, target, example, mapping), quantizer)
        try:
            graph = capture(structure(model, recipe, example, mapping), example)
        except CaptureError as error:
            if recipe.placement == "layerwise":
                return _with_quantizer(prepare_by_hand(model, recipe, target, example, mapping), quantizer)
            raise CaptureError(
                f"{error}; or mark the model with bitsmith.QuantStub and DeQuantStub, to quantize it by hand"
            ) from error
    recipe = with_module_recipes(recipe, model, graph)
    notes = list(graph.meta.get("notes", []))
    graph, done = rewrite(graph, recipe, [example], partial(held_out, [example], recipe, target))
    notes += done
    if any(step.stage == "prepare" and step.name != "fold_batch_norm" for step in recipe.steps):
        notes.append("equalization was measured on the example inputs, since no other batch had been run yet")
    placed = place(graph, recipe, target)
    channels_last(graph)
    return PreparedGraph(
        graph, placed, recipe, target, signature=inspect.signature(model.forward), notes=notes, seconds={},
        noise_samples=noise_samples or recipe.samples, quantizer=quantizer,
    )  # fmt: skip


def with_module_recipes(recipe: Recipe, model: nn.Module, graph: fx.GraphModule) -> Recipe:
    """The recipe with an override for each layer inside a module that has an attribute ``recipe``."""
    names = [layer_name(node) for node in graph.graph.nodes if op_of(node).role == "compute"]
    found = module_overrides(model, names)
    return recipe.model_copy(update={"overrides": (*recipe.overrides, *found)}) if found else recipe


def _with_quantizer(prepared: PreparedModules, quantizer: type[WatchingQuantizer]) -> PreparedModules:
    """The user's own kind of Quantizer in every place."""
    for owner in list(prepared.module.modules()) if quantizer is not WatchingQuantizer else []:
        for name, child in owner._modules.items():
            if type(child) is WatchingQuantizer:
                owner._modules[name] = own = quantizer(child.spec, non_negative=child.non_negative)
                own.carried = child.carried
                own.watch()
    return prepared


def convert(
    prepared: PreparedGraph | PreparedModules | QATGraph | nn.Module, *, memory: str | int = "4GB",
    example_inputs: Any = None, recipe: str | Path | Recipe | None = None, target: str | Target = "onnxruntime",
) -> QuantizedModel:  # fmt: skip
    """The quantized model of a prepared one that has seen its calibration batches, or that has been trained.

    Of a model that could be captured it is, to the bit, what ``bitsmith.quantize`` gives for the same batches, the
    recipe's steps included. Of one quantized by hand it has a graph, and so files and engines, where its modules can be
    captured, and simulates where they cannot. The prepared model is used up.

    A model written with ``bitsmith.nn`` layers that was calibrated in place (``bitsmith.nn.calibrate``), and perhaps
    trained, is taken as well, with ``example_inputs``: it keeps its grids, and nothing else is quantized
    (``recipe`` None: the one it was calibrated by).

    Of what ``bitsmith.prepare_qat`` returned it is what that simulates in eval mode at this moment; training may go on.
    """
    from ..qat import QATGraph

    if isinstance(prepared, QATGraph):
        return prepared.convert()
    if isinstance(prepared, PreparedGraph | PreparedModules):
        return prepared.convert(parse_memory(memory))
    if not isinstance(prepared, nn.Module) or not any(isinstance(m, QuantModule) for m in prepared.modules()):
        raise DataError(
            "convert takes what bitsmith.prepare or bitsmith.prepare_qat returned, or a model of bitsmith.nn layers, "
            f"not a {type(prepared).__name__}"
        )
    if example_inputs is None:
        raise DataError("convert needs example_inputs to read a model of bitsmith.nn layers: one batch")
    with evaluation_mode(prepared):
        example = read_batches(prepared, [example_inputs])[0]
        own = None if recipe is None else load_recipe(recipe)
        return convert_calibrated(prepared, example, own, get_target(target))
