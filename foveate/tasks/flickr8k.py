"""Questions about captioned photos: is a thing there (as POPE asks), and which caption is right.

POPE: https://arxiv.org/abs/2305.10355. Unlike there, yes and no are balanced for every single thing
asked about, so the question alone tells nothing.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from foveate.loading import missing
from foveate.tasks.example import Example, matches
from foveate.tasks.lexicon import Thing, things, words
from foveate.tasks.photos import Photos, sentence

NEGATIVES = ("random", "popular", "adversarial")
POPULAR = 20
PER_THING = 40
CAPTION_QUESTION = "Describe the image."
CAPTION_TOKENS = 32


def question(thing: Thing) -> str:
    """The one phrasing used in evaluation."""
    return f"{thing.verb} there {thing.phrase} in the image?"


@dataclass(frozen=True)
class Labels:
    """Which things each photo shows: 1 yes, 0 no, -1 not known, by [photo][thing]."""

    table: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(captions: list[tuple[str, ...]]) -> Labels:
        return Labels(tuple(_labels(five) for five in captions))

    def photos(self, thing: int, label: int) -> list[int]:
        return [i for i, row in enumerate(self.table) if row[thing] == label]


def _labels(captions: tuple[str, ...]) -> tuple[int, ...]:
    spoken = [words(c) for c in captions]
    together: frozenset[str] = frozenset().union(*spoken)
    row = []
    for thing in things():
        naming = sum(bool(thing.names & s) for s in spoken)
        clear = naming == 0 and not thing.open & together
        row.append(1 if naming >= 2 else 0 if clear else -1)
    return tuple(row)


@dataclass(frozen=True)
class YesNo:
    """``flickr8k-yesno[-popular|-adversarial]``: the same yes questions, three kinds of no."""

    photos: Photos
    negatives: str = "random"
    seed: int = 0
    limit: int | None = None

    @property
    def name(self) -> str:
        return "flickr8k-yesno" + ("" if self.negatives == "random" else f"-{self.negatives}")

    @cached_property
    def rows(self) -> list[tuple[int, int, str]]:
        """(photo, thing, answer), a yes and a no about one thing side by side."""
        labels = Labels.of([c for _, c in self.photos.rows])
        yes = [labels.photos(t, 1) for t in range(len(things()))]
        popular = sorted(range(len(yes)), key=lambda t: -len(yes[t]))[:POPULAR]
        pairs = []
        for t in popular if self.negatives == "popular" else range(len(yes)):
            rng = random.Random(f"{self.seed} {things()[t].phrase}")
            right, wrong = list(yes[t]), labels.photos(t, 0)
            rng.shuffle(right)
            rng.shuffle(wrong)
            if self.negatives == "adversarial":
                wrong = _most_likely_to_show(t, wrong, labels)
            for pair in list(zip(right, wrong, strict=False))[:PER_THING]:
                pairs.append([(pair[0], t, "yes"), (pair[1], t, "no")])
        random.Random(self.seed).shuffle(pairs)
        return [row for pair in pairs for row in pair][: self.limit]

    def __len__(self) -> int:
        return len(self.rows)

    def example(self, index: int) -> Example:
        photo, t, answer = self.rows[index]
        thing = things()[t]
        meta = {"negatives": self.negatives, "thing": thing.phrase}
        return Example(self.photos.image(photo), question(thing), answer, meta=meta)

    def score(self, example: Example, answer: str) -> float:
        return matches(example.answer, answer)


def _most_likely_to_show(t: int, candidates: list[int], labels: Labels) -> list[int]:
    """Photos without thing ``t``, those first whose other things most often come with it."""
    shown = [frozenset(u for u, v in enumerate(row) if v == 1) for row in labels.table]
    total: Counter[int] = Counter(u for s in shown for u in s)
    joint: Counter[int] = Counter(u for s in shown if t in s for u in s)
    chance = {u: joint[u] / total[u] for u in total if total[u] >= 5}
    return sorted(
        candidates, key=lambda i: -max((chance.get(u, 0.0) for u in shown[i]), default=0.0)
    )


@dataclass(frozen=True)
class Choice:
    """``flickr8k-choice``: the right caption out of three, by likelihood."""

    photos: Photos
    seed: int = 0
    limit: int | None = None
    name: str = "flickr8k-choice"

    def __len__(self) -> int:
        count = len(self.photos) if len(self.photos) > 2 else 0
        return min(count, self.limit or count)

    def example(self, index: int) -> Example:
        rng = random.Random(f"{self.seed} choice {index}")
        others = rng.sample([i for i in range(len(self.photos)) if i != index], 2)
        texts = [sentence(rng.choice(self.photos.captions(i))) for i in (index, *others)]
        choices = list(texts)
        rng.shuffle(choices)
        image = self.photos.image(index)
        return Example(image, CAPTION_QUESTION, texts[0], tuple(choices))

    def score(self, example: Example, answer: str) -> float:
        return float(answer == example.answer)


@dataclass(frozen=True)
class Caption:
    """``flickr8k-caption``: a caption is made and compared with the five by chrF (sacrebleu).

    chrF is the F-score of character n-grams against the best of the five, 0 to 1; it is simpler
    than CIDEr, which needs the statistics of a whole corpus.
    """

    photos: Photos
    seed: int = 0
    limit: int | None = None
    name: str = "flickr8k-caption"

    @cached_property
    def order(self) -> list[int]:
        order = list(range(len(self.photos)))
        random.Random(self.seed).shuffle(order)
        return order[: self.limit]

    def __len__(self) -> int:
        return len(self.order)

    def example(self, index: int) -> Example:
        photo = self.order[index]
        first, *rest = map(sentence, self.photos.captions(photo))
        image = self.photos.image(photo)
        return Example(image, CAPTION_QUESTION, first, also=tuple(rest), new_tokens=CAPTION_TOKENS)

    def score(self, example: Example, answer: str) -> float:
        try:
            from sacrebleu import sentence_chrf
        except ImportError as error:
            raise missing("sacrebleu", "eval") from error
        return float(sentence_chrf(answer, [example.answer, *example.also]).score) / 100
