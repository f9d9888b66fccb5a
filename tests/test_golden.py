"""What the released code of each method gave for seeded inputs, and what ours gives for them.

Reads every case of every archive in the folder named by FOVEATE_GOLDEN, else ``../shared/golden``;
skips where there is none. Selections are compared exactly, floats within 2e-5 of the largest,
importance within 2e-3 of each value. Where we leave the released code on purpose (``DEPARTURES``),
what it computes is checked through the operations, and the departure itself through the method.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.ops.attention import cls_attention
from foveate.ops.bipartite import match, merge
from foveate.ops.diversity import cosines, dpp, least_alike, max_min, unit
from foveate.ops.outliers import outlier_count, outlier_ratio
from foveate.ops.pagerank import pagerank
from foveate.ops.prumerge import Image, Rule, leftover, neighbourhood
from foveate.reducer import Reduction, Scorer, Tokens, reducer, top
from foveate.reducers.cdpruner import stretched
from foveate.reducers.dart import Dart
from foveate.reducers.sparsevlm import relevance
from foveate.schedule import Schedule

np = pytest.importorskip("numpy")

DEPARTURES = {
    "flattened batch": "released outliers are counted over the whole batch, ours image by image: "
    "the ratio is checked through outlier_ratio, the rest with the count it gave as a budget",
    "floor": "released int(N * ratio) can lose one outlier; ours counts them exactly",
    "no outlier": "released keeps the extra token alone (PruMerge+ fails); ours the most attended "
    "too",
    "stride 1": "released PruMerge+ keeps everything from 97 outliers of 576 on; ours every 2nd "
    "slot",
    "duplicates": "the released fixed path of PruMerge+ keeps tokens twice and loses as many "
    "others; ours keeps distinct ones: checked are the rows that neither touches",
    "dead rows vote": "released rows of pruned tokens vote on, being only masked; ours are gone: "
    "checked through pagerank(), whose voters are all rows unless told",
    "next layer": "released PyramidDrop ranks by queries and keys of the next layer, ours by those "
    "of the layer just crossed: the check gives it the next layer's as those",
    "at least one": "Schedule.count keeps one token while alive > 0; released int() can give none",
    "[CLS]": "VisionZip hands [CLS] to the LLM as one dominant token; ours counts patches only",
    "same token": "DivPrune picks a token again where vectors are equal; ours never does: checked "
    "are the directions it picked",
    "batch of crops": "CDPruner stretches relevance over all crops together, ours crop by crop: "
    "checked through dpp() with the released relevance",
    "text tower": "CDPruner's relevance is that of CLIP's text tower; ours is attention: as above",
    "set order": "DART takes pivots in the order of a Python set, ours by key size, and gives each "
    "int(budget / pivots), ours shares that meet the budget: checked through least_alike()",
}
# Below it, squares are subnormal in float32 and the root mean square has no digits left.
TINY = 1e-19


def folder() -> Path:
    beside = Path(__file__).resolve().parents[1].parent / "shared" / "golden"
    return Path(os.environ.get("FOVEATE_GOLDEN") or beside)


@dataclass(frozen=True)
class Case:
    """One case: its arrays by ``in.x``, ``out.idx``, … and what the archive says of it."""

    archive: str
    name: str
    said: str
    arrays: dict[str, Any]

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def __getitem__(self, key: str) -> Tensor:
        """The array as a tensor, float16 widened to float32."""
        tensor = torch.from_numpy(self.arrays[key])
        return tensor.float() if tensor.dtype == torch.float16 else tensor

    def names(self, kind: str) -> list[str]:
        return [key.partition(".")[2] for key in self.arrays if key.startswith(f"{kind}.")]


def cases() -> list[Case]:
    found = []
    for path in sorted(folder().glob("*.npz")):
        with np.load(path) as file:
            meta = json.loads(str(file["meta"]))
            arrays: dict[str, dict[str, Any]] = {}
            for key in file.files:
                if parts := re.fullmatch(r"(.+)\.((?:in|param|mid|out)\..+)", key):
                    arrays.setdefault(parts[1], {})[parts[2]] = file[key]
        said, name = meta.get("cases", {}), meta.get("name", path.stem)
        found += [Case(name, case, str(said.get(case, "")), a) for case, a in arrays.items()]
    return found


CASES = cases()


def close(got: Tensor, wanted: Tensor) -> None:
    """Within 2e-5 of the largest value."""
    assert got.shape == wanted.shape
    if wanted.numel():
        assert float((got - wanted).abs().max()) <= 2e-5 * float(wanted.abs().max())


# --- AIM ------------------------------------------------------------------------------------------


def decimal(digits: str) -> float:
    """``1`` is 1, ``05`` is 0.5, ``015`` is 0.15."""
    return float(f"0.{digits[1:]}" if digits.startswith("0") and len(digits) > 1 else digits)


def options(name: str) -> dict[str, Any]:
    """``importance_tau1_it3_d015`` as the knobs of ``pagerank``."""
    knobs: dict[str, Any] = {}
    if found := re.search(r"_tau(\d+)", name):
        knobs["temperature"] = decimal(found[1])
    if found := re.search(r"_it(\d+)", name):
        knobs["iterations"] = int(found[1])
    if found := re.search(r"_d(\d+)", name):
        knobs["damping"] = decimal(found[1])
    return knobs


def check_importance(case: Case) -> None:
    q, k, alive = case["in.q"], case["in.k"], case["in.alive"]
    scale = q.shape[-1] ** -0.5
    for name in case.names("out"):
        wanted, knobs = case[f"out.{name}"], options(name)
        for block in (None, 48, q.shape[2]):
            got = pagerank(q, k, scale=scale, alive=alive, block=block, **knobs)
            torch.testing.assert_close(got, wanted, rtol=2e-3, atol=TINY)
        if bool(alive.all()):  # else: DEPARTURES["dead rows vote"]
            batch, size = wanted.shape
            at = torch.arange(size).expand(batch, -1)
            valid = torch.ones(batch, size, dtype=torch.bool)
            x = torch.zeros(batch, size, 1)
            tokens = Tokens(x=x, valid=valid, q=q, k=k, at=at, rows=alive, scale=scale, causal=True)
            method = reducer("pagerank", **knobs)
            assert isinstance(method, Scorer)
            torch.testing.assert_close(method.score(tokens), wanted, rtol=2e-3, atol=TINY)


def rounds(case: Case) -> list[int]:
    """The r of each round, from the parameter or the case's description."""
    if "param.r" in case:
        return [int(r) for r in case["param.r"].flatten()]
    found = re.search(r"r list \[([\d, ]+)\]", case.said) or re.search(r"r=(\d+)", case.said)
    assert found, f"no r for {case.name}"
    return [int(r) for r in found[1].split(",")]


