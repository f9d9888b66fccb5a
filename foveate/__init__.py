"""foveate: vision-token reduction for multimodal LLMs."""

from foveate.recipe import Recipe, recipe
from foveate.reducer import Reducer, Reduction, Scorer, Tokens, reducer
from foveate.report import Report
from foveate.schedule import Schedule
from foveate.session import attach, detach, reduced

__all__ = [
    "Recipe",
    "Reducer",
    "Reduction",
    "Report",
    "Schedule",
    "Scorer",
    "Tokens",
    "attach",
    "detach",
    "recipe",
    "reduced",
    "reducer",
]
