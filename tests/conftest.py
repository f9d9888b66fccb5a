"""Session-scoped tiny models, and the method × family matrix that the contract tests produce."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

import foveate

MATRIX = Path(foveate.__file__).parent / "matrix.json"

TEMPLATE = (
    "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image> "
    "{% else %}{{ c['text'] }} {% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}"
    "so{% endif %}"
)


@pytest.fixture(scope="session")
def models():
    """Tiny models by family name, built once."""

    @functools.cache
    def build(name: str) -> Any:
        return tiny.FAMILIES[name].build()

    return build


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
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
    folder = tmp_path_factory.mktemp("checkpoint")
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-matrix", action="store_true", help="write foveate/matrix.json")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)  # tiny tensors; `make test` runs two processes
    if config.getoption("--write-matrix"):
        config.pluginmanager.register(Matrix(), "foveate-matrix")


class Matrix:
    """Collects the contract's outcomes: a cell works when every test of it passed."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], set[str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Any:
        report = yield
        called = getattr(item, "callspec", None)
        if "test_contract" in item.nodeid and called and "method" in called.params:
            cell = self.cells.setdefault((called.params["family"], called.params["method"]), set())
            if report.failed:
                cell.add(f"fails {item.name.split('[')[0]}")
            elif report.skipped and "works here" not in str(report.longrepr):
                cell.add(str(report.longrepr[2]).removeprefix("Skipped: "))
        return report

    def pytest_sessionfinish(self) -> None:
        from foveate.adapter import family

        rows = []
        for name, tiny_family in tiny.FAMILIES.items():
            model = tiny_family.build()
            found = {
                m: "; ".join(sorted(said)) or "works"
                for (f, m), said in self.cells.items()
                if f == name
            }
            rows.append(
                {
                    "family": family(model).family,
                    "model_type": model.config.model_type,
                    "encoder": model.config.vision_config.model_type,
                    "status": "tested" if found else "untested",
                    "methods": dict(sorted(found.items())),
                }
            )
        MATRIX.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
