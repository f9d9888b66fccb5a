"""What ``foveate eval`` found, one line a recipe over all its tasks, and as markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foveate.bench import DENSE
from foveate.markers import Block
from foveate.tasks import FINE

BLOCK = Block("eval", "written by `foveate eval … --write README.md`")
Row = Mapping[str, Any]
BUDGETS = (
    " Dense means the same frames. The gain over fewer frames is that over the untouched model on "
    "the fewest evenly spread frames that cost at least as many FLOPs, among those that were run: "
    "percentage points over the same clips and questions, with a paired bootstrap's 95 % "
    "interval; *: significant at the 95 % level by McNemar's exact test."
)
_FEWER = "gain over fewer frames"
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
        flops: mean over prompts.
        prefill_ms: mean over prompts.
        tasks: the row of each task, by its name without options.
    """

    name: str
    recipe: str
    vision_tokens: float
    fewer: float
    flops: float
    prefill_ms: float
    tasks: Mapping[str, Row]


def options(name: str) -> tuple[str, str]:
    """A task's name without its options, and these: ``video-what:frames=4`` has ``frames=4``."""
    base, _, more = name.partition(":")
    return (base, more) if "=" in more else (name, "")


def lines(rows: Sequence[Row]) -> list[Line]:
    """A line for each recipe, in the order of ``rows``.

    Tasks with options (numbers of frames) make a line for each recipe and options; the most FLOPs
    come first, so what costs the same stands together.
    """
    grouped: dict[tuple[str, bool, str], list[Row]] = {}
    for row in rows:
        key = (row["recipe"], row["blank"], options(row["task"])[1])
        grouped.setdefault(key, []).append(row)
    made = [_line(mine) for mine in grouped.values()]
    return sorted(made, key=lambda line: -line.flops) if budgeted(rows) else made


def budgeted(rows: Sequence[Row]) -> bool:
    """Whether the rows differ in more than their recipe, and are compared by their FLOPs."""
    return any(options(row["task"])[1] for row in rows)


def named(row: Row) -> str:
    """The recipe of a row, and what its name does not say."""
    more = ", blank images" if row["blank"] else ", adaptive" if row["adaptive"] else ""
    asked = options(row["task"])[1].replace(",", ", ")
    return str(row["recipe"]) + more + (f", {asked}" if asked else "")


def differs(row: Row) -> bool:
    """Whether the score differs from the untouched model's at the 95 % level.

    By McNemar's exact test where answers are right or wrong, else by the paired interval of 20
    examples or more.
    """
    if row["mcnemar_p"] is not None:
        return bool(row["mcnemar_p"] < _LEVEL)
    outside = row["difference_low"] > 0 or row["difference_high"] < 0
    return bool(outside and row["n"] >= _ENOUGH)


def collapses(rows: Sequence[Row]) -> list[str]:
    """A warning for each recipe that loses fine detail, in words of one sentence each.

    On a task that asks for it, the recipe's interval lies wholly below the untouched model's.
    """
    dense = {row["task"]: row for row in rows if row["recipe"] == DENSE and not row["blank"]}
    return [
        f"Warning: {named(row)} loses fine detail: {row['task']} falls from "
        f"{100 * dense[row['task']]['score']:.1f} % to {100 * row['score']:.1f} %, with intervals "
        "that do not meet. Keep more where small print or counts matter, or merge only what is the "
        "same: near-duplicates."
        for row in rows
        if row["task"] in FINE
        and row["recipe"] != DENSE
        and row["ci_high"] < dense[row["task"]]["ci_low"]
    ]


def markdown(result: Row) -> str:
    """The table of a result of ``foveate eval``, and how it was made."""
    rows = result["rows"]
    tasks = list(dict.fromkeys(options(row["task"])[0] for row in rows))
    heads = ["recipe", "vision tokens", "FLOPs", "prefill ms", *tasks]
    if budgeted(rows):
        heads[2:] = ["GFLOPs", "prefill ms", *(h for task in tasks for h in (task, _FEWER))]
    table = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    table += [f"| {' | '.join(_cells(line, tasks, budgeted(rows)))} |" for line in lines(rows)]
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
        flops=total("flops") / n,
        prefill_ms=total("prefill_ms") / n,
        tasks={options(row["task"])[0]: row for row in rows},
    )


def _cells(line: Line, tasks: Sequence[str], budgets: bool) -> list[str]:
    name = line.name if line.recipe == DENSE else line.name.replace(line.recipe, f"`{line.recipe}`")
    fewer = "1.0×" if line.recipe == DENSE else f"{line.fewer:.1f}× fewer"
    spent = f"{line.flops / 1e9:,.0f}" if budgets else fewer
    cost = [f"{line.vision_tokens:,.0f}", spent, f"{line.prefill_ms:,.0f}"]
    found = [line.tasks.get(task) for task in tasks]
    if not budgets:
        return [name, *cost, *(_score(row) if row else "–" for row in found)]
    both = ((_score(row), gained(row)) if row else ("–", "") for row in found)
    return [name, *cost, *(cell for pair in both for cell in pair)]


def gained(row: Row) -> str:
    """The gain over the untouched model on fewer frames, its interval, and how many they are."""
    if (than := row.get("fewer_frames")) is None:
        return ""
    points = f"{100 * than['difference']:+.1f}{'*' if differs(than | {'n': row['n']}) else ''}"
    between = "…".join(f"{100 * than[f'difference_{end}']:+.1f}" for end in ("low", "high"))
    return f"{points} ({between}) {options(than['task'])[1]}"


def _score(row: Row) -> str:
    score = f"{100 * row['score']:.1f}"
    interval = f"({100 * row['ci_low']:.0f}–{100 * row['ci_high']:.0f})"
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
    graded = sorted({options(r["task"])[0] for r in result["rows"] if r["mcnemar_p"] is None})
    instead = f" (for {', '.join(graded)} the paired bootstrap's interval)" if graded else ""
    return (
        "Scores in per cent with their 95 % intervals; bold where the difference from dense over "
        f"the same examples is significant at the 95 % level by McNemar's exact test{instead}, "
        "not corrected for the number of comparisons. Vision tokens are means over layers and "
        "examples, FLOPs those of the language model's prefill, and prefill ms means per prompt, "
        "measured, without the vision encoder." + (BUDGETS if budgeted(result["rows"]) else "")
    )
