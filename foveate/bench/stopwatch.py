"""Timing forwards by hooks: what the vision encoder takes, and what all the rest takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import foveate
from foveate.adapter import family
from foveate.peers import How
from foveate.recipe import Recipe
from foveate.report import Report, elapsed, tick


@dataclass(frozen=True)
class Forward:
    """One forward of the base model: when it began and ended, and its vision part, milliseconds."""

    total_ms: float
    vision_ms: float

    @property
    def prefill_ms(self) -> float:
        return self.total_ms - self.vision_ms


@dataclass
class Stopwatch:
    """Times forwards of a model by hooks that stand outside those of a recipe."""

    model: nn.Module
    _ticks: list[tuple[str, Any]] = field(default_factory=list)

    @contextmanager
    def around(
        self,
        recipe: Recipe | None,
        how: How = foveate.reduced,
        seen: Callable[[], object] | None = None,
    ) -> Iterator[Report | None]:
        """Reduce with ``recipe`` (None: leave the model as it is) and time what runs inside.

        Args:
            recipe: what to do.
            how: who does it: foveate, or a peer.
            seen: called after every part of the vision encoder.
        """
        adapter = family(self.model)
        base = adapter.base(self.model)
        self._ticks.clear()
        with ExitStack() as stack:
            self._mark(stack, base.register_forward_pre_hook, "start")
            report = None
            if recipe is not None:
                report = stack.enter_context(how(self.model, recipe))
            # Inside the recipe's hooks: reducing is not vision.
            for module in adapter.beside_text(self.model):
                self._mark(stack, module.register_forward_pre_hook, "vision")
                self._mark(stack, module.register_forward_hook, "seen", seen)
            self._mark(stack, base.register_forward_hook, "stop")
            yield report

    def tick(self) -> Any:
        """Now, on the model's device."""
        return tick(self.device)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forwards(self) -> list[Forward]:
        """The forwards so far, in order.

        ``generate`` encodes before the forward begins, which then counts from there.
        """
        done, start, seen, vision = [], None, None, 0.0
        for label, now in self._ticks:
            start = now if start is None else start
            if label == "vision":
                seen = now
            elif label == "seen":
                vision += elapsed(seen, now)
            elif label == "stop":
                done.append(Forward(elapsed(start, now), vision))
                start, vision = None, 0.0
        return done

    def decode_ms(self) -> float | None:
        """Milliseconds from one forward's end to the next after the first, on average."""
        ends = [now for label, now in self._ticks if label == "stop"]
        return elapsed(ends[0], ends[-1]) / (len(ends) - 1) if len(ends) > 1 else None

    def _mark(
        self,
        stack: ExitStack,
        register: Callable[..., Any],
        label: str,
        then: Callable[[], object] | None = None,
    ) -> None:
        def hook(*_: Any) -> None:
            self._ticks.append((label, self.tick()))
            if then is not None:
                then()

        stack.callback(register(hook).remove)
