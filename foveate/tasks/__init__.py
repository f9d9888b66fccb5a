"""Tasks: deterministic lists of questions about images, with the rule that scores an answer."""

from __future__ import annotations

import difflib
from pathlib import Path

from foveate.recipe import settings
from foveate.tasks.example import Example, Task

__all__ = ["FINE", "Example", "Task", "names", "task"]

SPLITS = ("train", "validation", "test")
FINE = ("scenes-words", "scenes-count")  # what they ask for is small in the image, and goes first


def names() -> tuple[str, ...]:
    """Every task that ``task`` knows."""
    photos = ("flickr8k-yesno", "flickr8k-yesno-popular", "flickr8k-yesno-adversarial")
    scenes = ("scenes-where", "scenes-count", "scenes-words")
    video = [f"video-{kind}{of}" for kind in ("what", "order", "where") for of in ("", "-shapes")]
    return (*photos, "flickr8k-choice", "flickr8k-caption", "easyvqa", *scenes, *video)


def task(
    name: str,
    *,
    data: str | Path | None = None,
    split: str = "validation",
    seed: int = 0,
    limit: int | None = None,
) -> Task:
    """The task of that name, or the one in a JSONL file (:mod:`foveate.tasks.own`).

    ``data`` is a folder of photos, for the tasks that need one.
    Photos have the splits that the folder holds. Of easyvqa, ``validation`` and ``test`` are the
    package's test split; drawn scenes differ in every split. A file of one's own has no splits.
    Video tasks have options: ``video-what:frames=4,pick=changed`` (:mod:`foveate.tasks.video`).
    """
    if (own := file_of(name)) is not None:
        from foveate.tasks.own import Own

        given = settings(name.removeprefix(f"{own}").removeprefix(":"), name)
        frames = given.pop("frames", None)
        if given or not (frames is None or (isinstance(frames, int) and frames > 0)):
            raise ValueError(f"{name}: a file has one option, as in {own}:frames=4.")
        return Own(_there(own), seed, limit, frames)
    name, _, more = name.partition(":")
    given = settings(more, name)
    if given and not name.startswith("video-"):
        raise ValueError(f"{name} has no options; ask for it without {more!r}.")
    if name not in names():
        near = difflib.get_close_matches(name, names(), 1, 0.0)[0]
        raise ValueError(f"no task {name!r}; did you mean {near!r}? Tasks: {', '.join(names())}")
    if not name.startswith(("flickr8k", "video-")) and split not in SPLITS:
        raise ValueError(f"{name} has no split {split!r}; it has {', '.join(SPLITS)}.")
    if name == "easyvqa":
        from foveate.tasks.easyvqa import EasyVQA

        return EasyVQA(split=split, seed=seed, limit=limit)
    if name.startswith("scenes-"):
        from foveate.tasks.scenes import Scenes

        return Scenes(name.removeprefix("scenes-"), split, seed, limit)
    if name.startswith("video-"):
        from foveate.tasks.video import task as video

        return video(name, given, data=data, split=split, seed=seed, limit=limit)
    from foveate.tasks.flickr8k import Caption, Choice, YesNo
    from foveate.tasks.photos import photos

    if name == "flickr8k-choice":
        return Choice(photos(data, split), seed, limit)
    if name == "flickr8k-caption":
        return Caption(photos(data, split), seed, limit)
    negatives = name.removeprefix("flickr8k-yesno").removeprefix("-") or "random"
    return YesNo(photos(data, split), negatives, seed, limit)


def file_of(name: str) -> Path | None:
    """The JSONL file that a task's name names, its options left out; None for other tasks."""
    base, colon, more = name.rpartition(":")
    file = base if colon and "=" in more else name
    return Path(file) if file.endswith(".jsonl") else None


def _there(file: Path) -> Path:
    if not file.is_file():
        raise ValueError(f"There is no task file {file}; see foveate.tasks.own for its form.")
    return file
