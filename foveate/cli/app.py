"""The commands. Each reads its options, calls one leaf, prints a table and writes JSON if asked."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from typer.core import TyperGroup

from foveate import catalogue, loading
from foveate.cli import bench, options, search, tables
from foveate.cli.options import (
    Batch,
    Data,
    Device,
    Dtype,
    Json,
    Keep,
    Model,
    Output,
    Recipes,
    Seed,
    Threads,
)
from foveate.recipe import Recipe, finished, parse, with_keep

_COMMAND = "foveate.command"  # where the context keeps what was typed
_ADAPTIVE = "adaptive"

_EXTRAS: Mapping[str, str] = {
    "PIL": "pinhole",
    "platformdirs": "pinhole",
    "filelock": "pinhole",
    "gguf": "pinhole",
    "onnx": "pinhole",
    "matplotlib": "demo",
    "skimage": "demo",
    "scipy": "eval",
    "sacrebleu": "eval",
    "optuna": "search",
    "av": "video",
}


class _Commands(TyperGroup):
    """Says what went wrong in one message instead of a traceback; exit status 2."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_COMMAND] = shlex.join(("foveate", *args))
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        warnings.simplefilter("ignore")
        try:
            return super().invoke(ctx)
        except Exception as error:
            message, status = _explained(error)
            if message is None or os.environ.get("FOVEATE_TRACEBACK"):
                raise
            print(f"foveate: {message}", file=sys.stderr)
            raise typer.Exit(status) from None


def _explained(error: Exception) -> tuple[str | None, int]:
    """What to say about an error, and the exit status; None leaves it to typer."""
    if type(error).__module__.split(".")[0] in ("click", "typer"):
        return None, 2
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate" in str(error):
        return "Out of memory; try a smaller --batch, fewer --images or --dtype bfloat16.", 2
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.split(".")[0]
        extra = _EXTRAS.get(package, "demo")
        return f"This needs the package {package}: pip install 'foveate[{extra}]'", 2
    said = str(error).strip() or type(error).__name__
    if isinstance(error, ValueError | OSError | ImportError | NotImplementedError):
        return said, 2
    if type(error).__module__.startswith("foveate."):
        return said, 2
    return (
        f"foveate stopped on an error it did not expect: {type(error).__name__}: {said}\n"
        "FOVEATE_TRACEBACK=1 before the same command shows where; please report it with that."
    ), 1


