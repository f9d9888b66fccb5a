"""Tuning with peft and a recipe attached, and the example that docs/tuning.md gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image
from test_contract import OBSERVED, batch, state_of
from test_session import BOTH
from test_training import answers, close, gradients

import foveate

peft = pytest.importorskip("peft")

# peft and the Trainer of today use names that transformers will drop in v6.
pytestmark = pytest.mark.filterwarnings("ignore:.* is deprecated and will be removed in v6")

DOC = Path(__file__).parents[1] / "docs" / "tuning.md"
LINEARS = r".*(language|text)_model.*\.(q|k|v|o|gate|up|down|gate_up)_proj"


def wrapped(model: Any, projector: str = "multi_modal_projector") -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, target_modules=LINEARS, modules_to_save=[projector], init_lora_weights=False
    )
    return peft.get_peft_model(model, config)


def attached_to(model: Any) -> list[Any]:
    """How many hooks and which attributes every module has."""
    return [([len(h) for h in hooks], names) for _, hooks, names, *_ in state_of(model)]


@pytest.mark.parametrize("family", OBSERVED)
def test_projector_and_deltas_learn_and_nothing_else(family: str) -> None:
    model, inputs = tiny.FAMILIES[family].build(), batch(family, [2, 0, 1])
    parts = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    projectors = {"multi_modal_projector", "merger", "connector", "visual_embeddings_table"}
    tuned = wrapped(model, *(projectors & parts))
    with foveate.reduced(tuned, BOTH):
        found = gradients(tuned, tuned.train()(**inputs, labels=answers(inputs)).loss)
    trained = {name for name, p in tuned.named_parameters() if p.requires_grad}
    assert found.keys() == trained
    assert all(g.isfinite().all() for g in found.values())
    for part in ("lora_A", "lora_B", "modules_to_save"):
        assert any(part in name and g.abs().max() > 0 for name, g in found.items())


@pytest.mark.parametrize("detached", ["inner", "wrapped"])
def test_attached_before_or_after_wrapping(detached: str) -> None:
    """The same loss and gradients, and nothing left behind."""
    inputs = batch("llava", [2, 0, 1])
    labels, results = answers(inputs), []
    for first in (True, False):
        model = tiny.llava()
        if first:
            foveate.attach(model, BOTH)
        tuned = wrapped(model)
        if not first:
            foveate.attach(tuned, BOTH)
        results.append(gradients(tuned, tuned(**inputs, labels=labels).loss))
        with pytest.raises(ValueError, match="already has a recipe"):
            foveate.attach(tuned, BOTH)
        foveate.detach(model if detached == "inner" else tuned)
        bare = wrapped(tiny.llava())
        assert torch.equal(tuned(**inputs).logits, bare(**inputs).logits)
        assert attached_to(tuned) == attached_to(bare)
    close(*results, tolerance=1e-6)


def test_a_projector_that_was_replaced_is_said() -> None:
    model, inputs = tiny.llava(), batch("llava", [1])
    tuned = wrapped(model)
    foveate.attach(tuned, BOTH)
    merged = tuned.merge_and_unload()
    with pytest.raises(ValueError, match=r"projector .* no longer the model's; call foveate\.deta"):
        merged(**inputs)
    foveate.detach(merged)
    with foveate.reduced(merged, BOTH):
        expected = merged(**inputs).logits
    foveate.attach(model := tiny.llava(), BOTH)  # before wrapping, the copy has the hook
    merged = wrapped(model).merge_and_unload()
    assert torch.equal(merged(**inputs).logits, expected)
    foveate.detach(merged)
    assert not any(any(hooks) for hooks, _ in attached_to(merged.model.multi_modal_projector))


def test_an_adapter_switched_off_is_the_model_as_it_was() -> None:
    model, inputs = tiny.llava(), batch("llava", [1])
    with foveate.reduced(model, BOTH):
        before = model(**inputs).logits
    tuned = wrapped(model)
    with foveate.reduced(tuned, BOTH), tuned.disable_adapter():
        assert torch.equal(tuned(**inputs).logits, before)


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_the_documented_example(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every python block of docs/tuning.md in order, on a tiny model."""
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = "\n".join(re.findall(r"^```python\n(.*?)^```$", DOC.read_text(), re.M | re.S))
    assert code.count("llava-hf/llava-1.5-7b-hf") == 1
    code = code.replace("llava-hf/llava-1.5-7b-hf", str(checkpoint))
    picture = Image.effect_noise((48, 48), 90).convert("RGB")
    space: dict[str, Any] = {"examples": [(picture, "what is", " this so")] * 8}
    exec(compile(code, str(DOC), "exec"), space)
    labels = space["collate"](space["examples"][:2])["labels"]
    assert (labels != -100).sum(-1).tolist() == [3, 3]
    assert [p.name for p in (tmp_path / "tuned").iterdir() if p.suffix == ".json"]
    learnt = space["collate"](space["examples"][:1])
    with torch.no_grad():
        loss = space["model"](**learnt).loss
        foveate.detach(space["model"])
        dense = space["model"](**learnt).loss
    assert loss.isfinite() and loss != dense
