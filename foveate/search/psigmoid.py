"""P-Sigmoid: the best sigmoid of depth within a budget. arXiv 2412.00556.

``r_i = top / (1 + exp(slope · (i - middle)))`` with i counted from 1, clipped to 1; the first
layers keep everything. ``middle`` follows from the budget, so only ``slope``, or ``slope`` and
``top``, are searched: by Bayesian optimisation (Optuna's Gaussian process), as in the paper. Where
the paper's text leaves it open whether ``top`` is searched, ``top = 1`` is the default.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from foveate.loading import missing
from foveate.schedule import Schedule
from foveate.search.budget import Budget
from foveate.search.probe import Probe

if TYPE_CHECKING:
    import optuna

SLOPES = 0.02, 2.0
TOPS = 0.3, 1.0
START = 0.222  # fitted to the paper's curve for LLaVA-1.5-7B


@dataclass(frozen=True)
class PSigmoid:
    """One search.

    Attributes:
        probe: the calibration set.
        first: the first layer that is reduced.
        top: the height of the sigmoid; None searches it, too.
    """

    probe: Probe
    budget: Budget
    first: int = 2
    top: float | None = 1.0

    def curve(self, slope: float, top: float) -> tuple[float, ...]:
        """The curve of this slope that the budget allows.

        Raises:
            ValueError: when none is.
        """
        layers, entrance = self.probe.runner.shape.layers, self.probe.runner.keep

        def at(middle: float) -> tuple[float, ...]:
            made = Schedule.sigmoid(
                slope=slope, middle=middle, top=top, full=self.first, entrance=entrance
            )
            return made.resolve(layers).alive

        return at(self.budget.largest(at, *middles(slope, layers)))

    def objective(self, trial: optuna.Trial) -> float:
        """The mean over the calibration set; for ``study.optimize``."""
        slope = trial.suggest_float("slope", *SLOPES, log=True)
        top = trial.suggest_float("top", *TOPS) if self.top is None else self.top
        curve = self.curve(slope, top)
        trial.set_user_attr("alive", list(curve))
        values = self.probe.values(curve)
        return sum(values) / len(values)

    def begin(self, study: optuna.Study, like: Sequence[float] = ()) -> None:
        """Ask first for the slope of the paper's curve, or of the curve ``like``."""
        slope, top = fit(like, self.first) if like else (START, 1.0)
        point = {"slope": slope} | ({"top": top} if self.top is None else {})
        study.enqueue_trial(point, skip_if_exists=True)


def middles(slope: float, layers: int) -> tuple[float, float]:
    """The range of middles, from hardly anything kept to hardly anything dropped."""
    return -20 / slope, layers + 20 / slope


def fit(alive: Sequence[float], first: int = 2) -> tuple[float, float]:
    """(slope, top) of the sigmoid nearest to a curve, by least squares from layer ``first`` on."""
    try:
        from scipy.optimize import curve_fit
    except ImportError as error:
        raise missing("scipy", "search") from error
    import numpy as np

    depth = np.arange(first + 1, len(alive) + 1, dtype=float)

    def sigmoid(i: np.ndarray, slope: float, top: float, middle: float) -> np.ndarray:
        return top / (1 + np.exp(np.clip(slope * (i - middle), -50, 50)))

    start = (START, 1.0, len(alive) / 2)
    bounds = ((SLOPES[0], TOPS[0], -len(alive)), (SLOPES[1], TOPS[1], 2 * len(alive)))
    found, _ = curve_fit(sigmoid, depth, np.array(alive[first:]), start, bounds=bounds)
    return float(found[0]), float(found[1])
