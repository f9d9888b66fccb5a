"""Captioned photos from a folder that holds ``S.tar`` (JPEG) and ``S.jsonl`` (image, captions)."""

from __future__ import annotations

import io
import json
import re
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from PIL import Image

DEFAULT = Path("shared") / "flickr8k"


@dataclass(frozen=True)
class Photos:
    """The photos of one split, in the order of the jsonl file."""

    folder: Path
    split: str

    @cached_property
    def rows(self) -> list[tuple[str, tuple[str, ...]]]:
        """(file name, captions) of every photo."""
        lines = (self.folder / f"{self.split}.jsonl").read_text().splitlines()
        items = [json.loads(line) for line in lines]
        return [(item["image"], tuple(item["captions"])) for item in items]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        with tarfile.open(self._tar) as archive:
            return {Path(m.name).name: (m.offset_data, m.size) for m in archive if m.isfile()}

    @property
    def _tar(self) -> Path:
        return self.folder / f"{self.split}.tar"

    def __len__(self) -> int:
        return len(self.rows)

    def image(self, index: int) -> Image.Image:
        offset, size = self._places[self.rows[index][0]]
        with self._tar.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        return Image.open(io.BytesIO(data)).convert("RGB")

    def captions(self, index: int) -> tuple[str, ...]:
        return self.rows[index][1]


def photos(data: str | Path | None, split: str) -> Photos:
    """The split of the folder ``data``; without one, of ``../shared/flickr8k`` when it is there."""
    places = [Path(data)] if data else _default_places()
    for folder in places:
        if (folder / f"{split}.jsonl").is_file() and (folder / f"{split}.tar").is_file():
            return Photos(folder, split)
    raise FileNotFoundError(
        f"no {split}.tar and {split}.jsonl in {' or '.join(str(p) for p in places)}.\n"
        'Name a folder that holds them, one {"image": ..., "captions": [...]} a line: '
        "--data DIR --split S. Tasks that need no folder: easyvqa, scenes-where, scenes-count, "
        "scenes-words."
    )


def sentence(caption: str) -> str:
    """A caption as a clean sentence: "A dog runs ." -> "A dog runs."."""
    text = re.sub(r"\s+", " ", caption.replace('"', "")).strip()
    text = re.sub(r"\s+([.,!?;'])", r"\1", text).rstrip(" .,;")
    return text[:1].upper() + text[1:] + "."


def _default_places() -> list[Path]:
    here = Path.cwd()
    repo = Path(__file__).resolve().parents[2]
    return [here.parent / DEFAULT, repo.parent / DEFAULT, here / DEFAULT]
