"""Tasks: every label follows from what was drawn or from the captions, the same every time."""

from __future__ import annotations

import hashlib
import json
import random
import re
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import pytest
from PIL import Image

from foveate.pinhole import mix
from foveate.tasks import Example, easyvqa, names, scenes, task
from foveate.tasks.example import matches
from foveate.tasks.lexicon import things, words
from foveate.tasks.photos import photos, sentence

SHARED = Path(__file__).resolve().parents[2] / "shared" / "flickr8k"
needs_photos = pytest.mark.skipif(
    not (SHARED / "validation.tar").is_file(), reason=f"no Flickr8k in {SHARED}"
)
DRAWN = ("scenes-where", "scenes-count", "scenes-words")


def print_of(example: Example) -> tuple[Any, ...]:
    digest = hashlib.sha256(example.image.tobytes()).hexdigest()
    return digest, example.question, example.answer, example.choices


# --- captioned photos --------------------------------------------------------------------------

NOUNS = ("dog", "snow", "car", "guitar", "horse", "tent", "flag", "train")


def captions() -> list[list[str]]:
    """48 photos, each showing two of the nouns and saying so in two captions of three."""
    said = []
    for i in range(48):
        a, b = NOUNS[i % 8], NOUNS[(i + 1 + i // 16) % 8]
        said.append([f"A {a} beside a {b} .", f"There is a {b} and the {a} .", f"Thing {i} ."])
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return miniature.photo_folder(tmp_path / "photos", captions())


def number_of(image: Image.Image) -> int:
    """Which photo of ``miniature.photo_folder`` this is, by its colour."""
    seen = np.asarray(image, float).mean((0, 1))
    return int(np.argmin([np.abs(seen - miniature.colour(i)).sum() for i in range(48)]))


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("flickr8k-yesno")])
def test_yes_and_no_follow_the_captions_and_are_balanced(name: str, folder: Path) -> None:
    made = task(name, data=folder)
    asked: Counter[tuple[str, str]] = Counter()
    assert len(made) > 40
    for i in range(len(made)):
        example = made.example(i)
        noun = re.fullmatch(r"(Is|Are) there (?:an? )?(.+) in the image\?", example.question)
        assert noun
        shown = captions()[number_of(example.image)]
        mentions = sum(bool(re.search(rf"\b{noun[2]}\b", c.lower())) for c in shown)
        assert mentions == (2 if example.answer == "yes" else 0)
        assert example.meta["negatives"] == (
            name.removeprefix("flickr8k-yesno-") if name.count("-") > 1 else "random"
        )
        asked[noun[2], example.answer] += 1
    assert {noun for noun, _ in asked} == set(NOUNS)
    assert all(asked[noun, "yes"] == asked[noun, "no"] > 0 for noun in NOUNS)


def test_pinhole_is_trained_on_yes_and_no_of_the_same_weight(folder: Path) -> None:
    """Of each thing: the question alone must tell nothing, though "no" is asked more often."""
    lessons, rng = mix.PhotoRows(photos(folder, "validation")), random.Random(0)
    asked: dict[tuple[str, str], list[float]] = {}
    for _ in range(2000):
        row = lessons.row(rng)
        for one in row.segments:
            noun = re.search(rf"\b({'|'.join(NOUNS)})\b.*\?$", one.question)
            if noun:
                shown = " ".join(captions()[row.index])
                assert (noun[1] in shown) == (one.answer == "yes")
                asked.setdefault((noun[1], one.answer), []).append(one.weight)
    for noun in NOUNS:
        yes, no = asked[noun, "yes"], asked[noun, "no"]
        assert len(no) / len(yes) == pytest.approx(mix.NEGATIVES, rel=0.15)
        assert sum(no) / sum(yes) == pytest.approx(1, rel=0.15)


def test_a_photo_that_may_show_it_is_not_asked_about(tmp_path: Path) -> None:
    """A guitarist may hold a guitar unseen; one caption of several is no yes either."""
    said = [["a guitar .", "a guitar ."], ["a band .", "a band ."], ["a guitar .", "a wall ."]]
    said += [["the sea .", "the sea ."]]
    made = task("flickr8k-yesno", data=miniature.photo_folder(tmp_path, said))
    rows = [made.example(i) for i in range(len(made))]
    about = {number_of(e.image): e.answer for e in rows if "guitar" in e.question}
    assert about == {0: "yes", 3: "no"}


