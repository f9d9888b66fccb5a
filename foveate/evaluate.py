"""Accuracy and its cost: the untouched model and any number of recipes, on the same examples.

Every answer is a line in a journal, so a run that was stopped goes on where it was; rows are made
of the lines alone. Recipes take turns batch by batch, which makes their times comparable.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

import foveate
from foveate.adapter import family, text_shape
from foveate.answer import Answers, answer
from foveate.ask import costs, vision_rows
from foveate.bench import DENSE, Stopwatch
from foveate.recipe import Recipe
from foveate.report import Report
from foveate.statistics import difference, interval, mcnemar
from foveate.tasks import Example, Task

BLANK = (124, 116, 104)  # the mean colour of photos
BASELINES = ("random", "pool", "downsample")
Key = tuple[str, str, bool]
_PROBED = 4  # examples that tell what a recipe costs


@dataclass(frozen=True)
class Record:
    """One answer and what its prompt cost.

    ``made`` tells recipes of one name apart; ``vision_tokens`` is the mean over layers.
    """

    task: str
    recipe: str
    made: str
    blank: bool
    index: int
    kind: str
    answer: str
    score: float
    vision_tokens: float
    flops: int
    dense_flops: int
    prefill_ms: float


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


@dataclass
class Journal:
    """Records, and the file that keeps them.

    Attributes:
        file: a line of JSON per record after a first line that says what was asked; None keeps
            them in memory.
        asked: what decides the answers besides recipe and task, such as model, split and seed.
    """

    file: Path | None = None
    asked: Mapping[str, Any] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Raises ValueError for a file that another command wrote."""
        if self.file is None:
            return
        head = json.dumps(dict(self.asked), sort_keys=True)
        if not self.file.is_file():
            self.file.write_text(head + "\n")
            return
        first, *lines = self.file.read_text().split("\n")
        if first != head:
            raise ValueError(
                f"{self.file} holds the answers of another command:\n  there {first}\n  now   "
                f"{head}\nGive another --json, or delete the file to begin anew."
            )
        whole = lines[:-1]  # what follows the last line break was cut off
        self.records += [Record(**json.loads(line)) for line in whole]
        self.file.write_text("\n".join((first, *whole, "")))

    def add(self, records: Sequence[Record]) -> None:
        self.records += records
        if self.file is not None:
            with self.file.open("a") as out:
                out.writelines(json.dumps(asdict(r)) + "\n" for r in records)

    def of(self, task: str) -> dict[Key, dict[int, Record]]:
        """The records of a task, by case and example."""
        found: dict[Key, dict[int, Record]] = {}
        for r in self.records:
            if r.task == task:
                found.setdefault((r.recipe, r.made, r.blank), {})[r.index] = r
        return found


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
        journal: goes on from its records.
        advance: told (task, answers just given).

    Raises:
        ValueError: for a task without examples, or a recipe that cannot work on the model.
    """
    journal = journal or Journal()
    cases = [Case(DENSE), *(Case(n, r) for n, r in recipes.items())]
    if blank:
        cases.insert(1, Case(DENSE, blank=True))
    rows = []
    for task in tasks:
        if len(task) == 0:
            raise ValueError(
                f"{task.name} finds nothing to ask here; give it more photos or another --split."
            )
        seen = journal.of(task.name)
        for span, examples in _batches(task, batch_size):
            for case in cases:
                todo = [i for i in span if i not in seen.get(case.key, ())]
                if todo:
                    chosen = [examples[i - span.start] for i in todo]
                    journal.add(_answered(model, processor, task, case, todo, chosen))
                if advance:
                    advance(task.name, len(span))
        rows += summary(journal.of(task.name), cases, len(task))
    return rows


def summary(
    found: Mapping[Key, Mapping[int, Record]], cases: Sequence[Case], n: int
) -> list[dict[str, Any]]:
    """A row per case over the first ``n`` examples, compared with the untouched model's."""
    dense = found[Case(DENSE).key]
    return [
        _row(case.name, [found[case.key][i] for i in range(n)], [dense[i] for i in range(n)])
        for case in cases
    ]


