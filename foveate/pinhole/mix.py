"""What pinhole is trained on: rows of packed questions about photos, shapes and drawn scenes.

Yes and no are balanced for every thing asked about, in expectation over photos: a thing's negatives
weigh together what its positives do, half of them from photos where it would be likely.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from foveate.loading import evenly
from foveate.pinhole.assembly import IMAGE_TOKEN, IMAGE_TOKENS
from foveate.tasks import easyvqa, scenes, video
from foveate.tasks.flickr8k import CAPTION_QUESTION, Labels, question
from foveate.tasks.lexicon import Thing, things, words
from foveate.tasks.photos import Photos, sentence

Array = NDArray[Any]

HEADER = "<|im_start|>user\n"
TURN = "<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"
CAPTION_ASKS = (
    CAPTION_QUESTION,
    CAPTION_QUESTION,
    "Describe this image.",
    "What is happening in the image?",
    "Write a caption for the image.",
    "What does the image show?",
)
OPEN_ASKS = ("What is in the image?", "What can you see in the image?", "What do you see?")
RANKED = 4
TEXT = 252
END_WEIGHT, CAPTION_WEIGHT, WORD_WEIGHT = 0.3, 0.1, 2.0
NEGATIVES = 2  # for each positive, where so many photos lack the thing
SHARES = {"photo": 0.45, "words": 0.24, "shapes": 0.16, "easy": 0.15}


@dataclass(frozen=True)
class Segment:
    """One question and answer; ``weight`` of each answer token in the loss."""

    question: str
    answer: str
    weight: float = 1.0


@dataclass(frozen=True)
class Row:
    """A training row before it is laid out: a drawn image, or ``index`` of a stored one.

    A clip has the stored images ``frames`` instead.
    """

    source: str
    segments: list[Segment]
    index: int = -1
    pixels: Array | None = None
    flip: bool = False
    ranked: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()
    items: tuple[scenes.Item, ...] = ()
    words: tuple[scenes.Written, ...] = ()


class Writer:
    """Text to token ids, and segments to fixed-length arrays."""

    def __init__(self, tokenizer_json: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(tokenizer_json))
        self.ids = lru_cache(50_000)(self._ids)
        self.prefix = cache(self._prefix)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _prefix(self, images: int = 1) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token ids before any question, and the places of the images' tokens among them."""
        image = self.ids(IMAGE_TOKEN)
        ids = self.ids(HEADER) + (image * IMAGE_TOKENS + self.ids("\n")) * images
        return ids, tuple(i for i, token in enumerate(ids) if token in image)

    def lay(
        self, segments: Sequence[Segment], length: int = TEXT, *, images: int = 1
    ) -> dict[str, Array]:
        """(S,) arrays text, segment, position, target, weight; what does not fit is left out."""
        out = {n: np.zeros(length, np.int64) for n in ("text", "position")}
        out |= {n: np.full(length, v, np.int64) for n, v in (("segment", -1), ("target", -100))}
        out["weight"] = np.zeros(length, np.float32)
        start = len(self.prefix(images)[0])
        at = 0
        for number, one in enumerate(segments):
            asked, answer = self.ids(one.question + TURN), self.ids(one.answer + END)
            ids = asked + answer[:-1]
            if at + len(ids) > length:
                continue
            here = slice(at, at + len(ids))
            out["text"][here], out["segment"][here] = ids, number
            out["position"][here] = np.arange(start, start + len(ids))
            said = slice(at + len(asked) - 1, at + len(ids))
            out["target"][said] = answer
            out["weight"][said] = one.weight
            out["weight"][at + len(ids) - 1] = min(END_WEIGHT, one.weight)
            at += len(ids)
        return out


