"""``prepare_qat``: from a float or a quantized model to one that trains on its grids."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map_only

from ..capture import ForwardFunction, capture, copy_graph, evaluation_mode, read_batches
from ..capture.inputs import Arguments
from ..capture.ops import module_of, op_of, quantizer_of
from ..eager import has_stubs, with_module_recipes
from ..errors import DataError, RecipeError
from ..flow import channels_last, check_arguments, resolve
from ..model import QuantizedModel
from ..place.layers import QuantLayer
from ..place.place import Placed, place
from ..prepare.fold_batch_norm import Unfolded, fold_batch_norm
from ..recipe import Override, PlacementName, Recipe
from ..targets import Target, get_target
from .build import Kinds, training_graph
from .distillation import Distillation
from .graph import QATGraph, Template
from .groups import groups_of
from .oscillation import Oscillation
from .parameters import restore_parameters
from .randomness import marking_randomness, take_randomness, what_is_lost
from .schedule import QATSchedule


def prepare_qat(
    model: nn.Module, recipe: str | Path | Recipe | None = None, example_inputs: Any = None,
    target: str | Target = "onnxruntime", *, calibration: Iterable[Any] | None = None, kind: str | Kinds = "auto",
    schedule: QATSchedule | None = None, teacher: nn.Module | Distillation | None = None,
    oscillation: Oscillation | None = None,
    placement: PlacementName | None = None, overrides: Iterable[Override] = (), forward: ForwardFunction | None = None,
) -> QATGraph:  # fmt: skip
    """A copy of ``model`` that trains on the grids of ``recipe``, in your own loop; ``bitsmith.convert`` ends it.

    ``model`` is a float model, or the result of ``bitsmith.quantize``. A float model's batch norms go on learning
    beside folded weights (``bitsmith.qat.layers``); its ranges start from ``calibration`` (batches as
    ``bitsmith.quantize`` takes them), else from the first batch that runs in train mode. A quantized model brings
    recipe, target and grids, and the weights and biases that its steps left, batch norms folded.

    ``kind``: what ranges follow. ``"moving-average"``: the ends of the data; ``"lsq"``: step sizes learn, ``"lsq+"``:
    and offsets; ``"pact"``: clipping thresholds (with ``"lsq"`` for weights); ``"auto"``: ``moving-average`` from 8
    bits on, ``lsq`` (``lsq+`` for affine activations) below. ``bitsmith.qat.Kinds(weights, activations)`` tells the
    two apart.
    ``schedule`` freezes norms and ranges. ``teacher``: the float model, mostly, or a ``bitsmith.qat.Distillation``; add
    ``p.penalty()`` to the loss. ``oscillation``: a ``bitsmith.qat.Oscillation``, to damp or freeze weights that jump to
    and fro. ``example_inputs``, ``placement``, ``overrides`` and ``forward`` are those of
    ``bitsmith.quantize``.

    The result trains as any module: dropouts act in train mode, parameters that were frozen stay frozen. What differs
    from the model in train mode is told by name in its ``notes``. Of the recipe's steps, batch norms are folded; the
    others belong to post-training quantization. Raises CaptureError where the model cannot be read as a graph.

    >>> import torch
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
    >>> p = prepare_qat(net, "int8", torch.randn(2, 3, 8, 8))
    >>> optimizer = torch.optim.SGD(p.parameters(), lr=0.01)
    >>> for _ in range(3):
    ...     p(torch.randn(16, 3, 8, 8)).square().mean().backward()
    ...     optimizer.step()
    >>> q = p.convert()
    >>> q.report.coverage.fraction
    1.0
    """
    if isinstance(model, QATGraph):
        raise DataError(
            "this model is prepared for training already: train it; for other options prepare the float model again, "
            "or what bitsmith.convert makes of this one"
        )
    kinds = kind if isinstance(kind, Kinds) else Kinds("lsq" if kind == "pact" else kind, kind)
    if isinstance(model, QuantizedModel):
        if recipe is not None or calibration is not None or placement is not None or tuple(overrides):
            raise DataError("a quantized model trains by the recipe and from the grids that it has: give it alone")
        p = _from_quantized(model, kinds)
    else:
        target = get_target(target)
        recipe = resolve(target.default_recipe if recipe is None else recipe, placement, overrides)
        p = _from_float(model, recipe, target, example_inputs, calibration, kinds, forward)
    if teacher is not None:
        p.distillation = teacher if isinstance(teacher, Distillation) else Distillation(teacher)
    if oscillation is not None:
        p.watch_oscillations(oscillation)
    if schedule is not None:
        schedule.attach(p)
    return p.train()


def _from_float(
    model: nn.Module, recipe: Recipe, target: Target, example_inputs: Any, calibration: Iterable[Any] | None,
    kinds: Kinds, forward: ForwardFunction | None,
) -> QATGraph:  # fmt: skip
    check_arguments(model)
    _check_target(target)
    if has_stubs(model):
        raise DataError(
            "a model with a QuantStub is quantized by hand: write it with bitsmith.nn layers, calibrate them in place "
            "(bitsmith.nn.calibrate), train them, then bitsmith.convert(model, example_inputs=...); or take the stubs "
            "out, and prepare_qat places quantizers itself"
        )
    with evaluation_mode(model):
        batches = [] if calibration is None else read_batches(model, calibration, forward)
        if example_inputs is None and not batches:
            raise DataError(
                "prepare_qat needs example_inputs: one batch, as the model takes it; or calibration batches"
            )
        example = batches[0] if example_inputs is None else read_batches(model, [example_inputs], forward)[0]
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        batches, example = tree_map_only(Tensor, lambda t: t.to(device), (batches, example))
        graph = _captured(model, example)
    recipe = with_module_recipes(recipe, model, graph)
    notes = [*graph.meta.get("notes", []), *restore_parameters(graph, model)]
    unfolded: Unfolded = {}
    if recipe.step("fold_batch_norm"):
        notes += _fold(graph, unfolded)
    if left := [step.name for step in recipe.steps if step.name != "fold_batch_norm"]:
        notes.append(f"not done, since training takes their place: {', '.join(left)}")
    drops = take_randomness(graph, model)
    notes += what_is_lost(model, {drop.path for drop in drops})
    placed = place(graph, recipe, target)
    training = training_graph(graph, placed.groups, unfolded, kinds, target, drops)
    channels_last(graph)
    p = QATGraph(training, Template(graph, placed, recipe, target), inspect.signature(model.forward), notes)
    p.to(device)
    p.start_weights()
    if batches:
        p.calibrate(batches)
    return p


def _captured(model: nn.Module, example: Arguments) -> fx.GraphModule:
    with marking_randomness(model):
        return capture(model, example)


def _check_target(target: Target) -> None:
    if target.shifts is not None:
        raise RecipeError(
            f"target {target.name} only shifts, so that the scales of its layers follow from one another; training "
            "them one by one has no meaning there: use bitsmith.quantize"
        )


def _from_quantized(q: QuantizedModel, kinds: Kinds) -> QATGraph:
    """Train on from where post-training quantization ended."""
    _check_target(q.target)
    graph = copy_graph(q.graph)
    for parameter in graph.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    compute = [n for n in graph.graph.nodes if op_of(n).role == "compute"]
    layers = [n for n in compute if isinstance(module_of(n), QuantLayer) or quantizer_of(n.args[0]) is not None]
    placed = Placed(layers=layers, groups=groups_of(graph))
    training = training_graph(graph, placed.groups, {}, kinds, q.target)
    notes = ["trained from a quantized model: its batch norms are folded and do not learn"]
    p = QATGraph(training, Template(graph, placed, q.recipe, q.target), q.signature, notes)
    p.to(next((parameter.device for parameter in q.parameters()), torch.device("cpu")))
    p.start_from(graph)
    for layer in p.layers().values():  # its weights are on their grids, which the ends of the weights would not give
        if layer.weight_quantizer is not None and layer.weight_quantizer.kind == "moving-average":
            layer.weight_quantizer.freeze()
    return p


def _fold(graph: fx.GraphModule, unfolded: Unfolded) -> list[str]:
    """Fold batch norms as the file will have them, and keep apart what trains apart."""
    trains = {
        name.removesuffix("weight"): p.requires_grad for name, p in graph.named_parameters() if name.endswith("weight")
    }
    before = {name for name, m in graph.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    notes = fold_batch_norm(graph, unfolded)
    for path, module in graph.named_modules():
        if trains.get(f"{path}."):
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)
    kept = [note for note in notes if note.rpartition(" into ")[2] not in unfolded]
    left = sorted(before & {name for name, _ in graph.named_modules()})
    if left:
        kept.append(f"batch norms that no layer takes in run in float: {', '.join(left)}")
    return [f"{note}; it does not learn any more" if " folded into " in note else note for note in kept]
