"""``foveate bench``: what a recipe gains, what it costs, and how close that is to the possible."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from foveate.cli import options, tables
from foveate.cli.options import Device, Dtype, Json, Keep, Model, Recipes, Threads


def command(
    model: Model = "shape:llava-onevision-0.5b",
    recipe: Recipes = None,
    keep: Keep = None,
    compare: Annotated[
        str,
        typer.Option(
            "--compare",
            help="Also the recipes as others carry them out: masking, rerun, loops, with commas.",
        ),
    ] = "",
    batch: Annotated[str, typer.Option("--batch", help="Prompts at once: 1,8.")] = "1",
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Prompts of a batch differ in length.")
    ] = False,
    images: Annotated[int, typer.Option("--images", min=1, help="Images of each prompt.")] = 1,
    frames: Annotated[
        int, typer.Option("--frames", min=0, help="Frames of a video instead of images.")
    ] = 0,
    image_size: Annotated[
        str, typer.Option("--image-size", help="WIDTHxHEIGHT; default: the encoder's own.")
    ] = "",
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=2, help="Of each prompt.")] = 40,
    new_tokens: Annotated[
        str, typer.Option("--new-tokens", help="Lengths of the answer: 16,128.")
    ] = "32",
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed rounds.")] = 5,
    warmup: Annotated[int, typer.Option("--warmup", min=1, help="Untimed rounds.")] = 1,
    identity: Annotated[
        bool, typer.Option(help="A row with everything attached and nothing reduced.")
    ] = True,
    attainable: Annotated[
        bool, typer.Option(help="Time the untouched model at every length that occurs.")
    ] = True,
    profile: Annotated[
        float,
        typer.Option(
            "--profile", min=0, help="Where time goes in what is less efficient than this: 0.95."
        ),
    ] = 0.0,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    json_file: Json = None,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", callback=options.writable, help="Append the rows to a CSV file."),
    ] = None,
) -> None:
    """Time the untouched model and recipes by stage, side by side in one run.

    With --json FILE finished rounds are kept beside it (FILE.rounds) until all are there, and the
    same command goes on where it was stopped.
    """
    from foveate import bench as leaf
    from foveate.bench import sheet
    from foveate.peers import carried_out
    from foveate.shapes import Prompt

    made = options.recipes(recipe or ["aim", "fastv", "prumerge"], keep)
    peers = [name.strip() for name in compare.split(",") if name.strip()]
    carried_out(made, peers)  # refuses before anything is loaded
    batches = _counts("--batch", batch, 1)
    prompt = Prompt(batches[0], images, frames, text_tokens, _size(image_size), ragged)
    settings = leaf.Settings(
        _counts("--new-tokens", new_tokens, 2), repeats, warmup, identity, attainable, profile
    )
    loaded, _ = options.load(model, dtype, device, threads, made)
    with options.progress() as bar:
        task = bar.add_task("warming up", total=None)

        def progress(done: int, total: int, what: str) -> None:
            bar.update(task, completed=done, total=total, description=what)

        result = leaf.bench(
            loaded,
            made,
            prompt,
            settings,
            batches=batches,
            compare=peers,
            name=model,
            file=json_file and json_file.with_name(json_file.name + ".rounds"),
            progress=progress,
        )
    tables.console().print(tables.bench(result))
    options.write(json_file, result)
    if csv_file is not None:
        sheet.append(csv_file, sheet.lines(result))


def _counts(option: str, text: str, least: int) -> tuple[int, ...]:
    """Whole numbers with commas, each once, ascending."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) >= least for part in parts):
        raise ValueError(
            f"{option} is {text!r}; give whole numbers of at least {least}, such as {least},8."
        )
    return tuple(sorted({int(part) for part in parts}))


def _size(text: str) -> tuple[int, int] | None:
    """``WIDTHxHEIGHT`` to (height, width)."""
    if not text:
        return None
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise ValueError(f"--image-size is {text!r}; give WIDTHxHEIGHT, for example 640x480.")
    return int(height), int(width)
