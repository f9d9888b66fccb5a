"""What ``foveate eval`` found, one line a recipe over all its tasks, and as markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.bench import DENSE
from foveate.markers import Block

BLOCK = Block("eval", "written by `foveate eval … --write README.md`")
Row = Mapping[str, Any]
_LEVEL = 0.05
_ENOUGH = 20  # examples; of fewer, a bootstrap's interval is too narrow to rely on


@dataclass(frozen=True)
class Line:
    """One recipe over all tasks.

    Attributes:
        name: for people.
        recipe: what was typed for it.
        vision_tokens: mean over layers and examples.
        fewer: FLOPs of the untouched model ÷ those of this one.
        prefill_ms: mean over prompts.
        tasks: the row of each task.
    """

    name: str
    recipe: str
    vision_tokens: float
    fewer: float
    prefill_ms: float
    tasks: Mapping[str, Row]


def lines(rows: Sequence[Row]) -> list[Line]:
    """A line for each recipe, in the order of ``rows``."""
    grouped: dict[tuple[str, bool], list[Row]] = {}
    for row in rows:
        grouped.setdefault((row["recipe"], row["blank"]), []).append(row)
    return [_line(mine) for mine in grouped.values()]


def named(row: Row) -> str:
    """The recipe of a row, and what its name does not say."""
    more = ", blank images" if row["blank"] else ", adaptive" if row["adaptive"] else ""
    return str(row["recipe"]) + more


def differs(row: Row) -> bool:
    """Whether the score differs from the untouched model's at the 95 % level.

    By McNemar's exact test where answers are right or wrong, else by the paired interval of 20
    examples or more.
    """
    if row["mcnemar_p"] is not None:
        return bool(row["mcnemar_p"] < _LEVEL)
    outside = row["difference_low"] > 0 or row["difference_high"] < 0
    return bool(outside and row["n"] >= _ENOUGH)


def markdown(result: Row) -> str:
    """The table of a result of ``foveate eval``, and how it was made."""
    tasks = _counts(result)
    heads = ("recipe", "vision tokens", "FLOPs", "prefill ms", *tasks)
    table = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    table += [f"| {' | '.join(_cells(line, list(tasks)))} |" for line in lines(result["rows"])]
    about = (_wrapped(_made(result)), _wrapped(_legend(result)))
    return "\n".join((*table, "", *about))


def _line(rows: Sequence[Row]) -> Line:
    first, n = rows[0], sum(row["n"] for row in rows)

    def total(key: str) -> float:
        return float(sum(row[key] * row["n"] for row in rows))

    return Line(
        name=named(first),
        recipe=first["recipe"],
        vision_tokens=total("vision_tokens") / n,
        fewer=total("dense_flops") / total("flops"),
        prefill_ms=total("prefill_ms") / n,
        tasks={row["task"]: row for row in rows},
    )


def _cells(line: Line, tasks: Sequence[str]) -> list[str]:
    name = line.name if line.recipe == DENSE else line.name.replace(line.recipe, f"`{line.recipe}`")
    fewer = "1.0×" if line.recipe == DENSE else f"{line.fewer:.1f}× fewer"
    cost = [f"{line.vision_tokens:,.0f}", fewer, f"{line.prefill_ms:,.0f}"]
    return [name, *cost, *(_score(line.tasks[task]) for task in tasks)]


def _score(row: Row) -> str:
    score = f"{100 * row['score']:.1f} %"
    interval = f"({100 * row['ci_low']:.1f}–{100 * row['ci_high']:.1f})"
    return f"{f'**{score}**' if differs(row) else score} {interval}"


def _counts(result: Row) -> dict[str, int]:
    """Examples by task."""
    return {row["task"]: row["n"] for row in result["rows"]}


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _made(result: Row) -> str:
    counts = _counts(result)
    each = f"{max(counts.values())} examples of each task"
    if len(set(counts.values())) > 1:
        each = ", ".join(f"{n} examples of {task}" for task, n in counts.items())
    where = [f"{result['model']} on {result['device']}", result["dtype"]]
    where += [f"CPU threads: {result['threads']}"] if result["threads"] else []
    versions = ", ".join(f"{name} {said}" for name, said in result["versions"].items())
    versions = versions.replace("not installed", "from a checkout")
    return (
        f"{', '.join(where)}; split {result['split']}, {each} (seed {result['seed']}); begun "
        f"{result['date']}; {versions}. Made by `{result['command']}`."
    )


def _legend(result: Row) -> str:
    graded = sorted({row["task"] for row in result["rows"] if row["mcnemar_p"] is None})
    instead = f" (for {', '.join(graded)} the paired bootstrap's interval)" if graded else ""
    return (
        "Scores with their 95 % intervals; bold where the difference from dense over the same "
        f"examples is significant at the 95 % level by McNemar's exact test{instead}, not "
        "corrected for the number of comparisons. Vision tokens are means over layers and "
        "examples, FLOPs those of the language model's prefill, and prefill ms means per prompt, "
        "measured, without the vision encoder."
    )
