"""Methods of the peers against naive loops of their descriptions in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import oracle
import pytest
import tiny
import torch
from test_reducers import DOUBLE, check, encoder, layer, random
from torch import Tensor

import foveate
from foveate.adapter import family
from foveate.ops.diversity import cosines, dpp, max_min
from foveate.reducer import Reduction, Tokens, discover, reducer

FEATURES = ("cdpruner", "fastervlm", "visionzip", "vispruner")


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def attended(tokens: Tokens, b: int) -> list[float]:
    """Mean over heads of [CLS]'s softmax row, or of all tokens' rows where there is none."""
    assert tokens.q is not None and tokens.k is not None and tokens.at is not None
    at = tokens.at[b].tolist()
    queries = at if tokens.cls is None else [tokens.cls]
    total = torch.zeros(tokens.k.shape[2], dtype=DOUBLE)
    for head in range(tokens.q.shape[1]):
        for i in queries:
            logits = tokens.k[b, head] @ tokens.q[b, head, i] * tokens.scale
            total += logits.softmax(0) / len(queries) / tokens.q.shape[1]
    return [float(total[j]) for j in at]


def ranked(score: list[float]) -> list[int]:
    return sorted(range(len(score)), key=lambda j: -score[j])


def kept(done: Reduction, b: int) -> list[int]:
    return cast(list[int], done.keep[b, : int(done.count[b])].tolist())


def vectors(*groups: Tensor, widest: int | None = None) -> Tokens:
    """Groups (n, D) of different sizes, padded at the end with vectors that must not count."""
    width = widest or max(len(x) for x in groups)
    x = torch.full((len(groups), width, groups[0].shape[1]), 7.0, dtype=groups[0].dtype)
    for b, group in enumerate(groups):
        x[b, : len(group)] = group
    sizes = torch.tensor([len(group) for group in groups])
    return Tokens(x=x, valid=torch.arange(width) < sizes[:, None])


@pytest.mark.parametrize("cls", [True, False])
def test_fastervlm(cls: bool) -> None:
    tokens = encoder(2, (5, 6), cls=cls)
    done = reducer("fastervlm").reduce(tokens, [9, 4])
    for b, n in enumerate((9, 4)):
        assert kept(done, b) == sorted(ranked(attended(tokens, b))[:n])


# --- VisionZip ------------------------------------------------------------------------------------


def naive_zip(
    tokens: Tokens, b: int, wanted: int, merged: int, weights: str
) -> tuple[list[int], list[Tensor], list[int]]:
    """Slots and vectors of the survivors in the released order, and who went into whom."""
    assert tokens.k is not None and tokens.at is not None
    x, keys = tokens.x[b], tokens.k[b].mean(dim=0)[tokens.at[b]]
    dominant = sorted(ranked(attended(tokens, b))[: wanted - merged])
    rest = [j for j in range(len(x)) if j not in dominant]
    targets = rest[:: len(rest) // merged][:merged] if merged else []
    into: dict[int, list[int]] = {t: [] for t in targets}
    for j in rest:
        if targets and j not in targets:
            into[max(targets, key=lambda t, j=j: cosine(keys[j], keys[t]))].append(j)
    rows = [x[j] for j in dominant]
    for t, joined in into.items():
        if weights == "mean":
            rows.append(torch.stack([x[j] for j in (t, *joined)]).mean(dim=0))
        else:
            rows.append(x[t] + (torch.stack([x[j] for j in joined]).mean(dim=0) if joined else 0))
    slots = dominant + targets
    owner = {j: slots.index(t) for t, joined in into.items() for j in joined}
    return slots, rows, [slots.index(j) if j in slots else owner.get(j, -1) for j in range(len(x))]


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize("weights", ["released", "mean"])
@pytest.mark.parametrize(
    ("wanted", "share", "merged"), [(32, 10 / 64, 5), (13, 0.5, 6), (3, 0.99, 2), (9, 1.0, 8)]
)
def test_visionzip(cls: bool, weights: str, wanted: int, share: float, merged: int) -> None:
    tokens = encoder(3, (6, 9), cls=cls)
    method = reducer("visionzip", weights=weights, contextual=share)
    done = method.reduce(tokens, [wanted] * 3)
    raster = reducer("visionzip", weights=weights, contextual=share, order="raster")
    again = raster.reduce(tokens, [wanted] * 3)
    check(done, tokens, [wanted] * 3)
    check(again, tokens, [wanted] * 3)
    assert done.x is not None and done.group is not None
    assert again.x is not None and again.group is not None
    for b in range(3):
        slots, rows, owner = naive_zip(tokens, b, wanted, merged, weights)
        assert kept(done, b) == slots
        assert done.group[b].tolist() == owner
        torch.testing.assert_close(done.x[b], torch.stack(rows))
        order = sorted(range(wanted), key=lambda r: slots[r])
        assert kept(again, b) == sorted(slots)
        assert torch.equal(again.x[b], done.x[b, order])
        assert [order[g] for g in again.group[b].tolist()] == owner


def test_visionzip_without_contextual_tokens_prunes() -> None:
    tokens = encoder(2, (5, 6))
    for method, n in ((reducer("visionzip", contextual=0), 9), (reducer("visionzip"), 1)):
        done = method.reduce(tokens, [n, n])
        assert done.x is None
        for b in range(2):
            assert kept(done, b) == sorted(ranked(attended(tokens, b))[:n])


@pytest.mark.parametrize(("wanted", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_visionzip_splits_as_in_the_paper(wanted: int, contextual: int) -> None:
    tokens = encoder(1, (24, 24), torch.float32)
    done = reducer("visionzip").reduce(tokens, [wanted])
    assert done.x is not None
    same = (done.x[0] == tokens.x[0, done.keep[0]]).all(dim=-1)
    assert int((~same).sum()) == contextual


def test_visionzip_keeps_the_gradient() -> None:
    tokens = encoder(1, (4, 7))
    tokens.x.requires_grad_()
    done = reducer("visionzip").reduce(tokens, [14])
    assert done.x is not None and done.group is not None
    done.x.sum().backward()
    assert tokens.x.grad is not None
    assert bool((tokens.x.grad != 0).all())  # every token is in a survivor


# --- DivPrune -------------------------------------------------------------------------------------


def naive_max_min(x: Tensor, steps: int) -> list[int]:
    def far(i: int, j: int) -> float:
        return 1 - cosine(x[i], x[j])

    every = range(len(x))
    picks = [max(every, key=lambda i: min(far(i, j) for j in every if j != i))]
    while len(picks) < steps:
        left = [i for i in every if i not in picks]
        picks.append(max(left, key=lambda i: min(far(i, j) for j in picks)))
    return picks


def test_divprune_in_ragged_groups() -> None:
    groups = [random(n, 5, seed=n) for n in (40, 17, 29, 3)]
    tokens, budget = vectors(*groups, widest=41), [9, 17, 2, 1]
    order = max_min(cosines(tokens.x), tokens.valid, 17)
    done = reducer("divprune").reduce(tokens, budget)
    check(done, tokens, budget)
    for b, (x, n) in enumerate(zip(groups, budget, strict=True)):
        naive = naive_max_min(x, n)
        assert order[b, :n].tolist() == naive
        assert kept(done, b) == sorted(naive)


def test_divprune_picks_no_token_twice() -> None:
    """Equal and zero vectors: what is the same as a picked one comes last."""
    x = random(4, 6, dtype=torch.float32).repeat(5, 1)
    x = torch.cat((x, torch.zeros(3, 6)))[None]
    tokens = Tokens(x=x, valid=torch.ones(1, 23, dtype=torch.bool))
    for n in range(1, 24):
        check(reducer("divprune").reduce(tokens, [n]), tokens, [n])
    first = kept(reducer("divprune").reduce(tokens, [4]), 0)
    assert {j % 4 for j in first} == set(range(4)) and max(first) < 20
    assert kept(reducer("divprune").reduce(replace(tokens, x=x * 0), [3]), 0) == [0, 1, 2]


# --- CDPruner -------------------------------------------------------------------------------------


def naive_dpp(x: Tensor, relevance: list[float], steps: int) -> list[int]:
    """The greedy subset by its definition: the largest determinant of the picked kernel."""
    r = torch.tensor(relevance, dtype=DOUBLE)
    kernel = torch.tensor([[cosine(a, b) for b in x] for a in x], dtype=DOUBLE) * r * r[:, None]
    kernel.diagonal().copy_(r.square())  # equals tie, and rounding must not decide
    picks: list[int] = []
    while len(picks) < steps:
        left = [j for j in range(len(x)) if j not in picks]
        picks.append(
            max(left, key=lambda j: float(kernel[[*picks, j]][:, [*picks, j]].slogdet()[1]))
        )
    return picks


def stretch(score: list[float]) -> list[float]:
    low, high = min(score), max(score)
    return [(s - low) / (high - low) + 1e-6 for s in score]


@pytest.mark.parametrize("cls", [True, False])
def test_cdpruner_at_the_entrance(cls: bool) -> None:
    tokens = encoder(2, (4, 7), cls=cls)
    tokens = replace(tokens, x=random(2, 28, 20, seed=5))
    done = reducer("cdpruner").reduce(tokens, [8, 8])
    free = reducer("cdpruner", relevance="none").reduce(tokens, [8, 8])
    for b in range(2):
        relevance = stretch(attended(tokens, b))
        assert kept(done, b) == sorted(naive_dpp(tokens.x[b], relevance, 8))
        assert kept(free, b) == sorted(naive_dpp(tokens.x[b], [1.0] * 28, 8))
        assert kept(done, b) != kept(free, b)


def test_cdpruner_inside_the_llm_asks_the_instruction() -> None:
    sizes, budget = [24, 11, 18], [7, 5, 1]
    tokens = layer(sizes, DOUBLE)
    tokens = replace(tokens, x=random(3, 24, 12, seed=9))
    done = reducer("cdpruner").reduce(tokens, budget)
    check(done, tokens, budget)
    assert tokens.q is not None and tokens.k is not None and tokens.at is not None
    length = tokens.q.shape[2]
    for b, (size, n) in enumerate(zip(sizes, budget, strict=True)):
        score = torch.zeros(length, dtype=DOUBLE)
        for row in range(length - 3, length):
            for head in range(4):
                logits = tokens.k[b, head // 2] @ tokens.q[b, head, row] * tokens.scale
                hidden = torch.arange(length) > row
                hidden[: length - size - 5] = True  # padding
                score += logits.masked_fill(hidden, -torch.inf).softmax(0) / 12
        relevance = stretch(score[tokens.at[b, :size]].tolist())
        assert kept(done, b) == sorted(naive_dpp(tokens.x[b, :size], relevance, n))


def test_a_dpp_below_its_rank_is_filled_by_relevance() -> None:
    """Vectors of width 3, so three picks span all; then the most relevant ones, each once."""
    groups = [random(n, 3, seed=n) for n in (20, 9)]
    tokens = vectors(*groups, widest=21)
    relevance = random(2, 21, seed=4).abs() + 0.1
    for dtype in (torch.float32, DOUBLE):
        order = dpp(cosines(tokens.x.to(dtype)), relevance.to(dtype), tokens.valid, 20)
        for b, x in enumerate(groups):
            score = relevance[b, : len(x)].tolist()
            picks = naive_dpp(x, score, 3)
            rest = [j for j in ranked(score) if j not in picks]
            assert order[b, : len(x)].tolist() == picks + rest


def test_a_dpp_of_equal_and_zero_vectors() -> None:
    x = torch.cat((random(2, 6, dtype=torch.float32).repeat(3, 1), torch.zeros(2, 6)))[None]
    tokens = replace(encoder(1, (2, 4), torch.float32), x=x)
    for n in range(1, 9):
        check(reducer("cdpruner").reduce(tokens, [n]), tokens, [n])
    order = dpp(cosines(x), torch.ones(1, 8), tokens.valid, 8)[0].tolist()
    assert {j % 2 for j in order[:2]} == {0, 1} and max(order[:2]) < 6
    assert sorted(order) == list(range(8))


def test_relevance_that_is_all_the_same() -> None:
    tokens = encoder(1, (4, 7))
    assert tokens.q is not None
    flat = replace(tokens, q=tokens.q * 0)
    done = reducer("cdpruner").reduce(flat, [5])
    assert torch.equal(done.keep, reducer("cdpruner", relevance="none").reduce(flat, [5]).keep)


# --- VisPruner ------------------------------------------------------------------------------------


def naive_vispruner(tokens: Tokens, b: int, wanted: int, share: float, step: int) -> list[int]:
    x, order = tokens.x[b], ranked(attended(tokens, b))
    first = max(1, int(wanted * share))
    rest = sorted(order[first:])
    while wanted > first and len(rest) > wanted - first:
        even, odd = rest[0::2], rest[1::2]
        alike = {i: max(cosine(x[i], x[j]) for j in odd) for i in even}
        gone = sorted(even, key=lambda i: -alike[i])
        gone = gone[: min(step, len(rest) - (wanted - first), len(rest) // 2)]
        rest = [j for j in rest if j not in gone]
    return sorted(order[:first] + (rest if wanted > first else []))


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(
    ("wanted", "share", "step"),
    [(20, 0.5, 8), (21, 0.5, 3), (1, 0.5, 8), (9, 1.0, 8), (2, 0.0, 50)],
)
def test_vispruner(cls: bool, wanted: int, share: float, step: int) -> None:
    tokens = encoder(2, (7, 9), cls=cls)
    done = reducer("vispruner", important=share, step=step).reduce(tokens, [wanted] * 2)
    check(done, tokens, [wanted] * 2)
    for b in range(2):
        assert kept(done, b) == naive_vispruner(tokens, b, wanted, share, step)


# --- DART -----------------------------------------------------------------------------------------


def naive_dart(
    tokens: Tokens, b: int, size: int, wanted: int, images: int, texts: int
) -> list[int]:
    assert tokens.k is not None and tokens.at is not None and tokens.hidden is not None
    assert tokens.instruction is not None
    at, hidden = tokens.at[b, :size].tolist(), tokens.hidden[b]
    norm = [float(key.abs().sum()) for key in tokens.k[b].transpose(0, 1)]
    vision = sorted(range(size), key=lambda j: -norm[at[j]])[: min(images, wanted)]
    text = range(len(hidden) - tokens.instruction[b], len(hidden))
    pivots = [hidden[at[j]] for j in vision]
    pivots += [hidden[row] for row in sorted(text, key=lambda row: -norm[row])[:texts]]
    chosen, total = list(vision), wanted - len(vision)
    for p, pivot in enumerate(pivots):
        pool = [j for j in range(size) if j not in chosen]
        share = total // len(pivots) + (p < total % len(pivots))
        chosen += sorted(pool, key=lambda j: cosine(hidden[at[j]], pivot))[:share]
    return sorted(chosen)


@pytest.mark.parametrize(("images", "texts"), [(4, 4), (1, 0), (3, 2), (50, 50)])
def test_dart(images: int, texts: int) -> None:
    sizes, budget = [40, 17, 29, 23, 5], [19, 17, 3, 0, 1]
    tokens = replace(layer(sizes, DOUBLE), instruction=(3, 2, 1, 3, 0))
    method = reducer("dart", image_pivots=images, text_pivots=texts)
    done = method.reduce(tokens, budget)
    check(done, tokens, budget)
    for b, (size, n) in enumerate(zip(sizes, budget, strict=True)):
        assert kept(done, b) == naive_dart(tokens, b, size, n, images, texts)


def test_dart_without_hidden_states() -> None:
    with pytest.raises(ValueError, match="pass Tokens with hidden"):
        reducer("dart").reduce(replace(layer([9]), hidden=None), [3])


# --- inside the LLM -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava", "llava-onevision", "qwen2.5-vl"])
@pytest.mark.parametrize("method", ["cdpruner", "divprune"])
def test_methods_of_both_places_inside_the_llm(models: Any, name: str, method: str) -> None:
    """``before=`` puts them there; dropping equals masking, in a padded batch."""
    recipe = foveate.recipe(method, keep=0.3, before=2)
    assert recipe.entrance is None and recipe.schedule.resolve(tiny.LAYERS).cuts() == (2,)
    model, inputs = models(name), tiny.prompt(tiny.FAMILIES[name], [2, 0, 1])
    run = oracle.reduced_run(model, recipe, inputs, 2)
    assert (run.logits - oracle.masked_logits(model, inputs, run)).abs().max() < 2e-6
    vision = (inputs["input_ids"] == tiny.IMAGE).sum(-1).tolist()
    gone = [len(a) - len(b) for a, b in zip(run.slots[0], run.slots[-1], strict=True)]
    assert gone == [n - int(0.3 * n + 1e-6) for n in vision] and vision[1] == 0


def test_before_is_no_knob_of_an_entrance_method() -> None:
    with pytest.raises(ValueError, match="no knob of visionzip 'before'"):
        foveate.recipe("visionzip", keep=0.5, before=2)


# --- what they read of the encoder ----------------------------------------------------------------


def test_who_reads_the_layer_of_the_features() -> None:
    assert {name for name, cls in discover().items() if cls.encoder == "features"} >= set(FEATURES)


@pytest.mark.parametrize("name", ["llava", "llava-dinov2", "internvl", "qwen2.5-vl", "video-llava"])
def test_the_layer_of_the_features(models: Any, name: str) -> None:
    """LLaVA and Video-LLaVA, of two encoders, take the last layer but one; others the last."""
    model = models(name)
    last = list(family(model).vision_attentions(model))
    found, each = last, [m for m in model.modules() if type(m) is type(last[0])]
    if "llava" in name:
        found = [each[each.index(module) - 1] for module in last]
    for method, wanted in (("fastervlm", found), ("prumerge", last)):
        with foveate.reduced(model, foveate.recipe(method, keep=0.5)):
            armed = [m for m in model.modules() if hasattr(vars(m).get("config"), "foveate_watch")]
            assert set(armed) == set(wanted) and len(armed) == len(last)


@pytest.mark.parametrize(
    ("method", "knob", "value", "said"),
    [
        ("visionzip", "contextual", 1.5, "at most 1"),
        ("visionzip", "weights", "sum", "Accepted: released, mean"),
        ("visionzip", "order", "rastre", "Did you mean 'raster'"),
        ("vispruner", "important", -0.1, "at least 0"),
        ("vispruner", "step", 0, "at least 1"),
        ("cdpruner", "relevance", "text", "Accepted: attention, none"),
        ("dart", "image_pivots", 0, "at least 1"),
        ("dart", "text_pivots", -1, "at least 0"),
    ],
)
def test_knobs_are_checked(method: str, knob: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reducer(method, **{knob: value})
