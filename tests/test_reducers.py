"""Each method against a naive loop of its formula in float64, and what all must hold to."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from foveate.ops.outliers import outlier_count
from foveate.reducer import Reduction, Tokens, discover, reducer
from foveate.reducers.downsample import Downsample
from foveate.reducers.random import Random

DOUBLE = torch.float64
METHODS = sorted(name for name, cls in discover().items() if cls.site != "pixels")
WITH_EXTRA = ("prumerge", "prumerge+")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def encoder(
    groups: int, grid: tuple[int, int], dtype: torch.dtype = DOUBLE, seed: int = 0, cls: bool = True
) -> Tokens:
    """What an entrance method sees: N tokens, then N + 1 rows of attention with [CLS] first."""
    size = grid[0] * grid[1]
    rows = size + int(cls)
    return Tokens(
        x=random(groups, size, 6, seed=seed, dtype=dtype),
        valid=torch.ones(groups, size, dtype=torch.bool),
        q=2 * random(groups, 2, rows, 4, seed=seed + 1, dtype=dtype),
        k=2 * random(groups, 2, rows, 4, seed=seed + 2, dtype=dtype),
        at=torch.arange(int(cls), rows).expand(groups, -1),
        rows=torch.ones(groups, rows, dtype=torch.bool),
        scale=0.5,
        cls=0 if cls else None,
        grid=grid,
        middle=(
            2 * random(groups, 2, rows, 4, seed=seed + 3, dtype=dtype),
            2 * random(groups, 2, rows, 4, seed=seed + 4, dtype=dtype),
        ),
    )


def layer(sizes: list[int], dtype: torch.dtype = torch.float32, first: int = 0) -> Tokens:
    """What a method sees inside the LLM: samples flush right, 2 rows of text before, 3 after.

    Sample i of the list is made from seed ``first + i``, so that it can be made alone.
    """
    length, width = max(sizes) + 5, max(sizes)
    q, k = torch.zeros(len(sizes), 4, length, 8), torch.zeros(len(sizes), 2, length, 8)
    x, valid = torch.zeros(len(sizes), width, 6), torch.zeros(len(sizes), width, dtype=torch.bool)
    at, rows = torch.zeros(len(sizes), width, dtype=torch.long), torch.zeros(len(sizes), length)
    hidden = torch.zeros(len(sizes), length, 6)
    embeds, entered = torch.zeros(len(sizes), length, 6), torch.zeros(len(sizes), length)
    for b, size in enumerate(sizes):
        own, seed = size + 5, 10 * (first + b)
        q[b, :, -own:] = random(4, own, 8, seed=seed)
        k[b, :, -own:] = random(2, own, 8, seed=seed + 1)
        x[b, :size], valid[b, :size] = random(size, 6, seed=seed + 2), True
        at[b, :size] = torch.arange(length - own + 2, length - 3)
        hidden[b, -own:] = random(own, 6, seed=seed + 3)
        hidden[b, at[b, :size]] = x[b, :size]
        rows[b, -own:] = 1
        embeds[b, -own:], entered[b, -own + 2 : -3] = random(own, 6, seed=seed + 3), 1
    return Tokens(
        x=x.to(dtype),
        valid=valid,
        q=q.to(dtype),
        k=k.to(dtype),
        at=at,
        rows=rows.bool(),
        scale=8**-0.5,
        causal=True,
        instruction=(3,) * len(sizes),
        hidden=hidden.to(dtype),
        embeds=embeds.to(dtype),
        entered=entered.bool(),
    )


def seen(method: str, groups: int, grid: tuple[int, int], dtype: torch.dtype) -> Tokens:
    """Tokens as the method's own site has them; a video has as many frames as the grid has rows."""
    if discover()[method].site == "layers":
        return layer([grid[0] * grid[1]] * groups, dtype)
    tokens = encoder(groups, grid, dtype)
    return replace(tokens, frames=grid[0]) if discover()[method].video else tokens


