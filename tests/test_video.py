"""Frames, several images, mixed batches; clips from files; the video tasks."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import command
import miniature
import oracle
import pytest
import tiny
import torch
from PIL import Image, ImageStat
from torch import Tensor

import foveate
from foveate import Recipe, Schedule, loading
from foveate.answer import answer
from foveate.ask import answers, given_as, prepare, vision
from foveate.cost import TextShape
from foveate.evaluate import fewer_frames
from foveate.ops.bipartite import merge_to
from foveate.tasks import Example, easyvqa, names, task, video

BOTH = Recipe(
    Schedule.ramp(0.5, start=2, stop=5),
    entrance=foveate.reducer("aim-merge-tokens"),
    layers=foveate.reducer("pagerank"),
)
RECIPES = {
    "aim": BOTH,
    "prumerge": foveate.recipe("prumerge+", keep=0.4),
    "adaptive": foveate.recipe("prumerge"),
    "fastv": foveate.recipe("fastv", keep=0.3),
}
FRAMES = 4
MIXED = ["", "i", "iii", "v", "iv"]
TOLERANCE = 3e-6
FILES = ("a.mp4", "b.png")


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def onevision_item(kind: str, alone: bool, seed: int) -> tuple[int, dict[str, Any]]:
    """Tokens and arguments of one image (anyres when it is alone in its sample) or one video."""
    if kind == "v":
        return FRAMES * 9 + 1, {"pixel_values_videos": noise(seed, 1, FRAMES, 3, 48, 48)}
    tokens = 36 + 72 + 6 if alone else 36 + 1
    pixels = noise(seed, 1, 3, 3, 48, 48)
    return tokens, {"pixel_values": pixels, "image_sizes": torch.tensor([[48, 96]])}


def qwen_item(kind: str, alone: bool, seed: int) -> tuple[int, dict[str, Any]]:
    times = FRAMES // 2 if kind == "v" else 1
    name, grid = ("pixel_values_videos", "video") if kind == "v" else ("pixel_values", "image")
    pixels = noise(seed, times * 144, 3 * 2 * 4 * 4)
    return times * 36, {name: pixels, f"{grid}_grid_thw": torch.tensor([[times, 12, 12]])}


ITEMS = {"llava-onevision": onevision_item, "qwen2.5-vl": qwen_item}


def batch(name: str, samples: list[str], seed: int = 0) -> dict[str, Any]:
    """Left-padded; a sample is its images ``i`` and videos ``v`` in order, text between them.

    Sample b depends on (seed + 10 b) only, so alone it is ``batch(name, [sample], seed + 10 * b)``.
    """
    rows, given = [], {}
    for b, sample in enumerate(samples):
        own = seed + 10 * b
        draw = torch.Generator().manual_seed(own)
        ids = torch.randint(3, 80, (8 + own % 4,), generator=draw).tolist()
        at = 2
        for i, kind in enumerate(sample):
            tokens, made = ITEMS[name](kind, sample.count("i") == 1, 1000 + own + i)
            ids[at:at] = [tiny.VIDEO if kind == "v" else tiny.IMAGE] * tokens + [5]
            at += tokens + 1
            for key, value in made.items():
                given[key] = torch.cat([given[key], value]) if key in given else value
        rows.append(ids)
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[tiny.PAD] * (width - len(ids)) + ids for ids in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(i)) + [1] * len(i) for i in rows]),
        **given,
    }
    if name == "llava-onevision" and "pixel_values" in given:
        images = [sample.count("i") for sample in samples]
        inputs["batch_num_images"] = torch.tensor([n for n in images if n])
    if name == "qwen2.5-vl":
        ids = inputs["input_ids"]
        inputs["mm_token_type_ids"] = (ids == tiny.IMAGE).int() + 2 * (ids == tiny.VIDEO).int()
    return inputs


def left(inputs: dict[str, Any], b: int) -> int:
    """Padding before sample b."""
    return int((inputs["attention_mask"][b] == 0).sum())


# --- frames and several images -----------------------------------------------------------------


@pytest.mark.parametrize("recipe", sorted(RECIPES))
@pytest.mark.parametrize("name", sorted(ITEMS))
def test_a_mixed_batch_equals_the_oracle_and_singles(models, name: str, recipe: str) -> None:
    """Text, an image, three images, a video, an image and a video: in one call and one by one."""
    model, made = models(name), RECIPES[recipe]
    inputs = batch(name, MIXED)
    together = oracle.reduced_run(model, made, inputs, 3)
    expected = oracle.masked_logits(model, inputs, together)
    assert (together.logits - expected).abs().max() < TOLERANCE
    for b, sample in enumerate(MIXED):
        alone = oracle.reduced_run(model, made, batch(name, [sample], 10 * b), 3)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        assert (alone.logits[0] - together.logits[b]).abs().max() < TOLERANCE
        if sample:
            assert torch.equal(alone.slots[-1][0] + left(inputs, b), together.slots[-1][b])


@pytest.mark.parametrize("name", sorted(ITEMS))
@torch.no_grad()
def test_budgets_inside_the_llm_are_the_samples(models, name: str) -> None:
    """Over all its images and frames together: one floor, not one for each."""
    model, samples = models(name), ["iii", "v", "iiv", ""]
    inputs = batch(name, samples)
    with foveate.reduced(model, foveate.recipe("fastv", keep=0.48)) as report:
        model(**inputs)
    item = ITEMS[name]
    counts = [sum(item(k, s.count("i") == 1, 0)[0] for k in s) for s in samples]
    assert report.alive[0] == counts == report.vision
    assert report.alive[-1] == [int(n * 0.48 + 1e-6) for n in counts]
    assert report.alive[-1] != [
        sum(int(item(k, s.count("i") == 1, 0)[0] * 0.48) for k in s) for s in samples
    ]


def large_onevision() -> Any:
    """OneVision with a grid of its own size: 27 × 27 patches, which pooling makes 14 × 14."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config=tiny._clip("siglip_vision_model") | {"image_size": 27 * 8},
        text_config=tiny.text_config("qwen2", max_position_embeddings=2048),
        image_token_index=tiny.IMAGE,
        video_token_index=tiny.VIDEO,
        image_grid_pinpoints=[[216, 216]],
    )
    return tiny._ready(LlavaOnevisionForConditionalGeneration(config))


