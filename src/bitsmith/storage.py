"""Keeping a quantized model: recipe, grids and weights in a folder, without pickles."""

from __future__ import annotations

import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

from .capture import capture, evaluation_mode
from .capture.inputs import Arguments
from .eager import BY_HAND, LayerMapping, assigned, keep_to_marks, structure
from .errors import CheckpointError
from .files import atomic_write, prepare_output_dir, write_text
from .flow import channels_last
from .grid import Format, Grid, Quantizer
from .migrate.layers import converted
from .migrate.static import MIGRATED, place_migrated
from .model import QuantizedModel
from .place.layers import QuantLayer
from .place.place import Placed, place
from .prepare import fold_batch_norm
from .prepare.structure import rebuild
from .recipe import Recipe, load_recipe
from .report.model import Report
from .targets import Target

if TYPE_CHECKING:
    from .dynamic import DynamicModel

MANIFEST, STATE, RECIPE = "quantized.json", "quantized.safetensors", "recipe.yaml"
_VERSION = 1
_LARGEST_INPUT = 1 << 32  # bytes; more is no input but an attack on the memory
_FORMAT: TypeAdapter[Format] = TypeAdapter(Format)


def save(q: QuantizedModel | DynamicModel, folder: str | Path) -> Path:
    """Write ``q`` into ``folder``: ``quantized.safetensors``, ``quantized.json`` and ``recipe.yaml``.

    Each file appears whole or not at all, the manifest last. ``bitsmith.load(folder, model)`` reads them back.
    """
    folder = prepare_output_dir(folder)
    manifest = {
        "version": _VERSION,
        "target": q.target.model_dump(mode="json"),
        "inputs": {},
        "quantizers": {},
        "report": q.report.model_dump(mode="json"),
    }
    if isinstance(q, QuantizedModel):
        state = {name: value.contiguous() for name, value in _unique_state(q.graph).items()}
        manifest |= {
            "inputs": _describe_inputs(q.graph),
            "structure": q.graph.meta.get("structure", []),
            "quantizers": {name: _describe(quantizer) for name, quantizer in _quantizers(q.graph)},
        }
    else:
        from .dynamic.storage import state_of

        state = state_of(q)
    with atomic_write(folder / STATE) as path:
        save_file(state, path)
    write_text(folder / RECIPE, q.recipe.to_yaml())
    write_text(folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")
    return folder


def load(
    folder: str | Path, model: nn.Module, *, mapping: Mapping[type[nn.Module], LayerMapping] | None = None
) -> QuantizedModel | DynamicModel:
    """The quantized model saved in ``folder``; ``model`` is the model it came from (the float one, or what
    ``migrate`` was given), and gives the structure.

    Its weights come from the folder; ``mapping`` is what ``bitsmith.prepare`` was given. Raises CheckpointError where a
    file is missing or damaged, or where the model's structure is not the one that was saved.

    >>> import bitsmith as bs, tempfile
    >>> net, x = nn.Linear(4, 2), torch.randn(8, 4)
    >>> q = bs.quantize(net, [x])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = bs.save(q, folder)
    ...     bool((bs.load(folder, nn.Linear(4, 2))(x) == q(x)).all())
    True
    """
    folder = Path(folder)
    manifest, state = _read(folder)
    recipe = load_recipe(folder / RECIPE)
    try:
        target = Target.model_validate(manifest["target"])
        report = Report.model_validate(manifest["report"])
    except ValidationError as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: {error}") from error
    if recipe.placement == "dynamic":
        from .dynamic.storage import restore

        return restore(model, recipe, target, report, state, folder)
    with evaluation_mode(model):
        example = _example_inputs(manifest)
        if report.placement == MIGRATED:
            graph, placed = place_migrated(converted(model), example, recipe, target)
        else:
            graph, placed = _placed(model, example, manifest, recipe, target, report, mapping)
    _restore(graph, placed, manifest, state, folder)
    channels_last(graph)
    for parameter in graph.parameters():
        parameter.requires_grad_(False)
    return QuantizedModel(graph, recipe, target, report, inspect.signature(model.forward))


def _placed(
    model: nn.Module, example: Arguments, manifest: dict[str, Any], recipe: Recipe, target: Target, report: Report,
    mapping: Mapping[type[nn.Module], LayerMapping] | None,
) -> tuple[fx.GraphModule, Placed]:  # fmt: skip
    module = structure(model, recipe, example, mapping)
    graph = capture(assigned(module, recipe) if report.placement == BY_HAND else module, example)
    if report.placement == BY_HAND:
        keep_to_marks(graph)
    if recipe.step("fold_batch_norm"):
        fold_batch_norm(graph)
    rebuild(graph, manifest.get("structure", []))
    return graph, place(graph, recipe, target)


def _quantizers(graph: fx.GraphModule) -> list[tuple[str, Quantizer]]:
    return [(name, m) for name, m in graph.named_modules() if isinstance(m, Quantizer)]


def _unique_state(graph: fx.GraphModule) -> dict[str, Tensor]:
    """Every tensor once, also where two calls share a layer; but each Quantizer with a grid of its own."""
    grids, seen = _grid_keys(graph), set[int]()
    state = {}
    for name, value in graph.state_dict(keep_vars=True).items():
        if name in grids:
            state[name] = value.detach().clone()
        elif id(value) not in seen:
            seen.add(id(value))
            state[name] = value.detach()
    return state


def _grid_keys(graph: fx.GraphModule) -> set[str]:
    return {f"{name}.{part}" for name, _ in _quantizers(graph) for part in ("scale", "zero_point")}


def _describe(quantizer: Quantizer) -> dict[str, Any]:
    return {"format": _FORMAT.dump_python(quantizer.format, mode="json"), "axis": quantizer.axis}


def _describe_inputs(graph: fx.GraphModule) -> dict[str, Any]:
    leaves: list[Any] = []
    for node in graph.graph.nodes:
        if node.op != "placeholder":
            continue
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            shape = [d if isinstance(d, int) else 2 for d in value.shape]
            leaves.append({"shape": shape, "dtype": str(value.dtype).removeprefix("torch.")})
        else:
            leaves.append({"value": value})
    spec = graph.graph._codegen.pytree_info.in_spec  # type: ignore[attr-defined]
    return {"leaves": leaves, "structure": torch.utils._pytree.treespec_dumps(spec)}


def _example_inputs(manifest: dict[str, Any]) -> Arguments:
    try:
        leaves = [_example(leaf) for leaf in manifest["inputs"]["leaves"]]
        _, structure = json.loads(manifest["inputs"]["structure"])
        args, kwargs = _rebuild(structure, iter(leaves))
        return tuple(args), dict(kwargs)
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, StopIteration) as error:
        raise CheckpointError(f"{MANIFEST} is damaged: its inputs cannot be read ({error})") from error


