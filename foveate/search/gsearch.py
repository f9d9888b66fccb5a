"""G-Search: the least tokens in every layer that lose nothing. arXiv 2412.00556.

From the shallowest layer to the deepest, the least keep ratio that the objective accepts; while a
layer is probed all deeper ones keep as much (removed tokens cannot come back, and deeper layers are
searched later). The paper finds each ratio by Bayesian optimisation. Under its own assumption, that
the objective only gets worse with fewer tokens, bisection finds the same with fewer probes, and is
the default here.

Departures: the paper says neither tolerance nor test. Here a ratio is accepted when the mean over
the examples, less what the dense model has on the very same ones, is above ``-max_drop`` with a
given confidence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from foveate.search.objective import lower
from foveate.search.probe import Probe

FIRST = 2  # the paper keeps all tokens in the first two layers
STEP = 1 / 64
TRIALS = 8


@dataclass(frozen=True)
class Tried:
    """One probe: ``keep`` from ``layer`` on, and what came of it.

    Attributes:
        drop: of the mean, against the untouched model.
        spare: what could be lost besides; below 0 it was too much.
    """

    layer: int
    keep: float
    drop: float
    spare: float


class Choose(Protocol):
    """Looks for the least ratio in (0, high] whose ``spare`` is not below 0; ``high`` is one."""

    def __call__(self, high: float, spare: Callable[[float], float]) -> float: ...


@dataclass
class GSearch:
    """One search.

    Attributes:
        probe: the calibration set, before layer 0.
        max_drop: of the objective's mean, in its own unit (0.005 is half a point of accuracy).
        confidence: with which the drop is below ``max_drop``; 0.5 compares the bare means.
        choose: how the least ratio of a layer is looked for; None means ``bisect(STEP)``.
        first: the first layer that may be reduced.
        known: what was tried before (a search that goes on).
        note: told of every further one at once.
        tried: all of them.
    """

    probe: Probe
    max_drop: float
    confidence: float = 0.8
    choose: Choose | None = None
    first: int = FIRST
    known: Sequence[Tried] = ()
    note: Callable[[Tried], object] | None = None

    def __post_init__(self) -> None:
        self.tried = list(self.known)

    def run(self) -> Iterator[list[float]]:
        """Yields the curve after each layer; the deeper ones hold the value of the last."""
        layers, choose = self.probe.runner.shape.layers, self.choose or bisect(STEP)
        alive = [self.probe.runner.keep] * layers
        for layer in range(self.first, layers):
            self.probe.decide(alive, layer)
            keep = choose(alive[layer - 1], self._probing(alive, layer))
            alive[layer:] = [keep] * (layers - layer)
            yield list(alive)

    def _probing(self, alive: Sequence[float], layer: int) -> Callable[[float], float]:
        def spare(keep: float) -> float:
            for before in self.tried:
                if before.layer == layer and abs(before.keep - keep) < 1e-6:
                    return before.spare
            self.tried.append(self._try(alive, layer, keep))
            if self.note:
                self.note(self.tried[-1])
            return self.tried[-1].spare

        return spare

    def _try(self, alive: Sequence[float], layer: int, keep: float) -> Tried:
        curve = [*alive[:layer], *[keep] * (len(alive) - layer)]
        pairs = zip(self.probe.values(curve), self.probe.dense, strict=True)
        apart = [mine - dense for mine, dense in pairs]
        spare = lower(apart, self.confidence) + self.max_drop
        return Tried(layer, keep, -sum(apart) / len(apart), spare)


def bisect(step: float) -> Choose:
    """Halving: the least multiple of ``step`` that is accepted if all larger ones are."""

    def choose(high: float, spare: Callable[[float], float]) -> float:
        low, top = 0, max(1, round(high / step))
        while top - low > 1:
            middle = (low + top) // 2
            low, top = (low, middle) if spare(middle * step) >= 0 else (middle, top)
        return min(high, top * step)

    return choose


def bayes(step: float, trials: int = TRIALS, seed: int = 0) -> Choose:
    """The paper's Bayesian optimisation: a Gaussian process over the ratio, least one accepted."""

    def choose(high: float, spare: Callable[[float], float]) -> float:
        import optuna

        top = max(1, round(high / step))
        good = [top]

        def value(trial: optuna.Trial) -> float:
            count = trial.suggest_int("count", 1, top)
            room = spare(count * step)
            trial.set_constraint("drop", -room)
            if room >= 0:
                good.append(count)
            return count

        sampler = optuna.samplers.GPSampler(seed=seed, n_startup_trials=2)
        optuna.create_study(sampler=sampler).optimize(value, n_trials=min(trials, top))
        return min(high, min(good) * step)

    return choose
