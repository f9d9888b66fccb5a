"""Accuracy of a model on a task, with a 95 % confidence interval.

    python -m foveate.evaluate --model pinhole --task easyvqa,scenes-count --limit 500 --blank

Any Hugging Face image-text model with its processor will do; what is attached to the model stays.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image

from foveate.tasks import Example, Task, names, task

MAX_NEW_TOKENS = 12
BLANK = (124, 116, 104)


@dataclass(frozen=True)
class Result:
    """The outcome on one task: mean score, its interval, and what was answered to every example.

    ``vision_tokens`` is the mean of an example's prompt, before any reduction.
    """

    task: str
    n: int
    score: float
    ci_low: float
    ci_high: float
    by: dict[str, tuple[int, float]]
    vision_tokens: float
    answers: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The row for JSON, without the answers."""
        row = asdict(self)
        del row["answers"]
        return row


def evaluate(
    model: Any,
    processor: Any,
    task: Task,
    *,
    batch_size: int = 16,
    blank: bool = False,
    likelihood: str = "mean",
    advance: Callable[[int], object] | None = None,
) -> Result:
    """Answer every example of ``task`` greedily, or by likelihood where it has choices.

    ``blank`` replaces every image by one of mean colour: what the questions alone give away.
    ``likelihood`` compares choices by ``mean`` or ``sum`` of their tokens' log-probabilities.
    """
    if len(task) == 0:
        raise ValueError(
            f"{task.name} finds nothing to ask here; give it more photos or another --split."
        )
    answers: list[str] = []
    scores: list[float] = []
    kinds: list[str] = []
    seen = 0
    for examples in _batches(task, batch_size, blank):
        given, tokens = _answer(model, processor, examples, likelihood)
        answers += given
        seen += tokens
        scores += [task.score(e, a) for e, a in zip(examples, given, strict=True)]
        kinds += [e.meta.get("kind", "") for e in examples]
        if advance:
            advance(len(examples))
    low, high = interval(scores)
    by = {
        k: _mean([s for s, kind in zip(scores, kinds, strict=True) if kind == k])
        for k in set(kinds)
    }
    by = {k: by[k] for k in sorted(by) if k}
    n, score = _mean(scores)
    return Result(task.name, n, score, low, high, by, seen / n, tuple(answers))


def measure(
    model: Any,
    processor: Any,
    tasks: Sequence[Task],
    *,
    batch_size: int = 16,
    blank: bool = False,
    advance: Callable[[str, int], object] | None = None,
) -> Iterator[dict[str, Any]]:
    """One row for JSON per task, followed with ``blank`` by the row of the blanked images."""
    for one in tasks:
        for hidden in (False, True)[: 1 + blank]:
            begun = time.monotonic()
            what = one.name + (" (blank)" if hidden else "")

            def done(count: int, what: str = what) -> None:
                if advance:
                    advance(what, count)

            result = evaluate(
                model, processor, one, batch_size=batch_size, blank=hidden, advance=done
            )
            seconds = round(time.monotonic() - begun, 1)
            dense = {"recipe": "dense", "agreement": 1.0, "flops_ratio": 1.0}
            yield {**dense, "blank": hidden, **result.to_dict(), "seconds": seconds}