def _example(leaf: dict[str, Any]) -> Any:
    if "shape" not in leaf:
        return leaf["value"]
    dtype = getattr(torch, leaf["dtype"])
    if math.prod(leaf["shape"]) * dtype.itemsize > _LARGEST_INPUT:
        raise ValueError(f"an input of shape {leaf['shape']} is too large")
    return torch.zeros(leaf["shape"], dtype=dtype)


def _rebuild(node: dict[str, Any], leaves: Iterator[Any]) -> Any:
    """The containers of a pytree; torch's own reader would import any module that the file names."""
    if node["type"] is None:
        return next(leaves)
    children = [_rebuild(child, leaves) for child in node["children_spec"]]
    if node["type"] in ("builtins.tuple", "builtins.list"):
        return tuple(children) if node["type"] == "builtins.tuple" else children
    if node["type"] in ("builtins.dict", "collections.OrderedDict"):
        items = zip(json.loads(node["context"]), children, strict=True)
        return dict(items) if node["type"] == "builtins.dict" else OrderedDict(items)
    raise ValueError(f"inputs in a {node['type']} are not loaded")


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    missing = [name for name in (MANIFEST, STATE, RECIPE) if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} holds no {', '.join(missing)}: give a folder that bitsmith.save wrote")
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        state = load_file(folder / STATE)
    except (ValueError, RecursionError, SafetensorError, OSError) as error:
        raise CheckpointError(f"the model in {folder} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != _VERSION:
        raise CheckpointError(f"{folder / MANIFEST} is not of version {_VERSION}: it was written by another Bitsmith")
    if absent := [
        key for key in ("target", "inputs", "quantizers", "report") if not isinstance(manifest.get(key), dict)
    ]:
        raise CheckpointError(f"{folder / MANIFEST} is damaged: it lacks {', '.join(absent)}")
    return manifest, state


def _restore(
    graph: fx.GraphModule, placed: Placed, manifest: dict[str, Any], state: dict[str, Tensor], folder: Path
) -> None:
    for name, quantizer in _quantizers(graph):
        if f"{name}.scale" in state and name in manifest["quantizers"]:
            scale, zero = state.pop(f"{name}.scale"), state.pop(f"{name}.zero_point", None)
            quantizer.set_grid(_grid(manifest["quantizers"][name], scale, zero, name))
    for module in list(graph.modules()):  # a bias that was left in float has no grid
        if isinstance(module, QuantLayer) and module.bias_quantizer is not None and module.bias_quantizer.grid is None:
            module.bias_quantizer = None
    grids = _grid_keys(graph)
    own = {k: v for k, v in _unique_state(graph).items() if k not in grids}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape)
    ungridded = [name for name, quantizer in _quantizers(graph) if quantizer.grid is None]
    if missing or unexpected or shapes or ungridded:
        raise CheckpointError(
            f"the model in {folder} does not fit this float model: missing {missing[:8]}, unexpected "
            f"{unexpected[:8]}, other shapes {shapes[:8]}, no grid {ungridded[:8]}. Pass the model that was quantized"
        )
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])


def _grid(described: dict[str, Any], scale: Tensor, zero_point: Tensor | None, name: str) -> Grid:
    try:
        fmt, axis = _FORMAT.validate_python(described["format"]), described["axis"]
        if scale.dtype != torch.float32 or not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError("its scale is not a positive float32")
        if scale.ndim and not isinstance(axis, int):
            raise ValueError("it has several scales and no axis")
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"the grid of {name!r} in {MANIFEST} is damaged: {error}") from error
    return Grid(fmt, scale, zero_point, axis)
