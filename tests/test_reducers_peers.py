"""The peers' methods against naive float64 loops, written from their descriptions."""

from __future__ import annotations

import math
from dataclasses import replace

import oracle
import pytest
import tiny
import torch
from test_reducers import DOUBLE, encoder, layer, random
from torch import Tensor

import foveate
from foveate.adapter import family
from foveate.ops.peaks import density_peaks
from foveate.reducer import Reduction, Tokens, reducer
from foveate.reducers.hiprune import HiPrune
from foveate.reducers.near_duplicates import leaders
from foveate.reducers.sparsevlm import SparseVLM


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def softmax_rows(q: Tensor, k: Tensor, scale: float, rows: list[int]) -> list[list[float]]:
    """Mean over heads of some rows of an attention map: q, k (H, L, d), Hkv dividing H."""
    heads, shared = q.shape[0], k.shape[0]
    found = []
    for i in rows:
        maps = [(k[h * shared // heads] @ q[h, i] * scale).softmax(0) for h in range(heads)]
        found.append(torch.stack(maps).mean(0).tolist())
    return found


# --- inside the LLM -------------------------------------------------------------------------------


def test_pyramiddrop_ranks_by_the_last_row() -> None:
    tokens = layer([12, 9], DOUBLE)
    assert tokens.q is not None and tokens.k is not None and tokens.at is not None
    done = reducer("pyramiddrop").reduce(tokens, [5, 4])
    for b, (size, wanted) in enumerate([(12, 5), (9, 4)]):
        first = 12 - size
        row = softmax_rows(tokens.q[b, :, first:], tokens.k[b, :, first:], tokens.scale, [size + 4])
        score = row[0][2 : 2 + size]
        best = sorted(range(size), key=lambda j: -score[j])[:wanted]
        assert done.keep[b, :wanted].tolist() == sorted(best)


def test_pyramiddrop_falls_in_stages() -> None:
    alive = foveate.recipe("pyramiddrop").schedule.resolve(32)
    assert alive.cuts() == (8, 16, 24)
    assert [alive.count(b, 576) for b in (0, 8, 16, 24)] == [576, 288, 144, 72]
    deeper = foveate.recipe("pyramiddrop", keep=0.027).schedule.resolve(28)
    assert deeper.cuts() == (7, 14, 21)
    assert [deeper.alive[b] for b in (7, 14, 21)] == pytest.approx([0.3, 0.09, 0.027])
    assert not foveate.recipe("pyramiddrop", keep=1.0).schedule.resolve(32).cuts()


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (None, (300, 200, 110)),
        (192 / 576, (300, 200, 110)),
        (0.22, (300, 107, 35)),  # between the budgets of 96 and 128
        (0.222, (303, 110, 36)),
        (96 / 576, (238, 48, 26)),
        (0.111, (66, 30, 17)),
        (32 / 576, (33, 15, 8)),
    ],
)
def test_sparsevlm_has_the_released_budgets(keep: float | None, left: tuple[int, ...]) -> None:
    schedule = foveate.recipe("sparsevlm", keep=keep).schedule.resolve(32)
    assert schedule.cuts() == (2, 6, 15)
    assert tuple(schedule.count(b, 576) for b in (2, 6, 15)) == left
    assert schedule.mean == pytest.approx(keep or 1 / 3, abs=0.04)


def test_sparsevlm_refuses_what_is_no_fraction() -> None:
    for keep in (0.0, 1.5):
        with pytest.raises(ValueError, match="fraction of vision tokens"):
            foveate.recipe("sparsevlm", keep=keep)
    assert not foveate.recipe("sparsevlm", keep=1.0).schedule.resolve(32).cuts()


def naive_raters(tokens: Tokens, b: int, text: int) -> list[int]:
    """Which of the last ``text`` rows rate, counted from the first of them."""
    assert tokens.embeds is not None and tokens.entered is not None
    rows, share = tokens.embeds[b], [0.0] * text
    vision = tokens.entered[b].nonzero()[:, 0].tolist()
    for v in vision:
        logits = torch.stack([rows[v] @ rows[len(rows) - text + t] for t in range(text)])
        for t, part in enumerate(logits.softmax(0).tolist()):
            share[t] += part / len(vision)
    rates = [t for t in range(text) if share[t] > sum(share) / text]
    return rates or list(range(text))


def naive_sparsevlm_score(tokens: Tokens, b: int, size: int) -> list[float]:
    assert tokens.q is not None and tokens.k is not None
    own = size + 5
    q, k = tokens.q[b, :, -own:], tokens.k[b, :, -own:]
    total = [0.0] * size
    raters = naive_raters(tokens, b, 3)
    for t in raters:
        row = size + 2 + t
        seen = softmax_rows(q[:, : row + 1], k[:, : row + 1], tokens.scale, [row])[0]
        for j in range(size):
            total[j] += seen[2 + j] / len(raters)
    return total


def test_sparsevlm_asks_its_raters() -> None:
    found = set()
    for first in range(6):
        tokens = layer([12, 9], DOUBLE, first)
        method = reducer("sparsevlm")
        score = method.score(tokens)  # type: ignore[attr-defined]
        for b, size in enumerate([12, 9]):
            wanted = torch.tensor(naive_sparsevlm_score(tokens, b, size), dtype=DOUBLE)
            torch.testing.assert_close(score[b, :size], wanted, rtol=1e-6, atol=0)
            found.add(tuple(naive_raters(tokens, b, 3)))
    assert len(found) > 3  # the texts do choose


def test_sparsevlm_with_one_text_token_asks_that() -> None:
    tokens = replace(layer([12, 12], DOUBLE), instruction=(1, 0))
    last = reducer("fastv").score(tokens)  # type: ignore[attr-defined]
    torch.testing.assert_close(reducer("sparsevlm").score(tokens), last)  # type: ignore[attr-defined]


def test_sparsevlm_needs_the_text() -> None:
    with pytest.raises(ValueError, match="input embeddings"):
        reducer("sparsevlm").reduce(replace(layer([12]), embeds=None), [5])


def naive_peaks(x: Tensor, clusters: int, neighbours: int) -> tuple[list[int], list[int]]:
    size = len(x)
    apart = [[float((a - b).norm()) / math.sqrt(x.shape[1]) for b in x] for a in x]
    density = [
        math.exp(-sum(d * d for d in sorted(row)[:neighbours]) / min(neighbours, size))
        for row in apart
    ]
    height = []
    for i in range(size):
        denser = [j for j in range(size) if (density[j], -j) > (density[i], -i)]
        height.append(min(apart[i][j] for j in denser) if denser else max(apart[i]))
    ranked = sorted(range(size), key=lambda i: (-density[i] * height[i], i))
    centres = ranked[:clusters]
    nearest = [min(range(clusters), key=lambda c: (apart[i][centres[c]], c)) for i in range(size)]
    return centres, [centres.index(i) if i in centres else nearest[i] for i in range(size)]


@pytest.mark.parametrize(("clusters", "neighbours"), [(1, 5), (4, 5), (7, 2), (23, 40)])
def test_density_peaks(clusters: int, neighbours: int) -> None:
    x = random(2, 23, 3, seed=7)
    x[1, 5] = x[1, 17]  # equal vectors have equal densities
    centre, member = density_peaks(x, clusters, neighbours)
    for b in range(2):
        assert (centre[b].tolist(), member[b].tolist()) == naive_peaks(x[b], clusters, neighbours)


def test_density_peaks_find_what_is_there() -> None:
    """Three heaps far apart: one centre in each, whatever the order of the vectors."""
    heaps = torch.tensor([[0.0, 0], [9, 0], [0, 9]]).repeat(8, 1)
    _, member = density_peaks((heaps + 0.1 * random(24, 2).float())[None], 3)
    for heap in range(3):
        assert len(set(member[0, heap::3].tolist())) == 1
    assert len(set(member[0, :3].tolist())) == 3


@pytest.mark.parametrize("wanted", [2, 9, 30, 60, 199])
def test_sparsevlm_recycles_within_its_budget(wanted: int) -> None:
    tokens, size = layer([200, 200], DOUBLE), 200
    done = reducer("sparsevlm").reduce(tokens, [wanted] * 2)
    assert done.x is not None and done.group is not None
    for b in range(2):
        score = naive_sparsevlm_score(tokens, b, size)
        ranked = sorted(range(size), key=lambda j: -score[j])
        for kept in range(wanted - 1, 0, -1):
            pool = min(int(0.3 * (size - kept)) + 1, size - kept)
            if kept + pool // 10 + 1 == wanted:
                break
        else:
            kept, pool = 1, int(0.3 * (size - 1)) + 1
        best = sorted(ranked[kept : kept + pool])
        centres, member = naive_peaks(tokens.x[b, best], wanted - kept, 5)
        expected = {j: tokens.x[b, j] for j in ranked[:kept]}
        into = {j: j for j in ranked[:kept]}
        for c, centre in enumerate(centres):
            inside = [best[i] for i in range(pool) if member[i] == c]
            expected[best[centre]] = tokens.x[b, inside].mean(0)
            into |= dict.fromkeys(inside, best[centre])
        assert done.keep[b].tolist() == sorted(expected)
        torch.testing.assert_close(
            done.x[b], torch.stack([expected[j] for j in sorted(expected)]), rtol=1e-6, atol=1e-9
        )
        places = [sorted(expected).index(into[j]) if j in into else -1 for j in range(size)]
        assert done.group[b].tolist() == places


@pytest.mark.parametrize("entrance", [None, "random"])
@torch.no_grad()
def test_sparsevlm_gets_the_rows_that_entered(models, monkeypatch, entrance: str | None) -> None:
    """In a padded batch, also after an entrance method; at every stage the same rows."""
    model, inputs = models("llava"), tiny.prompt(tiny.FAMILIES["llava"], [2, 0, 1])
    seen: list[Tokens] = []
    first: dict[str, Tensor] = {}
    score = SparseVLM.score
    noted = lambda self, tokens: seen.append(tokens) or score(self, tokens)  # noqa: E731
    monkeypatch.setattr(SparseVLM, "score", noted)
    method = entrance and reducer(entrance)
    start = 0.5 if entrance else 1.0
    alive = (start, start, 0.4, 0.4, 0.2, 0.2)
    recipe = foveate.Recipe(foveate.Schedule(alive), entrance=method, layers=reducer("sparsevlm"))
    layer = model.model.language_model.layers[0]
    with foveate.reduced(model, recipe), oracle.spying(layer, first):
        model(**inputs)
    entered = first["args"][0]
    assert len(seen) == 4  # two stages of two samples: their sizes differ
    for n, tokens in enumerate(seen):
        b = (0, 2)[n % 2]
        own = int(inputs["attention_mask"][b].sum()) - int(72 // (1 + b // 2) * (1 - start))
        assert tokens.embeds is not None and tokens.entered is not None
        assert torch.equal(tokens.embeds[0, -own:], entered[b, -own:])
        assert int(tokens.entered.sum()) == int(72 // (1 + b // 2) * start)


@torch.no_grad()
def test_merging_in_a_padded_batch_spoils_no_token(models) -> None:
    """Fewer survivors than the largest sample has: what fills up must not go to slot 0."""
    model, kind = models("llava"), tiny.FAMILIES["llava"]
    recipe = foveate.Recipe(foveate.Schedule.step(0.4), layers=reducer("near-duplicates"))
    with foveate.reduced(model, recipe):  # which always keeps that slot
        together = model(**tiny.prompt(kind, [2, 0, 1])).logits[:, -1]
        for b, n in enumerate([2, 0, 1]):
            alone = model(**tiny.prompt(kind, [n], seed=10 * b)).logits[0, -1]
            assert (alone - together[b]).abs().max() < 2e-6


# --- before the LLM -------------------------------------------------------------------------------


def naive_attended(tokens: Tokens, b: int) -> list[float]:
    assert tokens.q is not None and tokens.k is not None and tokens.at is not None
    at = tokens.at[b].tolist()
    asking = at if tokens.cls is None else [tokens.cls]
    rows = softmax_rows(tokens.q[b], tokens.k[b], tokens.scale, asking)
    return [sum(row[j] for row in rows) / len(rows) for j in at]


def naive_holov(tokens: Tokens, b: int, wanted: int, crops: int) -> list[int]:
    x, attn = tokens.x[b], naive_attended(tokens, b)
    size = len(x)
    number = min(crops, size)
    runs = [list(range(c * size // number, (c + 1) * size // number)) for c in range(number)]
    spread = [0.0] * size
    for run in runs:
        for i in run:
            like = [cosine(x[i], x[j]) for j in run if j != i]
            mean = sum(like) / max(1, len(like))
            spread[i] = sum((a - mean) ** 2 for a in like) / max(1, len(like))
    scale = sum(spread) / size or 1.0
    score = [1000 * a + 0.09 * v / scale for a, v in zip(attn, spread, strict=True)]
    means = torch.tensor([sum(score[i] for i in run) / len(run) for run in runs], dtype=DOUBLE)
    share, seats, kept = means.log_softmax(0).tolist(), [0] * number, []
    ranked = [sorted(run, key=lambda i: -score[i]) for run in runs]
    for _ in range(wanted):  # one seat after the other, to the crop with the best claim
        free = [c for c in range(number) if seats[c] < len(runs[c])]
        crop = max(free, key=lambda c: share[c] - math.log(2 * seats[c] + 1))
        kept.append(ranked[crop][seats[crop]])
        seats[crop] += 1
    return sorted(kept)


@pytest.mark.parametrize("cls", [True, False])
@pytest.mark.parametrize(("grid", "crops"), [((6, 8), 16), ((5, 7), 16), ((3, 3), 16), ((6, 8), 5)])
def test_holov_shares_seats_among_crops(cls: bool, grid: tuple[int, int], crops: int) -> None:
    tokens = encoder(2, grid, cls=cls)
    size = grid[0] * grid[1]
    for wanted in (1, 5, size // 2, size - 1):
        done = reducer("holov", crops=crops).reduce(tokens, [wanted] * 2)
        assert done.x is None  # nothing is made up, least of all zeros
        for b in range(2):
            assert done.keep[b].tolist() == naive_holov(tokens, b, wanted, crops)


def test_holov_gives_away_what_a_full_crop_cannot_take() -> None:
    """All attention in one crop of three: the released code feeds zeros for the rest."""
    tokens = encoder(1, (6, 8))
    assert tokens.q is not None and tokens.k is not None
    k = torch.zeros_like(tokens.k)
    k[:, :, 10:13] = 9 * tokens.q[:, :, :1]
    kept = reducer("holov").reduce(replace(tokens, k=k), [30]).keep[0].tolist()
    assert {9, 10, 11} <= set(kept) and len(set(kept)) == 30


def test_hiprune_takes_anchors_their_neighbours_and_registers() -> None:
    tokens = encoder(2, (6, 8))
    assert tokens.q is not None and tokens.k is not None and tokens.middle is not None
    assert tokens.at is not None
    bordering = set()
    for share, wanted in [(0.1, 4), (0.1, 14), (0.5, 30), (1.0, 40), (0.0, 20)]:
        done = reducer("hiprune", share=share).reduce(tokens, [wanted] * 2)
        for b in range(2):
            every = list(range(49))
            maps = [
                softmax_rows(q[b], k[b], tokens.scale, every)
                for q, k in (tokens.middle, (tokens.q, tokens.k))
            ]
            objects, deep = (
                [sum(row[j] for row in m) / 49 for j in tokens.at[b].tolist()] for m in maps
            )
            anchors = max(int(share * wanted / 5), int(wanted >= 5))
            kept: list[int] = []
            for j in sorted(range(48), key=lambda j: -objects[j])[:anchors]:
                row, column = divmod(j, 8)
                around = [(row, column), (row - 1, column), (row + 1, column)]
                around += [(row, column - 1), (row, column + 1)]
                inside = [r * 8 + c for r, c in around if 0 <= r < 6 and 0 <= c < 8]
                bordering.add(len(inside))
                kept += [i for i in inside if i not in kept]
            registers = sorted((j for j in range(48) if j not in kept), key=lambda j: -deep[j])
            assert done.keep[b].tolist() == sorted(kept + registers[: wanted - len(kept)])
    assert len(bordering) > 1  # some anchors lie at a border


def test_hiprune_without_a_grid_has_neighbours_in_the_row() -> None:
    tokens = replace(encoder(1, (6, 8)), grid=None)
    whole = replace(tokens, grid=(1, 48))
    done = [reducer("hiprune").reduce(t, [14]).keep for t in (tokens, whole)]
    assert torch.equal(*done)


def test_hiprune_needs_the_middle() -> None:
    with pytest.raises(ValueError, match="in the middle of the vision encoder"):
        reducer("hiprune").reduce(replace(encoder(1, (4, 4)), middle=None), [5])


@torch.no_grad()
def test_hiprune_gets_the_middle_of_the_encoder(models, monkeypatch) -> None:
    """Layer 1 of three; of Qwen2.5-VL's two, of which one has windows, the one without."""
    seen: list[Tokens] = []
    reduce = HiPrune.reduce
    noted = lambda self, *given: seen.append(given[0]) or reduce(self, *given)  # noqa: E731
    monkeypatch.setattr(HiPrune, "reduce", noted)
    for name in ("llava", "qwen2.5-vl"):
        model, inputs = models(name), tiny.prompt(tiny.FAMILIES[name], [1])
        with foveate.reduced(model, foveate.recipe("hiprune", keep=0.4)):
            model(**inputs)
        last = family(model).vision_attention(model)
        middle = family(model).middle_attention(model, last, 3 / 8)
        if name == "llava":
            assert middle is model.model.vision_tower.encoder.layers[1].self_attn
        else:
            assert middle is last
    llava, qwen = seen
    for tokens, last in ((llava, False), (qwen, True)):
        assert tokens.middle is not None and tokens.q is not None
        assert tokens.middle[0].shape == tokens.q.shape
        assert torch.equal(tokens.middle[0], tokens.q) == last
    keys = llava.middle[1]  # type: ignore[index]
    tower, given = models("llava").model.vision_tower, {}
    with oracle.spying(tower.encoder.layers[1].self_attn.k_proj, given):
        tower(tiny.prompt(tiny.FAMILIES["llava"], [1])["pixel_values"])
    expected = tower.encoder.layers[1].self_attn.k_proj(given["args"][0])
    torch.testing.assert_close(keys.transpose(1, 2).flatten(2), expected)


def naive_tome(x: Tensor, metric: Tensor, wanted: int) -> tuple[list[int], Tensor, list[int]]:
    """Slots, means over all members, and the survivor of every token."""
    members = [[j] for j in range(len(x))]
    slots = list(range(len(x)))

    def mean(of: Tensor, i: int) -> Tensor:
        return of[members[i]].mean(0)  # over original tokens: so sizes weigh

    while len(members) > wanted:
        r = min(len(members) // 2, len(members) - wanted)
        best = {}
        for i in range(0, len(members), 2):
            like = {j: cosine(mean(metric, i), mean(metric, j)) for j in range(1, len(members), 2)}
            best[i] = max(like.items(), key=lambda pair: pair[1])
        going = sorted(best, key=lambda i: -best[i][1])[:r]
        joined = {best[i][0]: [] for i in going}  # type: dict[int, list[int]]
        for i in going:
            joined[best[i][0]] += members[i]
        stay = [i for i in range(len(members)) if i not in going]
        slots = [slots[i] for i in stay]
        members = [members[i] + joined.get(i, []) for i in stay]
    group = [next(g for g, m in enumerate(members) if j in m) for j in range(len(x))]
    return slots, torch.stack([x[m].mean(0) for m in members]), group


@pytest.mark.parametrize("metric", ["keys", "tokens"])
@pytest.mark.parametrize("wanted", [1, 5, 12, 20, 34])
def test_tome_weighs_by_size(metric: str, wanted: int) -> None:
    tokens = encoder(2, (5, 7))
    assert tokens.k is not None and tokens.at is not None
    done = reducer("tome", metric=metric).reduce(tokens, [wanted] * 2)
    assert done.x is not None and done.group is not None
    for b in range(2):
        keys = tokens.k[b].mean(0)[tokens.at[b]]
        compared = keys if metric == "keys" else tokens.x[b]
        slots, x, group = naive_tome(tokens.x[b], compared, wanted)
        assert (done.keep[b].tolist(), done.group[b].tolist()) == (slots, group)
        torch.testing.assert_close(done.x[b], x)


def test_tome_down_to_one_is_the_mean_of_all() -> None:
    tokens = encoder(2, (5, 7), torch.float32)
    done = reducer("tome").reduce(tokens, [1, 1])
    assert done.x is not None
    torch.testing.assert_close(done.x[:, 0], tokens.x.mean(1))
    plain = reducer("aim-merge-tokens").reduce(tokens, [1, 1])
    assert plain.x is not None and not torch.allclose(plain.x[:, 0], tokens.x.mean(1), atol=1e-3)


# --- video ----------------------------------------------------------------------------------------


def film(frames: int, place: int, seed: int = 0) -> Tokens:
    tokens = encoder(2, (frames, place), seed=seed)
    return replace(tokens, frames=frames, q=None, k=None, at=None)


def naive_spread(place: int, wanted: int) -> list[int]:
    return [int((i + 0.5) * place / wanted) for i in range(wanted)]


@pytest.mark.parametrize("wanted", [1, 3, 7, 8, 20, 34])
def test_evs_keeps_the_first_frame_and_what_changes(wanted: int) -> None:
    tokens, place = film(5, 7), 7
    done = reducer("evs").reduce(tokens, [wanted] * 2)
    for b in range(2):
        x = tokens.x[b].view(5, place, -1)
        like = {
            t * place + p: cosine(x[t, p], x[t - 1, p]) for t in range(1, 5) for p in range(place)
        }
        new = sorted(like, key=lambda j: like[j])[: max(0, wanted - place)]
        first = list(range(place)) if wanted >= place else naive_spread(place, wanted)
        assert done.keep[b].tolist() == first + sorted(new)
    assert done.x is None


def test_evs_drops_a_still_frame_first() -> None:
    tokens = film(4, 6)
    x = tokens.x.view(2, 4, 6, -1).clone()
    x[:, 2] = 3 * x[:, 1]  # the third frame is the second, brighter
    done = reducer("evs").reduce(replace(tokens, x=x.flatten(1, 2)), [18, 18])
    assert done.keep[0].tolist() == [*range(12), *range(18, 24)]


def naive_dycoke(x: Tensor, wanted: int, window: int) -> list[int]:
    frames, place = x.shape[:2]
    if wanted <= place:
        return naive_spread(place, wanted)
    while math.ceil(frames / window) * place > wanted:
        window += 1
    later = [t for t in range(frames) if t % window]
    kept = [t * place + p for t in range(frames) if not t % window for p in range(place)]
    left = wanted - len(kept)
    for n, t in enumerate(later):
        other = t - 1 if t % window % 2 else t - 2
        quota = left // len(later) + (n < left % len(later))
        ranked = sorted(range(place), key=lambda p: cosine(x[t, p], x[other, p]))
        kept += [t * place + p for p in ranked[:quota]]
    return sorted(kept)


@pytest.mark.parametrize("frames", [1, 2, 3, 4, 5, 8, 9])  # the released code fails up to four
def test_dycoke_keeps_one_frame_of_each_window(frames: int) -> None:
    tokens = film(frames, 7)
    for window in (2, 4):
        for wanted in sorted({1, 6, 7, 8, 2 * frames, 4 * frames, 6 * frames, 7 * frames - 1}):
            if wanted >= 7 * frames:
                continue
            done = reducer("dycoke", window=window).reduce(tokens, [wanted] * 2)
            for b in range(2):
                x = tokens.x[b].view(frames, 7, -1)
                assert done.keep[b].tolist() == naive_dycoke(x, wanted, window)


def test_dycoke_as_released_keeps_058_of_196() -> None:
    """Windows of four at 0.475: one frame whole, 58 or 59 of 196 in each of the others."""
    tokens = film(8, 196)
    done = reducer("dycoke").reduce(tokens, [int(0.475 * 8 * 196)] * 2)
    counts = torch.bincount(done.keep[0] // 196).tolist()
    assert counts[0] == counts[4] == 196
    assert all(58 <= n <= 59 for t, n in enumerate(counts) if t % 4)


@pytest.mark.parametrize("name", ["evs", "dycoke"])
def test_video_methods_need_frames(name: str) -> None:
    with pytest.raises(ValueError, match="without frames"):
        reducer(name).reduce(encoder(1, (4, 4)), [5])
    with pytest.raises(ValueError, match="at the entrance"):
        foveate.Recipe(foveate.Schedule.step(0.5), layers=reducer(name))


# --- near-duplicates ------------------------------------------------------------------------------


def naive_duplicates(x: Tensor, threshold: float) -> Reduction:
    lead: list[int] = []
    for j in range(len(x)):
        if all(cosine(x[i], x[j]) < threshold for i in lead):
            lead.append(j)
    group = []
    for j in range(len(x)):
        like = [cosine(x[i], x[j]) for i in lead]
        group.append(lead.index(j) if j in lead else like.index(max(like)))
    means = [x[[j for j in range(len(x)) if group[j] == g]].mean(0) for g in range(len(lead))]
    return Reduction(
        torch.tensor(lead), torch.tensor(len(lead)), torch.stack(means), torch.tensor(group)
    )


@pytest.mark.parametrize("threshold", [0.2, 0.8, 0.95, 1.0])
def test_near_duplicates_merge_within_the_threshold(threshold: float) -> None:
    tokens = encoder(3, (6, 8))
    done = reducer("near-duplicates", threshold=threshold).reduce(tokens, None)
    assert done.x is not None and done.group is not None
    for b in range(3):
        wanted = naive_duplicates(tokens.x[b], threshold)
        assert wanted.x is not None and wanted.group is not None
        n = int(done.count[b])
        assert n == int(wanted.count)
        assert torch.equal(done.keep[b, :n], wanted.keep)
        assert torch.equal(done.group[b], wanted.group)
        torch.testing.assert_close(done.x[b, :n], wanted.x)
        for j, g in enumerate(done.group[b].tolist()):
            assert cosine(tokens.x[b, j], tokens.x[b, done.keep[b, g]]) >= threshold - 1e-9


def test_near_duplicates_of_a_blank_page_is_one_token() -> None:
    """Print on blank paper: what is printed stays to the bit, the paper becomes one token."""
    page = torch.ones(1, 20, 6)
    page[0, [3, 8, 9]] = random(3, 6, dtype=torch.float32)
    tokens = Tokens(x=page, valid=torch.ones(1, 20, dtype=torch.bool))
    done = reducer("near-duplicates").reduce(tokens, None)
    assert done.keep[0].tolist() == [0, 3, 8, 9] and done.x is not None
    assert torch.equal(done.x[0], page[0, [0, 3, 8, 9]])


def test_no_chain_joins_what_is_apart() -> None:
    """Each direction is like the next one, the first and the last are not: 24 degrees at most."""
    angle = torch.deg2rad(torch.arange(0, 90, 8.0))
    x = torch.stack((angle.cos(), angle.sin()), dim=-1)[None]
    tokens = Tokens(x=x, valid=torch.ones(1, 12, dtype=torch.bool))
    done = reducer("near-duplicates", threshold=math.cos(math.radians(20))).reduce(tokens, None)
    assert done.keep[0].tolist() == [0, 3, 6, 9]


def test_leaders_are_the_first_come_first_served_ones() -> None:
    alike = random(4, 40, 40, seed=3) > 1.2
    alike = alike | alike.mT | torch.eye(40, dtype=torch.bool)
    for b, found in enumerate(leaders(alike)):
        lead: list[int] = []
        for j in range(40):
            if not any(bool(alike[b, i, j]) for i in lead):
                lead.append(j)
        assert found.nonzero()[:, 0].tolist() == lead


def test_near_duplicates_with_a_budget_lead_by_novelty() -> None:
    tokens = encoder(2, (6, 8))
    done = reducer("near-duplicates").reduce(tokens, [13, 13])
    for b in range(2):
        x = tokens.x[b]
        most = [max([cosine(x[i], x[j]) for i in range(j)], default=-2.0) for j in range(48)]
        assert done.keep[b].tolist() == sorted(sorted(range(48), key=lambda j: most[j])[:13])


@torch.no_grad()
def test_near_duplicates_choose_in_a_model(models) -> None:
    """Without a budget, images of different counts in one batch."""
    model, kind = models("llava"), tiny.FAMILIES["llava"]
    recipe = foveate.recipe("near-duplicates", threshold=0.3)
    assert recipe.schedule.adaptive
    inputs = tiny.prompt(kind, [2, 0, 1])
    together = oracle.reduced_run(model, recipe, inputs, 3)
    expected = oracle.masked_logits(model, inputs, together)
    assert (together.logits - expected).abs().max() < 2e-6
    counts = [len(slots) for slots in together.slots[-1]]
    assert 9 < counts[2] < int(inputs["attention_mask"][2].sum())
    for b, n in ((0, 2), (2, 1)):
        alone = oracle.reduced_run(model, recipe, tiny.prompt(kind, [n], seed=10 * b), 3)
        assert len(alone.slots[-1][0]) == counts[b]
        assert (alone.logits[0] - together.logits[b]).abs().max() < 2e-6
