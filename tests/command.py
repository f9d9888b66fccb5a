"""The command line under test: a checkpoint it can load, and how to run it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from typer.testing import CliRunner, Result

from foveate.cli.app import app

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}"
    "so{% endif %}"
)
VISION, LAYERS = 36, 6


def save_checkpoint(folder: Path) -> Path:
    """A tiny LLaVA with its processor, as ``save_pretrained`` leaves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", "what", "is", "this", "so", "<image>"]
    known = {word: i for i, word in enumerate(words)}
    known |= {f"w{i}": i for i in range(len(words), 100)}
    known["<image>"], known["w90"] = tiny.IMAGE, known["<image>"]
    made = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, additional_special_tokens=["<image>"], **special
    )
    pixels = CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    )
    LlavaProcessor(
        image_processor=pixels,
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    tiny.llava().save_pretrained(folder)
    return folder


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def works(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return result.output


def refuses(*words: object, status: int = 2) -> str:
    """What the command says against it, as one line; tables and spinners are not in it."""
    result = run(*words)
    assert result.exit_code == status, result.output
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert "Traceback" not in result.output
    assert not result.stdout
    said = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())
    assert 20 < len(said) < 1200, said
    return said


def wrote(file: str) -> Any:
    return json.loads(Path(file).read_text())


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("the model was run")


def absent(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``import module`` fail as if it were not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
