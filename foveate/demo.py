"""The main job on photos that come with scikit-image: ask, reduce, compare, draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import foveate
from foveate.adapter import vision_rows
from foveate.ask import answers, prepare
from foveate.bench import about
from foveate.loading import missing
from foveate.recipe import Recipe
from foveate.trace import Panel, draw, panel
from foveate.trace import ready as drawable

if TYPE_CHECKING:
    from PIL import Image

KEEP = 0.25
RECIPES = ("aim", "prumerge+", "fastv", "gsearch-llava-1.5-7b")
QUESTIONS: Mapping[str, tuple[str, ...]] = {
    "chelsea": ("Is there a cat in the image?", "Describe the image."),
    "astronaut": ("Is there a woman in the image?", "Is there a dog in the image?"),
    "coffee": ("Is there a table in the image?", "Is there a person in the image?"),
}


@dataclass(frozen=True)
class Shown:
    """What the demo made: the JSON, and a row of panels for each photo."""

    result: dict[str, Any]
    pictures: list[tuple[Image.Image, list[Panel]]]


def run(
    model: Any,
    processor: Any,
    recipes: Mapping[str, Recipe],
    *,
    name: str,
    max_new_tokens: int = 24,
    progress: Callable[[str], object] | None = None,
) -> Shown:
    """Ask every question about every photo, with the untouched model and with each recipe."""
    rows: list[dict[str, Any]] = []
    pictures = []
    for title, questions in QUESTIONS.items():
        image, panels = photo(title), []
        for index, question in enumerate(questions):
            if progress is not None:
                progress(f"{title}: {question}")
            given = prepare(model, processor, image, question)
            made = answers(model, processor, given, recipes, max_new_tokens=max_new_tokens)
            rows += [{"image": title, "question": question} | row for row, _ in made]
            if index == 0:
                vision = vision_rows(model, given["input_ids"])[0].nonzero()[:, 0]
                panels = [
                    panel(report, vision, len(report.alive) // 2, row["recipe"])
                    for row, report in made
                    if report is not None
                ]
        pictures.append((image, [Panel(f"{title}\n{len(vision)} vision tokens", None), *panels]))
    return Shown({**about(model, name), "rows": rows, "scores": scores()}, pictures)


def ready(path: str | Path) -> None:
    """See that the photos are there and that the figure can be drawn, before a model is loaded."""
    drawable(path)
    for title in QUESTIONS:
        photo(title)


def recipes(keep: float) -> dict[str, Recipe]:
    """The demo's recipes, each keeping ``keep`` of the vision tokens in its own way."""
    return {name: foveate.recipe(name, keep=keep) for name in RECIPES}


def photo(name: str) -> Image.Image:
    """A photo that scikit-image carries in its wheel."""
    try:
        from skimage import data
    except ImportError as error:
        raise missing("scikit-image", "demo") from error
    from PIL import Image

    load: Callable[[], Any] = getattr(data, name)
    return Image.fromarray(load()).convert("RGB")


def scores() -> list[dict[str, Any]]:
    """Pinhole's measured scores, as written into its weights when they were trained."""
    try:
        from safetensors import safe_open
    except ImportError:
        return []
    from foveate.pinhole import weights

    file = weights.file()
    if not file.is_file():
        return []
    with safe_open(file, framework="pt") as opened:
        said = (opened.metadata() or {}).get("scores", "")
    rows: list[dict[str, Any]] = json.loads(said) if said else []
    return rows


def save(shown: Shown, path: str | Path) -> None:
    """Write the figure."""
    draw(shown.pictures, path)