class PhotoRows:
    """Rows about captioned photos."""

    def __init__(self, photos: Photos) -> None:
        self.captions = [c for _, c in photos.rows]
        table = np.array(Labels.of(self.captions).table)
        self.shown = table == 1
        self.yes, self.no = _rates(table)
        self.no_weight = self.yes.sum(0) / np.maximum(self.no.sum(0), 1e-9)

    def row(self, rng: random.Random) -> Row:
        i = rng.randrange(len(self.captions))
        captions = self.captions[i]
        told = rng.sample(captions, min(2, len(captions)))
        ranked = [Segment(CAPTION_QUESTION, sentence(rng.choice(captions)), CAPTION_WEIGHT)]
        for _ in range(RANKED - 1):
            other = self.captions[_other(rng, i, len(self.captions))]
            ranked.append(Segment(CAPTION_QUESTION, sentence(rng.choice(other)), 0.0))
        rest = [Segment(rng.choice(CAPTION_ASKS), sentence(c), CAPTION_WEIGHT) for c in told]
        asked = self.yes_no(i, rng)
        seen = [things()[t].phrase for t in np.flatnonzero(self.shown[i])]
        if seen and rng.random() < 0.25:
            rng.shuffle(seen)
            rest.append(Segment(rng.choice(OPEN_ASKS), _listed(seen[:5]), CAPTION_WEIGHT))
        sided = any(words(c) & {"left", "right"} for c in captions)
        flip = not sided and rng.random() < 0.5
        order = (*range(RANKED),)
        return Row("photo", ranked + asked + rest, i, flip=flip, ranked=order)

    def yes_no(self, i: int, rng: random.Random) -> list[Segment]:
        """Up to nine questions about photo ``i``, balanced only together with their weights."""
        draw = np.array([rng.random() for _ in range(self.yes.shape[1])])
        found = [(t, "yes", 1.0) for t in np.flatnonzero(draw < self.yes[i])]
        found += [(t, "no", self.no_weight[t]) for t in np.flatnonzero(draw < self.no[i])]
        rng.shuffle(found)
        return [Segment(_ask(things()[t], rng), said, weight) for t, said, weight in found[:9]]


def _ask(thing: Thing, rng: random.Random) -> str:
    if rng.random() < 0.7:
        return question(thing)
    forms = (
        f"{thing.verb} there {thing.phrase} in this picture?",
        f"Can you see {thing.phrase}?",
        f"Does the image show {thing.phrase}?",
    )
    return rng.choice(forms)


def _rates(table: Array) -> tuple[Array, Array]:
    """Chance that (photo, thing) is asked with yes and with no: two (photos, things) arrays."""
    shown, absent = table == 1, table == 0
    counts, gaps = shown.sum(0), absent.sum(0)
    keep = np.minimum(
        np.sqrt(np.minimum(1.0, 1000 / np.maximum(counts, 1))), gaps / np.maximum(counts, 1)
    )
    joint = shown.T.astype(float) @ shown
    chance = joint / np.maximum(np.diag(joint), 5)[:, None]
    likely = np.where(absent, (shown[:, :, None] * chance[None]).max(1) + 0.01, 0.0)
    wanted = np.minimum(NEGATIVES * keep * counts, gaps)
    no = 0.5 * absent * wanted / np.maximum(gaps, 1)
    no += 0.5 * likely * wanted / np.maximum(likely.sum(0), 1e-9)
    for _ in range(5):
        no = np.minimum(no * wanted / np.maximum(no.sum(0), 1e-9), 1.0)
    return shown * keep, no


def _other(rng: random.Random, i: int, n: int) -> int:
    j = rng.randrange(n - 1)
    return j + (j >= i)


def _listed(names: list[str]) -> str:
    """A list in words: "a dog", "a dog and grass", "a dog, grass and a ball"."""
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + names[-1:])


class EasyRows:
    """Rows about easy-vqa images: all of an image's questions at once."""

    def __init__(self, data: Path | None = None) -> None:
        self.task = easyvqa.EasyVQA(data, split="train")
        self.by_image: dict[int, list[Segment]] = {}
        for text, answer, number in self.task.rows:
            segment = Segment(easyvqa.sentence(text), answer)
            self.by_image.setdefault(number, []).append(segment)
        self.numbers = sorted(self.by_image)

    def row(self, rng: random.Random, first: int | None = None) -> Row:
        """All questions about one image, of the ``first`` ones or of all."""
        place = rng.randrange(first or len(self.numbers))
        segments = list(self.by_image[self.numbers[place]])
        rng.shuffle(segments)
        return Row("easy", segments, place)


