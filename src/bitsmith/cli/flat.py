"""Commands with many options: groups of them as one dataclass each, recipe options from their table, help by group."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperCommand

from ..options import RECIPE_OPTIONS, REFUSED, RecipeOption

RecipeChanges = dict[str, Any]
"""The annotation of a parameter that gets the recipe options that were given, by name."""

_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with an option for each field of its parameters that are dataclasses, and for each recipe option.

    The fields' annotations are those of Typer; the command gets the dataclass, and the options that were given.
    """
    own = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    makers: dict[str, Callable[[dict[str, Any]], Any]] = {}
    for parameter in own.parameters.values():
        if dataclasses.is_dataclass(parameter.annotation):
            group: Any = parameter.annotation
            made = _fields(group)
            makers[parameter.name] = functools.partial(_take, group, [field.name for field in made])
            parameters += made
        elif parameter.annotation == RecipeChanges:
            made = [_recipe_option(option) for option in RECIPE_OPTIONS.values()]
            makers[parameter.name] = _given
            parameters += made
        else:
            parameters.append(parameter.replace(kind=_KEYWORD))

    @functools.wraps(command)
    def call(**values: Any) -> None:
        made = {name: make(values) for name, make in makers.items()}
        command(**values, **made)

    call.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    return call


def _fields(group: type) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        inspect.Parameter(field.name, _KEYWORD, default=field.default, annotation=hints[field.name])
        for field in dataclasses.fields(group)
    ]


def _take(group: type, names: list[str], values: dict[str, Any]) -> Any:
    return group(**{name: values.pop(name) for name in names})


def _given(values: dict[str, Any]) -> RecipeChanges:
    taken = {name: values.pop(_parameter(name)) for name in RECIPE_OPTIONS}
    return {name: value for name, value in taken.items() if value is not None}


def _parameter(name: str) -> str:
    return name.replace("-", "_")


def _recipe_option(option: RecipeOption) -> inspect.Parameter:
    kind: Any = Literal[option.kind] if isinstance(option.kind, tuple) else option.kind
    names = [option.name, *option.aliases]
    if option.kind is bool:
        flags = [f"--{name}/--no-{name}" for name in names]
    else:
        flags = [f"--{name}" for name in names]
    only = f"; only {option.kept}: {option.refused}" if option.refused is not None else ""
    info = typer.Option(
        *flags,
        help=option.help + only,
        rich_help_panel=option.group,
        hidden=option.group == REFUSED,
        show_default=False,
    )
    return inspect.Parameter(_parameter(option.name), _KEYWORD, default=None, annotation=Annotated[kind | None, info])


class GroupedCommand(TyperCommand):
    """Lists the options of its help by group (``rich_help_panel``), in the order of their first appearance."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments and options, group by group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                fallback = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or fallback, []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)