def test_popular_asks_about_what_is_most_often_there(tmp_path: Path) -> None:
    said = [[f"a {NOUNS[0]} .", f"the {NOUNS[0]} ."]] * 3
    some = [t for t in things() if t.phrase.startswith("a ")][:30]
    nouns = [t.phrase.removeprefix("a ") for t in some if " " not in t.phrase.removeprefix("a ")]
    said += [[f"a {n} .", f"a {n} ."] for n in nouns] * 1
    made = task("flickr8k-yesno-popular", data=miniature.photo_folder(tmp_path, said))
    plain = task("flickr8k-yesno", data=tmp_path)
    asked = {made.example(i).meta["thing"] for i in range(len(made))}
    every = {plain.example(i).meta["thing"] for i in range(len(plain))}
    assert "a dog" in asked and len(asked) <= 20 < len(every)


def test_adversarial_photos_are_those_that_would_likely_show_it(tmp_path: Path) -> None:
    """Frisbees come with flags here, never with snow: a "no" about one shows a flag."""
    said = [["a frisbee and a flag .", "a flag , a frisbee ."]] * 6
    said += [["a train and snow .", "snow , a train ."]] * 20 + [["a flag .", "a flag ."]] * 6
    folder = miniature.photo_folder(tmp_path, said)

    def likely(name: str) -> list[bool]:
        made = task(name, data=folder)
        rows = [made.example(i) for i in range(len(made))]
        rows = [e for e in rows if "frisbee" in e.question and e.answer == "no"]
        return [number_of(e.image) >= 26 for e in rows]

    assert likely("flickr8k-yesno-adversarial") == [True] * 6
    assert not all(likely("flickr8k-yesno"))


def test_the_right_caption_is_the_photos_own(folder: Path) -> None:
    made = task("flickr8k-choice", data=folder)
    places = Counter()
    assert len(made) == 48
    for i in range(48):
        example = made.example(i)
        own = [sentence(c) for c in captions()[number_of(example.image)]]
        assert len(example.choices) == 3 and example.answer in example.choices
        assert example.answer in own
        assert made.score(example, example.answer) == 1.0
        places[example.choices.index(example.answer)] += 1
    assert min(places[p] for p in range(3)) >= 5  # not always in the same place


def test_a_caption_is_scored_by_its_likeness_to_the_nearest(tmp_path: Path) -> None:
    said = ["A brown dog runs through the snow .", "Children are playing ."]
    made = task("flickr8k-caption", data=miniature.photo_folder(tmp_path, [said]))
    example = made.example(0)
    assert (example.answer, *example.also) == tuple(map(sentence, said))
    assert example.new_tokens > len(example.answer.split()) * 2, "captions would be cut short"
    scores = [made.score(example, a) for a in (example.answer, *example.also)]
    assert scores == pytest.approx([1.0, 1.0])
    close = made.score(example, "A brown dog running in the snow.")
    unrelated = made.score(example, "Two cyclists wait at traffic lights.")
    assert 1 > close > 0.5 > 0.3 > unrelated >= made.score(example, "") == 0


@pytest.mark.parametrize(
    "name",
    ["flickr8k-yesno", "flickr8k-yesno-adversarial", "flickr8k-choice", "flickr8k-caption"],
)
def test_photo_tasks_repeat_for_a_seed(name: str, folder: Path) -> None:
    def all_of(seed: int, limit: int | None = None) -> list[tuple[Any, ...]]:
        made = task(name, data=folder, seed=seed, limit=limit)
        return [print_of(made.example(i)) for i in range(len(made))]

    assert all_of(3) == all_of(3) != all_of(4)
    assert all_of(3, limit=8) == all_of(3)[:8]


def test_captions_of_any_script_and_photos_in_folders(tmp_path: Path) -> None:
    """A line separator inside a caption is no end of line; names may have a folder before them."""
    miniature.photo_folder(tmp_path, [["a dog\u2028runs — schön ."], ["b"], ["c"]])
    file = tmp_path / "validation.jsonl"
    rows = [json.loads(line) for line in file.read_text().split("\n") if line]
    rows[0]["image"] = "some/folder/" + rows[0]["image"]
    file.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows), encoding="utf-8")
    found = photos(tmp_path, "validation")
    assert len(found) == 3 and found.captions(0) == ("a dog\u2028runs — schön .",)
    assert number_of(found.image(0)) == 0
    assert sentence(found.captions(0)[0]) == "A dog runs — schön."


