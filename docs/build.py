"""Write the pages that come from the code and from measurements: ``make docs``, before the site is built.

``reference.md`` from docstrings, ``recipes.md``, a page per target in ``targets/``, ``compare.md`` from
``benchmarks/RESULTS.md``; and the tables inside ``evaluate.md``.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

import bitsmith
from bitsmith.capture.ops import _OPS
from bitsmith.recipe import BY_EFFORT, NAMED, TI, Recipe
from bitsmith.targets import Target, list_targets
from docs.options import PAGE, written

HERE = Path(__file__).parent
RESULTS = HERE.parent / "benchmarks" / "RESULTS.md"


def api() -> list[str]:
    """Every public name with its signature and docstring."""
    lines = ["## Public names", ""]
    for name in sorted(bitsmith._PUBLIC):
        lines += _entry(f"bitsmith.{name}", getattr(bitsmith, name))
    return lines + _module("Layers: `bitsmith.nn`", bitsmith.nn)


def _module(title: str, module: ModuleType) -> list[str]:
    lines = [f"## {title}", ""]
    for name in module.__all__:
        lines += _entry(f"{module.__name__}.{name}", getattr(module, name))
    return lines


def _entry(path: str, value: object) -> list[str]:
    """A name's heading, signature and docstring; doctests as code."""
    name = path.rpartition(".")[2]
    signature = f"{name}{inspect.signature(value)}" if inspect.isfunction(value) else f"class {name}"
    doc = inspect.getdoc(value) or ""
    return [f"### `{path}`", "", "```python", signature, "```", "", *_doctests_as_code(doc), ""]


def _doctests_as_code(doc: str) -> list[str]:
    lines: list[str] = []
    inside = False
    for line in doc.splitlines():
        starts, ends = line.startswith(">>> ") and not inside, inside and not line.strip()
        if starts:
            lines.append("```pycon")
        if ends:
            lines.append("```")
        inside = (inside or starts) and not ends
        lines.append(line.replace("``", "`") if not inside else line)
    return [*lines, "```"] if inside else lines


def recipes() -> list[str]:
    """The named recipes: what each is made of in words, then as YAML."""
    lines = [
        "# Recipes", "",
        "A recipe is what weights, activations and biases are quantized to, a placement, steps and overrides. A name",
        "means the same numbers everywhere and for ever; `bitsmith.load_recipe(name).to_yaml()` is where to start one",
        "of your own.", "",
        "| name | weights | activations | steps |", "|---|---|---|---|",
    ]  # fmt: skip
    for name, recipe in (NAMED | BY_EFFORT | TI).items():
        steps = ", ".join(step.name for step in recipe.steps)
        weights, activations = _spec(recipe, "weights"), _spec(recipe, "activations")
        lines.append(f"| [`{name}`](#{name.lower()}) | {weights} | {activations} | {steps} |")  # anchors are lower case
    lines += [
        "", "- **weights, activations**: a format (integers of so many bits, or floats of exponent and mantissa bits),",
        "  symmetric or affine, float or power-of-two (po2) scales, one per tensor, channel, group or token, and the",
        "  range rule: which values the grid must cover.",
        "- **bias**: 32-bit integers at the scale of the accumulator, unless it says otherwise.",
        "- **placement**: where Quantizers stand: `runtime` (what the target runs in integers), `fx` (operands of an",
        "  add share a scale), `flexml` (outputs too), `layerwise` (only what layers read), `dynamic` (at run time).",
        "- **steps**: what is done to lose less, in this order; see [the algorithms](algorithms.md).",
        "- **overrides**: other numbers for some layers, by name, type or place.",
        "- **names in capitals** are those of TI's quantization tools: [TI's devices](tidl.md#recipes-by-tis-names).",
        "",
    ]  # fmt: skip
    for name, recipe in (NAMED | BY_EFFORT | TI).items():
        lines += [f"## {name}", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return lines


def _spec(recipe: Recipe, part: str) -> str:
    spec = getattr(recipe, part)
    if spec is None:
        return "float"
    fmt = spec.format
    kind = f"int{fmt.bits}" if hasattr(fmt, "signed") else f"float e{fmt.exponent_bits}m{fmt.mantissa_bits}"
    shape = "symmetric" if spec.symmetric else "affine"
    scale = ", po2 scales" if spec.scale == "po2" else ""
    when = ", at run time" if spec.dynamic else ""
    limit = f"{spec.range.limit:g}" if spec.range.limit is not None else ""
    ends = f"fixed at {limit}" if spec.range.fixed else spec.range.name + (f", at most {limit}" if limit else "")
    return f"{kind}, {shape}, per {spec.granularity}{scale}, {ends}{when}"


def target_page(target: Target) -> list[str]:
    """One target: how it is used, and what it runs."""
    yes = {True: "yes", False: "no"}
    bits = ", ".join(map(str, target.integer_bits)) or "none"
    rows = {
        "default recipe": f"`{target.default_recipe}`",
        "runs files in": target.engine,
        "bits of weights": ", ".join(map(str, target.weight_bits)),
        "bits of activations": ", ".join(map(str, target.activation_bits)),
        "bits that compute in integers": bits,
        "scales": ", ".join(target.scales),
        "one scale per": ", ".join(target.granularities),
        "adds rescale their operands": yes[target.rescales],
        "float formats": yes[target.floats],
        "agrees with the simulation": "to the bit" if target.exact else "within a bound",
        "runs in integers": ", ".join(sorted(target.integer_operators)),
    }
    lines = [f"# {target.name}", "", f"{target.description}.", ""]
    lines += ["<!-- illustrative -->", "```python", f'q = bs.quantize(model, batches, target="{target.name}")', "```"]
    lines += ["", "| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items() if value), ""]
    if target.limits is not None:
        kept = {k.replace("_", " "): v for k, v in target.limits.model_dump().items() if isinstance(v, int | float)}
        lines += ["## Limits", "", "| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in kept.items()), ""]
        lines += ["More: [models for these chips](../max78000.md).", ""]
    lines += [f"- {note}" for note in target.notes]
    if target.tidl is not None:
        lines += ["", "More: [TI's devices](../tidl.md)."]
    if target.name == "torch":
        lines += ["", "More: [integers in PyTorch](../torch-engine.md)."]
    return [*lines, ""]


def operators() -> list[str]:
    """The vocabulary of a LayerGraph by role."""
    lines = ["## Operators", "", "| role | operators |", "|---|---|"]
    for role in dict.fromkeys(op.role for op in _OPS.values()):
        lines.append(f"| {role} | {', '.join(op.name for op in _OPS.values() if op.role == role)} |")
    return [*lines, ""]


def comparison() -> list[str]:
    """What was measured, as ``benchmarks.tables`` wrote it."""
    measured = RESULTS.read_text(encoding="utf-8").partition("\n")[2].strip()
    return [
        "# How it compares", "",
        "Only what was measured, with commands in `benchmarks/`; every row is kept in `benchmarks/results/` with its",
        "checkpoint, samples, seed and commit. Times are from one machine of two cores, interleaved with what they are",
        "compared with: ratios carry over better than milliseconds.", "",
        measured, "",
    ]  # fmt: skip


def main() -> None:
    """Write the pages."""
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    reference = ["# Reference", "", "Written by `make docs` from the code.", "", *api(), *operators()]
    pages = {"reference.md": reference, "recipes.md": recipes(), "compare.md": comparison()}
    pages |= {f"targets/{target.name}.md": target_page(target) for target in list_targets()}
    for name, lines in pages.items():
        path = HERE / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
