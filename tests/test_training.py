"""Training with a recipe attached: the loss, its gradients, and who gets them."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import tiny
import torch
from test_contract import FAMILIES, METHODS, OBSERVED, REFUSED, batch, recipe_of, works
from test_session import BOTH, attending
from torch import Tensor

import foveate

# Rows as they come: one image, several samples of different lengths, padding on either side.
SHAPES = {"single": [1], "padded": [2, 0, 1]}


def answers(inputs: dict[str, Any], asked: int = 4) -> Tensor:
    """Labels (B, L) of the last ``asked`` text rows, and of one text row after the images."""
    labels = torch.full_like(inputs["input_ids"], -100)
    for b, (ids, mask) in enumerate(
        zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
    ):
        real = mask.nonzero().flatten()
        vision = torch.isin(ids, torch.tensor([tiny.IMAGE, tiny.VIDEO])).nonzero().flatten()
        learnt = [*real[-asked:].tolist(), *(vision[-1:] + 1).tolist()]
        labels[b, learnt] = ids[learnt]
    return labels


def right_padded(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same batch with its padding at the end."""
    shift = (inputs["attention_mask"] == 0).sum(-1).tolist()
    rolled = {**inputs}
    for name in ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"):
        if name in inputs:
            rows = zip(inputs[name], shift, strict=True)
            rolled[name] = torch.stack([row.roll(-n) for row, n in rows])
    return rolled


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def layers(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of the text model's layers."""
    return {n: g for n, g in found.items() if re.search(r"(language|text)_model\.layers", n)}


def close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 2e-5) -> None:
    assert found.keys() == expected.keys() and found
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < tolerance * largest, name


BLENDS = ("sparsevlm",)  # inside the LLM


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_dropping_equals_masking_in_the_loss(models, method: str, family: str) -> None:
    """The oracle, for the loss and for the gradients of the text model's layers.

    Where a method blends inside the LLM the oracle takes its vectors as given, so gradients through
    them are left to the finite differences below.
    """
    works(method, family)
    model, inputs = models(family), batch(family, [2, 0, 1])
    labels, recipe = answers(inputs), recipe_of(method)
    run = oracle.forward_run(model, recipe, inputs)
    expected = oracle.masked_loss(model, inputs, labels, run)
    with foveate.reduced(model, recipe):
        loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert bool(run.blended) == (method in BLENDS)
    if not run.blended:
        close(layers(gradients(model, loss)), layers(gradients(model, expected)))


