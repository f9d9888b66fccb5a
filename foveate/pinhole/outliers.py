"""Whether pinhole's [CLS] attention is of use to PruMerge: how many tokens its rule keeps a photo.

    python -m foveate.pinhole.outliers --data DIR

Attention that is spread evenly has no outliers, and then PruMerge chooses nothing worth choosing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

import foveate
from foveate.ask import prepare


@torch.no_grad()
def kept(model: Any, processor: Any, images: Iterable[Image.Image]) -> list[int]:
    """The tokens that adaptive ``prumerge`` keeps of each image: outliers, and one that is added.

    An image without an outlier keeps its most attended token all the same, so none is below 2.
    """
    found = []
    with foveate.reduced(model, foveate.recipe("prumerge")) as report:
        for image in images:
            model(**prepare(model, processor, image, "What is it?"), logits_to_keep=1)
            found += report.alive[0]
    return found


def main(
    data: Annotated[Path | None, typer.Option(help="folder with SPLIT.tar and SPLIT.jsonl")] = None,
    split: str = "validation",
    count: Annotated[int, typer.Option(help="photos to look at", min=2)] = 200,
) -> None:
    """Count the outliers of [CLS] attention on photos."""
    from foveate import pinhole
    from foveate.tasks.photos import photos

    model, processor = pinhole.load()
    shown = photos(data, split)
    number = min(count, len(shown))
    tokens = kept(model, processor, (shown.image(i) for i in range(number)))
    tenths = statistics.quantiles(tokens, n=10)
    typer.echo(
        f"{number} photos ({split}): PruMerge keeps {statistics.mean(tokens):.1f} tokens on "
        f"average, median {statistics.median(tokens):g}, a tenth at most {tenths[0]:.0f}, a tenth "
        f"at least {tenths[-1]:.0f}, least {min(tokens)}, most {max(tokens)}."
    )


if __name__ == "__main__":
    typer.run(main)
