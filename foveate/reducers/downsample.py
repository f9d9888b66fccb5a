"""Downsample: a smaller input image, the baseline that needs no method at all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from foveate.reducer import Reducer, Reduction, Tokens


@dataclass(frozen=True)
class Downsample(Reducer, name="downsample"):
    """Shrink the image until its grid of tokens fits the budget.

    It saves in the vision encoder too. For models whose grid follows the image's size; whoever
    prepares the images asks :meth:`shape` and resizes.
    """

    site: ClassVar[str] = "pixels"

    def shape(self, grid: tuple[int, int], budget: int) -> tuple[int, int]:
        """The largest grid of about the same aspect with at most ``budget`` tokens.

        Both sides are scaled alike and rounded down, one row or column is added if it fits.

        Args:
            grid: (height, width) of the image's own grid.
            budget: tokens, at least 1.
        """
        height, width = grid
        if budget < 1 or height < 1 or width < 1:
            raise ValueError(f"No grid of {budget} tokens can be cut from {height}×{width}.")
        if height * width <= budget:
            return grid
        scale = math.sqrt(budget / (height * width))
        wide = max(1, min(int(width * scale), budget))
        high = max(1, min(int(height * scale), budget // wide))
        near = ((high, wide), (high, wide + 1), (high + 1, wide))
        return max((shape for shape in near if math.prod(shape) <= budget), key=math.prod)

    def reduce(self, tokens: Tokens, budget: Sequence[int] | None) -> Reduction:
        """Not possible: there are no pixels here."""
        raise ValueError(
            "downsample shrinks the input image and cannot reduce tokens that exist already. "
            "Resize the image to the grid that Downsample().shape(grid, budget) gives, or use "
            "'pool', which averages tokens."
        )