@pytest.mark.parametrize(
    ("side", "implementation"),
    [
        ("left", "sdpa"),
        pytest.param("right", "sdpa", marks=pytest.mark.wide),
        pytest.param("left", "eager", marks=pytest.mark.wide),
        ("right", "eager"),
    ],
)
@pytest.mark.parametrize("family", OBSERVED)
def test_either_padding_and_either_attention(family: str, side: str, implementation: str) -> None:
    model = attending(family, implementation).train()
    inputs = batch(family, [2, 0, 1])
    inputs = inputs if side == "left" else right_padded(inputs)
    labels = answers(inputs)
    run = oracle.forward_run(model, BOTH, inputs)
    expected = oracle.masked_loss(model, inputs, labels, run)
    with foveate.reduced(model, BOTH):
        loss = model(**inputs, labels=labels, num_items_in_batch=1).loss
    assert torch.allclose(loss, expected, rtol=1e-5)
    close(layers(gradients(model, loss)), layers(gradients(model, expected)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_keep_all_is_the_untouched_model(models, method: str, family: str) -> None:
    works(method, family)
    model, inputs = models(family), batch(family, [2, 0, 1])
    labels = inputs["input_ids"]
    dense = model(**inputs, labels=labels).loss
    with foveate.reduced(model, recipe_of(method, keep=1.0)):
        kept = model(**inputs, labels=labels).loss
    assert torch.equal(kept, dense)
    found, expected = gradients(model, kept), gradients(model, dense)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", OBSERVED)
def test_a_batch_is_the_weighted_mean_of_its_samples(models, family: str, side: str) -> None:
    """Every text row is learnt here, the first one of a sample excepted: nothing predicts it."""
    model, images = models(family), [2, 0, 1]
    inputs = batch(family, images)
    inputs = inputs if side == "left" else right_padded(inputs)
    with foveate.reduced(model, BOTH):
        together = model(**inputs, labels=text_labels(inputs)).loss
        losses, weights = [], []
        for b, n in enumerate(images):
            alone = batch(family, [n], seed=10 * b)
            losses.append(model(**alone, labels=text_labels(alone)).loss)
            weights.append(int((text_labels(alone)[:, 1:] != -100).sum()))
    mean = sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)
    assert torch.allclose(together, mean, rtol=1e-5)
    close(gradients(model, together), gradients(model, mean))


def text_labels(inputs: dict[str, Any]) -> Tensor:
    vision = torch.isin(inputs["input_ids"], torch.tensor([tiny.IMAGE, tiny.VIDEO]))
    return inputs["input_ids"].masked_fill(vision | (inputs["attention_mask"] == 0), -100)


@pytest.mark.parametrize("method", METHODS)
def test_the_last_vision_row_left_predicts_the_text_after_it(models, method: str) -> None:
    works(method, "llava")
    model, inputs = models("llava"), batch("llava", [1])
    after = int((inputs["input_ids"][0] == tiny.IMAGE).nonzero()[-1]) + 1
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, after] = inputs["input_ids"][0, after]
    with foveate.reduced(model, recipe_of(method)) as report:
        out = model(**inputs, labels=labels)
        left = report.slots[-1][0].tolist()
    row = left.index(after) - 1
    assert inputs["input_ids"][0, left[row]] == tiny.IMAGE
    expected = -out.logits[0, row].log_softmax(-1)[labels[0, after]]
    assert torch.allclose(out.loss, expected)


def test_text_alone_is_learnt_as_ever(models) -> None:
    model, inputs = models("llava"), batch("llava", [0, 0])
    dense = model(**inputs, labels=inputs["input_ids"]).loss
    with foveate.reduced(model, BOTH):
        assert torch.equal(model(**inputs, labels=inputs["input_ids"]).loss, dense)


@pytest.mark.parametrize("given", ["all labels", "the last ones"])
def test_a_few_logits_give_the_same_loss(models, given: str) -> None:
    model, inputs = models("llava"), batch("llava", [1, 1])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -4:] = inputs["input_ids"][:, -4:]
    with foveate.reduced(model, BOTH):
        whole = model(**inputs, labels=labels).loss
        few = labels if given == "all labels" else labels[:, -5:]
        part = model(**inputs, labels=few, logits_to_keep=5)
    assert part.logits.shape[1] == 5
    assert torch.allclose(part.loss, whole, rtol=1e-6)


def test_a_tuple_and_the_trainers_count_are_taken(models) -> None:
    model, inputs = models("llava"), batch("llava", [2, 1])
    labels = answers(inputs)
    with foveate.reduced(model, BOTH):
        mean = model(**inputs, labels=labels).loss
        total = model(**inputs, labels=labels, return_dict=False, num_items_in_batch=5)[0]
    assert torch.allclose(total * 5, mean * (labels != -100).sum(), rtol=1e-5)


