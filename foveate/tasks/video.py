"""Clips made of pictures, with known answers: what appears, which comes first, in which part.

A clip has 36 moments, a second apart, in nine shots: three in each third, of two to eight moments.
A shot is a slow pan over one picture. What is asked about appears in one shot, and in no other
picture. The model gets ``frames`` of the moments, so few frames may miss the shot: what a clip
shows depends on split, seed and number alone, and tasks that differ in their frames ask the same
questions about the same clips.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from PIL import Image, ImageChops, ImageStat

from foveate.loading import Clip, evenly
from foveate.tasks import easyvqa
from foveate.tasks.example import Example, matches
from foveate.tasks.flickr8k import Labels
from foveate.tasks.lexicon import things
from foveate.tasks.photos import Photos, photos

KINDS = ("what", "order", "where")
PICKS = ("even", "changed")
FRAMES = 8
THIRD, SHOTS, SHORTEST = 12, 3, 2  # moments of a third, its shots, the least moments of a shot
LENGTH = 3 * THIRD
PARTS = ("the beginning", "the middle", "the end")
SIDE = 336
WINDOW = 0.85  # of the picture's sides, seen at once
_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True)
class Gallery:
    """Pictures, and what each shows.

    Attributes:
        asked: (verb, phrase) of each thing.
        labels: of each picture and thing.
        image: the picture of a number.
    """

    asked: tuple[tuple[str, str], ...]
    labels: Labels
    image: Callable[[int], Image.Image]

    def showing(self, thing: int, label: int = 1) -> frozenset[int]:
        return frozenset(self.labels.photos(thing, label))


def photo_gallery(some: Photos) -> Gallery:
    """Captioned photos; the things are those of ``flickr8k-yesno``."""
    asked = tuple((thing.verb, thing.phrase) for thing in things())
    return Gallery(asked, Labels.of([captions for _, captions in some.rows]), some.image)


def shape_gallery(split: str) -> Gallery:
    """Images of easy-VQA, one shape each; what it is follows from the answers about it."""
    task = easyvqa.EasyVQA(split=split)
    said: dict[int, set[str]] = {}
    for _, answer, number in task.rows:
        said.setdefault(number, set()).add(answer)
    asked = (
        *(("Is", f"a {colour} shape") for colour in _COLOURS),
        *(("Is", f"a {shape}") for shape in _SHAPES),
    )
    numbers = sorted(said)
    table = tuple(
        (*_one_of(_COLOURS, said[number]), *_one_of(_SHAPES, said[number])) for number in numbers
    )
    return Gallery(asked, Labels(table), lambda i: task.image(numbers[i]))


def _one_of(words: Sequence[str], said: set[str]) -> list[int]:
    """Labels of ``words``, of which a picture shows exactly one."""
    known = bool(said & set(words))
    return [int(word in said) if known else -1 for word in words]


def what(verb: str, phrase: str) -> str:
    """The question whether a thing is seen."""
    return f"{verb} there {phrase} in the video?"


def order(one: str, other: str) -> str:
    """The question which of two things is seen first."""
    return f"Which comes first in the video, {one} or {other}?"


def where(verb: str, phrase: str) -> str:
    """The question in which of the PARTS a thing is seen."""
    return (
        f"In which part of the video {verb.lower()} there {phrase}: "
        "the beginning, the middle or the end?"
    )


@dataclass(frozen=True)
class Shot:
    """A picture and the moments from ``start`` to ``stop`` in which it is seen."""

    picture: int
    start: int
    stop: int


@dataclass(frozen=True)
class _Asked:
    shots: list[Shot]
    question: str
    answer: str
    kind: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Video:
    """``video-what``, ``video-order``, ``video-where``, of photos or, ``-shapes``, of easy-VQA.

    Attributes:
        frames: given to the model.
        pick: which moments those are: ``even``, or ``changed``, those that differ most from the
            moment before, as if all others had been dropped.
    """

    name: str
    kind: str
    gallery: Gallery
    frames: int = FRAMES
    pick: str = "even"
    split: str = "validation"
    seed: int = 0
    limit: int | None = None

    @cached_property
    def _subjects(self) -> list[tuple[int, ...]]:
        """Things that can be asked about with enough other pictures to put around them."""
        others = 3 * SHOTS
        count = len(self.gallery.asked)
        yes = [self.gallery.showing(t) for t in range(count)]
        no = [self.gallery.showing(t, 0) for t in range(count)]
        single = [t for t in range(count) if yes[t] and len(no[t]) >= others]
        if self.kind != "order":
            return [(t,) for t in single]
        return [
            (a, b)
            for a in single
            for b in single
            if a < b and yes[a] & no[b] and yes[b] & no[a] and len(no[a] & no[b]) >= others
        ]

    def __len__(self) -> int:
        return (self.limit or 1000) if self._subjects else 0

    def example(self, index: int) -> Example:
        """Two in a row share the clip but for what makes the answer."""
        rng = random.Random(f"{self.split} {self.seed} {self.name.partition(':')[0]} {index // 2}")
        way = rng.random()
        asked = {"what": self._what, "order": self._order, "where": self._where}[self.kind]
        made = asked(rng, rng.choice(self._subjects), index % 2 == 0)
        clip = self._seen(made.shots, way)
        meta = {"kind": made.kind}
        return Example(
            clip.frames[0], made.question, made.answer, made.choices, meta=meta, clip=clip
        )

    def score(self, example: Example, answer: str) -> float:
        return matches(example.answer, answer)

    # What is asked

    def _what(self, rng: random.Random, subject: tuple[int, ...], first: bool) -> _Asked:
        shots = _shots(rng, self._without(subject))
        place = rng.randrange(len(shots))
        if first:
            shots[place] = self._replaced(shots[place], rng, *subject)
        answer = "yes" if first else "no"
        return _Asked(shots, what(*self.gallery.asked[subject[0]]), answer, answer)

    def _order(self, rng: random.Random, subject: tuple[int, ...], first: bool) -> _Asked:
        a, b = rng.sample(subject, 2)
        shots = _shots(rng, self._without(subject))
        places = sorted(rng.sample(range(len(shots)), 2), reverse=not first)
        for place, thing, other in zip(places, (a, b), (b, a), strict=True):
            shots[place] = self._replaced(shots[place], rng, thing, other)
        named = (self.gallery.asked[a][1], self.gallery.asked[b][1])
        answer, kind = (named[0], "named first") if first else (named[1], "named second")
        return _Asked(shots, order(*named), answer, kind, named)

    def _where(self, rng: random.Random, subject: tuple[int, ...], first: bool) -> _Asked:
        shots = _shots(rng, self._without(subject))
        third = rng.sample(range(3), 2)[first]
        place = third * SHOTS + rng.randrange(SHOTS)
        shots[place] = self._replaced(shots[place], rng, *subject)
        question = where(*self.gallery.asked[subject[0]])
        return _Asked(shots, question, PARTS[third], PARTS[third], PARTS)

    def _without(self, some: Sequence[int]) -> list[int]:
        """Pictures that show none of ``some``."""
        return sorted(frozenset.intersection(*(self.gallery.showing(t, 0) for t in some)))

    def _replaced(self, shot: Shot, rng: random.Random, thing: int, other: int = -1) -> Shot:
        """The shot with a picture of ``thing`` and, of two things, not of ``other``."""
        shown = self.gallery.showing(thing)
        shown = shown if other < 0 else shown & self.gallery.showing(other, 0)
        return Shot(rng.choice(sorted(shown)), shot.start, shot.stop)

    # What is seen

    def _seen(self, shots: Sequence[Shot], way: float) -> Clip:
        pictures = {shot.picture: self.gallery.image(shot.picture) for shot in shots}

        def frame(moment: int) -> Image.Image:
            shot = next(s for s in shots if moment < s.stop)
            return _panned(pictures[shot.picture], shot, moment, way)

        if self.pick == "even":
            at = evenly(LENGTH, self.frames)
            return Clip(tuple(map(frame, at)), tuple(at), LENGTH, 1.0)
        every = [frame(moment) for moment in range(LENGTH)]
        at = _changed(every, self.frames)
        return Clip(tuple(every[i] for i in at), tuple(at), LENGTH, 1.0)


def _shots(rng: random.Random, pictures: Sequence[int]) -> list[Shot]:
    """A clip of as many different pictures, every shot within its third."""
    ends = []
    for third in range(3):
        spare = sorted(rng.randint(0, THIRD - SHOTS * SHORTEST) for _ in range(SHOTS - 1))
        lengths = [
            b - a for a, b in zip((0, *spare), (*spare, THIRD - SHOTS * SHORTEST), strict=True)
        ]
        start = third * THIRD
        for length in lengths:
            ends.append((start, start + SHORTEST + length))
            start += SHORTEST + length
    chosen = rng.sample(pictures, len(ends))
    return [Shot(picture, *end) for picture, end in zip(chosen, ends, strict=True)]


def _panned(picture: Image.Image, shot: Shot, moment: int, way: float) -> Image.Image:
    """The window of the picture at a moment: it slides slowly from one corner to the opposite."""
    done = (moment - shot.start + 0.5) / (shot.stop - shot.start)
    slack = [side * (1 - WINDOW) for side in picture.size]
    x, y = slack[0] * (done if way < 0.5 else 1 - done), slack[1] * done
    box = (x, y, x + picture.width * WINDOW, y + picture.height * WINDOW)
    return picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=box)


def _changed(frames: Sequence[Image.Image], count: int) -> list[int]:
    """The first moment, and those that differ most from the one before, in order."""
    small = [frame.resize((16, 16), Image.Resampling.BOX) for frame in frames]
    pairs = itertools.pairwise(small)
    apart = [sum(ImageStat.Stat(ImageChops.difference(a, b)).mean) for a, b in pairs]
    order = sorted(range(1, len(frames)), key=lambda i: (-apart[i - 1], i))
    return sorted([0, *order[: count - 1]])


def task(name: str, options: dict[str, Any], *, data: Any, split: str, **how: Any) -> Video:
    """``video-KIND`` or ``video-KIND-shapes`` with its options.

    Raises:
        ValueError: for an option or a value that there is not.
    """
    kind, _, of = name.removeprefix("video-").partition("-")
    frames, pick = options.pop("frames", FRAMES), options.pop("pick", PICKS[0])
    if options:
        raise ValueError(f"{name} has no option {next(iter(options))!r}; it has frames and pick.")
    if not isinstance(frames, int) or not 1 <= frames <= LENGTH:
        raise ValueError(f"frames is {frames!r}; a clip has 1 to {LENGTH}, as in {name}:frames=4.")
    if pick not in PICKS:
        raise ValueError(f"pick is {pick!r}; take one of {', '.join(PICKS)}.")
    gallery = shape_gallery(split) if of else photo_gallery(photos(data, split))
    said = [f"frames={frames}"] + ([f"pick={pick}"] if pick != PICKS[0] else [])
    return Video(f"{name}:{','.join(said)}", kind, gallery, frames, pick, split, **how)
