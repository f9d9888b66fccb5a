"""Training on cached features: it goes on exactly where it stopped, and it does learn."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import miniature
import numpy as np
import pytest
import torch
from PIL import Image

from foveate.pinhole import cached, mix, seeing
from foveate.pinhole.align import Covered, Names, Vocabulary, align
from foveate.pinhole.assembly import IMAGE_TOKENS
from foveate.pinhole.bank import RANK_SHARPNESS, normalise, rank_loss, resized
from foveate.pinhole.cached import CachedRun
from foveate.pinhole.features import SIDE, Features, cells, stacked
from foveate.pinhole.mix import RANKED
from foveate.pinhole.packed import Student
from foveate.pinhole.seeing import Reading, Seeing
from foveate.tasks import scenes, video
from foveate.tasks.flickr8k import Labels
from foveate.tasks.photos import photos
from foveate.tasks.scenes import Item

SAID = [
    ["a dog runs over grass .", "the dog is on grass ."],
    ["snow on a hill .", "a hill with snow ."],
    ["a guitar by a wall .", "the guitar and the wall ."],
    ["a horse near a fence .", "one horse , one fence ."],
] * 3
ASKED = ["what color is the box?", "what shape is there?"]


@pytest.fixture(scope="module")
def student_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Student]:
    """Makes the same small student each time; it fits ``tokenizer``."""
    model = miniature.llava(vocabulary=192, image_token=191, image_size=224)
    return lambda: miniature.student(model, merged=False)


# --- features ----------------------------------------------------------------------------------


class Pictures(list[Image.Image]):
    """Pictures that note when they are asked for."""

    def __init__(self, count: int) -> None:
        super().__init__(Image.new("RGB", (30, 20), (9 * i, 200 - 9 * i, 60)) for i in range(count))
        self.asked: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.asked.append(index)
        return super().__getitem__(index)


def test_features_go_on_where_they_stopped(
    student_of: Callable[[], Student], tmp_path: Path
) -> None:
    student, whole, half = student_of(), Pictures(7), Pictures(7)
    at_once = Features(tmp_path / "a.features", 7, 128)
    assert list(at_once.fill(whole, student, batch=3)) == [3, 6, 7]
    stopped = Features(tmp_path / "b.features", 7, 128).fill(half, student, batch=3)
    assert next(stopped) == 3
    stopped.close()
    again = Features(tmp_path / "b.features", 7, 128)
    assert again.done == 3
    assert list(again.fill(half, student, batch=3)) == [6, 7]
    assert half.asked == list(range(7)), "something was encoded twice or never"
    assert np.array_equal(at_once.values, again.values)
    assert list(again.fill(half, student)) == []


def test_features_are_the_encoders(student_of: Callable[[], Student], tmp_path: Path) -> None:
    student, pictures = student_of(), Pictures(3)
    made = Features(tmp_path / "a.features", 3, 128)
    list(made.fill(pictures, student, batch=2))
    pixels = normalise(stacked(pictures[i] for i in (2, 0)))
    with torch.no_grad():
        expected = student.features(pixels)
    assert expected.shape == (2, IMAGE_TOKENS, 128)
    torch.testing.assert_close(made.take([2, 0]), expected, rtol=2e-3, atol=2e-3)
    assert (expected[0] - expected[1]).abs().max() > 0.05


def test_features_of_another_count_are_refused(tmp_path: Path) -> None:
    Features(tmp_path / "a.features", 4, 8)
    with pytest.raises(ValueError, match="another number of images than 5"):
        Features(tmp_path / "a.features", 5, 8)


# --- cells -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_one_patch_of_every_cell(stride: int) -> None:
    chosen = cells(5, stride, torch.Generator().manual_seed(0))
    side, per = SIDE, SIDE // stride
    assert chosen.shape == (5, per * per)
    assert (chosen.diff(dim=1) > 0).all() or stride == 1
    for row in chosen.tolist():
        assert row == sorted(row)
        at = {(place // side // stride, place % side // stride) for place in row}
        assert at == {(y, x) for y in range(per) for x in range(per)}
    if stride > 1:
        many = cells(300, stride, torch.Generator().manual_seed(1))
        assert set(many.flatten().tolist()) == set(range(side * side)), "some patch is never shown"


# --- align -------------------------------------------------------------------------------------


def test_align_learns_which_picture_has_which_word(
    student_of: Callable[[], Student], tmp_path: Path
) -> None:
    """Word w's patch is direction w in a noisy picture: projected, it must lie near w."""
    student, draw = student_of(), torch.Generator().manual_seed(0)
    kinds = 6
    directions = torch.randn(kinds, 128, generator=draw)
    made = Features(tmp_path / "a.features", 60, 128)
    shown = [(i % kinds, (i // kinds) % kinds) for i in range(60)]
    for i, pair in enumerate(shown):
        values = torch.randn(IMAGE_TOKENS, 128, generator=draw) * 0.3
        for half, word in enumerate(pair):
            values[half * 128 : half * 128 + 128] += directions[word]
        made.values[i] = values.numpy()
    texts = [" ".join("abcdef"[w] * 3 for w in pair) for pair in shown]
    writer = SimpleNamespace(ids=lambda word: (" abcdef".index(word.strip()[0]),))
    table = torch.randn(7, 192, generator=draw)
    words = Vocabulary(texts, writer, table)  # type: ignore[arg-type]
    assert words.words == ["aaa", "bbb", "ccc", "ddd", "eee", "fff"]
    assert [set(row.nonzero().flatten().tolist()) for row in words.labels] == [
        set(p) for p in shown
    ]
    losses = [loss for _, loss in align(student, made, words, steps=24)]
    assert np.mean(losses[-3:]) < 0.6 * np.mean(losses[:3])
    with torch.no_grad():
        patches = student.project(directions)
    centred = table[1:] - table[1:].mean(0)
    near = torch.cosine_similarity((patches - table[1:].mean(0))[:, None], centred[None], dim=-1)
    assert near.argmax(1).tolist() == list(range(kinds))


# --- ranking -----------------------------------------------------------------------------------


def test_ranking_compares_the_first_captions_mean_likelihood() -> None:
    """Naively: softmax over the means of the first segments, in the rows that are ranked."""
    draw = torch.Generator().manual_seed(0)
    segment = torch.tensor([[0, 0, 1, 2, 3, 3, 4, -1], [0, 1, 1, 2, 2, 3, 3, 4], [0] * 8])
    asked = (segment.flatten() >= 0).nonzero()[:, 0]
    logp = -torch.rand(len(asked), generator=draw)
    rows = SimpleNamespace(text=segment, segment=segment)
    losses = []
    for row in (0, 1):
        of = segment.flatten()[asked].where(asked // 8 == row, -1)
        means = torch.stack([logp[of == k].mean() for k in range(RANKED)])
        losses.append(-(means * RANK_SHARPNESS).log_softmax(0)[0])
    ranked = torch.tensor([True, True, False])
    loss = rank_loss(rows, logp, asked, ranked)  # type: ignore[arg-type]
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    assert rank_loss(rows, logp, asked, ~ranked[[0, 0, 0]]) == 0  # type: ignore[arg-type]


# --- tune --------------------------------------------------------------------------------------


class Clock:
    """Time that passes only when a step is made: 400 s each, so each step leaves a checkpoint."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Easy:
    """Two questions about each of three pictures, in place of easy-VQA."""

    row = mix.EasyRows.row

    def __init__(self) -> None:
        self.numbers = [0, 1, 2]
        answers = ["red", "circle"]
        pairs = [mix.Segment(q, a) for q, a in zip(ASKED, answers, strict=True)]
        self.by_image = {n: list(pairs) for n in self.numbers}
        self.task = SimpleNamespace(image=lambda n: Image.new("RGB", (64, 64), (80 * n, 20, 90)))


SHAPES = video.Gallery(
    (("Is", "a circle"), ("Is", "a box"), ("Is", "a star")),
    Labels(((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 1))),
    lambda i: Image.new("RGB", (64, 64)),
)


@pytest.fixture
def start(
    student_of: Callable[[], Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], CachedRun]:
    """A run in the folder of that name: 12 photos and 3 pictures, already encoded."""
    data = miniature.photo_folder(tmp_path / "data", SAID, "train")
    names = " ".join(word for kind in Names.KINDS for word in kind)
    spoken = [c for five in SAID for c in five] + [*ASKED, names, "yes no user assistant"]
    spoken += [mix.question(t) for t in mix.things()[:60]] + [mix.CAPTION_QUESTION]
    clock = Clock()
    update = CachedRun._update

    def timed(self: CachedRun, *given: Any) -> float:
        clock.now += 400
        return update(self, *given)

    features = Features
    monkeypatch.setattr(cached, "Features", lambda file, n: features(file, n, 128))
    monkeypatch.setattr(cached, "EasyRows", Easy)
    monkeypatch.setattr(video, "shape_gallery", lambda split: SHAPES)
    monkeypatch.setattr(cached, "time", clock)
    monkeypatch.setattr(cached, "TEXT", 40)
    monkeypatch.setattr(cached, "FRAMES", (2, 3))
    monkeypatch.setattr(cached, "SCENES", 2)
    monkeypatch.setattr(CachedRun, "_update", timed)

    def begin(name: str) -> CachedRun:
        out = tmp_path / name
        miniature.tokenizer_file(out / "processor" / "tokenizer.json", spoken)
        run = CachedRun(student_of(), out, photos(data, "train"), {}, (12, 3), rows=(2, 1, 1, 1))
        list(run.encode())
        return run

    return begin


def weights_of(run: CachedRun) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in run.student.named_parameters() if v.requires_grad}


def stop_after(steps: int, lines: Iterator[str]) -> None:
    for _ in range(steps):
        next(lines)
    lines.close()  # type: ignore[attr-defined]


MINUTES = 5 * 400 / 60 - 1  # five steps
LR = 1.2e-3


def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    start: Callable[[str], CachedRun],
) -> None:
    whole = start("whole")
    began = weights_of(whole)
    list(whole.tune(MINUTES, 1e9, LR))
    assert whole.step == 5
    first = start("stopped")
    stop_after(2, first.tune(MINUTES, 1e9, LR))
    second = start("stopped")
    stop_after(1, second.tune(MINUTES, 1e9, LR))
    assert (second.step, second.seconds) == (3, 1200)
    third = start("stopped")
    list(third.tune(MINUTES, 1e9, LR))
    assert third.step == 5
    ended, resumed = weights_of(whole), weights_of(third)
    for name, value in ended.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)
    moved = max(float((ended[k] - began[k]).abs().max()) for k in ended)
    assert moved > 1e-4, "nothing was trained"


def test_a_checkpoint_gives_back_step_clock_and_weights(
    start: Callable[[str], CachedRun],
) -> None:
    run = start("one")
    stop_after(3, run.tune(MINUTES, 1e9, LR))
    trained = weights_of(run)
    again = start("one")
    assert any(not torch.equal(v, trained[k]) for k, v in weights_of(again).items())
    again._resume(torch.optim.AdamW([{"params": list(p)} for p in groups(again)]))
    assert (again.step, again.seconds) == (3, 1200)
    assert all(torch.equal(v, trained[k]) for k, v in weights_of(again).items())


def groups(run: CachedRun) -> tuple[Any, Any]:
    return run.student.projector.parameters(), run.student.language.parameters()


def test_tuning_lowers_the_loss(start: Callable[[str], CachedRun]) -> None:
    run = start("learns")
    lines = list(run.tune(12 * 400 / 60 - 1, 1e9, LR))
    losses = [float(line.split()[3]) for line in lines]
    assert len(losses) == 12 and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.03


def test_a_row_weighs_the_same_however_many_there_are(
    start: Callable[[str], CachedRun],
) -> None:
    run, gradients = start("weighed"), []
    for copies in (1, 3):
        run.student.zero_grad()
        draw = torch.Generator().manual_seed(0)
        rows, _ = run.lessons.stored(run.features, random.Random(3), draw, 1, 4)
        per_row = ("pixels", "text", "segment", "position", "target", "weight", "places")
        more = {n: getattr(rows, n).repeat_interleave(copies, 0) for n in per_row}
        run._learn(dataclasses.replace(rows, **more))
        gradients.append([p.grad.clone() for p in run.student.projector.values()])
    for one, three in zip(*gradients, strict=True):
        assert one.abs().max() > 1e-4
        torch.testing.assert_close(three, 3 * one, rtol=1e-3, atol=1e-5)


def test_alignment_is_done_once(
    start: Callable[[str], CachedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached, "Vocabulary", functools.partial(Vocabulary, least=2))
    run = start("aligned")
    assert len(list(run.align(4))) == 4
    again = start("aligned")
    assert list(again.align(4)) == []
    for name, value in run.student.projector.items():
        assert torch.equal(again.student.projector[name], value)


def test_too_few_photos_to_align_with(start: Callable[[str], CachedRun]) -> None:
    with pytest.raises(ValueError, match="use more photos"):
        next(start("few").align(4))


def test_rows_show_their_own_images(start: Callable[[str], CachedRun]) -> None:
    run = start("rows")
    lessons, draw = run.lessons, torch.Generator().manual_seed(0)
    rows, ranked = lessons.stored(run.features, random.Random(3), draw, 40, 4)
    found = {int(i) for row in rows.pixels for i in shown_in(run.features, row)}
    assert len(found & set(range(12))) > 6 and found & {12, 13, 14}, "photos, easy-VQA after them"
    for row, is_photo in zip(rows.pixels, ranked, strict=True):
        assert bool(is_photo) == (int(shown_in(run.features, row)[0]) < 12)


def shown_in(features: Features, row: torch.Tensor) -> torch.Tensor:
    """The images of which every feature in ``row`` is one."""
    every = features.take(range(features.count))
    near = (every[:, None] - row[None, :, None]).abs().amax(-1).amin(-1)
    return (near.amax(1) == 0).nonzero()[:, 0]


def test_clips_show_their_frames_in_order(start: Callable[[str], CachedRun]) -> None:
    run = start("clips")
    lessons, draw = run.lessons, torch.Generator().manual_seed(0)
    for seed in range(4):
        rows = lessons.filmed(run.features, random.Random(seed), draw, 3, 4)
        rng = random.Random(seed)
        frames = rng.choice(cached.FRAMES)
        made = [rng.choice(lessons.clips).row(rng, frames) for _ in range(3)]
        each = rows.pixels.view(3, frames, -1, rows.pixels.shape[-1])
        ids, at = lessons.writer.prefix(frames)
        assert rows.places is not None and rows.places[0].tolist() == sorted(
            rows.places[0].tolist()
        )
        assert rows.prefix.tolist() == [ids[place] for place in rows.places[0]]
        for row, shown, places in zip(made, each, rows.places[:, rows.image], strict=True):
            assert set(places.tolist()) <= set(at)
            for frame, picture, standing in zip(
                row.frames, shown, places.view(frames, -1), strict=True
            ):
                patches = torch.tensor(
                    [at.index(place) % IMAGE_TOKENS for place in standing.tolist()]
                )
                assert torch.equal(run.features.take([frame])[0, patches], picture)


def test_what_is_asked_about_clips_is_true_and_tells_nothing() -> None:
    """Answers recomputed from the table; of every thing as many yes as no."""
    clips, rng = mix.ClipRows(SHAPES, 5, 3), random.Random(0)
    said: Counter[tuple[str, str]] = Counter()
    for _ in range(3000):
        row = clips.row(rng, 2)
        shown = [SHAPES.labels.table[i - 5] for i in row.frames]
        at = {
            phrase: [k for k, one in enumerate(shown) if one[t]]
            for t, (_, phrase) in enumerate(SHAPES.asked)
        }
        for segment in row.segments:
            named = sorted((p for p in at if p in segment.question), key=segment.question.index)
            said[named[0], segment.answer] += 1
            if segment.answer in ("yes", "no"):
                assert (segment.answer == "yes") == bool(at[named[0]])
            elif segment.answer in video.PARTS:
                assert at[named[0]] == [0 if segment.answer == "the beginning" else 1]
            else:
                assert at[segment.answer] == [0] and all(at[name] for name in named)
    for _, phrase in SHAPES.asked:
        assert abs(said[phrase, "yes"] - said[phrase, "no"]) < 0.1 * said[phrase, "no"]
        assert said[phrase, "the beginning"] and said[phrase, "the end"]


def test_scenes_are_drawn_anew_and_encoded(start: Callable[[str], CachedRun]) -> None:
    run = start("drawn")
    draw = torch.Generator().manual_seed(0)
    (rows, covered), (again, _), (other, _) = (
        run.lessons.drawn(run.student, run.names, random.Random(seed), draw, 2, IMAGE_TOKENS)
        for seed in (5, 5, 6)
    )
    assert torch.equal(rows.pixels, again.pixels) and torch.equal(rows.text, again.text)
    assert not torch.equal(rows.pixels, other.pixels)
    scene = mix.scene_row("shapes", random.Random(5), run.lessons.backgrounds)
    pixels = torch.from_numpy(np.stack([scene.pixels]))  # type: ignore[list-item]
    expected = run.student.features(normalise(resized(pixels)))
    torch.testing.assert_close(rows.pixels[:1], expected.detach(), rtol=1e-4, atol=1e-5)
    words = Names.of(scene.items)
    inside = words[:, 0] >= 0
    count = int(inside.sum())
    assert torch.equal(covered.words[:count], words[inside]) and len(covered.words) > count
    assert torch.equal(covered.features[:count], rows.pixels[0, inside])


def test_of_scenes_what_is_covered_is_shown_first(start: Callable[[str], CachedRun]) -> None:
    run = start("shown")
    draw = torch.Generator().manual_seed(0)
    rows, _ = run.lessons.drawn(run.student, run.names, random.Random(5), draw, 3, 100)
    rng = random.Random(5)
    made = [mix.scene_row("shapes", rng, run.lessons.backgrounds) for _ in range(3)]
    at = run.lessons.writer.prefix()[1]
    assert rows.places is not None
    for row, scene in zip(rows.places, made, strict=True):
        shown = {at.index(place) for place in row[rows.image].tolist()}
        covered = (Names.of(scene.items)[:, 0] >= 0).nonzero()[:, 0].tolist()
        assert 0 < len(covered) < 100 == len(shown) and set(covered) <= shown


def test_patches_are_named_by_the_shape_over_them() -> None:
    items = [Item("red", "circle", 40, 40, 30), Item("blue", "star", 300, 200, 25)]
    words = Names.of(items).view(SIDE, SIDE, 5)
    side = 336 / SIDE
    for y in range(SIDE):
        for x in range(SIDE):
            at = ((x + 0.5) * side, (y + 0.5) * side)
            under = [i for i in items if away(at, i) < 0.8 * i.half]
            told = [k[w] for k, w in zip(Names.KINDS, words[y, x].tolist(), strict=True) if w >= 0]
            part = {i: "center" if away(at, i) < side / 2 else "edge" for i in under}
            known = [w for i in under for w in (i.colour, i.shape, *WHERE[i.colour], part[i])]
            assert told == known
    centers = words.flatten(0, 1)[:, -1] == Names.PARTS.index("center")
    assert centers.sum() == len(items)


def away(at: tuple[float, float], item: Item) -> float:
    """The larger of the distances from the shape's centre along x and y."""
    return max(abs(at[0] - item.x), abs(at[1] - item.y))


WHERE = {"red": ("top", "left"), "blue": ("bottom", "right")}


def test_align_learns_what_shapes_are_and_where(
    student_of: Callable[[], Student], tmp_path: Path
) -> None:
    """A patch is the sum of directions, one of each kind: projected, it is near all of them."""
    student, draw = student_of(), torch.Generator().manual_seed(0)
    every = [w for kind in Names.KINDS for w in kind]
    writer = SimpleNamespace(
        ids=lambda word: (every.index(word.strip()) if word.strip() in every else 0,)
    )
    table = torch.randn(len(every), 192, generator=draw)
    names = Names(writer, table)  # type: ignore[arg-type]
    words = torch.stack([torch.randint(0, len(k), (400,), generator=draw) for k in Names.KINDS], 1)
    directions = [torch.randn(len(k), 128, generator=draw) for k in Names.KINDS]
    patches = torch.stack([d[w] for d, w in zip(directions, words.T, strict=True)]).sum(0)
    covered = Covered(patches[:300], words[:300])
    pictures = Features(tmp_path / "a.features", 4, 128)
    lone = SimpleNamespace(ids=lambda word: (0,))
    known = Vocabulary(["aaa", "bbb", "ccc", "ddd"], lone, table, least=1)  # type: ignore[arg-type]
    held = Covered(patches[300:], words[300:])
    before = names.loss(student, held).item()
    list(align(student, pictures, known, steps=40, scenes=(names, covered)))
    assert names.loss(student, held).item() < 0.4 * before


def test_patches_are_named_by_the_word_over_them() -> None:
    """Patch by patch, from the pixel in its middle."""
    known = scenes.vocabulary()
    writer = SimpleNamespace(ids=lambda word: (len(word),))
    named = Reading(writer, torch.randn(9, 16))  # type: ignore[arg-type]
    scene = scenes.draw("words", random.Random(5), (), many=True)
    assert len(scene.words) > 1
    labels = named.of(scene.words).view(SIDE, SIDE, 2)
    found = []
    for y in range(SIDE):
        for x in range(SIDE):
            middle = tuple(int((k + 0.5) * 336 / SIDE) for k in (x, y))
            under = [(w, w.letters.getpixel(middle)) for w in scene.words]
            told = [(known.index(w.word), ord(w.word[n - 1]) - ord("a")) for w, n in under if n]
            assert [tuple(labels[y, x].tolist())] == (told or [(-1, -1)])
            found += told
    assert {word for word, _ in found} == {known.index(w.word) for w in scene.words}


@pytest.fixture
def lesson(
    start: Callable[[str], CachedRun], monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], Seeing]:
    """A lesson in reading four words, in the folder of that name."""
    monkeypatch.setattr(scenes, "vocabulary", lambda: ("box", "dog", "yes", "red"))
    monkeypatch.setattr(seeing, "vocabulary", scenes.vocabulary)
    sizes = {"PAGES": 0, "WORDS": 4, "SHAPES": 1, "PHOTOS": 1}
    for name, value in {"FIRST": 1, "SPELLED": 2, **sizes}.items():
        monkeypatch.setattr(seeing, name, value)
    clock = Clock()
    update = Seeing._update

    def timed(self: Seeing) -> str:
        clock.now += 400
        return update(self)

    monkeypatch.setattr(seeing, "time", clock)
    monkeypatch.setattr(Seeing, "_update", timed)

    def begin(name: str) -> Seeing:
        run = start(name)
        grounds = run.lessons.backgrounds
        return Seeing(run.student, run.out, run._photos, grounds, run.names, run.reading)

    return begin


def told(line: str, name: str) -> float:
    words = line.split()
    return float(words[words.index(name) + 1])


def test_the_encoder_learns_to_read_what_it_sees_often(
    lesson: Callable[[str], Seeing], monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Seeing._images
    monkeypatch.setattr(Seeing, "_images", lambda self, rng: images(self, random.Random(0)))
    made = lesson("reads")
    before = {k: v.detach().clone() for k, v in made.student.named_parameters()}
    lines = list(made.run(20 * 400 / 60 - 1, lr=3e-3))
    assert told(lines[-1], "letters") < 0.9 * told(lines[0], "letters")
    assert told(lines[-1], "words") < 0.8 * told(lines[0], "words")
    assert told(lines[-1], "shapes") < 0.9 * told(lines[0], "shapes")
    assert 0 < told(lines[-1], "moved") < max(told(line, "moved") for line in lines)
    moved = {k for k, v in made.student.named_parameters() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("vision", "projector")) for k in moved)
    for name, stack in made.student.vision.items():
        assert torch.equal(stack.b[0], before[f"vision.{name}.b"][0]), "before FIRST"


def test_a_lesson_goes_on_where_it_was_stopped(lesson: Callable[[str], Seeing]) -> None:
    whole, first = lesson("whole"), lesson("stopped")
    list(whole.run(MINUTES))
    stop_after(2, first.run(MINUTES))
    second = lesson("stopped")
    assert len(list(second.run(MINUTES))) == 3 and second.step == whole.step == 5
    ended = dict(whole.student.named_parameters())
    for name, value in second.student.named_parameters():
        torch.testing.assert_close(value, ended[name], rtol=0, atol=1e-6)


def test_the_encoder_stays_as_it_is(start: Callable[[str], CachedRun]) -> None:
    run = start("frozen")
    before = weights_of(run)
    stop_after(2, run.tune(MINUTES, 1e9, LR))
    after = weights_of(run)
    assert all(torch.equal(before[k], after[k]) for k in before if k.startswith("vision"))
    assert not all(torch.equal(before[k], after[k]) for k in before)


def test_the_rate_that_is_asked_for_is_used(start: Callable[[str], CachedRun]) -> None:
    run = start("still")
    before = weights_of(run)
    stop_after(2, run.tune(MINUTES, 1e9, 0.0))
    assert all(torch.equal(value, before[name]) for name, value in weights_of(run).items())
