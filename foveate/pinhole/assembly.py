"""Putting pinhole together: published parts + trained weights -> a Hugging Face folder, once.

The folder lives in the user's cache (``FOVEATE_CACHE`` overrides). It is built beside its final
place, gets a manifest of checksums last and is renamed into place: it is whole or it is rebuilt.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.pinhole import convert, parts, weights

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

VERSION = 1
IMAGE_SIZE = 224
PATCH_SIZE = 14
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)
IMAGE_TOKEN = "<image>"
MANIFEST = "manifest.json"


def load(
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    *,
    untrained: bool = False,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Model (eval mode) and processor; assembles them on first use.

    ``dtype`` defaults to bfloat16 on an accelerator and float32 on CPU.
    """
    from transformers import LlavaForConditionalGeneration

    folder = path(untrained=untrained)
    place = torch.device(device or "cpu")
    dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    return model.to(place).eval(), read_processor(folder)  # type: ignore[arg-type]


def read_processor(folder: Path) -> LlavaProcessor:
    """The processor saved in ``folder``, giving the same pixels with and without torchvision.

    ``from_pretrained`` would take torchvision's resizing, which differs, wherever it is installed.
    """
    from transformers import BitImageProcessorPil, LlavaProcessor

    processor: LlavaProcessor = LlavaProcessor.from_pretrained(folder)
    processor.image_processor = BitImageProcessorPil.from_pretrained(folder)
    return processor


def path(*, untrained: bool = False) -> Path:
    """The folder with the assembled model, built if it is absent or damaged."""
    target = cache() / f"pinhole-{_version(untrained)}"
    if _whole(target):
        return target
    with _lock(target):
        if _whole(target):
            return target
        for left in target.parent.glob(f"{_scratch(target)}*"):
            shutil.rmtree(left, ignore_errors=True)
        if target.exists():
            _say(f"{target} is damaged; building it again")
            shutil.rmtree(target)
        _build(target, untrained)
    return target


def cache() -> Path:
    """The cache folder: ``FOVEATE_CACHE``, else the user's cache for ``foveate``."""
    named = os.environ.get("FOVEATE_CACHE")
    if not named:
        try:
            from platformdirs import user_cache_dir
        except ImportError as error:
            raise convert.missing("platformdirs") from error
        named = user_cache_dir("foveate")
    folder = Path(named).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The cache {folder} cannot be made ({error.strerror}); name a folder in FOVEATE_CACHE."
        ) from None
    return folder


def base(workdir: Path) -> tuple[weights.State, LlavaConfig, LlavaProcessor]:
    """Untrained state dict (float32), config and processor, straight from the parts.

    ``FOVEATE_PARTS/vision.safetensors``, when there, is taken as the converted vision part.
    """
    _require("gguf", *(() if _given_vision() else ("onnx",)))
    gguf = parts.locate(parts.LANGUAGE, workdir)
    tokenizer = _tokenizer(gguf)
    vision = _vision(workdir)
    language = convert.language_state(gguf)
    rows = -(-len(tokenizer) // 64) * 64
    language["embed_tokens.weight"] = _grow(language["embed_tokens.weight"], rows)
    text = convert.language_config(gguf) | {"vocab_size": rows}
    sizes = convert.vision_config(vision)
    config = _config(text, sizes, len(tokenizer) - 1)
    state = {f"model.vision_tower.{k}": v for k, v in vision.items()}
    state |= {f"model.language_model.{k}": v for k, v in language.items()}
    state |= _projector(sizes["hidden_size"], language["embed_tokens.weight"].shape[1])
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    return state, config, _processor(tokenizer)


def skeleton(
    config: LlavaConfig, state: Mapping[str, torch.Tensor]
) -> LlavaForConditionalGeneration:
    """The model with ``state`` as its weights (dtype of ``state``, nothing initialised twice)."""
    from transformers import LlavaForConditionalGeneration

    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.to_empty(device="cpu")
    known = model.state_dict()
    named = {name if name in known else convert.older_name(name): t for name, t in state.items()}
    model.load_state_dict(named, assign=True)
    model.tie_weights()
    fresh = type(model.model.language_model.rotary_emb)(config.text_config)
    model.model.language_model.rotary_emb = fresh
    model.eval()
    return model


def _build(target: Path, untrained: bool) -> None:
    from safetensors.torch import load_file

    if not untrained and not weights.file().is_file():
        raise FileNotFoundError(
            f"{weights.file()} is missing: this installation carries no trained pinhole weights.\n"
            "Install a released foveate (pip install 'foveate[pinhole]'), or train them: "
            "python -m foveate.pinhole.train"
        )
    _say(f"assembling pinhole in {target} (once, about a minute)")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=_scratch(target)) as scratch:
        work = Path(scratch)
        state, config, processor = base(work)
        if not untrained:
            state = weights.merge(state, load_file(weights.file()))
            state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
        state = {name: tensor.to(torch.bfloat16) for name, tensor in state.items()}
        config.dtype = torch.bfloat16
        built = work / "pinhole"
        skeleton(config, state).save_pretrained(built)
        processor.save_pretrained(built)
        _write_manifest(built)
        built.rename(target)


