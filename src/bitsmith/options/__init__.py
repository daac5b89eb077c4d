"""Single options that change a recipe, as 'bitsmith evaluate' and sweeps take them. Needs no torch until it is used.

``table.py`` has one row for each option, ``changes.py`` what each does to a recipe, ``constraints.py`` what does not go
together, with the reasons.
"""

from .constraints import ANY, CONSTRAINTS, Constraint
from .table import RECIPE_OPTIONS, REFUSED, RecipeOption, apply_options

__all__ = ["ANY", "CONSTRAINTS", "RECIPE_OPTIONS", "REFUSED", "Constraint", "RecipeOption", "apply_options"]