def check(done: Reduction, tokens: Tokens, budget: list[int]) -> None:
    """What the contract asks of any answer."""
    groups, size = tokens.x.shape[:2]
    assert done.count.tolist() == budget and done.count.device.type == "cpu"
    assert done.keep.dtype == torch.long and done.keep.shape[0] == groups
    for b, n in enumerate(budget):
        keep = done.keep[b, :n].tolist()
        assert len(set(keep)) == n and all(0 <= slot < size for slot in keep)
        if done.group is not None:
            group = done.group[b]
            assert group.shape == (size,) and all(-1 <= int(g) < n for g in group)
            if n and done.keep.shape[1] == n:  # who lends its slot is part of it
                assert torch.equal(group[done.keep[b]], torch.arange(n))
    if done.x is not None:
        assert done.x.shape == (groups, done.keep.shape[1], tokens.x.shape[-1])
        assert done.x.dtype == tokens.x.dtype and bool(done.x.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_budget_is_met_exactly(method: str, dtype: torch.dtype) -> None:
    tokens = seen(method, 2, (4, 7), dtype)
    for budget in (0, 1, 2, 3, 13, 14, 27, 28):
        check(reducer(method).reduce(tokens, [budget] * 2), tokens, [budget] * 2)


@pytest.mark.parametrize("method", METHODS)
def test_keeping_all_changes_nothing(method: str) -> None:
    tokens = seen(method, 2, (4, 7), torch.float32)
    done = reducer(method).reduce(tokens, [28, 28])
    assert torch.equal(done.keep, torch.arange(28).expand(2, -1)) and done.x is None


@pytest.mark.parametrize("method", METHODS)
def test_one_token(method: str) -> None:
    tokens = seen(method, 3, (1, 1), torch.float32)
    check(reducer(method).reduce(tokens, [1] * 3), tokens, [1] * 3)
    if discover()[method].adaptive:
        check(reducer(method).reduce(tokens, None), tokens, [1] * 3)


def alone_of(tokens: Tokens, b: int) -> Tokens:
    """Group ``b`` of a batch."""
    found = {field.name: getattr(tokens, field.name) for field in fields(tokens)}
    cut = {n: v[b : b + 1] for n, v in found.items() if isinstance(v, Tensor)}
    middle = tokens.middle and tuple(t[b : b + 1] for t in tokens.middle)
    instruction = tokens.instruction and tokens.instruction[b : b + 1]
    return replace(tokens, **cut, middle=middle, instruction=instruction)


@pytest.mark.parametrize("method", METHODS)
def test_batch_equals_single(method: str) -> None:
    tokens = seen(method, 3, (5, 7), torch.float32)
    budgets: list[int | None] = [11, None] if discover()[method].adaptive else [11]
    for budget in budgets:
        wanted = None if budget is None else [budget] * 3
        done = reducer(method).reduce(tokens, wanted)
        for b in range(3):
            one = alone_of(tokens, b)
            alone = reducer(method).reduce(one, None if wanted is None else wanted[b : b + 1])
            n = int(done.count[b])
            assert int(alone.count[0]) == n and torch.equal(done.keep[b, :n], alone.keep[0, :n])
            if done.x is not None and alone.x is not None:
                torch.testing.assert_close(done.x[b, :n], alone.x[0, :n])
            if done.group is not None and alone.group is not None:
                assert torch.equal(done.group[b], alone.group[0])


@pytest.mark.parametrize("method", [m for m in METHODS if discover()[m].ragged])
def test_ragged_equals_single(method: str) -> None:
    sizes, budget = [40, 17, 29, 0], [9, 17, 3, 0]
    done = reducer(method).reduce(layer(sizes), budget)
    check(done, layer(sizes), budget)
    for b, (size, n) in enumerate(zip(sizes[:-1], budget[:-1], strict=True)):
        alone = reducer(method).reduce(layer([size], first=b), [n])
        assert torch.equal(done.keep[b, :n], alone.keep[0])


@pytest.mark.parametrize("method", METHODS)
def test_budgets_that_cannot_be(method: str) -> None:
    tokens = seen(method, 2, (4, 7), torch.float32)
    if not discover()[method].adaptive:
        with pytest.raises(ValueError, match="needs a budget"):
            reducer(method).reduce(tokens, None)
    if not discover()[method].ragged:
        with pytest.raises(ValueError, match="once for each distinct budget"):
            reducer(method).reduce(tokens, [3, 4])


@pytest.mark.parametrize("method", [m for m in METHODS if discover()[m].needs_attention])
def test_attention_that_was_not_observed(method: str) -> None:
    tokens = replace(seen(method, 1, (4, 7), torch.float32), q=None, k=None, at=None)
    with pytest.raises(ValueError, match="given none"):
        reducer(method).reduce(tokens, [3])


@pytest.mark.parametrize(
    ("method", "knob", "value", "said"),
    [
        ("prumerge", "order", "rastre", "Did you mean 'raster'"),
        ("prumerge", "weights", "none", "Accepted: released, paper"),
        ("prumerge", "neighbours", -1, "at least 0"),
        ("prumerge+", "fence", -0.5, "at least 0"),
        ("prumerge+", "order", "", "Accepted: attention, raster"),
        ("aim-merge", "metric", "token", "Did you mean 'tokens'"),
        ("aim-merge-tokens", "order", "x", "Accepted: released, raster"),
        ("pagerank", "temperature", 0.0, "above 0"),
        ("pagerank", "damping", 1.5, "at most 1"),
        ("pagerank", "iterations", 0, "at least 1"),
        ("attention", "query", "first", "Accepted: instruction, last"),
        ("random", "seed", 1.5, "takes a int"),
        ("sparsevlm", "recycle", 1.5, "at most 1"),
        ("sparsevlm", "neighbours", 0, "at least 1"),
        ("holov", "crops", 0, "at least 1"),
        ("holov", "attention", -1.0, "at least 0"),
        ("holov", "diversity", -1.0, "at least 0"),
        ("holov", "temperature", 0.0, "above 0"),
        ("hiprune", "share", 1.1, "at most 1"),
        ("tome", "metric", "key", "Did you mean 'keys'"),
        ("dycoke", "window", 1, "at least 2"),
        ("near-duplicates", "threshold", 0.0, "above 0"),
    ],
)
def test_knobs_are_checked(method: str, knob: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        reducer(method, **{knob: value})


# --- PruMerge -------------------------------------------------------------------------------------


def cls_row(tokens: Tokens, b: int) -> list[float]:
    assert tokens.q is not None and tokens.k is not None and tokens.at is not None
    q, k = (t[b].transpose(0, 1).flatten(1) for t in (tokens.q, tokens.k))
    logits = (k @ q[0]) / math.sqrt(k.shape[1])
    return [float(a) for a in logits.softmax(0)[tokens.at[b]]]


def naive_merge(
    tokens: Tokens, b: int, kept: list[int], weights: str = "released", neighbours: int = 32
) -> tuple[Tensor, Tensor, list[int]]:
    """The kept tokens' new vectors, the extra one, and the nearest kept that took each token."""
    assert tokens.k is not None and tokens.at is not None
    x, a = tokens.x[b], cls_row(tokens, b)
    keys = tokens.k[b].transpose(0, 1).flatten(1)[tokens.at[b]]
    taken: dict[int, tuple[float, int]] = {}
    rows = []
    for r, i in enumerate(kept):
        others = [j for j in range(len(x)) if j != i and (weights == "released" or j not in kept)]
        cosine = {j: float(keys[i] @ keys[j] / keys[i].norm() / keys[j].norm()) for j in others}
        near = sorted(others, key=lambda j: -cosine[j])[:neighbours]
        total = sum((a[j] * x[j] for j in near), torch.zeros_like(x[i]))
        if weights == "paper":
            rows.append((a[i] * x[i] + total) / (a[i] + sum(a[j] for j in near)))
        else:
            rows.append(x[i] + total)
        for j in near:
            taken[j] = max(taken.get(j, (-2.0, -1)), (cosine[j], r))
    extra = sum((a[j] * x[j] for j in range(len(x)) if j not in kept), torch.zeros_like(x[0]))
    nearest = [kept.index(j) if j in kept else taken.get(j, (0, -1))[1] for j in range(len(x))]
    return torch.stack(rows), extra, nearest


def expect(
    done: Reduction, tokens: Tokens, b: int, kept: list[int], extra: bool = True, **knobs: object
) -> None:
    """``done`` is the merge over ``kept``, in that order, with the extra token at the end."""
    rows, sum_, nearest = naive_merge(tokens, b, kept, **knobs)  # type: ignore[arg-type]
    n = len(kept)
    assert done.x is not None and done.group is not None
    assert int(done.count[b]) == n + int(extra)
    assert done.keep[b, :n].tolist() == kept
    torch.testing.assert_close(done.x[b, :n], rows)
    if extra:
        assert int(done.keep[b, n]) == max(set(range(tokens.x.shape[1])) - set(kept))
        torch.testing.assert_close(done.x[b, n], sum_)
    # The extra token lends the slot of a pruned one, which may be a neighbour of a kept one.
    for j, g in enumerate(nearest):
        lent = extra and j == int(done.keep[b, n])
        assert int(done.group[b, j]) == (n if lent or (g < 0 and extra) else g)


def ranked(tokens: Tokens, b: int) -> list[int]:
    a = cls_row(tokens, b)
    return sorted(range(len(a)), key=lambda j: -a[j])


@pytest.mark.parametrize("weights", ["released", "paper"])
@pytest.mark.parametrize("extra", [True, False])
def test_prumerge_with_a_budget(weights: str, extra: bool) -> None:
    tokens = encoder(2, (6, 8))
    for neighbours in (0, 3, 32, 60):
        method = reducer("prumerge", weights=weights, extra=extra, neighbours=neighbours)
        done = method.reduce(tokens, [9, 9])
        for b in range(2):
            kept = ranked(tokens, b)[: 9 - extra]
            knobs = {"weights": weights, "neighbours": neighbours}
            expect(done, tokens, b, kept, extra, **knobs)


def test_prumerge_of_one_has_no_extra_token() -> None:
    tokens = encoder(2, (6, 8))
    for name in WITH_EXTRA:
        done = reducer(name).reduce(tokens, [1, 1])
        for b in range(2):
            expect(done, tokens, b, ranked(tokens, b)[:1], extra=False)


@pytest.mark.parametrize("extra", [True, False])
def test_prumerge_chooses_outliers_image_by_image(extra: bool) -> None:
    tokens = encoder(3, (9, 9))
    attn = torch.tensor([cls_row(tokens, b) for b in range(3)], dtype=DOUBLE)
    counts = outlier_count(attn).tolist()
    assert len(set(counts)) > 1  # ragged
    done = reducer("prumerge", extra=extra).reduce(tokens, None)
    for b, n in enumerate(counts):
        expect(done, tokens, b, ranked(tokens, b)[:n], extra)


def test_prumerge_without_outliers_keeps_the_most_attended() -> None:
    tokens = encoder(1, (6, 8))
    assert tokens.q is not None
    flat = replace(tokens, q=tokens.q * 1e-3)
    for name, kept in (("prumerge", ranked(flat, 0)[:1]), ("prumerge+", None)):
        done = reducer(name).reduce(flat, None)
        if kept is None:  # one counts as outlying: the stride is 48 // 3
            first = ranked(flat, 0)[0]
            kept = [first, *(j for j in (0, 16, 32) if j != first)]
        expect(done, flat, 0, kept)


@pytest.mark.parametrize("name", WITH_EXTRA)
def test_prumerge_in_raster_order_is_the_same_otherwise(name: str) -> None:
    tokens = encoder(3, (9, 9))
    for budget in (None, [20] * 3, [1] * 3):
        plain = reducer(name).reduce(tokens, budget)
        raster = reducer(name, order="raster").reduce(tokens, budget)
        assert plain.x is not None and raster.x is not None
        assert plain.group is not None and raster.group is not None
        assert torch.equal(plain.count, raster.count)
        for b, n in enumerate(plain.count.tolist()):
            order = plain.keep[b, :n].argsort()
            assert torch.equal(raster.keep[b, :n], plain.keep[b, order])
            assert torch.equal(raster.x[b, :n], plain.x[b, order])
            for j in range(81):
                old, new = int(plain.group[b, j]), int(raster.group[b, j])
                assert plain.keep[b, old] == raster.keep[b, new]


@pytest.mark.parametrize("peak", [0.3, 0.6, 1.0])
def test_prumerge_plus_samples_by_the_ratio(peak: float) -> None:
    tokens = encoder(3, (9, 9))
    assert tokens.q is not None
    tokens = replace(tokens, q=tokens.q * peak)
    done = reducer("prumerge+").reduce(tokens, None)
    attn = torch.tensor([cls_row(tokens, b) for b in range(3)], dtype=DOUBLE)
    for b, n in enumerate(outlier_count(attn).clamp(min=1).tolist()):
        stride = max(2, int(int(1 / (n / 81)) / 3))
        outlying = ranked(tokens, b)[:n]
        expect(done, tokens, b, outlying + [j for j in range(0, 80, stride) if j not in outlying])


def test_prumerge_plus_never_keeps_everything() -> None:
    """The released code keeps all but the last token from 97 outliers of 576 on."""
    tokens = encoder(1, (24, 24))
    assert tokens.q is not None and tokens.k is not None
    k = torch.zeros_like(tokens.k)
    k[:, :, 1:101] = 3 * tokens.q[:, :, :1]
    done = reducer("prumerge+").reduce(replace(tokens, k=k), None)
    assert 288 < int(done.count) < 400


def test_prumerge_plus_with_a_budget_spreads_the_rest() -> None:
    tokens = encoder(2, (6, 8))
    for budget in (2, 3, 9, 30, 47):
        done = reducer("prumerge+").reduce(tokens, [budget] * 2)
        for b in range(2):
            most = max(1, round((budget - 1) / 4))
            kept = done.keep[b, : budget - 1].tolist()
            assert kept[:most] == ranked(tokens, b)[:most]
            rest, samples = sorted(set(range(48)) - set(kept[:most])), kept[most:]
            assert samples == sorted(samples)
            gaps = [rest.index(j) - rest.index(i) for i, j in pairwise(samples)]
            assert not gaps or max(gaps) - min(gaps) <= 1
            expect(done, tokens, b, kept)


def test_prumerge_backpropagates() -> None:
    tokens = encoder(1, (6, 8))
    x = tokens.x.clone().requires_grad_()
    done = reducer("prumerge").reduce(replace(tokens, x=x), [9])
    assert done.x is not None
    done.x.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())  # every token counts somewhere


# --- the others -----------------------------------------------------------------------------------


def test_aim_merge_compares_keys_of_full_width() -> None:
    tokens = encoder(1, (4, 4))
    assert tokens.k is not None and tokens.at is not None
    keys = tokens.k[0].transpose(0, 1).flatten(1)[tokens.at[0]]
    done = reducer("aim-merge", order="released").reduce(tokens, [15])
    assert done.x is not None and done.group is not None
    pairs = {
        (s, d): float(keys[s] @ keys[d] / keys[s].norm() / keys[d].norm())
        for s in range(0, 16, 2)
        for d in range(1, 16, 2)
    }
    source, into = max(pairs, key=lambda p: pairs[p])
    best = {s: max(pairs[s, d] for d in range(1, 16, 2)) for s in range(0, 16, 2) if s != source}
    left = sorted(best, key=lambda s: -best[s])
    assert done.keep[0].tolist() == left + list(range(1, 16, 2))
    merged = done.keep[0].tolist().index(into)
    torch.testing.assert_close(done.x[0, merged], tokens.x[0, [source, into]].mean(0))
    assert int(done.group[0, source]) == merged


def test_aim_merge_orders_and_metrics() -> None:
    tokens = encoder(2, (5, 5))
    own = reducer("aim-merge", metric="tokens", order="released").reduce(tokens, [11, 11])
    blind = replace(tokens, q=None, k=None, at=None)
    same = reducer("aim-merge-tokens", order="released").reduce(blind, [11, 11])
    assert torch.equal(own.keep, same.keep) and own.x is not None and same.x is not None
    torch.testing.assert_close(own.x, same.x)
    raster = reducer("aim-merge", order="raster").reduce(tokens, [11, 11])
    assert bool((raster.keep.diff() > 0).all())


def test_fastv_and_attention_rank_by_softmax_rows() -> None:
    tokens = layer([12, 9], DOUBLE)
    assert tokens.q is not None and tokens.k is not None
    assert tokens.at is not None and tokens.rows is not None
    rows = {1: torch.zeros(2, 17, dtype=DOUBLE), 3: torch.zeros(2, 17, dtype=DOUBLE)}
    for count, total in rows.items():
        for b in range(2):
            for h in range(4):
                for i in range(17 - count, 17):
                    logits = tokens.k[b, h // 2] @ tokens.q[b, h, i] * tokens.scale
                    visible = tokens.rows[b] & (torch.arange(17) <= i)
                    logits[~visible] = -torch.inf
                    total[b] += logits.softmax(0) / 4 / count
    expected = {n: total.gather(1, tokens.at)[tokens.valid] for n, total in rows.items()}
    for name, knobs, n in [
        ("fastv", {}, 1),
        ("attention", {"query": "last"}, 1),
        ("attention", {}, 3),
    ]:
        score = reducer(name, **knobs).score(tokens)  # type: ignore[attr-defined]
        torch.testing.assert_close(score[tokens.valid], expected[n], rtol=1e-6, atol=0)


def test_pagerank_reads_the_tokens_rows() -> None:
    from foveate.ops.pagerank import pagerank

    tokens = layer([12, 9])
    assert tokens.q is not None and tokens.k is not None and tokens.at is not None
    score = reducer("pagerank").score(tokens)  # type: ignore[attr-defined]
    for b, size in enumerate([12, 9]):
        own = slice(12 - size, None)
        alone = pagerank(
            tokens.q[b : b + 1, :, own], tokens.k[b : b + 1, :, own], scale=tokens.scale
        )
        torch.testing.assert_close(score[b, :size], alone[0, 2 : 2 + size], rtol=1e-4, atol=1e-12)


def test_random_is_a_hash_of_slot_and_seed() -> None:
    tokens = encoder(2, (24, 24), torch.float32)
    scores = torch.stack([Random(seed).score(tokens)[0] for seed in range(20)])
    assert abs(float(scores.mean()) - 0.5) < 0.01 and float(scores.max()) < 1
    correlation = torch.corrcoef(scores) - torch.eye(20)
    assert float(correlation.abs().max()) < 0.2  # seeds are strangers to each other
    kept = torch.zeros(576)
    for seed in range(400):
        kept[Random(seed).reduce(tokens, [144, 144]).keep[0]] += 1
    assert float(kept.min()) > 60 and float(kept.max()) < 140  # 100 expected of each slot


def test_pool_averages_its_cells() -> None:
    tokens = encoder(2, (6, 8), torch.float32)
    for grid in ((6, 8), None, (7, 7)):  # a grid that does not fit is no grid
        done = reducer("pool").reduce(replace(tokens, grid=grid), [13, 13])
        assert done.x is not None and done.group is not None
        for cell in range(13):
            mean = tokens.x[:, done.group[0] == cell].mean(dim=1)
            torch.testing.assert_close(done.x[:, cell], mean)


def test_downsample_gives_a_grid_and_reduces_nothing() -> None:
    with pytest.raises(ValueError, match="use 'pool'"):
        Downsample().reduce(encoder(1, (4, 4)), [3])
    assert Downsample().shape((24, 24), 144) == (12, 12)
    assert Downsample().shape((24, 24), 576) == Downsample().shape((24, 24), 999) == (24, 24)
    for grid in ((24, 24), (27, 36), (1, 100), (100, 1), (3, 50), (16, 16)):
        for budget in range(1, grid[0] * grid[1]):
            h, w = Downsample().shape(grid, budget)
            assert 1 <= h <= grid[0] and 1 <= w <= grid[1] and h * w <= budget
            if min(h, w) >= 4:  # about the same aspect, and little of the budget is left over
                assert 0.7 < (h / w) / (grid[0] / grid[1]) < 1.4
                assert h * w + h + w + 1 > budget
    with pytest.raises(ValueError, match="No grid"):
        Downsample().shape((4, 4), 0)
