"""The encoder's own training: labels are what was drawn, it learns them, photos hold it."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import miniature
import pytest
import torch
from PIL import Image

from foveate.pinhole import sight
from foveate.pinhole.assembly import IMAGE_TOKENS
from foveate.pinhole.features import SIDE
from foveate.pinhole.packed import Student
from foveate.pinhole.sight import Marks, Sight
from foveate.tasks.scenes import Item, Scene, Written, draw, vocabulary

CELL = 336 / SIDE
PICTURE = Image.new("RGB", (336, 336), (120, 130, 140))
ITEMS = (
    Item("red", "circle", 60, 60, 30),
    Item("red", "star", 250, 80, 30),
    Item("blue", "circle", 90, 260, 30),
    Item("red", "circle", 260, 260, 30),
)


def test_marks_say_what_each_patch_shows() -> None:
    word = vocabulary()[7]
    drawn = Scene(PICTURE, (), ITEMS)
    written = Scene(PICTURE, (), (), (Written(word, (42, 84, 147, 126)),))
    marks = Marks.of([drawn, written])
    alike = {(60, 60): (2, 3, 3), (250, 80): (1, 1, 3), (90, 260): (1, 3, 1), (260, 260): (2, 3, 3)}
    for place in range(IMAGE_TOKENS):
        x, y = (place % SIDE + 0.5) * CELL, (place // SIDE + 0.5) * CELL
        under = [i for i in ITEMS if max(abs(x - i.x), abs(y - i.y)) < 0.8 * i.half]
        if not under:
            assert marks.names[0, place].tolist() == [-1] * 4
            assert marks.alike[0, place].tolist() == [-1] * 3
        for item in under:
            told = marks.alike[0, place] + 1
            assert tuple(told.tolist()) == alike[int(item.x), int(item.y)]
            middle = (marks.middle[0, place] + 1) * 168
            assert middle.tolist() == pytest.approx([item.x, item.y], abs=0.01)
        inside = 42 <= x < 147 and 84 <= y < 126
        assert marks.word[1, place] == (7 if inside else -1)
    assert (marks.word[0] == -1).all() and (marks.names[1] == -1).all()


def test_words_lie_where_their_boxes_are() -> None:
    """Painting over the box leaves the ground: with the same draws and without the word."""
    for seed in range(20):
        scene = draw("words", random.Random(seed), (), many=True)
        assert sorted(w.word for w in scene.written) == sorted(
            {q.answer for q in scene.questions if q.kind in ("word", "word-at")}
        )
        for one in scene.written:
            left, top, right, bottom = one.box
            assert 0 <= left < right <= 336 and 0 <= top < bottom <= 336
            colours = scene.image.crop(one.box).getcolors(336 * 336)
            assert colours is not None and len(colours) > 1


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], Sight]:
    """A small run by a clock that every step moves by a minute."""
    monkeypatch.setattr(sight, "FIRST", 1)
    monkeypatch.setattr(sight, "SHOWN", 40)
    for name, size in (("WORDS", 1), ("SHAPES", 2), ("HELD", 1)):
        monkeypatch.setattr(sight, name, size)
    model = miniature.llava(vocabulary=192, image_token=191, image_size=224)
    writer = SimpleNamespace(ids=lambda text: (sum(map(ord, text)) % 190,))
    held = [Image.new("RGB", (40, 30), (30 * i, 90, 200 - 30 * i)) for i in range(4)]
    now = [0.0]

    def passed() -> float:
        now[0] += 30.0  # read twice a step
        return now[0]

    monkeypatch.setattr(sight.time, "monotonic", passed)

    def begin(weight: float = sight.HOLD_WEIGHT) -> Sight:
        monkeypatch.setattr(sight, "HOLD_WEIGHT", weight)
        student: Student = miniature.student(model, merged=False)
        return Sight(student, writer, tmp_path, held, held)  # type: ignore[arg-type]

    return begin


def trained(run: Sight) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in run.student.named_parameters() if v.requires_grad}


def test_it_learns_and_leaves_the_language_model_alone(start: Callable[..., Sight]) -> None:
    run = start(0.0)
    before = trained(run)
    losses = [float(line.split()[3]) for line in run.run(20, check_every=1e9)]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    after = trained(run)
    moved = {k for k, v in after.items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("vision", "projector")) for k in moved)


def test_held_images_keep_what_they_had(start: Callable[..., Sight]) -> None:
    def moved(weight: float) -> float:
        run = start(weight)
        (run.out / "seen.pt").unlink(missing_ok=True)
        return [float(line.split()[5]) for line in run.run(20, check_every=1e9)][-1]

    assert moved(200.0) < 0.5 * moved(0.0)


def test_a_run_goes_on_where_it_stopped(start: Callable[..., Sight]) -> None:
    first = start()
    ended = list(first.run(6, check_every=1e9))
    again = start()
    assert list(again.run(6)) == [] and again.step == first.step == len(ended)
    for name, value in trained(first).items():
        assert torch.equal(trained(again)[name], value)
    assert len(list(again.run(9, check_every=1e9))) > 0


def test_frozen_blocks_stay_as_they_were(start: Callable[..., Sight]) -> None:
    run = start()
    before = trained(run)
    list(run.run(4, check_every=1e9))
    for name, value in trained(run).items():
        if name.startswith("vision"):
            assert torch.equal(value[0], before[name][0])
            assert not torch.equal(value[1:], before[name][1:])