def _row(name: str, mine: Sequence[Record], theirs: Sequence[Record]) -> dict[str, Any]:
    scores, wanted = [r.score for r in mine], [r.score for r in theirs]
    low, high = interval(scores)
    worse, better = difference(scores, wanted)
    same = [float(a.answer == b.answer) for a, b in zip(mine, theirs, strict=True)]
    kinds = sorted({r.kind for r in mine} - {""})
    return {
        "task": mine[0].task,
        "recipe": name,
        "blank": mine[0].blank,
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
        "flops_ratio": sum(r.dense_flops for r in mine) / sum(r.flops for r in mine),
        "prefill_ms": _mean([r.prefill_ms for r in mine]),
        "by": {k: _mean([r.score for r in mine if r.kind == k]) for k in kinds},
    }


def baselines(
    model: Any, processor: Any, task: Task, recipes: Mapping[str, Recipe]
) -> tuple[dict[str, Recipe], list[str]]:
    """The plain methods at the FLOPs of each recipe, and what was left out, with its reason.

    A recipe's FLOPs are measured on the first examples, so that adaptive ones have them too. A
    baseline keeps the most tokens whose FLOPs are not above that.
    """
    examples = [task.example(i) for i in range(min(_PROBED, len(task)))]
    dense = _costs_of(model, processor, examples, None)
    made: dict[str, Recipe] = {}
    notes: list[str] = []
    for recipe in recipes.values():
        spent = sum(flops for flops, _, _ in _costs_of(model, processor, examples, recipe))
        keep = _affordable(model, dense, spent)
        for name in BASELINES:
            label = f"{name}:keep={keep:.4g}"
            if label not in made:
                made[label] = foveate.recipe(name, keep=keep)
    for label in list(made):
        try:
            _costs_of(model, processor, examples[:1], made[label])
        except NotImplementedError as error:
            del made[label]
            notes.append(f"{label} is left out: {error}")
    return made, notes


def _affordable(model: Any, dense: Sequence[tuple[int, int, int]], spent: int) -> float:
    """The share of vision tokens, kept from the entrance on, that costs ``spent`` at most."""
    shape = text_shape(family(model).text(model))
    most = max(vision for _, _, vision in dense)

    def cost(count: int) -> int:
        lengths = [rows - vision + vision * count // most for _, rows, vision in dense]
        return sum(shape.prefill_flops([length] * shape.layers) for length in lengths)

    counts = [count for count in range(1, most + 1) if cost(count) <= spent]
    return max(counts, default=1) / most


def _costs_of(
    model: Any, processor: Any, examples: Sequence[Example], recipe: Recipe | None
) -> list[tuple[int, int, int]]:
    """(FLOPs, rows, vision tokens) of each example's prompt; the latter two before reducing."""
    found = []
    for example in examples:
        with ExitStack() as stack:
            report = stack.enter_context(foveate.reduced(model, recipe)) if recipe else None
            said = answer(model, processor, [example], max_new_tokens=1)
        flops = _costs(model, report, said)[0][1]
        vision = int(vision_rows(model, said.ids)[0].sum())
        found.append((flops, int(said.mask[0].sum()), vision))
    return found


def _answered(
    model: Any,
    processor: Any,
    task: Task,
    case: Case,
    indices: Sequence[int],
    examples: Sequence[Example],
) -> list[Record]:
    """One batch under one case."""
    given = [_blanked(e) for e in examples] if case.blank else examples
    watch = Stopwatch(model)
    with watch.around(case.recipe) as report:
        said = answer(model, processor, given)
        prefill_ms = watch.forwards()[0].prefill_ms / len(said.ids)
    costs = _costs(model, report, said)
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
            vision_tokens=tokens,
            flops=flops,
            dense_flops=dense_flops,
            prefill_ms=prefill_ms,
        )
        for index, example, text, (tokens, flops, dense_flops) in zip(
            indices, examples, said.texts, costs, strict=True
        )
    ]


def _costs(model: Any, report: Report | None, said: Answers) -> list[tuple[float, int, int]]:
    """What each example's prompt cost."""
    found = costs(model, report, said.ids, said.mask)
    return [found[row] for row in said.rows]


def _blanked(example: Example) -> Example:
    return replace(example, image=Image.new("RGB", example.image.size, BLANK))


def _batches(task: Task, size: int) -> Iterator[tuple[range, list[Example]]]:
    """Examples in batches, the next ones made ready while the model works."""
    spans = [range(s, min(s + size, len(task))) for s in range(0, len(task), size)]
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(task.example, i) for i in spans[0]]
        for span, after in zip(spans, (*spans[1:], range(0)), strict=True):
            coming = [pool.submit(task.example, i) for i in after]
            yield span, [f.result() for f in waiting]
            waiting = coming


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
