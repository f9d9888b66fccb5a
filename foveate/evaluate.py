"""Accuracy and its cost: the untouched model and any number of recipes, on the same examples.

Every answer is a record in a journal, and rows are made of the records alone. Recipes take turns
batch by batch, in a new order each time, which makes their times comparable.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from PIL import Image

import foveate
from foveate.adapter import family, text_shape, vision_rows
from foveate.answer import answer
from foveate.ask import costs
from foveate.bench import DENSE, Stopwatch
from foveate.encoded import once
from foveate.journal import Journal, Key, Record
from foveate.recipe import Recipe
from foveate.scoreboard import options
from foveate.statistics import difference, interval, mcnemar
from foveate.tasks import Example, Task

BLANK = (124, 116, 104)  # the mean colour of photos
BASELINES = ("random", "pool", "downsample")
_PROBED = 16  # examples that tell what a recipe costs


@dataclass(frozen=True)
class Case:
    """One column of a comparison: a recipe or None, with or without the images blanked."""

    name: str
    recipe: Recipe | None = None
    blank: bool = False

    @cached_property
    def key(self) -> Key:
        """What its records have in common."""
        if self.recipe is None:
            return self.name, "", self.blank
        text = json.dumps(self.recipe.to_dict(), sort_keys=True)
        return self.name, hashlib.sha256(text.encode()).hexdigest()[:12], self.blank


@dataclass(frozen=True)
class Cost:
    """A prompt's FLOPs; its rows and the vision tokens among them before any reduction."""

    flops: int
    rows: int
    vision: int


@dataclass(frozen=True)
class Batch:
    """Examples that go through the model together, and which of them each case lacks."""

    span: range
    lacking: list[list[int]]

    @cached_property
    def needed(self) -> list[int]:
        return sorted(set().union(*self.lacking))


def ready(tasks: Sequence[Task]) -> None:
    """See that examples can be made and scored, before a model is loaded.

    Raises:
        ValueError: for a task without examples, or two of one name.
        ImportError: for an absent package, with the line to type.
    """
    interval([1.0])  # the row's statistics need a package, too
    names = [task.name for task in tasks]
    for task in tasks:
        if names.count(task.name) > 1:
            raise ValueError(
                f"Two tasks are called {task.name}, and their rows could not be told apart; give "
                "one, or rename the file."
            )
        _check_some(task)
        task.score(task.example(0), "")


def digest(model: Any) -> str:
    """Tells other weights under the same name apart, by the first values of each parameter."""
    said = hashlib.sha256()
    for parameter in model.parameters():
        said.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return said.hexdigest()[:12]


def evaluate(
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    recipes: Mapping[str, Recipe],
    *,
    batch_size: int = 8,
    blank: bool = False,
    journal: Journal | None = None,
    advance: Callable[[str, int], object] | None = None,
) -> list[dict[str, Any]]:
    """Answer every example with the untouched model and with each recipe; rows for JSON.

    Questions are answered greedily and must be right to the letter after lower-casing; where an
    example has choices the likeliest is the answer.

    Args:
        recipes: by the name their rows get.
        blank: a further row of the untouched model with every image in one colour: what the
            questions alone give away.
        journal: goes on from its records; what it has answered is not made again.
        advance: told (task, answers just given).

    Raises:
        ValueError: for a task without examples, or a recipe that cannot work on the model.
    """
    journal = journal or Journal()
    cases = [Case(DENSE), *(Case(n, r) for n, r in recipes.items())]
    if blank:
        cases.insert(1, Case(DENSE, blank=True))
    rows: list[dict[str, Any]] = []
    scores: dict[tuple[str, str, bool], list[float]] = {}
    for task in tasks:
        _check_some(task)
        with once(model):
            _ask(model, processor, task, cases, journal, batch_size, advance)
        found = journal.of(task.name)
        rows += summary(found, cases, len(task))
        for case in cases:
            mine = [found[case.key][i].score for i in range(len(task))]
            scores[task.name, case.name, case.blank] = mine
    return [row | {"fewer_frames": fewer_frames(row, rows, scores)} for row in rows]


def _ask(
    model: Any,
    processor: Any,
    task: Task,
    cases: Sequence[Case],
    journal: Journal,
    size: int,
    advance: Callable[[str, int], object] | None,
) -> None:
    """Put a task's examples to every case, as far as the journal lacks the answers."""
    batches = _batches(task, cases, journal, size)
    warm: set[Key] = set()
    for batch, examples in zip(batches, _made(task, batches), strict=True):
        for case, indices in _in_turn(batch, cases):
            for some in _alike(indices, examples):
                if case.key not in warm:
                    _costs_of(model, processor, [examples[some[0]]], case.recipe)
                    warm.add(case.key)
                journal.add(_answered(model, processor, task, case, some, examples))
            if advance:
                advance(task.name, len(batch.span))


