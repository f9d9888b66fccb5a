"""Each operation against a naive loop of its formula in float64, over odd shapes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.ops.attention import (
    cls_attention,
    instruction_rows,
    key_rows,
    last_row,
    one_head,
    received,
)
from foveate.ops.bipartite import match, merge, merge_to
from foveate.ops.outliers import outlier_count, outlier_ratio
from foveate.ops.pagerank import pagerank
from foveate.ops.pooling import cells, centres, means
from foveate.reducer import Tokens

DOUBLE = torch.float64


def random(*shape: int, seed: int = 0, dtype: torch.dtype = DOUBLE) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=DOUBLE).to(dtype)


def naive_row(
    q: Tensor, k: Tensor, b: int, h: int, i: int, scale: float, seen: list[int]
) -> Tensor:
    """One softmax row (L,), 0 at keys not seen."""
    row = torch.zeros(k.shape[2], dtype=DOUBLE)
    key = h * k.shape[1] // q.shape[1]
    logits = [float(q[b, h, i] @ k[b, key, j]) * scale for j in seen]
    total = sum(math.exp(z - max(logits)) for z in logits)
    for j, z in zip(seen, logits, strict=True):
        row[j] = math.exp(z - max(logits)) / total
    return row


def naive_pagerank(
    q: Tensor,
    k: Tensor,
    scale: float,
    iterations: int,
    damping: float,
    alive: Tensor,
    voters: Tensor,
    causal: bool,
) -> Tensor:
    batch, heads, length, _ = q.shape
    out = torch.zeros(batch, length, dtype=DOUBLE)
    for b in range(batch):
        n = int(voters[b].sum())
        for h in range(heads):
            rows = {}
            for i in range(length):
                seen = [j for j in range(i + 1 if causal else length) if alive[b, j]]
                if seen and voters[b, i]:
                    rows[i] = naive_row(q, k, b, h, i, scale, seen)
            start = voters[b].to(DOUBLE) / n
            s = start
            for _ in range(iterations):
                moved = torch.zeros(length, dtype=DOUBLE)
                for i, row in rows.items():
                    moved += s[i] * row
                s = moved * (1 - damping) + damping * start
            out[b] += s**2 / heads
    return out.sqrt()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("damping", [0.0, 0.15])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "shared"), [((2, 4, 13, 3), 2), ((1, 3, 7, 5), 1), ((1, 2, 1, 4), 2)]
)
def test_pagerank_is_the_formula(
    shape: tuple[int, ...], shared: int, masked: bool, damping: float, causal: bool
) -> None:
    batch, _, length, width = shape
    q, k = random(*shape), random(batch, shared, length, width, seed=1)
    alive = voters = torch.ones(batch, length, dtype=torch.bool)
    if masked:  # the first row is hidden, so that with causality it sees nothing
        alive = random(batch, length, seed=2) > -0.3
        voters = random(batch, length, seed=3) > -0.5
        alive[:, 0], voters[:, -1] = length == 1, True
    wanted = naive_pagerank(q, k, 0.4 / 0.5, 4, damping, alive, voters, causal)
    for block in (None, 1, 3, 5, length, 2 * length):
        got = pagerank(
            q,
            k,
            scale=0.4,
            temperature=0.5,
            iterations=4,
            damping=damping,
            alive=alive if masked else None,
            voters=voters if masked else None,
            causal=causal,
            block=block,
        )
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pagerank_tiles_equal_the_dense_map(causal: bool, dtype: torch.dtype) -> None:
    q, k = random(2, 6, 101, 16, dtype=dtype), random(2, 2, 101, 16, seed=1, dtype=dtype)
    dense = pagerank(q, k, scale=0.25, causal=causal, block=101)
    assert dense.dtype == torch.float32 and bool(dense.isfinite().all())
    for block in (7, 64, 100):
        tiles = pagerank(q, k, scale=0.25, causal=causal, block=block)
        torch.testing.assert_close(tiles, dense, rtol=1e-4, atol=1e-12)


def test_pagerank_of_a_padded_row_is_that_of_the_row_alone() -> None:
    """Padding in front, and the mask that says so; the padding's own content must not matter."""
    q = random(2, 4, 90, 8, dtype=torch.float32)
    k = random(2, 2, 90, 8, seed=1, dtype=torch.float32)
    real = torch.ones(2, 90, dtype=torch.bool)
    real[0, :23] = False
    q[0, :, :23] = k[0, :, :23] = 1e3
    for block in (16, 90):
        both = pagerank(q, k, scale=0.3, alive=real, voters=real, block=block)
        alone = pagerank(q[:1, :, 23:], k[:1, :, 23:], scale=0.3, block=block)
        torch.testing.assert_close(both[:1, 23:], alone, rtol=1e-4, atol=1e-12)
        assert not both[0, :23].any()