class ClipRows:
    """Rows about clips of stored pictures: what they show, in which part, what comes first.

    Args:
        gallery: the pictures and what each shows.
        first: the number of its first picture among the stored ones.
        count: how many of its pictures are stored.
    """

    def __init__(self, gallery: video.Gallery, first: int, count: int) -> None:
        self.asked, self.first = gallery.asked, first
        self.table = np.array(gallery.labels.table[:count])

    def row(self, rng: random.Random, frames: int) -> Row:
        chosen = rng.sample(range(len(self.table)), frames)
        seen = self.table[chosen]
        known = np.flatnonzero((seen >= 0).all(0))
        segments = self._what(rng, seen, known) + self._when(rng, seen, known)
        rng.shuffle(segments)
        return Row("clip", segments, frames=tuple(self.first + i for i in chosen))

    def _what(self, rng: random.Random, seen: Array, known: Array) -> list[Segment]:
        """Up to four; of each thing as many yes as no, in expectation over clips."""
        absent, told = (self.table == 0).sum(0), (self.table >= 0).sum(0)
        asked = []
        for t in known:
            no = comb(int(absent[t]), len(seen))  # so many clips do not show it
            yes = comb(int(told[t]), len(seen)) - no
            shown = bool(seen[:, t].any())
            same, opposite = (yes, no) if shown else (no, yes)
            if rng.random() * same < opposite:
                text = video.what(*self.asked[t])
                asked.append(Segment(text, "yes" if shown else "no"))
        rng.shuffle(asked)
        return asked[:4]

    def _when(self, rng: random.Random, seen: Array, known: Array) -> list[Segment]:
        """Up to two of things that one part alone shows, and two of which comes first."""
        part = np.array(evenly(video.LENGTH, len(seen))) // video.THIRD
        at = {int(t): np.flatnonzero(seen[:, t]) for t in known if seen[:, t].any()}
        once = [t for t in at if len(set(part[at[t]])) == 1]
        asked = [
            Segment(video.where(*self.asked[t]), video.PARTS[part[at[t][0]]])
            for t in rng.sample(once, min(2, len(once)))
        ]
        pairs = [(a, b) for a in at for b in at if at[a].max() < at[b].min()]
        for pair in rng.sample(pairs, min(2, len(pairs))):
            names = [self.asked[t][1] for t in pair]
            text = video.order(*rng.sample(names, 2))
            asked.append(Segment(text, names[0]))
        return asked


def scene_row(kind: str, rng: random.Random, backgrounds: Sequence[Image.Image]) -> Row:
    """A drawn image with every question about it."""
    drawn = kind if kind == "words" else rng.choice(("where", "count", "count", "count"))
    scene = scenes.draw(drawn, rng, backgrounds, many=True)
    weight = WORD_WEIGHT if kind == "words" else 1.0
    segments = [Segment(q.text, q.answer, weight) for q in scene.questions]
    pixels = np.asarray(scene.image).transpose(2, 0, 1)
    pixels = np.ascontiguousarray(pixels)
    return Row(kind, segments, pixels=pixels, items=scene.items, words=scene.words)


@dataclass
class Mix:
    """Endless batches of laid-out rows, made by worker processes.

    ``progress`` (0 to 1) is shared: what is learned quickly is shown less as training goes on.
    """

    photos: PhotoRows
    easy: EasyRows
    backgrounds: list[Image.Image]
    tokenizer_json: Path
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        self.progress = multiprocessing.Value("d", 0.0)

    def shares(self) -> dict[str, float]:
        """The current share of each source."""
        done = float(self.progress.value)
        easy = SHARES["easy"] * (1 - 0.6 * min(1.0, done / 0.4))
        freed = SHARES["easy"] - easy
        extra = {"photo": 0.4 * freed, "words": 0.4 * freed, "shapes": 0.2 * freed}
        return {k: easy if k == "easy" else v + extra[k] for k, v in SHARES.items()}

    def batches(self, worker: int) -> Iterator[dict[str, Array]]:
        rng = random.Random(f"{self.seed} train {worker}")
        writer = Writer(self.tokenizer_json)
        while True:
            shares = self.shares()
            kinds = rng.choices(list(shares), list(shares.values()), k=self.batch)
            yield _collate([self._row(kind, rng) for kind in kinds], writer)

    def _row(self, kind: str, rng: random.Random) -> Row:
        if kind == "photo":
            return self.photos.row(rng)
        if kind == "easy":
            return self.easy.row(rng)
        return scene_row(kind, rng, self.backgrounds)


def _collate(rows: list[Row], writer: Writer) -> dict[str, Array]:
    """Rows sorted by source (photos, easy, drawn) into one batch of arrays."""
    order = {"photo": 0, "easy": 1}
    rows = sorted(rows, key=lambda r: order.get(r.source, 2))
    laid = [writer.lay(r.segments) for r in rows]
    batch = {k: np.stack([one[k] for one in laid]) for k in laid[0]}
    for name in ("photo", "easy"):
        batch[name] = np.array([r.index for r in rows if r.source == name], np.int64)
    batch["flip"] = np.array([r.flip for r in rows if r.source == "photo"], bool)
    drawn = [r.pixels for r in rows if r.pixels is not None]
    none = np.zeros((0, 3, scenes.SIZE, scenes.SIZE), np.uint8)
    batch["drawn"] = np.stack(drawn) if drawn else none
    batch["ranked"] = np.array([r.ranked or (-1,) * RANKED for r in rows], np.int64)
    return batch
