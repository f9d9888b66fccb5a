"""Which method where, and how much: entrance, layers and schedule chosen together.

Every candidate is a recipe of known cost: what is left open by its choices is solved from its share
of the FLOPs. Two values are told to Optuna, the objective's mean and that share, and the recipes
that no other one beats in both are the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import foveate
from foveate.recipe import Recipe
from foveate.schedule import Schedule
from foveate.search.budget import Budget, ends, flops, share
from foveate.search.found import figure
from foveate.search.objective import Asked, Calibration, lower
from foveate.search.prefix import Runner
from foveate.search.psigmoid import SLOPES, START, middles

if TYPE_CHECKING:
    import optuna

NONE = "none"
ENTRANCES = (NONE, "prumerge", "prumerge+", "aim-merge", "pool")
LAYERS = (NONE, "attention", "fastv", "pagerank")
SHAPES = ("sigmoid", "step")
LEAST = 0.02  # of the vision tokens, at the entrance

# What the papers propose, at any share: always among the first trials.
STARTS: tuple[Mapping[str, Any], ...] = (
    {"entrance": "aim-merge", "layers": "pagerank", "shape": "ramp"},
    {"entrance": NONE, "layers": "fastv", "shape": "step", "before": 2},
    {"entrance": NONE, "layers": "attention", "shape": "sigmoid", "slope": START},
    {"entrance": "prumerge", "layers": NONE},
    {"entrance": "prumerge+", "layers": NONE},
    {"entrance": "pool", "layers": NONE},
)


@dataclass
class Auto:
    """One search.

    Attributes:
        model: with nothing attached.
        calibration: the prompts.
        shares: least and most FLOPs, as a share of what vision tokens add to the text's.
        entrances, layers: the methods to choose from; ``none`` among them or not.
    """

    model: Any
    calibration: Calibration
    shares: tuple[float, float]
    entrances: Sequence[str] = ENTRANCES
    layers: Sequence[str] = LAYERS

    def __post_init__(self) -> None:
        """Run every prompt once through the untouched model."""
        runner = Runner(self.model)
        self.depth = runner.shape.layers
        self.dense: list[float] = []
        self._asked: list[Asked] = []
        lengths: list[tuple[int, int]] = []
        for made in self.calibration:
            state = runner.start(made.batch)
            logits = runner.logits(runner.flat(state), made.batch)
            asked, values = self.calibration.untouched(logits, made)
            self.dense += values
            self._asked.append(asked)
            lengths += state.lengths
        shards = self.calibration.shards
        self.shape, self.lengths = runner.shape, shards.joined(lengths)
        self.dense = shards.joined(self.dense)
        self.flops: int = sum(shards.gather(runner.flops))
        self.dense_flops = self.flops
        self.runs = 0

    @property
    def forwards(self) -> float:
        """Everything run so far, in forwards of the untouched language model."""
        return self.flops / self.dense_flops

    def begin(self, study: optuna.Study) -> None:
        """Put the papers' own settings first, at the largest share."""
        for start in STARTS:
            known = start["entrance"] in self.entrances and start["layers"] in self.layers
            if known:
                study.enqueue_trial({"limit": self.shares[1], **start}, skip_if_exists=True)

    def objective(self, trial: optuna.Trial) -> tuple[float, float]:
        """(mean value, share of the FLOPs); for ``study.optimize``."""
        import optuna

        try:
            recipe = self.recipe(trial)
        except ValueError as error:
            raise optuna.TrialPruned(str(error)) from None
        trial.set_user_attr("recipe", recipe.to_dict())
        values = self.values(recipe)
        trial.set_user_attr("values", values)
        return sum(values) / len(values), self.spent(recipe)

    def recipe(self, trial: optuna.Trial) -> Recipe:
        """The recipe of a trial's choices.

        Raises:
            ValueError: when they cannot be met together.
        """
        limit = share(trial.suggest_float("limit", *self.shares), self.shape, self.lengths)
        entrance = trial.suggest_categorical("entrance", self.entrances)
        layers = trial.suggest_categorical("layers", self.layers)
        if layers == NONE:
            if entrance == NONE:
                raise ValueError("neither entrance nor layers")
            return self._solved(limit, entrance, NONE, Schedule.flat)
        shapes = (*SHAPES, "ramp")
        shape = trial.suggest_categorical("shape", shapes)
        if shape == "ramp":
            if entrance == NONE:
                raise ValueError("a ramp of all tokens has nothing left to solve")
            return self._solved(limit, entrance, layers, Schedule.ramp)
        most = 1.0
        if entrance != NONE:
            least = limit.largest(lambda k: [k] * self.depth, LEAST, 1.0)
            most = least ** trial.suggest_float("part", 0.05, 0.95)
        return self._inside(trial, limit, entrance, layers, shape, most)

    def _inside(
        self,
        trial: optuna.Trial,
        limit: Budget,
        entrance: str,
        layers: str,
        shape: str,
        most: float,
    ) -> Recipe:
        """``most`` of the tokens at the entrance; the rest of the budget decides the curve."""
        if shape == "step":
            before = trial.suggest_int("before", 1, max(2, self.depth // 2))

            def make(x: float) -> Schedule:
                return Schedule.step(min(x, most), before=before, entrance=most)

            low, high = 1e-4, most
        else:
            slope = trial.suggest_float("slope", *SLOPES, log=True)

            def make(x: float) -> Schedule:
                return Schedule.sigmoid(slope=slope, middle=x, entrance=most)

            low, high = middles(slope, self.depth)
        return self._solved(limit, entrance, layers, make, low, high)

    def _solved(
        self,
        limit: Budget,
        entrance: str,
        layers: str,
        make: Callable[[float], Schedule],
        low: float = LEAST,
        high: float = 1.0,
    ) -> Recipe:
        """The recipe of the largest ``make(x)`` that the limit allows."""
        x = limit.largest(lambda x: make(x).resolve(self.depth).alive, low, high)
        schedule = make(x).resolve(self.depth)
        return Recipe(
            schedule,
            entrance=None if entrance == NONE else foveate.reducer(entrance),
            layers=foveate.reducer(layers) if layers != NONE and schedule.cuts() else None,
        )

    @torch.no_grad()
    def values(self, recipe: Recipe) -> list[float]:
        """The value of each example under a recipe."""
        shards = self.calibration.shards
        shards.tell("values", recipe)
        runner = Runner(self.model, recipe.entrance, recipe.schedule.alive[0])
        found: list[float] = []
        for asked in self._asked:
            end = runner.run(runner.start(asked.batch), recipe)
            logits = runner.logits(end.hidden, asked.batch)
            found += self.calibration.values(logits, asked)
        self.flops += sum(shards.gather(runner.flops))
        self.runs += 1
        return shards.joined(found)

    def apart(self, trial: optuna.trial.FrozenTrial) -> list[float]:
        """A trial's values less those of the untouched model, example by example."""
        return [a - b for a, b in zip(trial.user_attrs["values"], self.dense, strict=True)]

    def spent(self, recipe: Recipe) -> float:
        """The FLOPs of a recipe as a share of what vision tokens add to the text's."""
        floor, dense = ends(self.shape, self.lengths)
        cost = flops(dense, self.shape, self.lengths).cost(recipe.schedule.alive)
        return (cost - floor) / (dense - floor)

    def recommended(
        self,
        trials: Sequence[optuna.trial.FrozenTrial],
        max_drop: float | None,
        confidence: float,
    ) -> tuple[optuna.trial.FrozenTrial, bool]:
        """The cheapest trial that loses no more than ``max_drop``, and whether there is one.

        Where there is none, or without a tolerance, the best.
        """
        best = max(trials, key=lambda t: (t.values[0], -t.values[1]))
        if max_drop is None:
            return best, True
        fit = [t for t in trials if lower(self.apart(t), confidence) >= -max_drop]
        return (min(fit, key=lambda t: t.values[1]), True) if fit else (best, False)


def complete(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that made a recipe."""
    import optuna

    return study.get_trials(states=[optuna.trial.TrialState.COMPLETE])


def picture(
    trials: Sequence[optuna.trial.FrozenTrial],
    best: Sequence[optuna.trial.FrozenTrial],
    chosen: optuna.trial.FrozenTrial,
    dense: float,
    file: Path,
) -> None:
    """All trials by cost and value, the front as a line, the one recommended ringed."""
    drawn = figure(6, 3.6)
    axes = drawn.subplots()
    axes.axhline(dense, color="grey", linewidth=1, label="untouched")
    axes.scatter(*_points(trials), s=12, color="lightgrey", label="tried")
    axes.step(*_points(best), where="post", marker="o", markersize=4, label="front")
    axes.scatter(*_points([chosen]), s=120, facecolors="none", edgecolors="red", label="taken")
    axes.set(xlabel="share of the vision tokens' FLOPs", ylabel="objective")
    axes.legend(frameon=False)
    drawn.savefig(file, dpi=150)


def _points(trials: Sequence[optuna.trial.FrozenTrial]) -> tuple[list[float], list[float]]:
    return [t.values[1] for t in trials], [t.values[0] for t in trials]


def front(trials: Sequence[optuna.trial.FrozenTrial]) -> list[optuna.trial.FrozenTrial]:
    """Trials that no other beats in value and share, the cheapest first."""
    best: list[optuna.trial.FrozenTrial] = []
    for trial in sorted(trials, key=lambda t: (t.values[1], -t.values[0])):
        if not best or trial.values[0] > best[-1].values[0]:
            best.append(trial)
    return best
