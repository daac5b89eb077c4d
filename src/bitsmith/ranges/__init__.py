"""Ranges: statistic x granularity x rule, from the values seen to a Grid."""

from .histogram import Histogram
from .rules import Rule, activation_grid, activation_statistic, register_range_rule
from .solve import solve_grid
from .statistics import MinMax, MovingAverage, Statistic, Summary
from .tails import Tails
from .weights import weight_grid

__all__ = [
    "Histogram",
    "MinMax",
    "MovingAverage",
    "Rule",
    "Statistic",
    "Summary",
    "Tails",
    "activation_grid",
    "activation_statistic",
    "register_range_rule",
    "solve_grid",
    "weight_grid",
]