@torch.no_grad()
def test_aim_merges_every_frame_from_196_to_98_to_49() -> None:
    """Each frame by itself, as its own merge says; the newline after the video stays."""
    model, frames = large_onevision(), 3
    pixels = noise(3, 1, frames, 3, 216, 216)
    ids = torch.tensor([[1, *[tiny.VIDEO] * (frames * 196 + 1), 7, 8]])
    inputs = {"input_ids": ids, "pixel_values_videos": pixels}
    dense = model.model.get_video_features(pixels).pooler_output[0]
    for keep, each in ((0.5, 98), (0.25, 49)):
        recipe = foveate.recipe("aim", keep=keep, at="tokens")
        with foveate.reduced(model, recipe) as report:
            entered = oracle.entered_again(model, inputs)["entered"]
        assert report.alive[0] == [frames * each + 1]
        assert [len(g) for g in report.groups] == [196] * frames
        assert [int(g.max()) + 1 for g in report.groups] == [each] * frames
        for f in range(frames):
            frame = dense[f * 196 : (f + 1) * 196]
            alone, _, _ = merge_to(frame[None], None, each, "raster")
            mine = entered[0, 1 + f * each : 1 + (f + 1) * each]
            assert torch.allclose(mine, alone[0], atol=1e-6)
        assert torch.equal(entered[0, 1 + frames * each], dense[-1])


