"""What a schedule may cost, said in one of four ways, and the largest curve within that.

A prompt has ``text`` rows that always stay and ``vision`` rows of which the schedule keeps some.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from foveate.cost import TextShape
from foveate.schedule import Schedule

Lengths = Sequence[tuple[int, int]]
_HALVINGS = 60


@dataclass(frozen=True)
class Budget:
    """A limit, and the cost of a curve in the same unit.

    Attributes:
        said: for people.
        cost: of a curve ``alive``; never falls when more is kept.
    """

    said: str
    limit: float
    cost: Callable[[Sequence[float]], float]

    def holds(self, alive: Sequence[float]) -> bool:
        return self.cost(alive) <= self.limit

    def largest(self, curve: Callable[[float], Sequence[float]], low: float, high: float) -> float:
        """The largest x in [low, high] whose ``curve(x)``, rising with x, is within the limit.

        Raises:
            ValueError: when even ``curve(low)`` costs more.
        """
        if self.holds(curve(high)):
            return high
        if not self.holds(curve(low)):
            raise ValueError(
                f"A budget of {self.said} cannot be met: the least curve of this kind costs "
                f"{self.cost(curve(low)):.4g} and {self.limit:.4g} is allowed. Allow more, or "
                "reduce earlier (--first)."
            )
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.holds(curve(middle)) else (low, middle)
        return low


def share(fraction: float, shape: TextShape, lengths: Lengths) -> Budget:
    """A fraction of the prefill FLOPs that vision tokens add to what text alone costs."""
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"The budget is {fraction}; it is a fraction in (0, 1], such as 0.125.")
    floor, dense = ends(shape, lengths)
    limit = floor + fraction * (dense - floor)
    return Budget(f"{fraction:.4g} of the vision tokens' FLOPs", limit, _flops(shape, lengths))


def ends(shape: TextShape, lengths: Lengths) -> tuple[float, float]:
    """Prefill FLOPs of the decoder layers with no vision token and with all, means over prompts."""
    cost = _flops(shape, [(text, 0) for text, _ in lengths])
    return cost([0.0] * shape.layers), _flops(shape, lengths)([1.0] * shape.layers)


def flops(limit: float, shape: TextShape, lengths: Lengths) -> Budget:
    """Prefill FLOPs of the decoder layers, the mean over prompts."""
    return Budget(f"{limit / 1e12:.4g} TFLOPs", limit, _flops(shape, lengths))


def tokens(limit: float, lengths: Lengths) -> Budget:
    """Vision tokens, the mean over layers and prompts."""

    def cost(alive: Sequence[float]) -> float:
        schedule = Schedule(alive=tuple(alive))
        kept = (schedule.count(b, n) for b in range(len(alive)) for _, n in lengths)
        return sum(kept) / len(alive) / len(lengths)

    return Budget(f"{limit:.4g} tokens, averaged over layers", limit, cost)


def milliseconds(limit: float, measured: Sequence[tuple[int, float]], lengths: Lengths) -> Budget:
    """Prefill time, by what one layer took at some lengths: ``measured`` (rows, ms), ascending."""

    def layer(rows: float) -> float:
        before = max([m for m in measured if m[0] <= rows], default=measured[0])
        after = min([m for m in measured if m[0] >= rows], default=measured[-1])
        part = (rows - before[0]) / (after[0] - before[0]) if after[0] > before[0] else 0.0
        return before[1] + part * (after[1] - before[1])

    def cost(alive: Sequence[float]) -> float:
        schedule = Schedule(alive=tuple(alive))
        each = (layer(t + schedule.count(b, n)) for b in range(len(alive)) for t, n in lengths)
        return sum(each) / len(lengths)

    return Budget(f"{limit:.4g} ms to the first token", limit, cost)


def _flops(shape: TextShape, lengths: Lengths) -> Callable[[Sequence[float]], float]:
    def cost(alive: Sequence[float]) -> float:
        schedule = Schedule(alive=tuple(alive))
        rows = (text + schedule.count(b, n) for b in range(len(alive)) for text, n in lengths)
        return sum(map(shape.layer_flops, rows)) / len(lengths)

    return cost
