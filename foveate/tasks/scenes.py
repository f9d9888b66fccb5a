"""Drawn scenes with known answers: where things are, how many there are, which word is written.

Everything is drawn with Pillow at 336 px on plain, textured or photo backgrounds. Training and
validation draw from different seeds; evaluation uses one phrasing a kind, training several.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageStat

from foveate.tasks.example import Example, matches

SIZE = 336
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 150, 44),
    "blue": (31, 86, 200),
    "yellow": (245, 215, 30),
    "purple": (130, 50, 170),
    "orange": (250, 128, 20),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("where", "count", "words")
MAX_COUNT = 5
ASKED = {"0": 0.25, "1": 0.08, "2": 0.35}  # shares of these answers that training asks for

Colour = tuple[int, int, int]
Point = tuple[float, float]


@dataclass(frozen=True)
class Item:
    """One drawn shape: colour name, shape, centre and half size in pixels."""

    colour: str
    shape: str
    x: float
    y: float
    half: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> int:
        """Which of ``PLACES`` its centre is in."""
        return 2 * (self.y >= SIZE / 2) + (self.x >= SIZE / 2)


@dataclass(frozen=True)
class Written:
    """One drawn word. ``letters`` has, in every pixel of the scene, 1 + the index of the letter."""

    word: str
    letters: Image.Image


@dataclass(frozen=True)
class Question:
    """A question with its short answer; ``kind`` groups results."""

    text: str
    answer: str
    kind: str


@dataclass(frozen=True)
class Scene:
    """An image, what can be asked about it, and the shapes and words in it."""

    image: Image.Image
    questions: tuple[Question, ...]
    items: tuple[Item, ...] = ()
    words: tuple[Written, ...] = ()


@dataclass(frozen=True)
class Scenes:
    """``scenes-where``, ``scenes-count`` or ``scenes-words``: one question an image."""

    kind: str
    split: str = "validation"
    seed: int = 0
    limit: int | None = None

    @property
    def name(self) -> str:
        return f"scenes-{self.kind}"

    def __len__(self) -> int:
        return self.limit or 1000

    def example(self, index: int) -> Example:
        rng = random.Random(f"{self.split} {self.seed} {self.kind} {index}")
        scene = draw(self.kind, rng, sample_photos())
        asked = scene.questions[0]
        return Example(scene.image, asked.text, asked.answer, meta={"kind": asked.kind})

    def score(self, example: Example, answer: str) -> float:
        return matches(example.answer, answer)


def draw(
    kind: str, rng: random.Random, backgrounds: Sequence[Image.Image], *, many: bool = False
) -> Scene:
    """A scene of one kind. ``many``: all the questions training can use, in varied words."""
    if kind == "words":
        return _words_scene(rng, backgrounds, many)
    return _shapes_scene(kind, rng, backgrounds, many)


@cache
def vocabulary() -> tuple[str, ...]:
    """The words that are drawn: common, three to five letters."""
    return tuple(Path(__file__).with_name("words.txt").read_text().split())


@cache
def sample_photos() -> tuple[Image.Image, ...]:
    """Photo backgrounds for evaluation, from scikit-image."""
    try:
        from skimage import data
    except ImportError as error:
        raise ImportError(
            "the drawn scenes use scikit-image's photos: pip install 'foveate[pinhole]'"
        ) from error
    arrays = (data.astronaut(), data.chelsea(), data.coffee(), data.rocket())
    return tuple(Image.fromarray(a).convert("RGB") for a in arrays)


# --- shapes ------------------------------------------------------------------------------------


def _shapes_scene(
    kind: str, rng: random.Random, backgrounds: Sequence[Image.Image], many: bool
) -> Scene:
    ground = background(rng, backgrounds)
    target = _name(rng)
    count = rng.randint(0, MAX_COUNT) if kind == "count" else 1
    level = rng.choice(("both", "shape", "colour")) if kind == "count" else "both"
    names = [_like(rng, target, level) for _ in range(count)]
    counted = [(target, level)] if kind == "count" else []
    if many and counted and rng.random() < 0.5:
        other = _unlike(rng, target, level)
        names += [_like(rng, other, level) for _ in range(rng.randint(1, MAX_COUNT))]
        counted.append((other, level))
    else:
        names += [_unlike(rng, target, level) for _ in range(rng.randint(1, 4))]
    if kind == "where":
        names = _unique(names)
    rng.shuffle(names)
    items = _place(rng, names)
    canvas = ImageDraw.Draw(ground)
    for item in items:
        _paint(canvas, item, rng)
    if many:
        return Scene(ground, _all_questions(rng, items, counted), tuple(items))
    if kind == "count":
        return Scene(ground, (_count_question(rng, items, target, level, False),))
    asked = _where_question(rng, items, False)
    if not asked.text:
        return _shapes_scene(kind, rng, backgrounds, many)
    return Scene(ground, (asked,))


def _name(rng: random.Random) -> tuple[str, str]:
    return rng.choice(tuple(COLOURS)), rng.choice(SHAPES)


def _like(rng: random.Random, target: tuple[str, str], level: str) -> tuple[str, str]:
    colour, shape = _name(rng)
    return (
        target[0] if level in ("both", "colour") else colour,
        target[1] if level in ("both", "shape") else shape,
    )


def _unlike(rng: random.Random, target: tuple[str, str], level: str) -> tuple[str, str]:
    """A distractor; half of them share the colour or the shape when that is allowed."""
    while True:
        colour, shape = _name(rng)
        if level == "both" and rng.random() < 0.5:
            colour, shape = (target[0], shape) if rng.random() < 0.5 else (colour, target[1])
        same = {"both": (colour, shape) == target, "shape": shape == target[1]}
        if not same.get(level, colour == target[0]):
            return colour, shape


def _unique(names: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return list(dict.fromkeys(names))


def _place(rng: random.Random, names: list[tuple[str, str]]) -> list[Item]:
    """Positions that do not overlap, as many as fit."""
    items: list[Item] = []
    for colour, shape in names:
        for attempt in range(200):
            half = rng.uniform(17, 34) * (1 - attempt / 400)
            x, y = (rng.uniform(half + 4, SIZE - half - 4) for _ in range(2))
            if all(math.hypot(x - i.x, y - i.y) > 1.35 * (half + i.half) for i in items):
                items.append(Item(colour, shape, x, y, half))
                break
    return items


def _paint(canvas: ImageDraw.ImageDraw, item: Item, rng: random.Random) -> None:
    fill = _jitter(COLOURS[item.colour], rng)
    edge = (230, 230, 230) if sum(fill) < 330 else (30, 30, 30)
    box = (item.x - item.half, item.y - item.half, item.x + item.half, item.y + item.half)
    if item.shape == "circle":
        canvas.ellipse(box, fill=fill, outline=edge, width=2)
    else:
        canvas.polygon(_corners(item, rng.uniform(-0.2, 0.2)), fill=fill, outline=edge, width=2)


def _corners(item: Item, turn: float) -> list[Point]:
    """The outline of a shape, turned slightly: [(x, y)]."""
    h = item.half
    if item.shape == "square":
        points = [(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)]
        points = [(x * 0.85, y * 0.85) for x, y in points]
    elif item.shape == "triangle":
        points = [(0.0, -1.0), (0.95, 0.8), (-0.95, 0.8)]
    elif item.shape == "star":
        radii = [(1.1 if k % 2 == 0 else 0.45, k * math.pi / 5) for k in range(10)]
        points = [(r * math.sin(a), -r * math.cos(a)) for r, a in radii]
    else:
        w = 0.34
        points = [(-w, -1.0), (w, -1.0), (w, -w), (1.0, -w), (1.0, w), (w, w)]
        points += [(w, 1.0), (-w, 1.0), (-w, w), (-1.0, w), (-1.0, -w), (-w, -w)]
    c, s = math.cos(turn), math.sin(turn)
    return [(item.x + h * (x * c - y * s), item.y + h * (x * s + y * c)) for x, y in points]


def _all_questions(
    rng: random.Random, items: list[Item], counted: Sequence[tuple[tuple[str, str], str]]
) -> tuple[Question, ...]:
    """Up to seventeen questions about one scene of shapes, plainer ones among them.

    ``counted``: names and levels whose number was drawn evenly up to ``MAX_COUNT``, always asked
    for. Of other shapes there are mostly none to two, which are asked for less often (``ASKED``),
    lest every number is learned to be one of these.
    """
    asked = [_where_question(rng, items, True) for _ in range(2)]
    plain = _plain_questions(items)
    asked += rng.sample(plain, min(1, len(plain)))
    asked += [_count_question(rng, items, *one, True) for one in counted]
    for level in ("both", "shape", "colour") * 4:
        seen = rng.random() < 0.75 and items
        some = rng.choice(items) if seen else None
        target = (some.colour, some.shape) if some else _name(rng)
        question = _count_question(rng, items, target, level, True)
        if rng.random() < ASKED.get(question.answer, 1.0):
            asked.append(question)
    kept = list({q.text: q for q in asked if q.text}.values())
    rng.shuffle(kept)
    return tuple(kept)


def _plain_questions(items: list[Item]) -> list[Question]:
    """What one word tells apart: for training, where two words are not yet put together."""
    found = []
    for item in items:
        if sum(i.shape == item.shape for i in items) == 1:
            found.append(Question(f"What color is the {item.shape}?", item.colour, "plain"))
            if _clear(item):
                text = f"Where is the {item.shape}?"
                found.append(Question(text, PLACES[item.place], "plain"))
        if sum(i.colour == item.colour for i in items) == 1:
            found.append(Question(f"What shape is {item.colour}?", item.shape, "plain"))
            if _clear(item):
                text = f"Where is the {item.colour} shape?"
                found.append(Question(text, PLACES[item.place], "plain"))
        if _clear(item) and sum(i.place == item.place for i in items) == 1:
            found.append(Question(f"What is at the {PLACES[item.place]}?", item.name, "plain"))
    return found


def _count_question(
    rng: random.Random, items: list[Item], target: tuple[str, str], level: str, varied: bool
) -> Question:
    colour, shape = target
    plural = "crosses" if shape == "cross" else f"{shape}s"
    what = {"both": f"{colour} {plural}", "shape": plural, "colour": f"{colour} shapes"}[level]
    count = sum(
        (level == "shape" or i.colour == colour) and (level == "colour" or i.shape == shape)
        for i in items
    )
    forms = (
        f"How many {what} are there?",
        f"How many {what} are in the image?",
        f"Count the {what}.",
    )
    return Question(rng.choice(forms) if varied else forms[0], str(count), f"count-{level}")


def _where_question(rng: random.Random, items: list[Item], varied: bool) -> Question:
    """Which quadrant a shape is in, or how two shapes lie to each other."""
    named = [i for i in items if sum(j.name == i.name for j in items) == 1]
    options = [_quadrant(rng, i, varied) for i in named if _clear(i)]
    pairs = [(a, b) for a in named for b in named if a is not b]
    relations = [r for a, b in pairs for r in _relations(rng, a, b, varied)]
    yes, no = ([r for r in relations if r.answer == answer] for answer in ("yes", "no"))
    if options and (not yes or rng.random() < 0.5):
        return rng.choice(options)
    if yes and no:
        return rng.choice(yes if rng.random() < 0.5 else no)
    return Question("", "", "")


def _clear(item: Item) -> bool:
    return min(abs(item.x - SIZE / 2), abs(item.y - SIZE / 2)) > 24


def _quadrant(rng: random.Random, item: Item, varied: bool) -> Question:
    forms = (
        f"In which corner of the image is the {item.name}?",
        f"Where is the {item.name}?",
        f"Where in the image is the {item.name}: top left, top right, bottom left or bottom right?",
    )
    return Question(rng.choice(forms) if varied else forms[0], PLACES[item.place], "quadrant")


def _relations(rng: random.Random, a: Item, b: Item, varied: bool) -> list[Question]:
    found = []
    for word, gap in (("left of", b.x - a.x), ("above", b.y - a.y)):
        if abs(gap) > 40:
            forms: tuple[str, ...] = (f"Is the {a.name} {word} the {b.name}?",)
            if varied and word == "left of":
                forms += (f"Is the {a.name} to the left of the {b.name}?",)
            text = rng.choice(forms)
            found.append(Question(text, "yes" if gap > 0 else "no", word.split()[0]))
    return found


# --- words -------------------------------------------------------------------------------------


def _words_scene(rng: random.Random, backgrounds: Sequence[Image.Image], many: bool) -> Scene:
    ground = background(rng, backgrounds)
    number = rng.choice((1, 1, 2, 3)) if many else 1
    chosen = rng.sample(vocabulary(), number)
    if number == 1:
        written = _write(ground, chosen[0], (0, 0, SIZE, SIZE), rng.randint(36, 90), rng)
        forms: tuple[str, ...] = ("What word is written in the image?",)
        if many:
            forms += ("Read the word.", "What does the text say?", "Which word is in the image?")
        asked = Question(rng.choice(forms), chosen[0], "word")
        return Scene(ground, (asked,), words=(written,))
    places = rng.sample(range(4), number)
    half = SIZE // 2
    questions, found = [], []
    for word, place in zip(chosen, places, strict=True):
        left, top = half * (place % 2), half * (place // 2)
        box = (left, top, left + half, top + half)
        found.append(_write(ground, word, box, rng.randint(30, 60), rng))
        forms = (f"What word is at the {PLACES[place]}?", f"Read the word at the {PLACES[place]}.")
        questions.append(Question(rng.choice(forms), word, "word-at"))
        if rng.random() < 0.3:
            text = f'Where is the word "{word}"?'
            questions.append(Question(text, PLACES[place], "quadrant"))
    return Scene(ground, tuple(questions), words=tuple(found))


def page(rng: random.Random, backgrounds: Sequence[Image.Image]) -> Scene:
    """Six words, three rows of two, and no questions: for an encoder that learns to read."""
    ground = background(rng, backgrounds)
    wide, high = SIZE // 2, SIZE // 3
    corners = [(left, top) for top in range(0, SIZE, high) for left in range(0, SIZE, wide)]
    words = [
        _write(ground, word, (x, y, x + wide, y + high), rng.randint(36, 60), rng)
        for word, (x, y) in zip(rng.sample(vocabulary(), len(corners)), corners, strict=True)
    ]
    return Scene(ground, (), words=tuple(words))


def _write(
    ground: Image.Image, word: str, box: tuple[int, int, int, int], size: int, rng: random.Random
) -> Written:
    """One word inside ``box``, readable against what is behind it."""
    text = word.upper() if rng.random() < 0.25 else word
    mask, letters = _word_masks(text, size, rng.uniform(-12, 12))
    wide, high = box[2] - box[0] - 8, box[3] - box[1] - 8
    scale = min(1.0, wide / mask.width, high / mask.height)
    if scale < 1.0:
        small = int(mask.width * scale), int(mask.height * scale)
        mask, letters = mask.resize(small), letters.resize(small, Image.Resampling.NEAREST)
    x = box[0] + 4 + rng.randint(0, max(0, wide - mask.width))
    y = box[1] + 4 + rng.randint(0, max(0, high - mask.height))
    area = (x, y, x + mask.width, y + mask.height)
    behind = ImageStat.Stat(ground.crop(area).convert("L"))
    fill = _contrasting(behind.mean[0], rng)
    if behind.stddev[0] > 18:
        edge = (255, 255, 255) if _light(fill) < 128 else (0, 0, 0)
        ground.paste(edge, area, mask.filter(ImageFilter.MaxFilter(5)))
    ground.paste(fill, area, mask)
    known = Image.new("L", ground.size)
    known.paste(letters, area)
    return Written(word, known)


def _word_masks(text: str, size: int, angle: float) -> tuple[Image.Image, Image.Image]:
    """A word, turned, and as ``Written.letters`` has it: a column of its box for every letter."""
    font = _font(size)
    left, top, right, bottom = (int(v) for v in font.getbbox(text))
    mask = Image.new("L", (right - left + 8, bottom - top + 8))
    letters = mask.copy()
    ImageDraw.Draw(mask).text((4 - left, 4 - top), text, fill=255, font=font)
    columns = ImageDraw.Draw(letters)
    for i in range(len(text)):
        begin, end = (4 - left + font.getlength(text[:n]) for n in (i, i + 1))
        columns.rectangle((begin, 4, end - 1, mask.height - 4), fill=i + 1)
    return (
        mask.rotate(angle, Image.Resampling.BICUBIC, expand=True),
        letters.rotate(angle, Image.Resampling.NEAREST, expand=True),
    )


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError(
            "drawing words needs Pillow with FreeType: pip install -U 'pillow>=10.1'"
        )
    return font


def _contrasting(behind: float, rng: random.Random) -> Colour:
    while True:
        colour = _jitter(rng.choice(tuple(COLOURS.values())), rng)
        if abs(_light(colour) - behind) > 70:
            return colour


def _light(colour: Colour) -> float:
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


# --- backgrounds -------------------------------------------------------------------------------


def background(rng: random.Random, photos: Sequence[Image.Image]) -> Image.Image:
    """336 px of plain colour, texture or a photo, a third each."""
    kind = rng.random()
    if kind < 0.34 or (kind >= 0.67 and not photos):
        return Image.new("RGB", (SIZE, SIZE), _muted(rng))
    return _texture(rng) if kind < 0.67 else _photo(rng, photos)


def _muted(rng: random.Random) -> Colour:
    grey = rng.randint(50, 225)
    return _shift((grey, grey, grey), rng, 25)


def _texture(rng: random.Random) -> Image.Image:
    """Coarse smooth noise between two colours."""
    cells = rng.choice((4, 8, 16, 48))
    noise = Image.frombytes("L", (cells, cells), rng.randbytes(cells * cells))
    mask = noise.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    first = _muted(rng)
    second = _shift(first, rng, 45)
    pair = [Image.new("RGB", (SIZE, SIZE), colour) for colour in (first, second)]
    return Image.composite(pair[0], pair[1], mask)


def _photo(rng: random.Random, photos: Sequence[Image.Image]) -> Image.Image:
    photo = rng.choice(photos)
    side = int(min(photo.size) * rng.uniform(0.5, 1.0))
    x, y = rng.randint(0, photo.width - side), rng.randint(0, photo.height - side)
    crop = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(x, y, x + side, y + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _jitter(colour: Colour, rng: random.Random) -> Colour:
    return _shift(colour, rng, 14)


def _shift(colour: Colour, rng: random.Random, amount: int) -> Colour:
    r, g, b = (max(0, min(255, c + rng.randint(-amount, amount))) for c in colour)
    return r, g, b