def test_pagerank_mass_is_kept() -> None:
    """One head: rows of M sum to 1, so the mass does too, whatever the steps."""
    q, k = random(1, 1, 50, 4), random(1, 1, 50, 4, seed=1)
    for iterations in (1, 2, 9):
        assert pagerank(q, k, scale=1.0, iterations=iterations).sum() == pytest.approx(1.0)


@pytest.mark.parametrize("causal", [True, False])
def test_key_rows_are_softmax_rows(causal: bool) -> None:
    q, k = random(2, 6, 11, 4), random(2, 3, 11, 4, seed=1)
    queries = torch.tensor([[3, 10, 4], [10, 2, 9]])
    rows = torch.ones(2, 11, dtype=torch.bool)
    rows[1, :2] = False
    got = key_rows(q, k, queries, scale=0.5, rows=rows, causal=causal)
    for b in range(2):
        for h in range(6):
            for r, i in enumerate(queries[b].tolist()):
                seen = [j for j in range(i + 1 if causal else 11) if rows[b, j]]
                wanted = naive_row(q, k, b, h, i, 0.5, seen)
                torch.testing.assert_close(got[b, h, r], wanted)


def test_received_pools_heads_and_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = random(2, 4, 9, 4), random(2, 2, 9, 4, seed=1)
    queries = torch.tensor([[5, 6, 7, 8]] * 2)
    weight = torch.tensor([[0.25] * 4, [0, 0, 0.5, 0.5]], dtype=DOUBLE)
    rows = key_rows(q, k, queries, scale=0.5, causal=True)
    wanted = torch.einsum("bhrl,br->bl", rows, weight) / 4
    torch.testing.assert_close(received(q, k, queries, weight, scale=0.5, causal=True), wanted)
    monkeypatch.setattr("foveate.ops.attention._BYTES", 1)  # row by row
    torch.testing.assert_close(received(q, k, queries, weight, scale=0.5, causal=True), wanted)


def test_instruction_rows() -> None:
    q = random(3, 1, 10, 2)
    tokens = Tokens(
        x=random(3, 4, 2),
        valid=torch.ones(3, 4, dtype=torch.bool),
        q=q,
        k=q,
        at=torch.zeros(3, 4, dtype=torch.long),
        instruction=(3, 0, 1),
    )
    queries, weight = instruction_rows(tokens)
    assert queries.tolist() == [[7, 8, 9]] * 3
    torch.testing.assert_close(weight, torch.tensor([[1 / 3] * 3, [0, 0, 1], [0, 0, 1]]))
    queries, weight = last_row(tokens)
    assert queries.tolist() == [[9]] * 3 and weight.tolist() == [[1]] * 3


def test_cls_attention_is_one_head_of_full_width() -> None:
    q, k = random(2, 3, 8, 4), random(2, 3, 8, 4, seed=1)
    at = torch.tensor([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]])
    got = cls_attention(q, k, at, 0)
    for b in range(2):
        logits = [
            sum(float(q[b, h, 0] @ k[b, h, j]) for h in range(3)) / math.sqrt(12) for j in range(8)
        ]
        total = sum(map(math.exp, logits))
        row = [math.exp(logits[j]) / total for j in at[b].tolist()]
        torch.testing.assert_close(got[b], torch.tensor(row, dtype=DOUBLE))
    real = torch.ones(2, 8, dtype=torch.bool)
    real[:, 7] = False
    some = at[:1, :6].expand(2, -1)
    wanted = cls_attention(q[:, :, :7], k[:, :, :7], some, 0)
    torch.testing.assert_close(cls_attention(q, k, some, 0, rows=real), wanted)


def test_cls_attention_without_cls() -> None:
    q, k = random(1, 2, 6, 3), random(1, 2, 6, 3, seed=1)
    at = torch.tensor([[1, 2, 4, 5]])
    query = q[0][:, at[0]].mean(dim=1).flatten()
    logits = torch.stack([query @ k[0, :, j].flatten() for j in at[0]]) / math.sqrt(6)
    torch.testing.assert_close(cls_attention(q, k, at, None)[0], logits.softmax(-1))
    torch.testing.assert_close(one_head(k, at)[0, 2], k[0, :, 4].flatten())


def naive_round(
    metric: list[Tensor], x: list[Tensor], r: int, order: str
) -> tuple[list[int], dict[int, int]]:
    """The places kept, in order, and where the merged ones went."""
    best = {}
    for s in range(0, len(metric), 2):
        cosine = {
            d: float(metric[s] @ metric[d] / metric[s].norm() / metric[d].norm())
            for d in range(1, len(metric), 2)
        }
        target = max(cosine, key=lambda d: cosine[d])
        best[s] = (cosine[target], target)
    ranked = sorted(best, key=lambda s: -best[s][0])
    gone = {s: best[s][1] for s in ranked[:r]}
    keep = ranked[r:] + list(range(1, len(metric), 2))
    return (sorted(keep) if order == "raster" else keep), gone


