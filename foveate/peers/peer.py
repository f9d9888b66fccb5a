"""What a peer is: somebody else who carries out recipes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from foveate.recipe import Recipe
from foveate.report import Report

How = Callable[[nn.Module, Recipe], AbstractContextManager[Report]]


@dataclass(frozen=True)
class Peer:
    """Somebody to compare with.

    Attributes:
        name: on the command line.
        what: the recipes it carries out, in words.
        example: such a recipe.
        serves: whether a recipe is one of them.
        reduced: called as ``foveate.reduced`` is.
    """

    name: str
    what: str
    example: str
    serves: Callable[[Recipe], bool]
    reduced: How
