"""A picture of what survives: the patches that are dropped at a layer are dimmed.

Reads a report and nothing else of a run. Works where the vision tokens of one image are a full
raster (LLaVA-1.5, pinhole, one InternVL tile).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from foveate.loading import missing
from foveate.report import Report

if TYPE_CHECKING:
    from PIL import Image

_KEPT, _MERGED, _DROPPED = 1.0, 0.45, 0.12  # brightness of a patch


@dataclass(frozen=True)
class Panel:
    """One cell of the figure: a title and the brightness of every patch, (height, width)."""

    title: str
    light: Tensor | None


def survivors(report: Report, vision: Tensor, layer: int) -> Tensor:
    """Which vision tokens of the first sample are alive at ``layer``, ``(N,)`` bool.

    Args:
        vision: (N,) the positions of its vision tokens in the original prompt.
    """
    return torch.isin(vision.cpu(), report.slots[layer][0])


def panel(report: Report, vision: Tensor, layer: int, title: str = "") -> Panel:
    """What is left at ``layer`` as brightness: kept 1, merged into a kept one dimmer, dropped dark.

    Raises:
        ValueError: for a layer that is not there, or vision tokens that are no square raster.
    """
    if not 0 <= layer < len(report.alive):
        raise ValueError(f"There is no layer {layer}; this model has 0 to {len(report.alive) - 1}.")
    side = math.isqrt(len(vision))
    if side * side != len(vision):
        raise ValueError(
            f"The {len(vision)} vision tokens of this prompt are no square raster, and only those "
            "can be drawn; use one image and a model without tiles, such as pinhole or LLaVA-1.5."
        )
    alive = survivors(report, vision, layer)
    light = torch.full((len(vision),), _DROPPED)
    light[_merged(report, len(vision))] = _MERGED
    light[alive] = _KEPT
    count = int(alive.sum())
    if count == 0:
        light.fill_(_DROPPED)  # what was merged went away with its survivor
    caption = f"layer {layer}: {count} of {len(vision)}"
    return Panel(f"{title}\n{caption}" if title else caption, light.view(side, side))


def ready(path: str | Path) -> None:
    """See that matplotlib is there and knows the suffix of ``path``, before anything is run.

    Raises:
        ImportError: when it is missing, with the line to type.
        ValueError: for a suffix that says no format of pictures.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise missing("matplotlib", "demo") from error
    known = FigureCanvasAgg.get_supported_filetypes()
    suffix = Path(path).suffix.removeprefix(".").lower()
    if suffix and suffix not in known:
        raise ValueError(
            f"{path} ends in .{suffix}, which is no format that can be written; end it in "
            f"{', '.join(f'.{name}' for name in known)}."
        )


def draw(rows: Sequence[tuple[Image.Image, Sequence[Panel]]], path: str | Path) -> None:
    """Write a figure: one picture per row, its panels side by side. The suffix says the format."""
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise missing("matplotlib", "demo") from error
    columns = max(len(panels) for _, panels in rows)
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(2.1 * columns, 2.5 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots(len(rows), columns, squeeze=False)
        for line, (image, panels) in zip(axes, rows, strict=True):
            for axis in line:
                axis.axis("off")
            for axis, cell in zip(line, panels, strict=False):
                axis.imshow(_dimmed(image, cell.light))
                axis.set_title(cell.title)
        try:
            figure.savefig(path, dpi=110)
        except (OSError, ValueError) as error:
            raise ValueError(f"The picture cannot be written to {path}: {error}") from None


def layers_worth_drawing(report: Report, most: int = 4) -> list[int]:
    """The entrance and the layers at which most tokens went, in order."""
    counts = [sum(alive) for alive in report.alive]
    falls = sorted(range(1, len(counts)), key=lambda b: counts[b] - counts[b - 1])
    chosen = {0, *(b for b in falls[: most - 1] if counts[b] < counts[b - 1])}
    return sorted(chosen)


def _merged(report: Report, tokens: int) -> Tensor:
    """Tokens whose value went into a survivor at the entrance, ``(N,)`` bool."""
    groups = [group.cpu() for group in report.groups]
    if sum(map(len, groups)) != tokens:
        return torch.zeros(tokens, dtype=torch.bool)
    return torch.cat(groups) >= 0


def _dimmed(image: Image.Image, light: Tensor | None) -> Any:
    """The picture (height, width, 3) with each patch at its brightness, towards white."""
    import numpy as np

    small = image.convert("RGB")
    small.thumbnail((480, 480))
    pixels = np.asarray(small, dtype=np.float32) / 255
    if light is None:
        return pixels
    height, width = pixels.shape[:2]
    grid = light.numpy()
    rows = np.arange(height) * grid.shape[0] // height
    columns = np.arange(width) * grid.shape[1] // width
    shade = grid[rows][:, columns][..., None]
    return pixels * shade + (1 - shade)
