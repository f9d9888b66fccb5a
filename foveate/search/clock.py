"""A budget in milliseconds to the first token, from times measured on this machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

import foveate
from foveate.bench.machine import wait
from foveate.recipe import Recipe
from foveate.search.budget import Budget, Lengths, milliseconds
from foveate.search.prefix import Runner

POINTS, REPEATS = 8, 5


def first_token(model: Any, inputs: Any, recipe: Recipe | None = None) -> float:
    """Milliseconds of one prefill, vision encoder and reduction included; the median of a few."""

    def run() -> None:
        model(**inputs, use_cache=True, logits_to_keep=1)

    if recipe is None:
        return _median(run, model.device)
    with foveate.reduced(model, recipe):
        return _median(run, model.device)


def layer_times(runner: Runner, longest: int) -> list[tuple[int, float]]:
    """Milliseconds of one decoder layer over (rows, ms), from a few rows to ``longest``."""
    weight = next(runner.text.parameters())
    found = []
    for point in range(1, POINTS + 1):
        rows = max(1, longest * point // POINTS)
        given = torch.randn(1, rows, runner.shape.width, device=weight.device).to(weight.dtype)

        def run(given: torch.Tensor = given) -> None:
            runner.text(inputs_embeds=given, use_cache=True)

        found.append((rows, _median(run, weight.device) / runner.shape.layers))
    return found


def budget(
    limit: float,
    runner: Runner,
    inputs: Any,
    lengths: Lengths,
    largest: Callable[[Budget], Recipe],
) -> Budget:
    """``limit`` ms to the first token of ``inputs``, one prompt, as a limit for the layers.

    What a prefill takes besides its layers (vision encoder, cuts, head) is measured, too, with the
    ``largest`` recipe of its kind within a limit.

    Raises:
        ValueError: when all the rest alone takes as long.
    """
    times = layer_times(runner, max(text + vision for text, vision in lengths))

    def left(rest: float) -> Budget:
        if limit <= rest:
            raise ValueError(
                f"{limit:.4g} ms to the first token cannot be met: what is not a decoder layer "
                f"(vision encoder, cuts, head) takes {rest:.4g} ms here, all together {dense:.4g}."
            )
        return milliseconds(limit - rest, times, lengths)

    dense = first_token(runner.model, inputs)
    spent = milliseconds(limit, times, lengths).cost
    recipe = largest(left(dense - spent([1.0] * runner.shape.layers)))
    return left(first_token(runner.model, inputs, recipe) - spent(recipe.schedule.alive))


def _median(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds, after one run to warm up."""

    def timed() -> float:
        wait(device)
        begun = perf_counter()
        run()
        wait(device)
        return 1e3 * (perf_counter() - begun)

    with torch.no_grad():
        run()
        return statistics.median(timed() for _ in range(REPEATS))
