"""Opening what a user names: a model, a picture. What is wrong with it is said in one message."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from foveate import shapes
from foveate.adapter import families
from foveate.reducer import unknown

if TYPE_CHECKING:
    from PIL import Image

PINHOLE = "pinhole"
LARGEST = 100_000_000  # pixels of a picture
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm")
_NAMES = "a Hub id (org/name), a local folder, pinhole, or shape:<name>"


@dataclass(frozen=True)
class Clip:
    """Some frames of a video.

    Attributes:
        frames: in order, of one size.
        at: where each stood among the ``total`` frames of the video.
        fps: frames of the video per second.
    """

    frames: tuple[Image.Image, ...]
    at: tuple[int, ...]
    total: int
    fps: float


def model(name: str, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """The model called ``name`` in eval mode, and its processor (None for ``shape:…``).

    Args:
        name: a Hub id, a local folder, ``pinhole`` or ``shape:<name>``.
        dtype: ``float32``, ``bfloat16``, ``float16`` or ``auto``: bfloat16 where the processor
            computes in it, else float32.
        device: ``cpu``, ``cuda``, ``cuda:1``, … or ``auto``: the accelerator if there is one.

    Raises:
        ValueError: for a name, dtype or device that cannot be had.
    """
    place = _device(device)
    kind = _dtype(dtype, place)
    if name.startswith(shapes.PREFIX):
        return shapes.build(name, dtype=kind, device=place), None
    if name == PINHOLE:
        from foveate import pinhole

        return pinhole.load(kind, place)
    return _pretrained(name, kind, place)


def picture(path: str | Path) -> Image.Image:
    """The picture in a file, upright, as RGB; what is transparent becomes white.

    Raises:
        ValueError: for a file that is missing, unreadable, damaged or above 100 megapixels.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise missing("pillow", "pinhole") from error
    file = Path(path)
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"{path} {what}; give the file of a picture (JPEG, PNG, WebP, …).")
    try:
        with warnings.catch_warnings(), file.open("rb") as opened:
            warnings.simplefilter("ignore")  # Pillow warns where we refuse
            image = Image.open(opened)
            _check_size(path, *image.size)
            return _rgb(ImageOps.exif_transpose(image))
    except Image.DecompressionBombError:
        raise ValueError(_too_large(path, "more than 178")) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"{path} is not a picture that Pillow can read; give a JPEG, PNG or WebP file."
        ) from None
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged or cut short ({error}); get the file again or give another."
        ) from None


def clip(path: str | Path, frames: int) -> Clip:
    """``frames`` frames of a video, spread evenly over it; all of them if it has fewer.

    Raises:
        ValueError: for a file that is missing or damaged, or without a video in it.
        ImportError: without PyAV.
    """
    try:
        import av
    except ImportError as error:
        raise missing("av", "video") from error
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; give the file of a video (MP4, WebM, MOV, …).")
    try:
        with av.open(str(path)) as file:  # what a file says of its frames is not always true
            total = sum(packet.size > 0 for packet in file.demux(video=0))
            rate = float(file.streams.video[0].average_rate or 1)
        at = evenly(total, min(frames, total))
        with av.open(str(path)) as file:
            file.streams.video[0].thread_type = "AUTO"
            decoded = itertools.islice(enumerate(file.decode(video=0)), at[-1] + 1 if at else 0)
            found = {i: _upright(frame) for i, frame in decoded if i in at}
    except (av.error.FFmpegError, IndexError) as error:
        raise ValueError(
            f"{path} holds no video that can be decoded ({error}); give an MP4, WebM or MOV file."
        ) from None
    if not found:
        raise ValueError(f"{path} holds no frame; get the file again or give another.")
    return Clip(tuple(found.values()), tuple(found), total, rate)


def _upright(frame: Any) -> Image.Image:
    """A decoded frame, turned as the file says that it is to be shown."""
    return cast("Image.Image", frame.to_image().rotate(frame.rotation, expand=True))


def opened(path: str | Path, frames: int) -> Image.Image | Clip:
    """A picture, or ``frames`` frames of a video, by the name of the file."""
    video = Path(path).suffix.lower() in VIDEOS
    return clip(path, frames) if video else picture(path)


def evenly(total: int, count: int) -> list[int]:
    """The middles of ``count`` equal parts of ``total`` places."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def missing(package: str, extra: str) -> ImportError:
    """The error for an absent extra, with the line to type."""
    return ImportError(f"This needs the package {package}: pip install 'foveate[{extra}]'")


def _check_size(path: str | Path, width: int, height: int) -> None:
    if width * height > LARGEST:
        raise ValueError(_too_large(path, f"{width} × {height} = {width * height / 1e6:.0f}"))


def _too_large(path: str | Path, megapixels: str) -> str:
    return (
        f"{path} has {megapixels} megapixels and at most {LARGEST // 1_000_000} are taken; models "
        "look at a few hundred thousand pixels, so make it smaller first."
    )


def _rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":  # more than 8 bits
        grey = (image.convert("I") if image.mode.startswith("I") else image).convert("F")
        high = float(cast(Any, grey.getextrema())[1])
        white = next((w for w in (1.0, 255.0, 65535.0) if high <= w), high)
        return grey.point(lambda v: v * (255 / white)).convert("L").convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image.convert("RGB")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"The device {name!r} cannot be used ({reason}); try --device cpu."
        ) from None
    return place


def _dtype(name: str, device: torch.device) -> torch.dtype:
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name == "auto":
        fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return torch.bfloat16 if fast else torch.float32
    if name not in known:
        raise ValueError(unknown("dtype", name, {**known, "auto": None}))
    return known[name]


def _pretrained(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    local = Path(name).is_dir()
    if not local and (name.count("/") != 1 or name.startswith((".", "/", "~"))):
        bundled = dict.fromkeys((PINHOLE, *(shapes.PREFIX + n for n in shapes.names())))
        raise ValueError(f"{unknown('model', name, bundled)}\n--model takes {_NAMES}.")
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        if kind not in families():  # before any weights are fetched
            raise ValueError(f"its type is {kind!r} and foveate knows {', '.join(families())}.")
        processor = AutoProcessor.from_pretrained(name)
        made = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The model {name!r} cannot be loaded: {first}\n--model takes {_NAMES}; it must be an "
            "image-text-to-text model with its processor."
        ) from None
    return cast(Any, made).to(device).eval(), processor