def interval(scores: list[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for right-or-wrong scores, else a bootstrap."""
    n = len(scores)
    if n == 0:
        return 0.0, 1.0
    mean = sum(scores) / n
    if set(scores) <= {0.0, 1.0}:
        z = 1.959964
        centre = (mean + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(mean * (1 - mean) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, centre - half), min(1.0, centre + half)
    rng = random.Random(0)
    means = sorted(sum(rng.choices(scores, k=n)) / n for _ in range(1000))
    return means[25], means[974]


def _mean(scores: list[float]) -> tuple[int, float]:
    return len(scores), sum(scores) / len(scores) if scores else 0.0


def _batches(task: Task, size: int, blank: bool) -> Iterator[list[Example]]:
    """Examples in batches, the next ones made ready while the model works."""

    def one(index: int) -> Example:
        example = task.example(index)
        if not blank:
            return example
        plain = Image.new("RGB", example.image.size, BLANK)
        return Example(plain, example.question, example.answer, example.choices, example.meta)

    with ThreadPoolExecutor(4) as pool:
        starts = range(0, len(task), size)
        spans = [range(s, min(s + size, len(task))) for s in starts]
        waiting = [pool.submit(one, i) for i in spans[0]] if spans else []
        for k in range(len(spans)):
            coming = [pool.submit(one, i) for i in spans[k + 1]] if k + 1 < len(spans) else []
            yield [f.result() for f in waiting]
            waiting = coming


def _answer(
    model: Any, processor: Any, examples: list[Example], likelihood: str
) -> tuple[list[str], int]:
    """What is answered to each example, and the vision tokens of all their prompts."""
    if any(e.choices for e in examples):
        return _choose(model, processor, examples, likelihood)
    inputs = _inputs(model, processor, examples, [_prompt(processor, e) for e in examples])
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    new = out[:, inputs["input_ids"].shape[1] :]
    answers = [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]
    return answers, sum(_vision_tokens(model, inputs))


def _choose(
    model: Any, processor: Any, examples: list[Example], likelihood: str
) -> tuple[list[str], int]:
    """The likeliest choice of each example, all of them in one forward."""
    pairs = [(e, c) for e in examples for c in e.choices]
    end = processor.tokenizer.eos_token or ""
    prompts = [_prompt(processor, e) for e, _ in pairs]
    texts = [p + c + end for p, (_, c) in zip(prompts, pairs, strict=True)]
    lengths = [
        len(whole) - len(start)
        for whole, start in zip(*(_ids(processor, some) for some in (texts, prompts)), strict=True)
    ]
    inputs = _inputs(model, processor, [e for e, _ in pairs], texts)
    with torch.no_grad():
        logits = model(**inputs, logits_to_keep=max(lengths) + 1).logits
    ids = inputs["input_ids"][:, -max(lengths) :]
    logp = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    scores = [
        float(row[-n:].mean() if likelihood == "mean" else row[-n:].sum())
        for row, n in zip(logp, lengths, strict=True)
    ]
    tokens = _vision_tokens(model, inputs)
    chosen, seen, at = [], 0, 0
    for e in examples:
        part = scores[at : at + len(e.choices)]
        chosen.append(e.choices[part.index(max(part))])
        seen += tokens[at]
        at += len(e.choices)
    return chosen, seen


def _prompt(processor: Any, example: Example) -> str:
    """The text of a single-turn chat, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": example.question}]
    chat = [{"role": "user", "content": content}]
    return cast(str, processor.apply_chat_template(chat, add_generation_prompt=True))


def _ids(processor: Any, texts: list[str]) -> list[list[int]]:
    return cast(list[list[int]], processor.tokenizer(texts)["input_ids"])


def _inputs(model: Any, processor: Any, examples: list[Example], texts: list[str]) -> Any:
    """The processor's output for ``texts`` about the examples' images, padded on the left."""
    images = [example.image for example in examples]
    inputs = processor(
        images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
    )
    return inputs.to(model.device, model.dtype)


def _vision_tokens(model: Any, inputs: Any) -> list[int]:
    """The number of image placeholders in each prompt."""
    placeholder = getattr(model.config, "image_token_id", None)
    count: list[int] = (inputs["input_ids"] == placeholder).sum(-1).tolist()
    return count


def main() -> None:
    """``python -m foveate.evaluate``; what can go wrong is said in one message, exit status 2."""
    try:
        import typer
    except ImportError:
        print("foveate: evaluation needs typer: pip install 'foveate[eval]'", file=sys.stderr)
        sys.exit(2)
    of_model = typer.Option("pinhole", help="pinhole, a Hub id or a local folder.")
    of_task = typer.Option("easyvqa", help="Names of tasks, with commas between them.")
    of_limit = typer.Option(500, min=1, help="Examples of each task.")
    of_file = typer.Option(None, "--json", help="Write the rows here, after each one.")
    of_blank = typer.Option(False, "--blank", help="Also with every image blanked.")
    of_batch = typer.Option(8, "--batch", min=1, help="Examples at once.")
    of_data = typer.Option(None, help="Folder with SPLIT.tar and SPLIT.jsonl of captioned photos.")
    of_split = typer.Option("validation", help="Which examples: train or validation.")
    of_device = typer.Option("auto", help="cpu, cuda, cuda:1, … or auto.")
    of_dtype = typer.Option("auto", help="float32, bfloat16, float16 or auto.")
    of_threads = typer.Option(None, min=1, help="CPU threads.")

    def command(
        model: str = of_model,
        task: str = of_task,
        limit: int = of_limit,
        json_file: Path | None = of_file,
        blank: bool = of_blank,
        batch: int = of_batch,
        data: Path | None = of_data,
        split: str = of_split,
        device: str = of_device,
        dtype: str = of_dtype,
        threads: int | None = of_threads,
    ) -> None:
        """Accuracy on tasks with 95 % intervals; questions need the right answer to the letter."""
        if threads:
            torch.set_num_threads(threads)
        try:
            tasks = _named(task, data, split, limit)
            result = _measured(model, tasks, batch, blank, json_file, (dtype, device))
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            typer.echo(f"foveate: {error}", err=True)
            raise typer.Exit(2) from None
        typer.echo(table(result["rows"]))

    typer.run(command)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of ``measure`` as a markdown table: one line a task, blanked images beside it."""
    lines = ["| task | n | score | 95 % interval | images blanked |", "|---|--:|--:|---|--:|"]
    blanked = {row["task"]: row["score"] for row in rows if row["blank"]}
    for row in rows:
        if not row["blank"]:
            beside = blanked.get(row["task"])
            lines.append(
                f"| {row['task']} | {row['n']} | {row['score']:.1%} "
                f"| {row['ci_low']:.1%} – {row['ci_high']:.1%} "
                f"| {'–' if beside is None else f'{beside:.1%}'} |"
            )
    return "\n".join(lines)


def _named(given: str, data: Path | None, split: str, limit: int) -> list[Task]:
    found = [name.strip() for name in given.split(",") if name.strip()]
    if not found:
        raise ValueError(f"--task {given!r} names no task; there are {', '.join(names())}.")
    return [task(name, data=data, split=split, limit=limit) for name in found]


def _measured(
    name: str,
    tasks: Sequence[Task],
    batch: int,
    blank: bool,
    file: Path | None,
    place: tuple[str, str],
) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
    from transformers import logging

    from foveate import loading
    from foveate.bench import about

    if name.startswith("shape:"):
        raise ValueError(f"{name} has random weights and cannot be evaluated; try --model pinhole.")
    if file is not None and not file.absolute().parent.is_dir():
        raise ValueError(f"--json {file}: the folder {file.absolute().parent} does not exist.")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model, processor = loading.model(name, dtype=place[0], device=place[1])
    result: dict[str, Any] = {**about(model, name), "rows": []}
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        jobs: dict[str, Any] = {}
        total = {one.name: len(one) for one in tasks}

        def advance(what: str, count: int) -> None:
            if what not in jobs:
                jobs[what] = bar.add_task(what, total=total[what.removesuffix(" (blank)")])
            bar.advance(jobs[what], count)

        for row in measure(model, processor, tasks, batch_size=batch, blank=blank, advance=advance):
            result["rows"].append(row)
            if file is not None:
                file.write_text(json.dumps(result, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