def check_merge(case: Case) -> None:
    x, other = case["in.x"], [name for name in case.names("in") if name != "x"]
    metric = case[f"in.{other[0]}"] if other else None
    start, given, compared = x, metric, 0
    for n, r in enumerate(rounds(case), 1):
        matched = match(x if metric is None else metric, r)
        if n == 1:
            check_match(case, x.shape[1], matched.source, matched.group, matched.keep)
        x = merge(matched, x)
        metric = None if metric is None else merge(matched, metric)
        for name in case.names("out"):
            if re.search(rf"round_?{n}$", name):
                of_metric = metric is not None and any(w in name for w in ("metric", "key", *other))
                close(metric if of_metric and metric is not None else x, case[f"out.{name}"])
                compared += 1
    assert compared
    own, size = [], start.shape[1]
    while size > x.shape[1]:
        own.append(min(size // 2, size - x.shape[1]))
        size -= own[-1]
    asked, size = [], start.shape[1]
    for r in rounds(case):
        asked.append(min(r, size // 2))
        size -= asked[-1]
    if own == asked:  # the method's own rounds
        done = aim(start, given, x.shape[1])
        assert done.x is not None
        assert torch.equal(done.x, x)


def check_match(case: Case, size: int, source: Tensor, group: Tensor, keep: Tensor) -> None:
    """The first round's decisions."""
    if "mid.src_idx" not in case:
        return
    left, into = case["mid.unm_idx"].squeeze(-1), case["mid.dst_idx"].squeeze(-1)
    assert torch.equal(source, 2 * case["mid.src_idx"].squeeze(-1))
    assert torch.equal(keep[:, : left.shape[1]], 2 * left)
    assert torch.equal(keep[:, left.shape[1] :], torch.arange(1, size, 2).expand(len(keep), -1))
    assert torch.equal(group.gather(1, source), left.shape[1] + into)


def aim(x: Tensor, keys: Tensor | None, budget: int) -> Reduction:
    """The method itself; keys come in heads."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    if keys is None:
        return reducer("aim-merge-tokens", order="released").reduce(
            Tokens(x=x, valid=valid), [budget] * len(x)
        )
    k = heads(keys)
    at = torch.arange(x.shape[1]).expand(len(x), -1)
    return reducer("aim-merge", order="released").reduce(
        Tokens(x=x, valid=valid, q=k, k=k, at=at), [budget] * len(x)
    )


def heads(states: Tensor) -> Tensor:
    """(B, L, C) in two heads where C is even, as the session shows them."""
    count = 2 if states.shape[-1] % 2 == 0 else 1
    return states.unflatten(-1, (count, -1)).transpose(1, 2)


def check_schedule(case: Case) -> None:
    length = len(case["out.retain_rate" if "out.retain_rate" in case else "out.keep"])
    first = {32: 13}.get(length, length // 2)
    # The mask made after layer l acts in layer l + 1: boundary l + 1.
    schedule = Schedule.ramp(start=first, stop=first + 8).resolve(length + 1)
    assert schedule.alive[0] == 1
    if "out.retain_rate" in case:
        assert list(schedule.alive[1:]) == pytest.approx(
            case["out.retain_rate"].tolist(), abs=1e-12
        )
        return
    scores, wanted = case["in.scores"], case["out.keep"]
    begin, end = (int(n) for n in case["param.boundaries"].reshape(-1, 3)[0, :2])
    alive = torch.ones(wanted.shape[1], end - begin, dtype=torch.bool)
    for layer in range(length):
        rate, size = schedule.alive[layer + 1], end - begin
        count = int(size * rate)
        if count or rate == 0:  # else: DEPARTURES["at least one"]
            assert schedule.count(layer + 1, size) == count
        best = top(scores[layer, :, begin:end], alive, [count] * len(alive)).keep
        alive = torch.zeros_like(alive).scatter(1, best, True)
        keep = torch.ones_like(wanted[layer])
        keep[:, begin:end] = alive
        assert torch.equal(keep, wanted[layer])
        if "out.visual_kept" in case:
            assert count == int(case["out.visual_kept"].reshape(length, -1)[layer, 0])


# --- PruMerge -------------------------------------------------------------------------------------


def check_outliers(case: Case) -> None:
    attn = case["in.attn"]
    ratio = float(outlier_ratio(attn))
    assert ratio == float(case["out.ratio"])
    if "out.count" in case:
        assert round(ratio * attn.numel()) == int(case["out.count"])
        if len(attn) == 1:  # else: DEPARTURES["flattened batch"]
            assert int(outlier_count(attn)) == int(case["out.count"])
    if "out.kept" in case:  # DEPARTURES["floor"]
        assert int(attn.shape[-1] * ratio) == int(case["out.kept"])


def image_tokens(q: Tensor, k: Tensor, x: Tensor, cls: int | None) -> Tokens:
    """q (B, 1, C) is the one query that counts; k (B, L, C)."""
    first = 0 if cls is None else 1
    states = q.expand_as(k) if cls is None else torch.zeros_like(k)
    if cls is not None:
        states[:, :1] = q
    return Tokens(
        x=x,
        valid=torch.ones(x.shape[:2], dtype=torch.bool),
        q=heads(states),
        k=heads(k),
        at=torch.arange(first, k.shape[1]).expand(len(x), -1),
        rows=torch.ones(k.shape[:2], dtype=torch.bool),
        cls=cls,
    )


def looked(tokens: Tokens, keys: Tensor) -> Image:
    assert tokens.q is not None and tokens.k is not None and tokens.at is not None
    return Image(tokens.x, keys, cls_attention(tokens.q, tokens.k, tokens.at, tokens.cls))


def check_rows(image: Image, idx: Tensor, features: Tensor) -> None:
    """The released merge over ``idx`` (B, K), and its extra token, through the operations."""
    chosen = torch.zeros(image.attn.shape, dtype=torch.bool).scatter(1, idx, True)
    close(
        torch.cat((neighbourhood(image, idx, chosen, Rule())[0], leftover(image, chosen)), 1),
        features,
    )


def check_budget(name: str, tokens: Tokens, idx: Tensor, features: Tensor) -> None:
    """The method with the released count as its budget."""
    groups, kept = idx.shape
    if 0 < kept < tokens.x.shape[1] - 1:
        done = reducer(name).reduce(tokens, [kept + 1] * groups)
        assert torch.equal(done.keep[:, :kept], idx) and done.x is not None
        close(done.x, features)


def check_adaptive(done: Reduction, b: int, count: int, idx: Tensor, features: Tensor) -> None:
    """One image of the adaptive method; ``count`` outliers, ``idx`` (K,) what was released."""
    kept = int(done.count[b]) - 1
    assert kept == max(1, count) and done.x is not None
    assert torch.equal(done.keep[b, : len(idx)], idx)  # DEPARTURES["floor"]: one more follows
    if kept == len(idx):
        close(done.x[b, : kept + 1], features)


def fixed(case: Case) -> bool:
    """Whether the count was given and not found."""
    return "adaptive=False" in case.said or "training" in case.said


def check_base(case: Case) -> None:
    k, hidden, idx = case["in.k"], case["in.hidden"], case["out.idx"]
    tokens = image_tokens(case["in.q_cls"], k, hidden[:, 1:], 0)
    image = looked(tokens, k[:, 1:])
    if "mid.cls_attn" in case:
        close(image.attn, case["mid.cls_attn"])
    check_rows(image, idx, case["out.features"])
    check_budget("prumerge", tokens, idx, case["out.features"])
    if fixed(case):
        return
    ratio = float(outlier_ratio(image.attn))  # DEPARTURES["flattened batch"]
    assert int(image.attn.shape[1] * ratio) == idx.shape[1]
    if "mid.reduction_ratio" in case:
        assert ratio == float(case["mid.reduction_ratio"])
    done = reducer("prumerge").reduce(tokens, None)
    counts = outlier_count(image.attn).tolist()
    assert (done.count - 1).tolist() == [max(1, n) for n in counts]
    if len(idx) == 1:
        check_adaptive(done, 0, counts[0], idx[0], case["out.features"][0])


def check_video(case: Case) -> None:
    k, x = case["in.k"], case["in.hidden"]
    tokens = image_tokens(case["in.q_mean"], k, x, None)
    image = looked(tokens, k)
    if "mid.attn" in case:
        close(image.attn, case["mid.attn"])
    done = reducer("prumerge").reduce(tokens, None)
    counts, kept = outlier_count(image.attn).tolist(), case["out.kept_per_frame"].tolist()
    indices = case["out.idx"].split(kept)
    features = case["out.features"].split([n + 1 for n in kept])
    for b, n in enumerate(counts):
        assert int(x.shape[1] * (n / x.shape[1])) == kept[b]
        one = slice(b, b + 1)
        frame = Image(image.x[one], image.keys[one], image.attn[one])
        check_rows(frame, indices[b][None], features[b][None])
        alone = image_tokens(case["in.q_mean"][one], k[one], x[one], None)
        check_budget("prumerge", alone, indices[b][None], features[b][None])
        check_adaptive(done, b, n, indices[b], features[b])


def check_plus(case: Case) -> None:
    k, hidden, idx = case["in.k"], case["in.hidden"], case["out.idx"]
    tokens = image_tokens(case["in.q_cls"], k, hidden[:, 1:], 0)
    image = looked(tokens, k[:, 1:])
    if "mid.cls_attn" in case:
        close(image.attn, case["mid.cls_attn"])
    order = image.attn.argsort(dim=-1, descending=True, stable=True)
    if fixed(case):
        check_duplicates(case, tokens, image, order)
        return
    check_rows(image, idx, case["out.features"])
    size, ratio = image.attn.shape[1], float(outlier_ratio(image.attn))
    most = int(size * ratio)
    assert torch.equal(order[:, :most], idx[:, :most])
    done = reducer("prumerge+").reduce(tokens, None)
    assert torch.equal(done.keep[:, :most], idx[:, :most]) and done.x is not None
    if int(1 / ratio) >= 6:  # else: DEPARTURES["stride 1"]
        assert torch.equal(done.keep[:, :-1], idx)
        close(done.x, case["out.features"])
    else:
        samples = done.keep[0, most:-1].tolist()
        assert samples == [j for j in range(0, size - 1, 2) if j not in idx[0, :most].tolist()]


def check_duplicates(case: Case, tokens: Tokens, image: Image, order: Tensor) -> None:
    """DEPARTURES["duplicates"]: half by attention, half a grid, of which some are the same."""
    idx, features, size = case["out.idx"], case["out.features"], image.attn.shape[1]
    most = size // 8
    assert torch.equal(idx[:, :most], order[:, :most])
    grid = torch.arange(4, size - 1, 8)
    assert torch.equal(idx[:, most:], grid.expand(len(idx), -1))
    untouched = 0
    for b, kept in enumerate(idx.tolist()):
        doubled = {j for j in kept if kept.count(j) > 1}
        pruned = [j for j in range(size) if j not in kept]
        lost, pool = pruned[: len(kept) - len(set(kept))], pruned[len(kept) - len(set(kept)) :]
        if "mid.compl" in case:
            assert case["mid.compl"][b].tolist() == pool
        one = Image(image.x[b : b + 1], image.keys[b : b + 1], image.attn[b : b + 1])
        chosen = torch.zeros(1, size, dtype=torch.bool)
        chosen[0, kept] = True
        x, near = neighbourhood(one, idx[b : b + 1], chosen, Rule())
        taken = near[0] > -torch.inf
        own = torch.tensor([j in doubled for j in kept])
        rows = ~(own | taken[:, sorted(doubled | set(lost))].any(dim=1))
        untouched += int(rows.sum())
        scale = float(features[b].abs().max())
        assert not rows.any() or float((x[0] - features[b, :-1])[rows].abs().max()) <= 2e-5 * scale
        left = torch.ones(1, size, dtype=torch.bool)
        left[0, pool] = False
        assert float((leftover(one, left)[0, 0] - features[b, -1]).abs().max()) <= 2e-5 * scale
    assert untouched
    done = reducer("prumerge+").reduce(tokens, [idx.shape[1] + 1] * len(idx))
    assert all(len(set(keep)) == idx.shape[1] + 1 for keep in done.keep.tolist())


# --- FastV ----------------------------------------------------------------------------------------


def check_fastv(case: Case) -> None:
    row, begin, size = (
        case["in.last_row"].double(),
        int(case["param.start"]),
        int(case["param.n_img"]),
    )
    _, count, length = row.shape
    tokens = Tokens(
        x=torch.zeros(1, size, 1),
        valid=torch.ones(1, size, dtype=torch.bool),
        q=torch.ones(1, count, length, 1, dtype=torch.float64),
        k=whole(row, begin, size).log()[..., None],
        at=torch.arange(begin, begin + size)[None],
        causal=True,
    )
    text = [j for j in range(length) if not begin <= j < begin + size]
    for name in [name for name in case.names("out") if name.startswith("keep_")]:
        wanted = case[f"out.{name}"].flatten()
        budget = len(wanted) - len(text)
        if name == "keep_hf" and "param.r" in case:
            assert budget == round(size * (1 - float(case["param.r"])))
        for method in (reducer("fastv"), reducer("attention", query="last")):
            kept = method.reduce(tokens, [budget]).keep[0] + begin
            assert sorted(kept.tolist() + text) == wanted.tolist()
    if "out.top_hf_order" in case:
        method = reducer("fastv")
        assert isinstance(method, Scorer)
        order = method.score(tokens)[0].argsort(descending=True, stable=True) + begin
        wanted = case["out.top_hf_order"].flatten()
        assert torch.equal(order[: len(wanted)], wanted)


def whole(row: Tensor, begin: int, size: int) -> Tensor:
    """``row`` (1, H, L) with sums of 1, so that the softmax of its logarithm is the row itself.

    The archive holds it in float16; what rounding took or gave goes to the largest text column,
    which is not ranked.
    """
    text = row.clone()
    text[..., begin : begin + size] = 0
    at = text.argmax(dim=-1, keepdim=True)
    whole = row.scatter_add(-1, at, 1 - row.sum(dim=-1, keepdim=True))
    assert float(whole.min()) >= 0
    return whole


# --- VisionZip ------------------------------------------------------------------------------------


def check_visionzip(case: Case) -> None:
    """Through the method, of whose [CLS] attention and keys q and k are made."""
    rows, hidden, metric = case["in.cls_attn"], case["in.hidden"], case["in.metric"]
    dominant, contextual = int(case["param.dominant"]), int(case["param.contextual"])
    groups, count, length = rows.shape
    # As many heads again attend to nothing and undo what the others add to the mean key.
    logits = whole(rows.double(), 1, length - 1).log()
    logits = torch.cat((logits, -logits), dim=1)[..., None]
    keys = metric.double()[:, None].expand(-1, 2 * count, -1, -1)
    k = torch.cat((logits, keys), dim=-1)
    q = torch.zeros_like(k)
    q[:, :count, :, 0] = 1
    tokens = Tokens(
        x=hidden[:, 1:],
        valid=torch.ones(groups, length - 1, dtype=torch.bool),
        q=q,
        k=k,
        at=torch.arange(1, length).expand(groups, -1),
        rows=torch.ones(groups, length, dtype=torch.bool),
        cls=0,
    )
    budget = dominant + contextual
    method = reducer("visionzip", contextual=contextual / budget)
    done = method.reduce(tokens, [budget] * groups)
    assert done.x is not None and done.group is not None
    # DEPARTURES["[CLS]"]: row 0 there
    assert torch.equal(
        done.keep[:, :dominant] + 1, case["out.all_indices"][:, 1:].sort(dim=-1).values
    )
    close(done.x, case["out.tokens"][:, 1:])
    for b, kept in enumerate(done.keep.tolist()):
        rest = [j for j in range(length - 1) if j not in kept[:dominant]]
        assert kept[dominant:] == [rest[i] for i in case["mid.target_indices"].tolist()]
        others = [j for j in rest if j not in kept]
        assert (done.group[b, others] - dominant).tolist() == case["mid.assign"][b].tolist()


# --- DivPrune, CDPruner, DART ---------------------------------------------------------------------


def plain(x: Tensor) -> Tokens:
    """Vectors (B, N, D) and nothing else."""
    return Tokens(x=x, valid=torch.ones(x.shape[:2], dtype=torch.bool))


def check_divprune(case: Case) -> None:
    x, order = case["in.x"][None], case["out.order"]
    tokens, count = plain(x), len(order)
    assert count == round(float(case["param.ratio"]) * x.shape[1])
    ours = max_min(cosines(x), tokens.valid, count)[0]
    kept = reducer("divprune").reduce(tokens, [count]).keep[0]
    assert torch.equal(kept, ours.sort().values)
    if "duplicates" in case.name:  # DEPARTURES["same token"]
        assert len(set(ours.tolist())) == count
        same = cosines(x)[0][order][:, ours] > 1 - 1e-5
        assert bool(same.any(dim=0).all()) and bool(same.any(dim=1).all())
        return
    assert torch.equal(ours, order)
    assert torch.equal(kept, case["out.sorted"])


def check_cdpruner(case: Case) -> None:
    """DEPARTURES["batch of crops"] and ["text tower"]."""
    x, mask, count = case["in.feat"], case["out.mask"], int(case["param.T"])
    valid = torch.ones_like(mask)
    likeness = unit(case["in.image_embeds"]) @ unit(case["in.text_embeds"]).mT
    flat = stretched(-likeness.mean(dim=-1).flatten()[None], valid.flatten()[None])
    close(flat.view(mask.shape), case["mid.relevance"])
    picks = dpp(cosines(x), case["mid.relevance"], valid, count)
    assert torch.equal(torch.zeros_like(mask).scatter(1, picks, True), mask)
    if "out.select_idx" in case:
        assert torch.equal(picks.sort(dim=-1).values, case["out.select_idx"].view_as(picks))


def check_dart(case: Case) -> None:
    """DEPARTURES["set order"]: its pivots and their order, and what they take."""
    hidden, keys = case["in.hidden"], case["in.keys"]
    first, size = int(case["param.start"]), int(case["param.n"])
    images, texts = int(case["param.pivot_image"]), int(case["param.pivot_text"])
    wanted = case["out.kept"] - first
    tokens = Tokens(
        x=hidden[:, first : first + size],
        valid=torch.ones(1, size, dtype=torch.bool),
        q=keys,
        k=keys,
        at=torch.arange(first, first + size)[None],
        rows=torch.ones(1, hidden.shape[1], dtype=torch.bool),
        causal=True,
        instruction=(hidden.shape[1] - first - size,),
        hidden=hidden,
    )
    method = reducer("dart", image_pivots=images, text_pivots=texts)
    assert isinstance(method, Dart)
    spoken, _ = method.spoken(tokens, keys.abs().sum(dim=(1, 3)))
    pivots = method.reduce(tokens, [images]).keep[0].tolist()  # no budget for others
    order = list({*(first + j for j in pivots), *spoken[0].tolist()})
    each, over = divmod(len(wanted) - images, images + texts)
    assert not over and len(wanted) <= size
    chosen = torch.zeros(1, size, dtype=torch.bool)
    chosen[0, pivots] = True
    cosine = unit(hidden[:, order]) @ unit(tokens.x).mT
    taken = least_alike(cosine, ~chosen, torch.full((1, len(order)), each))
    assert (chosen | taken)[0].nonzero().flatten().tolist() == wanted.tolist()
    kept = set(method.reduce(tokens, [len(wanted)]).keep[0].tolist())
    assert len(kept) == len(wanted) and kept >= set(pivots)


# --- PyramidDrop ----------------------------------------------------------------------------------


def check_pyramiddrop(case: Case) -> None:
    """The case's batch is one sample, without padding."""
    x, begin, size = case["in.features"], int(case["param.pos"]), int(case["param.n"])
    assert x.shape[1] == size + int(case["param.prompt_len"])  # the last row asks
    q, k = (  # DEPARTURES["next layer"]
        rotated((x @ case[f"in.{name}"].T).unflatten(-1, (int(case["param.heads"]), -1)))
        for name in ("wq", "wk")
    )
    tokens = Tokens(
        x=x[:, begin : begin + size],
        valid=torch.ones(1, size, dtype=torch.bool),
        q=q,
        k=k,
        at=torch.arange(begin, begin + size)[None],
        scale=q.shape[-1] ** -0.5,
        causal=True,
    )
    method = reducer("pyramiddrop")
    assert isinstance(method, Scorer)
    close(method.score(tokens)[0], case["mid.score_last"])
    wanted = case["out.top_rank_index_last"] - begin
    assert len(wanted) == Schedule.pyramid().resolve(32).count(8, size)
    kept = method.reduce(tokens, [len(wanted)]).keep
    assert torch.equal(kept[0], wanted)
    text = torch.ones(x.shape[1], dtype=torch.bool)
    text[begin : begin + size] = False
    left = text.index_fill(0, begin + kept[0], True)
    assert torch.equal(x[:, left], case["out.embeds"])


def rotated(states: Tensor) -> Tensor:
    """(B, L, H, d) to (B, H, L, d), turned by their places 0..L-1: base 10000, by halves."""
    states, width = states.transpose(1, 2), states.shape[-1]
    turn = 10000.0 ** (-torch.arange(0, width, 2).float() / width)
    angle = torch.arange(states.shape[2])[:, None] * turn
    cos, sin = (torch.cat((f(angle), f(angle)), dim=-1) for f in (torch.cos, torch.sin))
    left, right = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-right, left), dim=-1) * sin


# --- SparseVLM ------------------------------------------------------------------------------------


def check_sparsevlm(case: Case) -> None:
    embeds, rows = case["in.embeds"], case["in.rater_rows"].double()
    begin, size = int(case["param.v_start"]), int(case["param.n"])
    length = embeds.shape[1]
    tail = length - begin - size
    entered = torch.zeros(1, length, dtype=torch.bool)
    entered[:, begin : begin + size] = True
    share = relevance(embeds, entered, torch.ones(1, tail, dtype=torch.bool))
    close(share, case["mid.text_score"])
    raters = case["out.rater_idx"].flatten()
    assert (share[0] > share[0].mean()).nonzero()[:, 0].tolist() == raters.tolist()
    # Queries pick a rater's row out of the keys, which hold the logarithms of all rows.
    given = torch.stack([whole(rows[:, :, r], begin, size) for r in range(rows.shape[2])], 2)
    count, heads = len(raters), rows.shape[1]
    q = torch.zeros(1, heads, length, count, dtype=torch.float64)
    for r, place in enumerate(raters.tolist()):
        q[:, :, begin + size + place, r] = 1
    tokens = Tokens(
        x=torch.zeros(1, size, 1),
        valid=torch.ones(1, size, dtype=torch.bool),
        q=q,
        k=given.log().mT,
        at=torch.arange(begin, begin + size)[None],
        instruction=(tail,),
        embeds=embeds,
        entered=entered,
    )
    method = reducer("sparsevlm", recycle=0)
    close(method.score(tokens).float(), case["out.visual_score"])  # type: ignore[attr-defined]
    wanted = case["out.mask"][0].nonzero()[:, 0]
    assert torch.equal(method.reduce(tokens, [len(wanted)]).keep[0], wanted)


CHECKS: dict[str, Callable[[Case], None]] = {
    "aim_importance": check_importance,
    "aim_merge": check_merge,
    "aim_schedule": check_schedule,
    "cdpruner": check_cdpruner,
    "dart": check_dart,
    "divprune": check_divprune,
    "fastv": check_fastv,
    "prumerge_base": check_base,
    "prumerge_outlier": check_outliers,
    "prumerge_plus": check_plus,
    "prumerge_siglip_video": check_video,
    "visionzip": check_visionzip,
    "pyramiddrop": check_pyramiddrop,
    "sparsevlm": check_sparsevlm,
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.archive}-{case.name}")
def test_golden(case: Case) -> None:
    known = [name for name in CHECKS if case.archive.startswith(name)]
    assert known, f"no check for {case.archive}"
    CHECKS[max(known, key=len)](case)


def test_golden_is_there() -> None:
    if not CASES:
        pytest.skip(f"no golden arrays in {folder()}; set FOVEATE_GOLDEN")
