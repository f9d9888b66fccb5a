"""What a difference in scores is worth: intervals, paired over the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.loading import missing

RESAMPLES = 2000


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for right-or-wrong scores, else a bootstrap."""
    if not scores:
        return 0.0, 1.0
    if _right_or_wrong(scores):
        found = _binomial(int(sum(scores)), len(scores)).proportion_ci(method="wilson")
        return float(found.low), float(found.high)
    return _middle(_resampled(np.asarray(scores), np.random.default_rng(0)))


def difference(scores: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of ``scores - dense`` over the same examples, by a bootstrap."""
    return difference_of_means([(scores, dense)])


def difference_of_means(
    tasks: Sequence[tuple[Sequence[float], Sequence[float]]],
) -> tuple[float, float]:
    """As ``difference``, of the mean over ``tasks``, each resampled by itself and counted once."""
    draw = np.random.default_rng(0)
    means = [_resampled(np.asarray(mine) - np.asarray(dense), draw) for mine, dense in tasks]
    return _middle(np.mean(means, axis=0))


def mcnemar(scores: Sequence[float], dense: Sequence[float]) -> float | None:
    """Exact two-sided p that two right-or-wrong models err equally; None for other scores."""
    if not (_right_or_wrong(scores) and _right_or_wrong(dense)):
        return None
    gained = sum(a > b for a, b in zip(scores, dense, strict=True))
    lost = sum(a < b for a, b in zip(scores, dense, strict=True))
    return float(_binomial(gained, gained + lost).pvalue) if gained + lost else 1.0


def _binomial(hits: int, n: int) -> Any:
    """The test by scipy of ``hits`` successes in ``n`` trials."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise missing("scipy", "eval") from error
    return binomtest(hits, n)


def _right_or_wrong(scores: Sequence[float]) -> bool:
    return set(scores) <= {0.0, 1.0}


def _resampled(values: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    """Means of ``values`` drawn with replacement."""
    counts = draw.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    return np.asarray(counts @ values / len(values))


def _middle(means: NDArray[np.float64]) -> tuple[float, float]:
    """What 95 % of the means lie in; the generator is seeded, so the same run says the same."""
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