@pytest.mark.parametrize("order", ["released", "raster"])
@pytest.mark.parametrize(
    ("size", "budget"), [(16, 8), (17, 9), (17, 5), (9, 8), (20, 3), (7, 1), (2, 1)]
)
@pytest.mark.parametrize("own", [True, False])
def test_merge_rounds_are_the_formula(size: int, budget: int, order: str, own: bool) -> None:
    vectors, keys = random(1, size, 5)[0], random(1, size, 3, seed=1)[0]
    x, metric = list(vectors), list(vectors if own else keys)
    slot = list(range(size))
    owner = {i: i for i in range(size)}  # original token to slot
    while len(x) > budget:
        keep, gone = naive_round(metric, x, min(len(x) // 2, len(x) - budget), order)
        into = {d: [d, *(s for s, t in gone.items() if t == d)] for d in keep}
        moved = {slot[s]: slot[d] for s, d in gone.items()}
        owner = {i: moved.get(o, o) for i, o in owner.items()}
        x = [torch.stack([x[p] for p in into[d]]).mean(0) for d in keep]
        metric = [torch.stack([metric[p] for p in into[d]]).mean(0) for d in keep]
        slot = [slot[d] for d in keep]
    got, keep_, group = merge_to(vectors[None], None if own else keys[None], budget, order)
    torch.testing.assert_close(got[0], torch.stack(x))
    assert keep_[0].tolist() == slot
    assert [slot[g] for g in group[0].tolist()] == [owner[i] for i in range(size)]


def test_match_clamps_and_leaves() -> None:
    x = random(2, 9, 4, dtype=torch.float32)
    for r in (0, -3):
        matched = match(x, r)
        assert torch.equal(merge(matched, x), x)
        assert torch.equal(matched.keep[1], torch.arange(9))
    assert merge(match(x, 99), x).shape == (2, 5, 4)


def test_merge_of_zero_vectors_gives_no_nan() -> None:
    x = random(1, 8, 4, dtype=torch.float32)
    x[:, 2] = 0
    assert bool(merge(match(x, 4), x).isfinite().all())


def test_merge_backpropagates() -> None:
    x = random(2, 13, 4).requires_grad_()
    merged, _, group = merge_to(x, None, 4)
    merged.sum().backward()
    # The mean's weights: every survivor's gradient of 1 is shared by all that went into it.
    shares = torch.zeros(2, 4, dtype=DOUBLE).scatter_add(1, group, x.grad[..., 0])
    torch.testing.assert_close(shares, torch.ones_like(shares))


def naive_quartile(values: list[float], q: float) -> float:
    ranked, place = sorted(values), q * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


@pytest.mark.parametrize("size", [1, 2, 3, 9, 64, 575])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
def test_outliers(size: int, dtype: torch.dtype) -> None:
    attn = (random(3, size) * 2).exp().to(dtype)

    def naive(values: list[float]) -> int:
        low, high = naive_quartile(values, 0.25), naive_quartile(values, 0.75)
        return sum(v > high + 1.5 * (high - low) for v in values)

    assert outlier_count(attn).tolist() == [naive(row) for row in attn.double().tolist()]
    together = naive(attn.double().flatten().tolist())
    assert float(outlier_ratio(attn)) == together / attn.numel()


def test_outliers_of_equal_values_are_none() -> None:
    assert outlier_count(torch.full((2, 50), 0.1)).tolist() == [0, 0]


GRIDS = [(1, 1), (3, 5), (24, 24), (7, 2), (1, 13), (2, 30)]


@pytest.mark.parametrize("grid", [*GRIDS, None])
def test_cells_are_exactly_the_budget(grid: tuple[int, int] | None) -> None:
    size = 17 if grid is None else grid[0] * grid[1]
    for budget in range(1, size + 1):
        cell = cells(size, budget, grid)
        sizes = torch.bincount(cell, minlength=budget)
        assert len(sizes) == budget and int(sizes.min()) >= 1
        middle = centres(cell, budget, grid)
        assert torch.equal(cell[middle], torch.arange(budget))  # each inside its own cell
        assert bool((middle.diff() > 0).all())
        if grid is None:
            assert bool((cell.diff() >= 0).all()) and int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(cells(size, size, grid), torch.arange(size))


def test_a_quarter_of_a_grid_is_two_by_two() -> None:
    x = random(2, 48, 3)
    got = means(x, cells(48, 12, (6, 8)), 12)
    wanted = x.view(2, 3, 2, 4, 2, 3).mean(dim=(2, 4)).flatten(1, 2)
    torch.testing.assert_close(got, wanted)
