"""The tables of ``evaluate.md``, from the command line itself: ``python -m docs.build`` writes them into the page."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from typer.models import OptionInfo

from bitsmith.cli import app
from bitsmith.options import CONSTRAINTS, RECIPE_OPTIONS, REFUSED

PAGE = Path(__file__).with_name("evaluate.md")
MARK = "<!-- OPTIONS: written by python -m docs.build -->"


def option_tables() -> list[str]:
    """Every option of ``bitsmith evaluate`` by group, what is refused, and what does not go together."""
    lines: list[str] = []
    groups: dict[str, list[str]] = {}
    evaluate = next(c.callback for c in app.registered_commands if c.callback and c.callback.__name__ == "evaluate")
    for parameter in inspect.signature(evaluate).parameters.values():
        info = parameter.annotation.__metadata__[0]
        if isinstance(info, OptionInfo) and not info.hidden:
            groups.setdefault(info.rich_help_panel or "Options", []).append(_row(parameter, info))
    for title, rows in groups.items():
        lines += [f"### {title}", "", "| option | values | what it does |", "|---|---|---|", *rows, ""]
    lines += ["### Refused", "", "Known from Brevitas' command line, and refused with these reasons:", ""]
    lines += ["| option | what it is there | why not here |", "|---|---|---|"]
    for option in RECIPE_OPTIONS.values():
        if option.group == REFUSED:
            kept = f"; `{option.kept}` is taken" if option.kept is not None else ""
            lines.append(f"| `--{option.name}` | {option.help} | {_cell(str(option.refused))}{kept} |")
    lines += ["", "### What does not go together", "", "| options | in a recipe | why |", "|---|---|---|"]
    alike: dict[tuple[str, str], list[str]] = {}
    for constraint in CONSTRAINTS:
        options, _, _ = str(constraint).partition(": ")
        where = [f"with {name}" for name in constraint.having]
        where += ["without " + " and ".join(constraint.lacking)] if constraint.lacking else []
        alike.setdefault((", ".join(where), constraint.reason), []).append(options)
    lines += [f"| {'; '.join(options)} | {where} | {_cell(why)} |" for (where, why), options in alike.items()]
    return [*lines, ""]


def _row(parameter: inspect.Parameter, info: OptionInfo) -> str:
    names = [info.default] if isinstance(info.default, str) else []
    names = [*names, *(info.param_decls or ())] or [f"--{parameter.name.replace('_', '-')}"]
    kinds = [kind for kind in _members(get_args(parameter.annotation)[0]) if kind is not type(None)]
    values = info.metavar or ", ".join(_word(kind) for kind in kinds)
    told = parameter.default not in (None, False) and info.show_default is not False
    default = f" [default: {parameter.default}]" if told else ""
    shown = ", ".join(f"`{name}`" for name in names).replace("/", "`, `")
    return f"| {shown} | {_cell(values)} | {_cell(info.help or '')}{default} |"


def _members(kind: Any) -> tuple[Any, ...]:
    """The types of a union, the words of a literal."""
    if get_origin(kind) in (Literal, Union, UnionType):
        return tuple(member for part in get_args(kind) for member in _members(part))
    return (kind,)


_WORDS = {bool: "", int: "whole number", float: "number", str: "text", Path: "path"}


def _word(kind: Any) -> str:
    return _WORDS.get(kind, str(kind)) if isinstance(kind, type) else f"`{kind}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def written(page: str) -> str:
    """The page with its tables between the marks."""
    before, _, after = page.split(MARK)
    return MARK.join([before, "\n\n" + "\n".join(option_tables()) + "\n", after])