def fewer_frames(
    row: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    scores: Mapping[tuple[str, str, bool], Sequence[float]],
) -> dict[str, Any] | None:
    """How a row about clips compares with the untouched model at the same FLOPs.

    That is on the fewest frames, evenly spread, that cost at least as much as the row's prompts, so
    that nothing is won by a larger budget. The questions are the same, so the comparison is paired.
    None for other tasks, and for the untouched model on such frames itself.
    """
    base, more = options(row["task"])
    even = [
        other
        for other in rows
        if (other["recipe"], other["blank"]) == (DENSE, False)
        and options(other["task"])[0] == base
        and "pick=" not in other["task"]
        and other["flops"] >= row["flops"]
    ]
    if not more or not even or row in even:
        return None
    other = min(even, key=lambda one: float(one["flops"]))
    mine = scores[row["task"], row["recipe"], row["blank"]]
    theirs = scores[other["task"], DENSE, False]
    low, high = difference(mine, theirs)
    return {
        "task": other["task"],
        "flops": other["flops"],
        "difference": _mean(mine) - _mean(theirs),
        "difference_low": low,
        "difference_high": high,
        "mcnemar_p": mcnemar(mine, theirs),
    }


def _check_some(task: Task) -> None:
    if len(task) == 0:
        raise ValueError(
            f"{task.name} finds nothing to ask here; give it more photos, another --split or a "
            "file with questions in it."
        )


def _batches(task: Task, cases: Sequence[Case], journal: Journal, size: int) -> list[Batch]:
    seen = journal.of(task.name)
    spans = [range(start, min(start + size, len(task))) for start in range(0, len(task), size)]
    return [
        Batch(span, [[i for i in span if i not in seen.get(c.key, ())] for c in cases])
        for span in spans
    ]


def _in_turn(batch: Batch, cases: Sequence[Case]) -> list[tuple[Case, list[int]]]:
    """Each case with what it lacks, in an order of the batch's own: none always follows another."""
    jobs = list(zip(cases, batch.lacking, strict=True))
    random.Random(batch.span.start).shuffle(jobs)
    return jobs


def _alike(indices: Sequence[int], examples: Mapping[int, Example]) -> list[list[int]]:
    """Examples with choices apart from those without."""
    parts = [[i for i in indices if bool(examples[i].choices) is given] for given in (False, True)]
    return [part for part in parts if part]


def summary(
    found: Mapping[Key, Mapping[int, Record]], cases: Sequence[Case], n: int
) -> list[dict[str, Any]]:
    """A row per case over the first ``n`` examples, compared with the untouched model's."""
    dense = found[Case(DENSE).key]
    return [
        _row(case, [found[case.key][i] for i in range(n)], [dense[i] for i in range(n)])
        for case in cases
    ]


def _row(case: Case, mine: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Any]:
    scores, wanted = [r.score for r in mine], [r.score for r in theirs]
    low, high = interval(scores)
    worse, better = difference(scores, wanted)
    same = [float(a.answer == b.answer) for a, b in zip(mine, theirs, strict=True)]
    kinds = sorted({r.kind for r in mine} - {""})
    return {
        "task": mine[0].task,
        "recipe": case.name,
        "adaptive": case.recipe is not None and case.recipe.schedule.adaptive,
        "blank": case.blank,
        "n": len(mine),
        "score": _mean(scores),
        "ci_low": low,
        "ci_high": high,
        "difference": _mean(scores) - _mean(wanted),
        "difference_low": worse,
        "difference_high": better,
        "mcnemar_p": mcnemar(scores, wanted),
        "agreement": _mean(same),
        "vision_tokens": _mean([r.vision_tokens for r in mine]),
        "flops": _mean([r.flops for r in mine]),
        "dense_flops": _mean([r.dense_flops for r in mine]),
        "flops_ratio": sum(r.dense_flops for r in mine) / sum(r.flops for r in mine),
        "prefill_ms": _mean([r.prefill_ms for r in mine]),
        "by": {k: _mean([r.score for r in mine if r.kind == k]) for k in kinds},
    }


def baselines(
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    recipes: Mapping[str, Recipe],
    journal: Journal | None = None,
) -> tuple[dict[str, Recipe], list[str]]:
    """The plain methods at the FLOPs of each recipe, and what was left out, with its reason.

    A recipe's FLOPs are measured on the first examples of all tasks, so that adaptive ones have
    them too. A baseline keeps the most tokens whose FLOPs are not above that; one that ``recipes``
    has already is not made again.

    Args:
        journal: asked first; remembers.
    """
    keys = [Case(*item).key[:2] for item in recipes.items()]
    said = (journal or Journal()).once(
        f"baselines of {keys} on {[task.name for task in tasks]}",
        lambda: _baselines(model, processor, tasks, recipes),
    )
    return {name: Recipe.from_dict(made) for name, made in said["recipes"].items()}, said["notes"]