def bad_line(folder: Path) -> None:
    with (folder / "validation.jsonl").open("a") as file:
        file.write('{"image": "x.jpg", "captions": "one text"}\n')


def no_json(folder: Path) -> None:
    (folder / "validation.jsonl").write_text("image,captions\n")


def no_caption(folder: Path) -> None:
    (folder / "validation.jsonl").write_text('{"image": "validation-0.jpg", "captions": []}')


def name_unknown(folder: Path) -> None:
    line = json.dumps({"image": "gone.jpg", "captions": captions()[0]})
    (folder / "validation.jsonl").write_text("\n".join([line] * 3))


def no_tar(folder: Path) -> None:
    (folder / "validation.tar").write_bytes(b"x" * 2000)


def packed_tar(folder: Path) -> None:
    plain = (folder / "validation.tar").read_bytes()
    with tarfile.open(folder / "validation.tar", "w:gz") as archive:
        (folder / "inside").write_bytes(plain)
        archive.add(folder / "inside")


def no_pictures(folder: Path) -> None:
    file = folder / "validation.tar"
    file.write_bytes(file.read_bytes().replace(b"\xff\xd8\xff", b"\0\0\0"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (bad_line, r"validation\.jsonl, line 49 is not of the form"),
        (no_json, r"line 1 is not of the form"),
        (no_caption, r"line 1 is not of the form"),
        (name_unknown, r"holds no gone\.jpg"),
        (no_tar, r"validation\.tar is damaged"),
        (packed_tar, r"uncompressed"),
        (no_pictures, r"not a picture or is damaged"),
    ],
)
def test_a_damaged_folder_is_said_in_one_line(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        task("flickr8k-choice", data=folder).example(0)


def test_no_folder_says_what_to_type(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--data DIR --split S"):
        task("flickr8k-yesno", data=tmp_path / "absent")


def test_a_split_that_is_not_there_says_which_are(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no test\.tar.*splits there: validation"):
        task("flickr8k-yesno", data=folder, split="test")


@needs_photos
def test_the_test_split_of_flickr8k_cannot_be_had() -> None:
    with pytest.raises(FileNotFoundError, match="splits there: train, validation"):
        task("flickr8k-yesno", data=SHARED, split="test")


@needs_photos
def test_flickr8k_splits_share_no_photo_and_no_question_is_lopsided() -> None:
    train, validation = (photos(SHARED, s) for s in ("train", "validation"))
    first, second = ({name for name, _ in p.rows} for p in (train, validation))
    assert (len(first), len(second)) == (5997, 1000) and not first & second
    made = task("flickr8k-yesno", data=SHARED)
    rows = made.rows
    balance = Counter((t, answer) for _, t, answer in rows)
    assert all(balance[t, "yes"] == balance[t, "no"] for t in range(len(things())))
    for photo, t, answer in rows[:400]:
        naming = sum(bool(words(c) & things()[t].names) for c in validation.captions(photo))
        assert naming >= 2 if answer == "yes" else naming == 0
    assert made.example(0).image.size == (224, 224)


# --- easy-VQA ----------------------------------------------------------------------------------

SHADES = {
    "red": (1, 0, 0),
    "green": (0, 1, 0),
    "blue": (0, 0, 1),
    "black": (0, 0, 0),
    "yellow": (1, 1, 0),
    "teal": (0, 1, 1),
    "brown": (1, 0.5, 0),
    "gray": (0.5, 0.5, 0.5),
}


def test_easyvqa_repeats_and_its_colours_are_in_the_pictures() -> None:
    made = task("easyvqa", limit=300)
    again = task("easyvqa", limit=300)
    assert [print_of(made.example(i)) for i in range(5)] == [
        print_of(again.example(i)) for i in range(5)
    ]
    rows = [made.example(i) for i in range(300)]
    named = [e for e in rows if e.question.startswith("What color")]
    assert len(named) > 10 and {e.answer for e in named} <= set(SHADES)
    vivid = [e for e in named if e.answer in ("red", "green", "blue")]
    for example in vivid:
        pixels = np.asarray(example.image, float).reshape(-1, 3)
        inside = pixels[np.ptp(pixels, axis=1) > 60]  # the background is near white
        strongest = ("red", "green", "blue")[int(inside.mean(0).argmax())]
        assert strongest == example.answer


def test_easyvqa_splits_share_no_picture() -> None:
    def prints(split: str) -> set[str]:
        made = task("easyvqa", split=split, limit=300)
        return {print_of(made.example(i))[0] for i in range(300)}

    assert not prints("train") & prints("validation")
    assert prints("validation") == prints("test")
    assert len(task("easyvqa", split="train")) == 38575 and len(task("easyvqa")) == 9673


def test_easyvqa_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(easyvqa.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install easy-vqa"):
        len(task("easyvqa"))


# --- drawn scenes ------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> list[list[scenes.Item]]:
    """Scenes on a colour that no shape has; the items of each scene drawn since."""
    placed: list[list[scenes.Item]] = []
    place = scenes._place

    def noted(rng: random.Random, wanted: list[tuple[str, str]]) -> list[scenes.Item]:
        placed.append(place(rng, wanted))
        return placed[-1]

    ground = Image.new("RGB", (scenes.SIZE, scenes.SIZE), GROUND)
    monkeypatch.setattr(scenes, "_place", noted)
    monkeypatch.setattr(scenes, "background", lambda rng, photos: ground.copy())
    monkeypatch.setattr(scenes, "sample_photos", tuple)
    return placed


GROUND = (140, 160, 190)


def test_what_is_drawn_is_what_is_asked_about(plain: list[list[scenes.Item]]) -> None:
    """Every item is a region of its own, of its colour, around its place; nothing else is."""
    from scipy import ndimage

    for name in ("scenes-where", "scenes-count"):
        made = task(name)
        for i in range(12):
            pixels = np.asarray(made.example(i).image, int)
            items = plain[-1]
            regions, count = ndimage.label(np.abs(pixels - GROUND).sum(-1) > 0, np.ones((3, 3)))
            assert count == len(items)
            assert len({regions[int(k.y), int(k.x)] for k in items} - {0}) == len(items)
            for item in items:
                off = np.abs(pixels[int(item.y), int(item.x)] - scenes.COLOURS[item.colour])
                assert off.max() <= 14
                region = regions == regions[int(item.y), int(item.x)]
                rows, columns = np.nonzero(region)
                assert np.hypot(rows.mean() - item.y, columns.mean() - item.x) < 0.35 * item.half


def test_shapes_fill_as_much_as_such_shapes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import ImageDraw

    def area(shape: str) -> float:
        canvas = Image.new("RGB", (200, 200), GROUND)
        item = scenes.Item("red", shape, 100, 100, 60)
        scenes._paint(ImageDraw.Draw(canvas), item, random.Random(1))
        return float((np.abs(np.asarray(canvas, int) - GROUND).sum(-1) > 0).sum()) / 60**2

    # of half size 1: pi; 1.7²; ½ · 1.9 · 1.8; 5 · 1.1 · 0.45 · sin 36°; 4 · 0.68 − 0.68²
    known = {"circle": 3.14, "square": 2.89, "triangle": 1.71, "star": 1.45, "cross": 2.26}
    for shape in scenes.SHAPES:
        assert area(shape) == pytest.approx(known[shape], rel=0.06), shape


def test_where_and_count_agree_with_what_was_drawn(plain: list[list[scenes.Item]]) -> None:
    answers: dict[str, Counter[str]] = {}
    for name in ("scenes-where", "scenes-count"):
        made = task(name)
        for i in range(300):
            example = made.example(i)
            expected = right(example.question, plain[-1])
            assert example.answer == expected, example.question
            answers.setdefault(example.meta["kind"], Counter())[expected] += 1
    sides = answers["left"] + answers["above"]
    assert 0.4 < sides["yes"] / sides.total() < 0.6
    assert set(answers["quadrant"]) == set(scenes.PLACES)
    counts = answers["count-both"] + answers["count-shape"] + answers["count-colour"]
    assert set(counts) >= set("012345") and max(counts.values()) < 0.3 * counts.total()


def test_training_questions_agree_with_what_was_drawn(plain: list[list[scenes.Item]]) -> None:
    answers: Counter[str] = Counter()
    kinds = ["where" if seed % 3 == 0 else "count" for seed in range(150)]
    for seed, kind in enumerate(kinds):
        scene = scenes.draw(kind, random.Random(seed), (), many=True)
        for question in scene.questions:
            expected = right(question.text, plain[-1])
            assert question.answer == expected, question.text
            answers[expected] += 1
    assert answers.total() > 600
    counts = [answers[str(n)] for n in range(scenes.MAX_COUNT + 1)]
    assert min(counts) > 0.08 * sum(counts) and max(counts) < 0.3 * sum(counts)
    assert sum(counts[2:]) > 3 * kinds.count("count"), "an image is dear: it is asked about often"


def right(question: str, items: list[scenes.Item]) -> str:
    """The answer, worked out again from the sentence."""
    found = re.search(r"(?:How many|Count the) (.+?)(?: are| ?[.?]|$)", question)
    if found:
        said = {w.removesuffix("es" if w == "crosses" else "s") for w in found[1].split()}
        return str(sum(said - {"shape"} <= {i.colour, i.shape} for i in items))
    at = re.fullmatch(r"What is at the (\w+ \w+)\?", question)
    if at:
        (one,) = (i for i in items if corner(i) == at[1])
        return one.name
    plain = re.fullmatch(r"(What color|What shape|Where) is (?:the )?(\w+)(?: shape)?\?", question)
    if plain:
        (one,) = (i for i in items if plain[2] in (i.colour, i.shape))
        return {"What color": one.colour, "What shape": one.shape}.get(plain[1], corner(one))
    named = re.findall(rf"(?:{'|'.join(scenes.COLOURS)}) (?:{'|'.join(scenes.SHAPES)})", question)
    place = {n: next(i for i in items if i.name == n) for n in named}
    assert all(sum(i.name == n for i in items) == 1 for n in named), "asked about is not one item"
    if len(named) == 1:
        return corner(*place.values())
    a, b = (place[n] for n in named)
    return "yes" if (a.x < b.x if "left of" in question else a.y < b.y) else "no"


def corner(one: scenes.Item) -> str:
    high = "top" if one.y < scenes.SIZE / 2 else "bottom"
    return f"{high} {'left' if one.x < scenes.SIZE / 2 else 'right'}"


def test_the_word_asked_for_is_the_one_written(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[str, tuple[int, int, int, int]]] = []
    write = scenes._write

    def noted(ground: Any, word: str, box: Any, *more: Any) -> scenes.Written:
        before = np.asarray(ground, int)
        made = write(ground, word, box, *more)
        rows, columns = np.nonzero(np.abs(np.asarray(ground, int) - before).sum(-1) > 60)
        assert len(rows) > 40, "nothing readable was written"
        assert columns.min() >= box[0] and columns.max() < box[2]
        assert rows.min() >= box[1] and rows.max() < box[3]
        written.append((word, box))
        return made

    monkeypatch.setattr(scenes, "_write", noted)
    made = task("scenes-words")
    for i in range(12):
        assert made.example(i).answer == written[-1][0]
    for seed in range(12):
        written.clear()
        scene = scenes.draw("words", random.Random(seed), (), many=True)
        for question in scene.questions:
            at = [w for w, box in written if place_of(box) in question.text]
            if question.kind == "word-at":
                assert at == [question.answer]
            elif question.kind == "quadrant":
                assert [place_of(b) for w, b in written if f'"{w}"' in question.text] == [
                    question.answer
                ]


@pytest.mark.parametrize("angle", [-12, 0, 9])
def test_letters_lie_where_they_are_drawn(angle: int) -> None:
    """Of "mill" the first column holds most ink, columns follow each other, no ink is outside."""
    ink, letters = (np.asarray(m, int) for m in scenes._word_masks("mill", 60, angle))
    assert ink.shape == letters.shape and set(np.unique(letters)) == set(range(5))
    held = [int((ink > 128)[letters == i].sum()) for i in range(5)]
    assert held[1] > 2 * max(held[2:]) and min(held[2:]) > 100
    assert held[0] < 0.02 * sum(held), "ink that is no letter's"
    middles = [np.nonzero(letters == i)[1].mean() for i in range(1, 5)]
    assert middles == sorted(middles)
    scene = scenes.draw("words", random.Random(angle), (), many=True)
    for one in scene.words:
        assert np.asarray(one.letters).shape == (scenes.SIZE, scenes.SIZE)
        assert np.asarray(one.letters).max() == len(one.word)


def test_a_page_has_six_words_apart() -> None:
    for seed in range(6):
        page = scenes.page(random.Random(seed), ())
        covered = np.stack([np.asarray(one.letters) > 0 for one in page.words])
        assert len({one.word for one in page.words}) == 6 and not page.questions
        assert covered.any((1, 2)).all() and covered.sum(0).max() == 1


def place_of(box: tuple[int, int, int, int]) -> str:
    return f"{'bottom' if box[1] else 'top'} {'right' if box[0] else 'left'}"


@pytest.mark.parametrize("name", DRAWN)
def test_scenes_repeat_and_splits_and_seeds_differ(name: str) -> None:
    def prints(**more: Any) -> list[tuple[Any, ...]]:
        made = task(name, **more)
        return [print_of(made.example(i)) for i in range(12)]

    first = prints()
    assert first == prints()
    others = [prints(split="train"), prints(split="test"), prints(seed=1)]
    assert len({p for some in (first, *others) for p in some}) == 48
    assert len(task(name)) == 1000 and len(task(name, limit=7)) == 7


# --- a task of one's own -----------------------------------------------------------------------


def own(folder: Path, *rows: dict[str, Any], images: int = 3) -> Path:
    """``mine.jsonl`` in ``folder``, and photos/0.png, 1.png and so on, each of one colour."""
    (folder / "photos").mkdir()
    for i in range(images):
        Image.new("RGB", (20, 20), miniature.colour(i)).save(folder / "photos" / f"{i}.png")
    said = [{"image": "photos/0.png", "question": "what", "answer": "this"} | row for row in rows]
    file = folder / "mine.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in said), "utf-8")
    return file


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = own(tmp_path, *({"image": f"photos/{i}.png", "answer": str(i)} for i in range(3)))
    monkeypatch.chdir("/")
    made = task(str(file))
    rows = [made.example(i) for i in range(3)]
    assert made.name == "mine" and len(made) == 3
    assert [number_of(e.image) for e in rows] == [int(e.answer) for e in rows]


def test_the_seed_shuffles_and_the_limit_cuts(tmp_path: Path) -> None:
    file = own(tmp_path, *({"answer": str(i)} for i in range(9)))
    orders = [[e.answer for e in map(task(str(file), seed=s).example, range(9))] for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) == list("012345678")
    cut = task(str(file), limit=4)
    assert [cut.example(i).answer for i in range(len(cut))] == orders[0][:4]


def test_any_of_several_answers_will_do(tmp_path: Path) -> None:
    made = task(str(own(tmp_path, {"answer": ["two", "2", "schön"]})))
    example = made.example(0)
    assert (example.answer, example.also, example.choices) == ("two", ("2", "schön"), ())
    said = {"2": 1, "Two.": 1, "Schön!": 1, "sch n": 0, "3": 0, "": 0}
    assert {a: made.score(example, a) for a in said} == said


def test_choices_are_compared_as_they_stand(tmp_path: Path) -> None:
    made = task(str(own(tmp_path, {"answer": "+", "choices": ["-", "+", "+ "]})))
    example = made.example(0)
    assert example.choices == ("-", "+", "+ ")
    assert [made.score(example, c) for c in example.choices] == [0, 1, 0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": []}, r"mine\.jsonl, line 2 is not of the form"),
        ({"answer": 3}, "line 2 is not of the form"),
        ({"answer": " "}, "line 2 is not of the form"),
        ({"question": None}, "line 2 is not of the form"),
        ({"answer": "C", "choices": ["A", "B"]}, "line 2.*of which every answer is one"),
        ({"answer": ["A", "C"], "choices": ["A", "B"]}, "line 2.*of which every answer is one"),
        ({"image": "photos/9.png"}, r"line 2 names the image photos/9\.png, which is not in"),
    ],
)
def test_a_bad_line_is_named(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = task(str(own(tmp_path, {}, row)))
    with pytest.raises(ValueError, match=message):
        len(made)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    file = own(tmp_path, {})
    (tmp_path / "photos" / "0.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"0\.png is not a picture that Pillow can read"):
        task(str(file)).example(0)
    file.write_bytes('{"image": "schön"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=r"mine\.jsonl is not UTF-8 text"):
        len(task(str(file)))


# --- names and answers -------------------------------------------------------------------------


def test_an_unknown_task_or_split_is_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'easyvqa'"):
        task("easy-vqa")
    for name in ("easyvqa", *DRAWN):
        with pytest.raises(ValueError, match="train, validation, test"):
            task(name, split="val")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Yes.", 1.0),
        (" yes\nNo", 1.0),
        ("YES!", 1.0),
        ("yes, it is", 0.0),
        ("?", 0.0),
        ("no", 0.0),
        ("", 0.0),
    ],
)
def test_an_answer_is_right_when_it_says_this_and_no_more(answer: str, score: float) -> None:
    assert matches("yes", answer) == score


def test_answers_of_other_scripts_are_told_apart() -> None:
    assert matches("красный", "Красный.") == matches("+", " +\n") == 1.0
    assert matches("красный", "синий") == matches("+", "-") == matches("красный", "") == 0.0