def test_a_loss_of_ones_own_is_cut_and_given_back(models) -> None:
    model, inputs = tiny.llava(), batch("llava", [1])

    def mine(logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
        assert logits.shape[:2] == labels.shape
        return logits.sum()

    model.loss_function = mine
    with foveate.reduced(model, BOTH):
        assert model.loss_function is not mine
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.loss_function is mine


@pytest.mark.parametrize("side", ["left", "right"])
def test_labels_cut_by_the_report_are_those_of_the_loss(side: str) -> None:
    """What docs/tuning.md says for losses that are computed outside the model."""
    model, inputs = tiny.llava(), batch("llava", [2, 0, 1])
    inputs = inputs if side == "left" else right_padded(inputs)
    labels, seen = answers(inputs), []

    def see(logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
        seen.append(labels)
        return logits.sum()

    model.loss_function = see
    with foveate.reduced(model, BOTH) as report:
        model(**inputs, labels=labels)
        left = zip(labels, report.slots[-1], strict=True)
    cut = torch.nn.utils.rnn.pad_sequence(
        [row[slots] for row, slots in left],
        batch_first=True,
        padding_value=-100,
        padding_side="left",
    )
    assert torch.equal(seen[0], cut)


# Gradients


ON_LLAVA = [method for method in METHODS if (method, "llava") not in REFUSED]
PARTS = [(method, "multi_modal_projector.linear_1.weight") for method in ON_LLAVA]
# PruMerge's weights are attention: what computes it learns through the merge alone.
WATCHED = "encoder.layers.2.self_attn.k_proj.weight"
PARTS += [("prumerge", WATCHED), ("prumerge+", WATCHED)]


@pytest.mark.parametrize(("method", "part"), PARTS)
def test_gradients_are_finite_differences(
    method: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, through the choice, the merge, the projector and the LLM."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm_in_double)
    model, inputs = tiny.llava().double(), batch("llava", [2, 1])
    model.loss_function = loss_in_double
    inputs["pixel_values"] = inputs["pixel_values"].double()
    labels = answers(inputs)
    weight = next(p for name, p in model.named_parameters() if name.endswith(part))
    step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    step *= 1e-5 / step.norm()
    with foveate.reduced(model, recipe_of(method)):
        model(**inputs, labels=labels).loss.backward()
        with torch.no_grad():
            weight += step
            above = model(**inputs, labels=labels).loss
            weight -= 2 * step
            below = model(**inputs, labels=labels).loss
    assert torch.allclose((weight.grad * step).sum(), (above - below) / 2, rtol=1e-5, atol=1e-14)


def norm_in_double(self: Any, x: Tensor) -> Tensor:
    """The usual norm, which rounds to float32."""
    return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def loss_in_double(logits: Tensor, labels: Tensor, **more: Any) -> Tensor:
    """The usual loss, which rounds to float32."""
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("recipe", [BOTH, foveate.recipe("prumerge")], ids=["both", "adaptive"])
@pytest.mark.parametrize("family", ["llava", "qwen2.5-vl"])
def test_gradient_checkpointing(family: str, recipe: foveate.Recipe, reentrant: bool) -> None:
    model, inputs = tiny.FAMILIES[family].build().train(), batch(family, [2, 1])
    labels = answers(inputs)
    with foveate.reduced(model, recipe):
        plain = gradients(model, model(**inputs, labels=labels, use_cache=False).loss)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        again = gradients(model, model(**inputs, labels=labels, use_cache=False).loss)
    # Reentrant checkpoints compute without a graph first, and that is when attention is watched:
    # what PruMerge weighs with gets no gradient then. docs/tuning.md says so.
    learnt = layers if reentrant else dict
    close(learnt(again), learnt(plain), 1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
def test_checkpointing_that_runs_hooks_again_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    def old(self: Any, *args: Any, **kwargs: Any) -> Any:
        return torch.nn.Module.__call__(self, *args, **kwargs)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", old, raising=False)
    model, inputs = tiny.llava().train(), batch("llava", [1])
    model.gradient_checkpointing_enable()
    with foveate.reduced(model, foveate.recipe("pool")):
        model(**inputs)
    with foveate.reduced(model, BOTH), pytest.raises(ValueError, match=r"needs transformers 5\.23"):
        model(**inputs)


# What is refused


def test_shifted_labels(models) -> None:
    model, inputs = models("llava"), batch("llava", [1])
    with foveate.reduced(model, BOTH), pytest.raises(ValueError, match="Pass labels alone"):
        model(**inputs, labels=inputs["input_ids"], shift_labels=inputs["input_ids"])


def test_rows_by_number(models) -> None:
    model, inputs = models("llava"), batch("llava", [1])
    with foveate.reduced(model, BOTH), pytest.raises(ValueError, match="Give a number"):
        model(**inputs, logits_to_keep=torch.tensor([3]))


def test_too_many_labels(models) -> None:
    model, inputs = models("llava"), batch("llava", [1])
    labels = torch.nn.functional.pad(inputs["input_ids"], (0, 1))
    with foveate.reduced(model, BOTH), pytest.raises(ValueError, match="one label for each id"):
        model(**inputs, labels=labels)