def _baselines(
    model: Any, processor: Any, tasks: Sequence[Task], recipes: Mapping[str, Recipe]
) -> dict[str, Any]:
    each = max(1, _PROBED // len(tasks))
    examples = [task.example(i) for task in tasks for i in range(min(each, len(task)))]
    dense = _costs_of(model, processor, examples, None)
    found = {n: _costs_of(model, processor, examples, r) for n, r in recipes.items()}
    known = {(_plain(recipes[name]), spent[0].flops) for name, spent in found.items()}
    made: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for label, recipe in _equal(model, dense, found.values()).items():
        name = _plain(recipe)
        try:
            (cost,) = _costs_of(model, processor, examples[:1], recipe)
        except NotImplementedError as error:
            notes[name] = f"{name} is left out: {error}"
            continue
        if (name, cost.flops) not in known:
            known.add((name, cost.flops))
            made[label] = recipe.to_dict()
    return {"recipes": made, "notes": list(notes.values())}


def _equal(model: Any, dense: Sequence[Cost], found: Iterable[Sequence[Cost]]) -> dict[str, Recipe]:
    """Every plain method at the FLOPs of each recipe."""
    keeps = [_affordable(model, dense, sum(cost.flops for cost in spent)) for spent in found]
    return {
        f"{name}:keep={keep:.4g}": foveate.recipe(name, keep=keep)
        for keep in keeps
        for name in BASELINES
    }


def _plain(recipe: Recipe) -> str:
    """The method's name when the recipe is one at the entrance and nothing else."""
    return recipe.entrance.name if recipe.entrance and not recipe.layers else ""


def _affordable(model: Any, dense: Sequence[Cost], spent: int) -> float:
    """The share of vision tokens, kept from the entrance on, that costs ``spent`` at most."""
    shape = text_shape(family(model).text(model))
    most = max(cost.vision for cost in dense)

    def flops(count: int) -> int:
        lengths = [cost.rows - cost.vision + cost.vision * count // most for cost in dense]
        return sum(shape.prefill_flops([length] * shape.layers) for length in lengths)

    counts = [count for count in range(1, most + 1) if flops(count) <= spent]
    return max(counts, default=1) / most


def _costs_of(
    model: Any, processor: Any, examples: Sequence[Example], recipe: Recipe | None
) -> list[Cost]:
    """What each example's (first) prompt costs, one by one."""
    found = []
    for example in examples:
        with ExitStack() as stack:
            report = stack.enter_context(foveate.reduced(model, recipe)) if recipe else None
            said = answer(model, processor, [example], max_new_tokens=1)
        flops = costs(model, report, said.ids, said.mask)[0]["flops"]
        vision = int(vision_rows(model, said.ids)[0].sum())
        found.append(Cost(flops, int(said.mask[0].sum()), vision))
    return found


def _answered(
    model: Any,
    processor: Any,
    task: Task,
    case: Case,
    indices: Sequence[int],
    made: Mapping[int, Example],
) -> list[Record]:
    """One batch under one case."""
    examples = [made[i] for i in indices]
    given = [_blanked(e) for e in examples] if case.blank else examples
    watch = Stopwatch(model)
    with watch.around(case.recipe) as report:
        said = answer(model, processor, given)
        prefill_ms = watch.forwards()[0].prefill_ms / len(said.ids)
    spent, dense = (costs(model, r, said.ids, said.mask) for r in (report, None))
    return [
        Record(
            task=task.name,
            recipe=case.name,
            made=case.key[1],
            blank=case.blank,
            index=index,
            kind=example.meta.get("kind", ""),
            answer=text,
            score=task.score(example, text),
            vision_tokens=mine["vision_tokens"],
            flops=mine["flops"],
            dense_flops=untouched["flops"],
            prefill_ms=prefill_ms,
        )
        for index, example, text, mine, untouched in zip(
            indices, examples, said.texts, spent, dense, strict=True
        )
    ]


def _blanked(example: Example) -> Example:
    blank, clip = Image.new("RGB", example.image.size, BLANK), example.clip
    seen = replace(clip, frames=(blank,) * len(clip.frames)) if clip else None
    return replace(example, image=blank, clip=seen)


def _made(task: Task, batches: Sequence[Batch]) -> Iterator[dict[int, Example]]:
    """The examples that each batch needs, the next ones made ready while the model works."""
    with ThreadPoolExecutor(4) as pool:
        coming = [pool.submit(task.example, i) for i in batches[0].needed]
        for batch, after in zip(batches, (*batches[1:], None), strict=True):
            waiting = coming
            coming = [pool.submit(task.example, i) for i in after.needed] if after else []
            yield dict(zip(batch.needed, (f.result() for f in waiting), strict=True))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
