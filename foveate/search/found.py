"""What a search ends with: a recipe that says where it came from, a report, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate.bench import DENSE
from foveate.evaluate import evaluate
from foveate.journal import Journal
from foveate.loading import missing
from foveate.recipe import Recipe
from foveate.statistics import difference_of_means
from foveate.tasks import Task

NAME = "found"


def held_out(
    model: Any, processor: Any, tasks: Sequence[Task], recipe: Recipe, **more: Any
) -> dict[str, Any]:
    """Scores of dense and recipe on examples that the search did not see; ``more`` is evaluate's.

    The values are means over tasks, the difference with its 95 % interval (a fraction, not points);
    ``measured_on`` says how many examples of which task, ``rows`` has each of them.
    """
    journal = Journal()
    rows = evaluate(model, processor, tasks, {NAME: recipe}, journal=journal, **more)
    dense, mine = ([r for r in rows if (r["recipe"] == NAME) is wanted] for wanted in (False, True))
    low, high = difference_of_means([_paired(journal, task.name) for task in tasks])
    spent = sum(r["flops"] * r["n"] for r in mine)
    return {
        "score": sum(r["score"] for r in mine) / len(mine),
        "dense": sum(r["score"] for r in dense) / len(dense),
        "difference": sum(r["difference"] for r in mine) / len(mine),
        "difference_low": low,
        "difference_high": high,
        "flops_ratio": sum(r["dense_flops"] * r["n"] for r in mine) / spent,
        "measured_on": {r["task"]: r["n"] for r in mine},
        "rows": rows,
    }


def _paired(journal: Journal, task: str) -> tuple[list[float], list[float]]:
    """The scores of the recipe and of the untouched model, example by example."""
    by = {recipe: records for (recipe, _, _), records in journal.of(task).items()}
    mine, dense = by[NAME], by[DENSE]
    return [mine[i].score for i in mine], [dense[i].score for i in mine]


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