def _scratch(target: Path) -> str:
    """How folders begin in which ``target`` is built; the lock's holder may remove them."""
    return f".building-{target.name}-"


def _version(untrained: bool) -> str:
    """Names everything the folder is made of; ten hex digits."""
    known = [str(VERSION), str(IMAGE_SIZE), parts.LANGUAGE.sha256, parts.VISION.sha256]
    if (given := _given_vision()) is not None:
        known.append(parts.sha256(given))
    if untrained or not weights.file().is_file():
        known.append("untrained" if untrained else "missing")
    else:
        known.append(parts.sha256(weights.file()))
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:10]


def _write_manifest(folder: Path) -> None:
    sums = {p.name: parts.sha256(p) for p in sorted(folder.iterdir()) if p.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"files": sums}, indent=1))


def _whole(folder: Path) -> bool:
    """Whether every file the manifest names is there, byte for byte."""
    try:
        sums: dict[str, str] = json.loads((folder / MANIFEST).read_text())["files"]
        return bool(sums) and all(parts.sha256(folder / n) == s for n, s in sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _lock(target: Path) -> Any:
    try:
        from filelock import FileLock
    except ImportError as error:
        raise convert.missing("filelock") from error
    return FileLock(target.with_name(f".{target.name}.lock"))


def _vision(workdir: Path) -> weights.State:
    if (given := _given_vision()) is not None:
        from safetensors.torch import load_file

        _say(f"vision part taken as converted from {given}")
        return {name: tensor.float() for name, tensor in load_file(given).items()}
    return convert.vision_state(parts.locate(parts.VISION, workdir))


def _given_vision() -> Path | None:
    """The converted vision part, where someone put one."""
    given = Path(os.environ.get("FOVEATE_PARTS") or os.devnull) / "vision.safetensors"
    return given if given.is_file() else None


def _require(*packages: str) -> None:
    """Complain about what is not installed before anything large is fetched."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise convert.missing(package)


def _tokenizer(gguf: Path) -> Any:
    """SmolLM2's tokenizer with ``<image>`` as its last token and a padding token of its own."""
    from transformers import AddedToken, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)])
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.padding_side = "left"
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = None
    return tokenizer


def _processor(tokenizer: Any) -> LlavaProcessor:
    from transformers import BitImageProcessorPil, LlavaProcessor

    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = BitImageProcessorPil(
        do_resize=True,
        size=size,
        do_center_crop=False,
        crop_size=size,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
        do_convert_rgb=True,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=Path(__file__).with_name("chat_template.jinja").read_text().strip(),
    )


def _config(language: dict[str, Any], vision: dict[str, Any], image_token: int) -> LlavaConfig:
    from transformers import Dinov2Config, LlamaConfig, LlavaConfig

    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlavaConfig(
        vision_config=Dinov2Config(**vision),
        text_config=LlamaConfig(**language),
        image_token_index=image_token,
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        **special,
    )


def _projector(vision: int, language: int) -> weights.State:
    """A fresh two-layer projector, the same every time."""
    seed = torch.Generator().manual_seed(0)
    name = "model.multi_modal_projector.linear_"

    def linear(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=seed).mul(columns**-0.5)

    return {
        f"{name}1.weight": linear(language, vision),
        f"{name}1.bias": torch.zeros(language),
        f"{name}2.weight": linear(language, language) * 0.4,
        f"{name}2.bias": torch.zeros(language),
    }


def _grow(embedding: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows for new tokens, at the mean of the known ones: (V, D) -> (rows, D)."""
    extra = embedding.mean(0, keepdim=True).expand(rows - embedding.shape[0], -1)
    return torch.cat([embedding, extra])


def _say(line: str) -> None:
    print(f"foveate: {line}", file=sys.stderr)