app = typer.Typer(
    cls=_Commands,
    help="Vision-token reduction for multimodal LLMs: ask, compare, time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


Image = Annotated[Path, typer.Argument(help="A picture: JPEG, PNG, WebP, …")]
NewTokens = Annotated[int, typer.Option("--new-tokens", min=2, help="Longest answer.")]


def _version(wanted: bool) -> None:
    if wanted:
        from foveate.bench import version_of

        for package in ("foveate", "torch", "transformers"):
            typer.echo(f"{package} {version_of(package)}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Versions.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    model: Model = loading.PINHOLE,
    recipe: Recipes = None,
    keep: Keep = None,
    new_tokens: NewTokens = 24,
    output: Output = Path("foveate-demo.png"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Ask questions about photos, dense and reduced: one table, one picture.

    Without --recipe, four recipes that keep 0.25 of the vision tokens, or what --keep says.
    """
    from foveate import demo as leaf

    made = (
        options.recipes(recipe, keep)
        if recipe
        else leaf.recipes(leaf.KEEP if keep is None else keep)
    )
    options.no_shape(model, "demo")
    leaf.ready(output)
    loaded, processor = options.load(model, dtype, device, threads, made)
    with options.waiting("asking") as say:
        shown = leaf.run(
            loaded, processor, made, name=model, max_new_tokens=new_tokens, progress=say
        )
    out, result = tables.console(), shown.result
    head = f"{model} on {result['device']}, {result['dtype']}"
    out.print(tables.answers(result["rows"], head))
    leaf.save(shown, output)
    out.print(f"Surviving patches at half depth: {output}")
    if model == loading.PINHOLE:
        if result["scores"]:
            out.print(tables.scores(result["scores"]))
        else:
            out.print("What pinhole can and cannot do, measured: docs/pinhole.md")
    options.write(json_file, result)


@app.command()
def ask(
    image: Annotated[Path, typer.Argument(help="A picture (JPEG, PNG, …) or video (MP4, …).")],
    question: Annotated[str, typer.Argument(help="What to ask about it.")],
    model: Model = loading.PINHOLE,
    recipe: Recipes = None,
    keep: Keep = None,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Frames taken of a video.")] = 8,
    new_tokens: NewTokens = 48,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json_file: Json = None,
) -> None:
    """Answer a question about a picture or video, dense and reduced, side by side."""
    from foveate.ask import answers, given_as, prepare
    from foveate.bench import about

    opened, made = loading.opened(image, frames), options.recipes(recipe or ["aim"], keep)
    options.no_shape(model, "ask")
    loaded, processor = options.load(model, dtype, device, threads, made)
    given = prepare(loaded, processor, opened, question)
    with options.waiting("answering"):
        found = answers(loaded, processor, given, made, max_new_tokens=new_tokens)
    rows = [{"image": str(image), "question": question} | row for row, _ in found]
    result = {**about(loaded, model), "given": given_as(processor, opened), "rows": rows}
    tables.console().print(tables.answers(rows, f"{model} on {result['device']}"))
    if isinstance(opened, loading.Clip):
        tables.console().print(f"{image}: {result['given']}")
    for row, report in found:
        for note in report.notes if report is not None else ():
            tables.console().print(f"{row['recipe']}: {note}")
    options.write(json_file, result)


@app.command()
def trace(
    image: Image,
    model: Model = loading.PINHOLE,
    recipe: Recipes = None,
    keep: Keep = None,
    layers: Annotated[
        str, typer.Option("--layers", help="Such as 0,8,16; default: where most tokens go.")
    ] = "",
    question: Annotated[str, typer.Option("--question")] = "Describe the image.",
    output: Output = Path("foveate-trace.png"),
    dtype: Dtype = "auto",
    device: Device = "auto",
    json_file: Json = None,
) -> None:
    """Draw which patches survive, layer by layer."""
    from foveate.adapter import vision_rows
    from foveate.ask import answers, prepare
    from foveate.trace import draw, layers_worth_drawing, panel, ready

    opened, made = loading.picture(image), options.recipes(recipe or ["aim"], keep)
    options.no_shape(model, "trace")
    wanted = _numbers(layers)
    ready(output)
    loaded, processor = options.load(model, dtype, device, None, made)
    given = prepare(loaded, processor, opened, question)
    vision = vision_rows(loaded, given["input_ids"])[0].nonzero()[:, 0]
    pictures, alive = [], {}
    with options.waiting("looking"):
        found = answers(loaded, processor, given, made, max_new_tokens=2, warm=False)
    for row, report in found:
        if report is not None:
            at = wanted or layers_worth_drawing(report)
            pictures.append((opened, [panel(report, vision, b, row["recipe"]) for b in at]))
            alive[row["recipe"]] = report.alive
    draw(pictures, output)
    tables.console().print(f"Surviving patches: {output}")
    options.write(json_file, {"model": model, "image": str(image), "alive": alive})


app.command("bench")(bench.command)


@app.command("eval")
def evaluate(
    context: typer.Context,
    task: Annotated[
        list[str],
        typer.Option("--task", help="A task or a JSONL file of your own; several, or with commas."),
    ],
    model: Model = loading.PINHOLE,
    recipe: Recipes = None,
    keep: Annotated[
        str,
        typer.Option(
            "--keep",
            help="Every preset at each of these, such as 0.33,0.11; the word adaptive adds the "
            "methods that choose their own count (prumerge, prumerge+) doing so.",
        ),
    ] = "",
    baselines: Annotated[
        bool, typer.Option(help="Also random, pool and downsample at each recipe's FLOPs.")
    ] = True,
    blank: Annotated[bool, typer.Option("--blank", help="Also dense with blanked images.")] = False,
    limit: Annotated[int, typer.Option("--limit", min=1, help="Examples of each task.")] = 500,
    seed: Seed = 0,
    batch: Batch = 8,
    data: Data = None,
    split: Annotated[
        str, typer.Option("--split", help="Such as train, validation.")
    ] = "validation",
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json_file: Json = None,
    write: Annotated[
        Path | None,
        typer.Option("--write", help="Put the table, as markdown, between a file's markers."),
    ] = None,
) -> None:
    """Accuracy with 95 % intervals, dense against recipes; goes on where it was stopped.

    With --json FILE every answer is kept beside it (FILE.answers), and the same command goes on;
    of a finished run it only makes the table again.
    """
    from foveate import evaluate as leaf
    from foveate import scoreboard
    from foveate.bench import about
    from foveate.journal import Journal

    made = _budgeted(recipe or [], keep)
    options.no_shape(model, "eval")
    if write is not None:
        scoreboard.BLOCK.check(write)
    named = options.tasks(task, data=data, split=split, seed=seed, limit=limit)
    tasks = list(named.values())
    leaf.ready(tasks)
    loaded, processor = options.load(model, dtype, device, threads, made)
    asked = about(loaded, model) | {"split": split, "seed": seed}
    journal = Journal(
        json_file and json_file.with_name(json_file.name + ".answers"),
        asked | {"weights": leaf.digest(loaded), "data": str(data or ""), "files": _digests(named)},
    )
    begun = journal.once("begun", lambda: str(date.today()))
    result = asked | {"date": begun, "command": context.meta[_COMMAND], "rows": [], "notes": []}
    with options.progress() as bar:
        if baselines and made:
            job = bar.add_task("finding baselines of equal FLOPs", total=None)
            plain, result["notes"] = leaf.baselines(loaded, processor, tasks, made, journal)
            made |= plain
            bar.remove_task(job)
        columns = 1 + blank + len(made)
        jobs = {t.name: bar.add_task(t.name, total=len(t) * columns) for t in tasks}
        result["rows"] = leaf.evaluate(
            loaded,
            processor,
            tasks,
            made,
            batch_size=batch,
            blank=blank,
            journal=journal,
            advance=lambda name, count: bar.advance(jobs[name], count),
        )
    result["notes"] = [*result["notes"], *scoreboard.collapses(result["rows"])]
    tables.console().print(tables.evaluation(result))
    options.write(json_file, result)
    if write is not None:
        scoreboard.BLOCK.write(write, scoreboard.markdown(result))


app.add_typer(search.app, name="search")


@app.command("new-method")
def new_method(
    name: Annotated[str, typer.Argument(help="Lower case, as in papers: my-method.")],
    check: Annotated[bool, typer.Option(help="Run the contract suite on it.")] = True,
) -> None:
    """Write a method's file from a template, and hold it to the contract.

    In a checkout of foveate the file goes to foveate/reducers and the tests run on it, every
    family; elsewhere a module of one's own is written, with the lines that make it known.
    """
    from foveate import new_method as leaf

    written = leaf.write(name, Path.cwd())
    typer.echo(f"{written.file} is written; {written.advice}")
    if check and not leaf.check(written):
        raise typer.Exit(1)


@app.command()
def methods(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the README has it.")] = False,
    write: Annotated[
        Path | None, typer.Option("--write", help="Put the markdown between a file's markers.")
    ] = None,
    json_file: Json = None,
) -> None:
    """The catalogue of methods and presets."""
    rows, presets = catalogue.methods(), catalogue.presets()
    if write is not None:
        catalogue.BLOCK.write(write, catalogue.markdown())
        typer.echo(f"{write} is up to date.")
    elif markdown:
        typer.echo(catalogue.BLOCK.around(catalogue.markdown()))
    else:
        tables.console().print(tables.methods(rows, presets))
    options.write(json_file, {"rows": rows, "presets": presets})


@app.command()
def models(json_file: Json = None) -> None:
    """Which method works on which family, as the tests found it."""
    rows = catalogue.models()
    tables.console().print(tables.models(rows))
    options.write(json_file, {"rows": rows})


def _budgeted(given: Sequence[str], keep: str) -> dict[str, Recipe]:
    """The recipes of ``eval``: every preset at each budget, finished recipes as they are."""
    budgets = [part.strip() for part in keep.split(",") if part.strip()]
    if not budgets:
        return options.recipes(given, None)
    if not given:
        raise ValueError(f"--keep {keep} says what each --recipe keeps, and none is given.")
    if all(map(finished, given)):
        raise ValueError(f"{given[0]} is a finished recipe; --keep goes with a preset.")
    made: dict[str, Recipe] = {}
    for text in given:
        for budget in budgets:
            made |= _at(text, budget)
    if _ADAPTIVE in budgets and not any(one.schedule.adaptive for one in made.values()):
        raise ValueError(
            f"--keep {_ADAPTIVE} is for methods that choose their own count, and none of "
            f"{', '.join(given)} does; prumerge and prumerge+ do."
        )
    return made


def _at(text: str, budget: str) -> dict[str, Recipe]:
    """The recipe ``text`` at one budget, by its name; none where it cannot be adaptive."""
    if finished(text):
        return {text: parse(text)}
    if budget == _ADAPTIVE:
        own = parse(text)
        return {text: own} if own.schedule.adaptive else {}
    try:
        share = float(budget)
    except ValueError:
        raise ValueError(
            f"--keep holds {budget!r}; give fractions, such as 0.33,0.11, or {_ADAPTIVE}."
        ) from None
    return {with_keep(text, budget): parse(text, share)}


def _digests(names: Iterable[str]) -> dict[str, str]:
    """What is in the files among tasks: when it has changed, old answers are no answers to it."""
    from foveate.tasks import file_of

    files = {str(file) for name in names if (file := file_of(name)) is not None}
    return {f: hashlib.sha256(Path(f).read_bytes()).hexdigest()[:12] for f in sorted(files)}


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--layers is {text!r}; give layer numbers, such as 0,8,16.") from None
