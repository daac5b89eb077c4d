"""Write docs/reference.md from the public docstrings, the named recipes and the targets: ``make docs``."""

from __future__ import annotations

import inspect
from pathlib import Path

import bitsmith
from bitsmith.capture.ops import _OPS
from bitsmith.recipe import BY_EFFORT, NAMED
from bitsmith.targets import list_targets

HERE = Path(__file__).parent


def api() -> list[str]:
    """Every public name with its signature and docstring."""
    lines = ["## Public names", ""]
    for name in sorted(bitsmith._PUBLIC):
        value = getattr(bitsmith, name)
        signature = f"{name}{inspect.signature(value)}" if inspect.isfunction(value) else f"class {name}"
        lines += [
            f"### `bitsmith.{name}`",
            "",
            "```python",
            signature,
            "```",
            "",
            inspect.getdoc(value) or "",
            "",
        ]
    return lines


def recipes() -> list[str]:
    """The named recipes as YAML."""
    lines = ["## Named recipes", "", "A name means the same numbers everywhere and for ever.", ""]
    for name, recipe in (NAMED | BY_EFFORT).items():
        lines += [f"### `{name}`", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]
    return lines


def targets() -> list[str]:
    """The targets, one row each."""
    lines = [
        "## Targets",
        "",
        "| name | what | engine | runs in integers | to the bit |",
        "|---|---|---|---|---|",
    ]
    for target in list_targets():
        operators = ", ".join(sorted(target.integer_operators))
        exact = "yes" if target.exact else "within a bound"
        lines.append(f"| `{target.name}` | {target.description} | {target.engine} | {operators} | {exact} |")
    notes = [f"- `{target.name}`: {note}" for target in list_targets() for note in target.notes]
    return [*lines, "", *notes, ""]


def operators() -> list[str]:
    """The vocabulary of a LayerGraph by role."""
    lines = ["## Operators", "", "| role | operators |", "|---|---|"]
    for role in dict.fromkeys(op.role for op in _OPS.values()):
        lines.append(f"| {role} | {', '.join(op.name for op in _OPS.values() if op.role == role)} |")
    return [*lines, ""]


def main() -> None:
    """Write the page."""
    text = [
        "# Reference",
        "",
        "Written by `make docs` from the code.",
        "",
        *api(),
        *recipes(),
        *targets(),
        *operators(),
    ]
    (HERE / "reference.md").write_text("\n".join(text), encoding="utf-8")


if __name__ == "__main__":
    main()
