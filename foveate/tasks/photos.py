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
        file = self.folder / f"{self.split}.jsonl"
        lines = enumerate(file.read_text(encoding="utf-8").split("\n"), 1)
        return [_row(line, f"{file}, line {n}") for n, line in lines if line.strip()]

    @cached_property
    def _places(self) -> dict[str, tuple[int, int]]:
        try:
            with tarfile.open(self._tar, "r:") as archive:
                return {Path(m.name).name: (m.offset_data, m.size) for m in archive if m.isfile()}
        except tarfile.TarError as error:
            raise ValueError(
                f"{self._tar} is damaged or is not an uncompressed tar ({error})."
            ) from None

    @property
    def _tar(self) -> Path:
        return self.folder / f"{self.split}.tar"

    def __len__(self) -> int:
        return len(self.rows)

    def first(self, count: int | None) -> Photos:
        """The first ``count`` of them, or all."""
        some = Photos(self.folder, self.split)
        some.__dict__["rows"] = self.rows[:count]
        return some

    def image(self, index: int) -> Image.Image:
        name = Path(self.rows[index][0]).name
        if name not in self._places:
            raise ValueError(f"{self._tar} holds no {name}, which {self.split}.jsonl names.")
        offset, size = self._places[name]
        with self._tar.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        try:
            return Image.open(io.BytesIO(data)).convert("RGB")
        except (OSError, SyntaxError):
            raise ValueError(f"{name} in {self._tar} is not a picture or is damaged.") from None

    def captions(self, index: int) -> tuple[str, ...]:
        return self.rows[index][1]


def photos(data: str | Path | None, split: str) -> Photos:
    """The split of the folder ``data``; without one, of ``../shared/flickr8k`` when it is there."""
    places = [Path(data)] if data else _default_places()
    for folder in places:
        if (folder / f"{split}.jsonl").is_file() and (folder / f"{split}.tar").is_file():
            return Photos(folder, split)
    there = " or ".join(f"{p} (splits there: {_splits(p)})" for p in places)
    raise FileNotFoundError(
        f"no {split}.tar and {split}.jsonl in {there}.\n"
        'Name a folder that holds them, one {"image": ..., "captions": [...]} a line: '
        "--data DIR --split S. Tasks that need no folder: easyvqa, scenes-where, scenes-count, "
        "scenes-words, video-what-shapes, video-order-shapes, video-where-shapes."
    )


def _splits(folder: Path) -> str:
    named = sorted(p.stem for p in folder.glob("*.jsonl") if p.with_suffix(".tar").is_file())
    return ", ".join(named) or "none"


def _row(line: str, where: str) -> tuple[str, tuple[str, ...]]:
    try:
        item = json.loads(line)
        image, captions = item["image"], item["captions"]
        if isinstance(captions, str) or not all(isinstance(t, str) for t in (image, *captions)):
            raise TypeError
        if not captions:
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'{where} is not of the form {{"image": "a.jpg", "captions": ["…", "…"]}}: {line[:80]}'
        ) from None
    return image, tuple(captions)


def sentence(caption: str) -> str:
    """A caption as a clean sentence: "A dog runs ." -> "A dog runs."."""
    text = re.sub(r"\s+", " ", caption.replace('"', "")).strip()
    text = re.sub(r"\s+([.,!?;'])", r"\1", text).rstrip(" .,;")
    return text[:1].upper() + text[1:] + "."


def _default_places() -> list[Path]:
    here = Path.cwd()
    repo = Path(__file__).resolve().parents[2]
    return [here.parent / DEFAULT, repo.parent / DEFAULT, here / DEFAULT]
