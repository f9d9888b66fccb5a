"""What a search ends with: a recipe that says where it came from, a report, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate.evaluate import evaluate
from foveate.loading import missing
from foveate.recipe import Recipe
from foveate.tasks import Task

NAME = "found"


def held_out(
    model: Any, processor: Any, tasks: Sequence[Task], recipe: Recipe, **more: Any
) -> dict[str, Any]:
    """Scores of dense and recipe on examples that the search did not see; ``more`` is evaluate's.

    The values are means over tasks; ``rows`` has each with its interval.
    """
    rows = evaluate(model, processor, tasks, {NAME: recipe}, **more)
    dense, mine = ([r for r in rows if (r["recipe"] == NAME) is wanted] for wanted in (False, True))
    spent = sum(r["flops"] * r["n"] for r in mine)
    return {
        "score": sum(r["score"] for r in mine) / len(mine),
        "dense": sum(r["score"] for r in dense) / len(dense),
        "flops_ratio": sum(r["dense_flops"] * r["n"] for r in mine) / spent,
        "rows": rows,
    }


def stamped(recipe: Recipe, config: Any, facts: Mapping[str, Any]) -> Recipe:
    """``recipe`` with its provenance: model type and depth, versions, and ``facts``."""
    import torch
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    said = {"model_type": config.model_type, "layers": len(recipe.schedule.alive)}
    return replace(recipe, provenance={**said, "versions": versions, **facts})


def figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "search") from error
    return Figure(figsize=(width, height), layout="constrained")


def picture(curves: Mapping[str, Sequence[float]], file: Path) -> None:
    """Keep ratio by layer, a line for each curve."""
    drawn = figure(6, 3.6)
    axes = drawn.subplots()
    for name, alive in curves.items():
        axes.step(range(len(alive)), alive, where="mid", label=name)
    axes.set(xlabel="layer", ylabel="vision tokens kept", ylim=(0, 1.03))
    axes.legend(frameon=False)
    drawn.savefig(file, dpi=150)