def test_a_frame_knows_nothing_of_the_others(models) -> None:
    """What one frame keeps does not depend on what the others show."""
    for name in sorted(ITEMS):
        model, inputs = models(name), batch(name, ["v"])
        other = {k: v.clone() for k, v in inputs.items()}
        pixels = other["pixel_values_videos"]
        half = pixels[:, FRAMES // 2 :] if pixels.ndim == 5 else pixels[len(pixels) // 2 :]
        half.normal_(generator=torch.Generator().manual_seed(77))
        groups = []
        for given in (inputs, other):
            with foveate.reduced(model, BOTH) as report, torch.no_grad():
                model(**given)
            groups.append([g.clone() for g in report.groups])
        count = len(groups[0])
        assert count == (FRAMES if name == "llava-onevision" else FRAMES // 2)
        same = [torch.equal(a, b) for a, b in zip(*groups, strict=True)]
        assert same == [i < count // 2 for i in range(count)]


# --- clips from files --------------------------------------------------------------------------


def grey(i: int) -> int:
    return 20 * i


def written(file: Path, frames: int = 12, rate: int = 4, size: tuple[int, int] = (64, 48)) -> Path:
    """A video whose frame i is grey of brightness 20 i."""
    av = pytest.importorskip("av")
    with av.open(str(file), "w") as out:
        stream = out.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        for i in range(frames):
            picture = av.VideoFrame.from_image(Image.new("RGB", size, (grey(i),) * 3))
            for packet in stream.encode(picture):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
    return file


@pytest.mark.parametrize(
    ("count", "at"), [(1, [6]), (3, [2, 6, 10]), (4, [1, 4, 7, 10]), (40, list(range(12)))]
)
def test_frames_of_a_clip_are_spread_evenly(tmp_path: Path, count: int, at: list[int]) -> None:
    made = loading.clip(written(tmp_path / "a.mp4"), count)
    assert (list(made.at), made.total, made.fps) == (at, 12, 4.0)
    seen = [ImageStat.Stat(f).mean[0] for f in made.frames]
    assert [round(v / 20) for v in seen] == at
    assert {f.size for f in made.frames} == {(64, 48)}


def test_what_is_wrong_with_a_clip_is_said(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=r"gone\.mp4 does not exist; give the file of a video"):
        loading.clip(tmp_path / "gone.mp4", 4)
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"text\.mp4 holds no video that can be decoded"):
        loading.clip(tmp_path / "text.mp4", 4)
    whole = written(tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cut\.mp4 holds no"):
        loading.clip(tmp_path / "cut.mp4", 4)
    command.absent("av", monkeypatch)
    with pytest.raises(ImportError, match=r"pip install 'foveate\[video\]'"):
        loading.clip(tmp_path / "whole.mp4", 4)


def test_a_picture_is_no_clip(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert isinstance(loading.opened(tmp_path / "a.png", 4), Image.Image)
    assert isinstance(loading.opened(written(tmp_path / "a.MP4"), 4), loading.Clip)


@pytest.mark.usefixtures("loaded", "elsewhere")
def test_asking_about_a_clip_where_frames_are_images(tmp_path: Path) -> None:
    file = written(tmp_path / "a.mp4")
    said = command.works("ask", file, "what is this", "--frames", 3, "--json", "a.json")
    assert "3 of 12 frames, given as 3 images: it takes no video" in said
    rows = command.wrote("a.json")["rows"]
    assert rows[0]["vision_tokens"] == 3 * command.VISION
    assert rows[1]["vision_tokens_entrance"] == 3 * (command.VISION // 4)
    one = command.works("ask", file, "what is this", "--frames", 1, "--json", "b.json")
    assert "1 of 12 frames" in one
    assert command.wrote("b.json")["rows"][0]["vision_tokens"] == command.VISION


class Videos:
    """A processor for tiny OneVision that takes clips; what it was given is kept."""

    chat_template = "here"
    video_processor = "here"

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}

    def apply_chat_template(self, turns: Any, **_: Any) -> str:
        return " ".join(part["type"] for part in turns[0]["content"])

    def __call__(self, text: list[str], **given: Any) -> Any:
        from transformers import BatchFeature

        self.given = given
        marks = {"video": [tiny.VIDEO] * (len(given.get("videos", [[]])[0]) * 9 + 1)}
        marks["image"] = [tiny.IMAGE] * 114
        rows = [[3, *(i for word in t.split() for i in marks.get(word, [7])), 8] for t in text]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
        made: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        if clips := given.get("videos"):
            shades = [[ImageStat.Stat(f).mean[0] for f in clip] for clip in clips]
            made["pixel_values_videos"] = (
                torch.tensor(shades)[:, :, None, None, None].expand(-1, -1, 3, 48, 48) / 255
            )
        if images := [image for some in given.get("images", ()) for image in some]:
            made["pixel_values"] = noise(0, len(images), 3, 3, 48, 48)
            made["image_sizes"] = torch.tensor([[48, 96]] * len(images))
        return BatchFeature(made)

    def decode(self, ids: Any, **_: Any) -> str:
        return " ".join(map(str, ids.tolist()))

    def batch_decode(self, rows: Any, **more: Any) -> list[str]:
        return [self.decode(row, **more) for row in rows]


def test_a_clip_goes_in_as_a_video_where_the_processor_takes_one(models, tmp_path: Path) -> None:
    model, processor = models("llava-onevision"), Videos()
    clip = loading.clip(written(tmp_path / "a.mp4"), 4)
    given = prepare(model, processor, clip, "what")
    assert given["pixel_values_videos"].shape == (1, 4, 3, 48, 48)
    assert processor.given["do_sample_frames"] is False
    place = {"total_num_frames": 12, "fps": 4.0, "frames_indices": [1, 4, 7, 10]}
    assert processor.given["video_metadata"] == [place]
    recipes = {"aim": foveate.recipe("aim", keep=0.34, at="tokens")}
    rows = [row for row, _ in answers(model, processor, given, recipes, warm=False)]
    assert [row["vision_tokens_entrance"] for row in rows] == [4 * 9 + 1, 4 * 3 + 1]
    assert given_as(processor, clip) == "4 of 12 frames, given as a video"


def test_pictures_and_clips_in_one_batch(models, tmp_path: Path) -> None:
    """Where some prompts show a picture and some a clip, each keeps its own."""
    model, processor = models("llava-onevision"), Videos()
    clip = loading.clip(written(tmp_path / "a.mp4"), 4)
    picture = Image.new("RGB", (96, 48), (9, 9, 9))
    some = [Example(picture, "what", "7"), Example(clip.frames[0], "what", "7", clip=clip)]
    with foveate.reduced(model, BOTH):
        together = answer(model, processor, some, max_new_tokens=3).texts
        assert together == [
            answer(model, processor, [one], max_new_tokens=3).texts[0] for one in some
        ]
    assert len(set(together)) == 2


@pytest.mark.parametrize("name", sorted(ITEMS))
def test_real_video_processors_make_what_the_models_take(models, name: str, tmp_path) -> None:
    """Frames of a clip through transformers' own processors, where torchvision loads."""
    pytest.importorskip("torchvision", exc_type=Exception)
    from transformers import LlavaOnevisionVideoProcessor, Qwen2VLVideoProcessor

    clip = loading.clip(written(tmp_path / "a.mp4", size=(48, 48)), 4)
    made: Any = LlavaOnevisionVideoProcessor(size={"height": 48, "width": 48})
    if name == "qwen2.5-vl":
        pixels = {"shortest_edge": 48 * 48, "longest_edge": 4 * 48 * 48}
        made = Qwen2VLVideoProcessor(patch_size=4, size=pixels)
    given = vision(Videos(), [clip])
    out = made(**given, return_tensors="pt")
    like = batch(name, ["v"])
    for key in ("pixel_values_videos", "video_grid_thw"):
        if key in like:
            assert out[key].shape == like[key].shape
            like[key] = out[key]
    run = oracle.reduced_run(models(name), BOTH, like, 2)
    assert (run.logits - oracle.masked_logits(models(name), like, run)).abs().max() < TOLERANCE


# --- the tasks ---------------------------------------------------------------------------------

NOUNS = ("dog", "snow", "car", "guitar", "horse", "tent", "flag", "train")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 photos, each in a colour of its own and showing one of the nouns."""
    said = [[f"A {NOUNS[i % 8]} .", f"The {NOUNS[i % 8]} ."] for i in range(48)]
    return miniature.photo_folder(tmp_path_factory.mktemp("photos"), said)


def nouns(clip: loading.Clip) -> list[str]:
    """What each frame shows, by its colour."""
    found = []
    for frame in clip.frames:
        seen = ImageStat.Stat(frame).mean
        apart = [
            sum(abs(a - b) for a, b in zip(seen, miniature.colour(i), strict=True))
            for i in range(48)
        ]
        found.append(NOUNS[apart.index(min(apart)) % 8])
    return found


def asked(example: Example) -> list[str]:
    """The nouns of the question, in its order."""
    words = re.findall(r"\w+", example.question)
    return [w for w in words if w in NOUNS]


@pytest.mark.parametrize("kind", ["what", "order", "where"])
def test_answers_follow_from_the_clip(kind: str, photos: Path) -> None:
    """Every moment looked at, the answer is what is seen there; all answers as often."""
    made = task(f"video-{kind}:frames=36", data=photos, limit=24)
    answers, kinds = [], Counter()
    for i in range(24):
        example = made.example(i)
        shown, said = nouns(example.clip), asked(example)
        first = [shown.index(noun) if noun in shown else None for noun in said]
        if kind == "what":
            expected = "yes" if first[0] is not None else "no"
        elif kind == "order":
            assert first[0] != first[1] and None not in first
            expected = f"{'a ' if said[first[0] > first[1]] != 'snow' else ''}"
            expected += said[first[0] > first[1]]
            assert example.choices == tuple(("a " + n).replace("a snow", "snow") for n in said)
        else:
            thirds = {m // 12 for m, noun in enumerate(shown) if noun == said[0]}
            assert len(thirds) == 1
            expected = example.choices[thirds.pop()]
            assert example.choices == ("the beginning", "the middle", "the end")
        assert example.answer == expected
        assert made.score(example, expected) == 1.0
        answers.append(expected)
        kinds[example.meta["kind"]] += 1
    if kind == "where":
        assert all(a != b for a, b in zip(answers[::2], answers[1::2], strict=True))
        assert len(kinds) == 3
    else:
        assert sorted(kinds.values()) == [12, 12]


def test_a_clip_is_nine_shots_three_a_third(photos: Path) -> None:
    made = task("video-what:frames=36", data=photos)
    for i in range(0, 12, 2):
        frames = [f.resize((4, 4)).tobytes() for f in made.example(i).clip.frames]
        starts = [0] + [m for m in range(1, 36) if frames[m] != frames[m - 1]]
        assert len(starts) == 9 and {0, 12, 24} <= set(starts)
        lengths = [b - a for a, b in itertools.pairwise([*starts, 36])]
        assert min(lengths) >= 2 and max(lengths) <= 8


@pytest.mark.parametrize("name", [n for n in names() if n.startswith("video-")])
def test_more_frames_of_the_same_clips(name: str, photos: Path) -> None:
    """Questions, answers and moments do not depend on how many frames are taken, or which."""
    few, more, all_of_it, changed = (
        task(f"{name}:{options}", data=photos)
        for options in ("frames=3", "frames=9", "frames=36", "frames=9,pick=changed")
    )
    for i in range(2):
        whole = all_of_it.example(i)
        assert whole.clip.at == tuple(range(36))
        for made in (few, more, changed):
            example = made.example(i)
            assert (example.question, example.answer) == (whole.question, whole.answer)
            assert len(example.clip.frames) == made.frames == len(example.clip.at)
            for moment, frame in zip(example.clip.at, example.clip.frames, strict=True):
                assert frame.tobytes() == whole.clip.frames[moment].tobytes()
        again = task(f"{name}:frames=3", data=photos).example(i)
        assert again.clip.frames[1].tobytes() == few.example(i).clip.frames[1].tobytes()
    assert {len(f.tobytes()) for f in whole.clip.frames} == {336 * 336 * 3}


def test_changed_frames_are_the_first_of_each_shot(photos: Path) -> None:
    """With nine frames for nine shots, every shot is seen once."""
    made = task("video-what:frames=9,pick=changed", data=photos)
    for i in range(4):
        frames = [f.resize((4, 4)).tobytes() for f in made.example(i).clip.frames]
        assert len(set(frames)) == 9


def test_pans_are_slow_and_seen() -> None:
    """A gradient: the window moves one way, by little, from corner to corner."""
    ramp = Image.linear_gradient("L").resize((256, 256)).convert("RGB")
    shot = video.Shot(0, 4, 10)
    means = [ImageStat.Stat(video._panned(ramp, shot, m, 0.9)).mean[0] for m in range(4, 10)]
    steps = [b - a for a, b in itertools.pairwise(means)]
    assert all(2 < step < 12 for step in steps)


def test_shapes_are_what_easy_vqa_says_of_them() -> None:
    gallery = video.shape_gallery("validation")
    rows = easyvqa.EasyVQA().rows
    numbers = sorted({number for _, _, number in rows})
    for words in (video._COLOURS, video._SHAPES):
        start = 0 if words is video._COLOURS else len(video._COLOURS)
        for place, number in enumerate(numbers[:50]):
            said = {a for _, a, n in rows if n == number} & set(words)
            row = gallery.labels.table[place][start : start + len(words)]
            assert row == tuple(int(w in said) if said else -1 for w in words)
    assert gallery.asked[0] == ("Is", "a black shape") and gallery.asked[-1] == ("Is", "a triangle")
    assert gallery.image(3).tobytes() == easyvqa.EasyVQA().image(numbers[3]).tobytes()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("video-what:frames=0", "frames is 0; a clip has 1 to 36"),
        ("video-what:frames=37", "frames is 37"),
        ("video-what:frames=two", "frames is 'two'"),
        ("video-what:pick=odd", "pick is 'odd'; take one of even, changed"),
        ("video-what:fps=2", "no option 'fps'; it has frames and pick"),
        ("video-what:frames", "'frames' in 'video-what' is not key=value"),
        ("easyvqa:frames=2", "easyvqa has no options"),
        ("video-wha", "did you mean 'video-what'"),
    ],
)
def test_options_that_there_are_not(name: str, said: str, photos: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        task(name, data=photos)


def test_too_few_pictures_leave_nothing_to_ask(tmp_path: Path) -> None:
    folder = miniature.photo_folder(tmp_path, [["a dog .", "a dog ."], ["snow .", "snow ."]])
    assert len(task("video-order", data=folder)) == 0


# --- the table ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded", "elsewhere")
def test_a_table_of_recipes_and_frames(photos: Path) -> None:
    """What is compared with the untouched model on fewer frames, at FLOPs that are not above."""
    tasks = "video-what:frames=2,pick=changed,video-what:frames=1,video-what:frames=2"
    tasks += ",video-what:frames=4"
    more = ("--recipe", "fastv:keep=0.3", "--no-baselines", "--limit", 6, "--data", photos)
    out = command.works("eval", "--task", tasks, *more, "--json", "a.json")
    rows = command.wrote("a.json")["rows"]
    assert [r["task"] for r in rows[::2]] == [
        "video-what:frames=2,pick=changed",
        "video-what:frames=1",
        "video-what:frames=2",
        "video-what:frames=4",
    ]
    spent = {(r["task"].partition(":")[2], r["recipe"]): r["flops"] for r in rows}
    for row in rows:
        options = row["task"].partition(":")[2]
        than = row["fewer_frames"]
        if row["recipe"] == "dense" and "pick" not in options:
            assert than is None
            continue
        affordable = {o: f for (o, r), f in spent.items() if r == "dense" and "pick" not in o}
        enough = {o: f for o, f in affordable.items() if f >= row["flops"]}
        best = min(enough, key=lambda o: enough[o])
        assert than["task"] == f"video-what:{best}" and than["flops"] == enough[best]
    reduced = spent["frames=4", "fastv:keep=0.3"]
    assert spent["frames=2", "dense"] < reduced < spent["frames=4", "dense"]
    assert "fewer frames" in out and "pick=changed" in out
    assert out.count("video-what, 6 examples") == 1


def test_gains_are_paired_by_clip() -> None:
    """Two of four clips gained, none lost."""
    one = {"blank": False, "n": 4}
    rows = [
        one | {"task": "video-what:frames=2", "recipe": "dense", "flops": 100},
        one | {"task": "video-what:frames=3", "recipe": "dense", "flops": 150},
        one | {"task": "video-what:frames=8", "recipe": "dense", "flops": 400},
        one | {"task": "video-what:frames=8", "recipe": "aim", "flops": 101},
        one | {"task": "easyvqa", "recipe": "aim", "flops": 1},
    ]
    scores = {
        ("video-what:frames=2", "dense", False): [0.0] * 4,
        ("video-what:frames=3", "dense", False): [1.0, 0.0, 0.0, 1.0],
        ("video-what:frames=8", "dense", False): [1.0] * 4,
        ("video-what:frames=8", "aim", False): [1.0] * 4,
    }
    found = [fewer_frames(row, rows, scores) for row in rows]
    assert found[:3] == [None] * 3 and found[4] is None
    assert found[3]["task"] == "video-what:frames=3"
    assert found[3]["difference"] == 0.5 and found[3]["mcnemar_p"] == 0.5


@pytest.mark.usefixtures("loaded", "elsewhere")
def test_questions_about_clips_of_ones_own() -> None:
    """A line may name a video; how many of its frames are taken is an option of the file."""
    written(Path("a.mp4"))
    Image.new("RGB", (48, 48)).save("b.png")
    lines = [{"image": name, "question": "what is this", "answer": "so"} for name in FILES]
    Path("mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = task("mine.jsonl:frames=3")
    shown = {bool(e.clip): e for e in map(made.example, range(2))}
    assert shown[True].clip.at == (2, 6, 10) and shown[True].image is shown[True].clip.frames[0]
    assert shown[False].shown is shown[False].image
    plain = task("mine.jsonl")
    assert sorted(len(e.clip.at) if e.clip else 0 for e in map(plain.example, range(2))) == [0, 8]
    command.works("eval", "--task", "mine.jsonl:frames=2,mine.jsonl:frames=3", "--json", "a.json")
    rows = command.wrote("a.json")["rows"]
    tokens = {row["task"]: row["vision_tokens"] for row in rows}
    half = command.VISION / 2  # a clip and a picture
    assert tokens == {"mine:frames=2": 3 * half, "mine:frames=3": 4 * half}
    for wrong in ("mine.jsonl:fps=2", "mine.jsonl:frames=0", "mine.jsonl:frames=x"):
        with pytest.raises(ValueError, match=r"one option, as in mine\.jsonl:frames=4"):
            task(wrong)


def test_the_budgets_that_the_docs_name() -> None:
    """docs/video.md: AIM on 8 frames of pinhole costs less than 2 untouched ones, 16 than 3."""
    shape, text = TextShape(30, 576, 9, 3, 64, 1536, 49152), 32
    alive = foveate.recipe("aim", keep=0.25).resolve(30).schedule.alive

    def flops(frames: int, curve: Sequence[float]) -> int:
        return shape.prefill_flops([text + int(256 * frames * share) for share in curve])

    for many, few in ((8, 2), (16, 3)):
        assert flops(many, alive) < flops(few, [1.0] * 30)
        assert flops(2 * many, alive) > flops(few, [1.0] * 30)
