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
    return _bootstrap(np.asarray(scores))


def difference(scores: Sequence[float], dense: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of ``scores - dense`` over the same examples, by a bootstrap."""
    return _bootstrap(np.asarray(scores) - np.asarray(dense))


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


def _bootstrap(values: NDArray[np.float64]) -> tuple[float, float]:
    """Percentiles of the means of resampled ``values``; seeded, so the same run says the same."""
    draw = np.random.default_rng(0)
    counts = draw.multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    low, high = np.quantile(counts @ values / len(values), (0.025, 0.975))
    return float(low), float(high)
