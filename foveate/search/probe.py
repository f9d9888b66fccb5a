"""Probing schedules on the calibration set, from the layer that a search has come to."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from foveate.reducer import Reducer
from foveate.search.objective import Asked, Calibration
from foveate.search.prefix import Runner, Shelf


class Probe:
    """The calibration set, all of it just before one layer.

    Attributes:
        layer: the layer in question; what lies below is decided and not run again.
        dense: the untouched model's value of each example, of all processes.
        runs: probes so far.
        lengths: of each prompt, text and vision rows.
        forwards: everything run so far, in forwards of the untouched model over the calibration
            set.
    """

    def __init__(
        self,
        runner: Runner,
        calibration: Calibration,
        method: Reducer,
        folder: Path,
        *,
        memory: int = 2 << 30,
    ) -> None:
        """Runs every prompt once through the untouched model.

        Args:
            folder: for states that do not fit into ``memory`` (bytes).
        """
        self.runner, self.calibration, self.method = runner, calibration, method
        self._folder, self._memory = folder, memory
        self.layer, self.runs = 0, 0
        self.forwards = 1.0
        self.dense: list[float] = []
        self.lengths: list[tuple[int, int]] = []
        self._asked: list[Asked] = []
        self._shelf = self._new_shelf(0)
        plain = Runner(runner.model)
        for made in calibration:
            state = plain.start(made.batch)
            logits = plain.logits(plain.flat(state), made.batch)
            asked, values = calibration.untouched(logits, made)
            self.dense += values
            self._asked.append(replace(asked, batch=replace(asked.batch, inputs={})))
            self._shelf.put(state if runner.entrance is None else runner.start(made.batch))
            self.lengths += state.lengths
        shards = calibration.shards
        self.dense, self.lengths = shards.joined(self.dense), shards.joined(self.lengths)
        self._dense_flops = sum(shards.gather(plain.flops))

    def values(self, alive: Sequence[float]) -> list[float]:
        """The value of each example under a schedule that begins as decided."""
        shards = self.calibration.shards
        shards.tell("values", alive)
        recipe = self.runner.recipe(alive, self.method)
        found: list[float] = []
        for state, asked in zip(self._shelf, self._asked, strict=True):
            logits = self.runner.logits(self.runner.run(state, recipe).hidden, asked.batch)
            found += self.calibration.values(logits, asked)
        self.runs += 1
        self._count()
        return shards.joined(found)

    def decide(self, alive: Sequence[float], layer: int) -> None:
        """Go to just before ``layer``; the schedule below it is ``alive``'s."""
        rest = [0.0] * (self.runner.shape.layers - layer)  # so that attention there is kept
        recipe = self.runner.recipe([*alive[:layer], *rest], self.method)
        if layer == self.layer:
            return
        self.calibration.shards.tell("decide", alive, layer)
        further = self._new_shelf(layer)
        for state in self._shelf:
            further.put(self.runner.run(state, recipe, layer))
        shutil.rmtree(self._shelf.folder)
        self._shelf, self.layer = further, layer
        self._count()

    def _count(self) -> None:
        every = self.calibration.shards.gather(self.runner.flops)
        self.forwards = 1.0 + sum(every) / self._dense_flops

    def _new_shelf(self, layer: int) -> Shelf:
        folder = self._folder / str(layer)
        folder.mkdir()
        return Shelf(folder, self._memory)
