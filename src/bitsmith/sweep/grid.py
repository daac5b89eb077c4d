"""A sweep's file: models x seeds x configurations, and which of them are left out."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import BitsmithError, RecipeError
from ..evaluate.images import Preprocess
from ..options import Constraint, apply_options
from ..recipe import load_recipe
from ..targets import get_target

Options = dict[str, Any]
_OWN = ("recipe", "target")  # what a configuration says beside the options of 'bitsmith evaluate'


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelData(_Strict):
    """A model with the data it is calibrated and judged on; paths are relative to where the sweep is run.

    Images are prepared as the model's own weights state, with what ``preprocess`` says in its place; ``label_map`` is a
    file that says which class each of their folders is.
    """

    model: str
    weights: str | None = None
    calibration: str
    validation: str
    calibration_samples: int = Field(default=1000, ge=1)
    validation_samples: int | None = Field(default=None, ge=1)
    preprocess: dict[str, Any] = {}
    label_map: str | None = None

    @field_validator("preprocess")
    @classmethod
    def _known(cls, given: dict[str, Any]) -> dict[str, Any]:
        prepared(Preprocess(), given)
        return given


def prepared(stated: Preprocess, given: dict[str, Any]) -> Preprocess:
    """What a model states of its images, with what is given in its place, item by item.

    >>> print(prepared(Preprocess(crop=299, mean=(0.5,), std=(0.5,)), {"resize": 320}))
    shorter side to 320 (bilinear), centre 299 x 299, mean (0.5), standard deviation (0.5)
    """
    sides = {"squash": False} if "resize" in given else {}
    return Preprocess.model_validate({**stated.model_dump(), **sides, **given})


class Sweep(_Strict):
    """``grid`` maps options to lists, of which all combinations are run; ``runs`` lists more of them one by one.

    Options are those of ``bitsmith evaluate`` by their names, and ``recipe`` and ``target``; ``base`` holds for all.
    ``constraints`` are the file's own, beside those that options have anyway (``bitsmith.options.CONSTRAINTS``):
    configurations that meet one are skipped with its reason.

    >>> sweep = Sweep(
    ...     models=[ModelData(model="bitsmith.demo:digits_net", calibration="a", validation="b")],
    ...     grid={"weight-bit-width": [8, 4], "act-bit-width": [8, 4]},
    ... )
    >>> len(list(sweep.configurations()))
    4
    """

    models: tuple[ModelData, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    base: Options = {}
    grid: dict[str, list[Any]] = {}
    runs: tuple[Options, ...] = ()
    constraints: tuple[Constraint, ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Sweep:
        if not self.grid and not self.runs:
            raise ValueError("there is nothing to run: give grid or runs")
        if empty := [name for name, values in self.grid.items() if not values]:
            raise ValueError(f"grid: {empty[0]} has no values")
        return self

    def options(self) -> Iterator[Options]:
        """The options of every configuration."""
        if self.grid:
            for values in itertools.product(*self.grid.values()):
                yield {**self.base, **dict(zip(self.grid, values))}
        for run in self.runs:
            yield {**self.base, **run}

    def configurations(self) -> Iterator[Configuration]:
        """All configurations, model by model, so that a worker finds the model it has loaded."""
        files: dict[str, str] = {}
        for model, seed in itertools.product(self.models, self.seeds):
            for options in self.options():
                yield self._configuration(model, seed, options, files)

    def _configuration(self, model: ModelData, seed: int, options: Options, files: dict[str, str]) -> Configuration:
        named = {name: options[name] for name in _OWN if name in options}
        changes = {name: value for name, value in options.items() if name not in _OWN}
        work = {"model": model.model_dump(mode="json"), "seed": seed, "target": named.get("target", "onnxruntime")}
        skipped, what = None, {}
        for constraint in self.constraints:
            if constraint.forbids(options):
                skipped = constraint.reason
        try:
            target = get_target(work["target"])
            recipe = apply_options(load_recipe(named.get("recipe", target.default_recipe)), changes)
            target.check(recipe)
            if recipe.placement == "dynamic":
                raise RecipeError("sweeps are of static recipes: dynamic ones have nothing to calibrate or to share")
            what = recipe.model_dump(mode="json")
        except BitsmithError as error:
            skipped = skipped or str(error)
        work["recipe"] = what
        # A recipe's name and the spelling of its options do not change the result; the contents of files do.
        identity = {**work, "recipe": {k: v for k, v in what.items() if k != "name"} or options}
        identity["files"] = [
            files.setdefault(path, _fingerprint(path))
            for path in (model.weights, model.calibration, model.validation, model.label_map)
            if path is not None
        ]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:20]
        return Configuration(key, work, options, skipped)


@dataclass(frozen=True)
class Configuration:
    """One row to be: ``work`` is all that a worker needs, as plain data; ``skipped`` says why there is none to do."""

    key: str
    work: dict[str, Any]
    options: Options
    skipped: str | None


def _fingerprint(spec: str) -> str:
    """The contents of a file, or the names and sizes in a folder; of the user's own function its file's."""
    path = Path(spec)
    place = Path(spec.rpartition(":")[0])
    if path.is_dir():
        listing = sorted((str(f.relative_to(path)), f.stat().st_size) for f in path.rglob("*") if f.is_file())
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    for file in (path, place):
        if file.is_file():
            with file.open("rb") as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
    return spec


def load_sweep(path: str | Path) -> Sweep:
    """The sweep that a YAML file describes; RecipeError names the field that is wrong."""
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(f"the sweep file {str(path)!r} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"{str(path)!r} must be a mapping with models and grid or runs")
    try:
        return Sweep.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'sweep'}: {e['msg']}" for e in error.errors())
        raise RecipeError(f"{str(path)!r} is not valid: {problems}") from error
