"""Questions about noise, and a small model that answers them: for what asks or searches."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import miniature
import numpy as np
import torch
from PIL import Image

from foveate.tasks import Example
from foveate.tasks.example import matches

WORDS = [chr(97 + i) + chr(97 + j) for i in range(8) for j in range(10)]
TEMPLATE = "{% for m in messages %}{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }} {% endfor %}{% endfor %}"  # noqa: E501


@dataclass
class Listed:
    """A task that is a list."""

    examples: list[Example]
    name: str = "listed"
    drawn: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.examples)

    def example(self, index: int) -> Example:
        self.drawn.append(index)
        return self.examples[index]

    def score(self, example: Example, answer: str) -> float:
        return matches(example.answer, answer)


def small_pair(folder: Path) -> tuple[Any, Any]:
    """A small LLaVA (16 vision tokens) and a processor that fits it."""
    from transformers import BitImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

    file = miniature.tokenizer_file(folder / "tokenizer.json", [" ".join(WORDS)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(file), unk_token="<unk>", pad_token="<unk>", eos_token="<|im_end|>"
    )
    size = {"height": 56, "width": 56}
    images = BitImageProcessorPil(size=size, do_center_crop=False, crop_size=size)
    processor = LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    image = tokenizer.convert_tokens_to_ids("<image>")
    model = miniature.llava(vocabulary=96, image_token=image)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model, processor


def noise(seed: int, width: int = 60) -> Image.Image:
    """Coarse noise, so that pictures really differ."""
    draw = np.random.default_rng(seed)
    return Image.fromarray(draw.integers(0, 255, (4, 4, 3), dtype=np.uint8)).resize((width, 44))


def asked(count: int = 7) -> Listed:
    """Questions of different lengths about different pictures."""
    some = [Example(noise(i), " ".join(WORDS[i : 2 * i + 2]), WORDS[i]) for i in range(count)]
    return Listed(some)


def chosen(count: int = 7) -> Listed:
    """Choices, every other time of different lengths."""
    made = []
    for i in range(count):
        spans = [(3 * i + k, 3 * i + k + 2 + (i % 2) * k) for k in range(3)]
        choices = tuple(" ".join(WORDS[start:stop]) for start, stop in spans)
        made.append(Example(noise(i), " ".join(WORDS[i : i + 2 + i % 3]), choices[1], choices))
    return Listed(made)
