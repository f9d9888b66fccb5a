"""Options and steps that several commands share."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

import foveate
from foveate import loading
from foveate.cli import tables
from foveate.recipe import Recipe, finished, parse

if TYPE_CHECKING:
    from foveate.tasks import Task


def writable(path: Path | None) -> Path | None:
    """Refuse a file that cannot be written before the work whose result it is to hold."""
    if path is None:
        return None
    folder = path.parent
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file to write, such as {path / 'result'}.")
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise ValueError(
            f"{path} cannot be written because the folder {folder} {what}; "
            f"make it (mkdir -p {folder}) or name another file."
        )
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise ValueError(f"{path} cannot be written: no permission; name another file.")
    return path


Model = Annotated[
    str, typer.Option("--model", help="Hub id, local folder, pinhole, or shape:<name>.")
]
Recipes = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe",
        help="Preset or method, name:key=value,…, or a JSON file; may be given several times.",
    ),
]
Keep = Annotated[
    float | None,
    typer.Option("--keep", help="Fraction of vision tokens kept by every preset, in (0, 1]."),
]
Json = Annotated[
    Path | None,
    typer.Option("--json", callback=writable, help="Also write the result as JSON."),
]
Data = Annotated[Path | None, typer.Option("--data", help="Folder with SPLIT.tar and SPLIT.jsonl.")]
Seed = Annotated[int, typer.Option("--seed", help="Of the order of examples.")]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Examples at once.")]
Dtype = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, … or auto.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads.")]
Output = Annotated[
    Path, typer.Option("-o", "--output", callback=writable, help="The picture to write.")
]


def recipes(given: Sequence[str], keep: float | None) -> dict[str, Recipe]:
    """The recipes of the command line, by the text that names them."""
    made = {text: parse(text, None if finished(text) else keep) for text in given}
    if keep is not None and all(map(finished, given)):
        parse(given[0], keep)  # refuses a budget for a finished recipe
    return made


def tasks(given: Sequence[str], **how: Any) -> dict[str, Task]:
    """The tasks of the command line by what was typed; a file may have commas in its name.

    ``A,B:x=1,y=2`` are two: what follows a comma as ``key=`` belongs to the task before.
    """
    from foveate.tasks import task

    parts = [[text] if Path(text).is_file() else re.split(r",(?!\s*\w+=)", text) for text in given]
    names = dict.fromkeys(name.strip() for part in parts for name in part if name.strip())
    if not names:
        raise ValueError("--task names no task; try --task easyvqa.")
    return {name: task(name, **how) for name in names}


def no_shape(model: str, command: str) -> None:
    if model.startswith("shape:"):
        raise ValueError(
            f"{model} has random weights and nothing to say; {command} needs a real model: "
            "--model pinhole, a Hub id or a local folder. For timing: foveate bench."
        )


def load(
    model: str, dtype: str, device: str, threads: int | None, recipes: Mapping[str, Recipe]
) -> tuple[Any, Any]:
    """Model and processor; recipes that do not fit it are refused before anything long runs."""
    if threads is not None:
        torch.set_num_threads(threads)
    with waiting(f"loading {model}"):
        loaded, processor = loading.model(model, dtype=dtype, device=device)
    for text, recipe in recipes.items():
        try:
            foveate.attach(loaded, recipe)
        except ValueError as error:
            raise ValueError(f"{text}: {error}") from None
        foveate.detach(loaded)
    return loaded, processor


@contextmanager
def waiting(what: str) -> Iterator[Callable[[str], object]]:
    """A spinner on stderr; yields what changes its text."""
    with tables.console(stderr=True).status(f"{what} …") as status:
        yield lambda now: status.update(f"{now} …")


def progress() -> Progress:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    return Progress(*columns, console=tables.console(stderr=True), transient=True)


def write(path: Path | None, result: Mapping[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(result, indent=1) + "\n")
