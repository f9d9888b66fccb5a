"""Peers: the same recipes as others carry them out, and the same output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

import foveate
from foveate import peers
from foveate.adapter import family
from foveate.peers import loops, masking
from foveate.peers.prefill import additive
from foveate.reducers.fastv import FastV
from foveate.shapes import Prompt, inputs

STEPS = 4
BESIDE = Path(__file__).resolve().parents[2] / "shared" / "golden"
GOLDEN = Path(os.environ.get("FOVEATE_GOLDEN") or BESIDE)
LATE = foveate.Schedule.ramp(0.5, start=1, stop=5)
VIDEO = foveate.recipe("aim", keep=0.5, at="tokens", start=1, stop=4)
CASES = {
    "aim": ("masking", foveate.recipe("aim", keep=0.5)),
    "aim, at the tokens": (
        "masking",
        foveate.recipe("aim", keep=0.5, at="tokens", start=1, stop=4),
    ),
    "pagerank alone": ("masking", foveate.recipe("pagerank", keep=0.3, before=3)),
    "pagerank, other knobs": (
        "masking",
        foveate.recipe("pagerank", keep=0.5, temperature=1.0, iterations=2, damping=0.15),
    ),
    "fastv": ("rerun", foveate.recipe("fastv", keep=0.25)),
    "fastv before 4": ("rerun", foveate.recipe("fastv", keep=0.5, before=4)),
    "prumerge": ("loops", foveate.recipe("prumerge")),
    "prumerge of 9": ("loops", foveate.recipe("prumerge", keep=0.25)),
    "prumerge+": ("loops", foveate.recipe("prumerge+", keep=0.5, neighbours=4)),
    "prumerge without extra": ("loops", foveate.recipe("prumerge", keep=0.25, extra=False)),
}


@torch.no_grad()
def said(model: Any, recipe: foveate.Recipe, how: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Logits of the last prompt row and of each step (B, steps, V), and the report."""
    with how(model, recipe) as report:
        out = model.generate(
            **given,
            max_new_tokens=STEPS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    return torch.stack(out.logits, 1), report


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llava", "internvl"])
def test_a_peer_says_what_foveate_says(models, name: str, case: str, batch: int) -> None:
    """Dropping equals masking, a map made twice is the same map, a loop adds up the same."""
    model, (peer, recipe) = models(name), CASES[case]
    given = inputs(model, Prompt(batch, ragged=True, text_tokens=9))
    ours, _ = said(model, recipe, foveate.reduced, given)
    theirs, _ = said(model, recipe, peers.PEERS[peer].reduced, given)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)
    dense = said(model, foveate.Recipe(foveate.Schedule.flat(1.0)), foveate.reduced, given)[0]
    assert float((dense - ours).abs().max()) > 1e-2  # it would be seen if nothing were reduced


def test_video_under_masking(models) -> None:
    """Frames are merged one by one; the newline at the end is kept and can be hidden."""
    model = models("llava-onevision")
    given = inputs(model, Prompt(2, frames=3, ragged=True))
    ours, report = said(model, VIDEO, foveate.reduced, given)
    theirs, _ = said(model, VIDEO, masking.reduced, given)
    assert report.alive[0] == [3 * 4 + 1] * 2
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)


def test_a_peer_hides_the_same_rows(models) -> None:
    """Survivors, layer by layer."""
    model, recipe = models("llava"), foveate.Recipe(
        LATE, foveate.reducer("aim-merge"), foveate.reducer("pagerank")
    )  # fmt: skip
    given = inputs(model, Prompt())
    hidden: list[Tensor] = []
    original = masking._Run.before

    def spy(self: Any, index: int, *rest: Any) -> Any:
        out = original(self, index, *rest)
        hidden.append(self.alive)
        return out

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(masking._Run, "before", spy)
        with masking.reduced(model, recipe) as theirs:
            model(**given)
        with foveate.reduced(model, recipe) as ours:
            model(**given)
    entered = ours.slots[0][0]
    assert [entered[alive[0]].tolist() for alive in hidden] == [s[0].tolist() for s in ours.slots]
    assert [len(s[0]) for s in ours.slots] == [58, 58, 53, 49, 44, 40]
    assert theirs.rows == [[58]] * 6  # nothing is removed


def test_masking_holds_as_much_as_ever_and_the_others_do_not(models) -> None:
    """The cache's length per layer."""
    model, given = models("llava"), inputs(models("llava"), Prompt())

    def held(how: Any, name: str, keep: float) -> list[int]:
        with how(model, foveate.recipe(name, keep=keep)), torch.no_grad():
            cache = model(**given).past_key_values
        return [layer.keys.shape[2] for layer in cache.layers]

    assert held(foveate.reduced, "pagerank", 0.25) == [76, 76, 49, 49, 49, 49]
    assert held(masking.reduced, "pagerank", 0.25) == [76] * 6
    assert held(peers.PEERS["rerun"].reduced, "fastv", 0.25) == [76, 76, 49, 49, 49, 49]
    assert held(peers.PEERS["loops"].reduced, "prumerge", 0.25) == [49] * 6


def test_what_makes_peers_slow_really_happens(models, monkeypatch) -> None:
    """A map in every layer; a layer run twice; a turn of the loop for every token."""
    model, given = models("llava"), inputs(models("llava"), Prompt())
    calls: list[str] = []
    rerun, looped = peers.PEERS["rerun"].reduced, peers.PEERS["loops"].reduced

    @contextmanager
    def counted(owner: Any, name: str) -> Iterator[None]:
        plain = getattr(owner, name)

        def note(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return plain(*args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, note)
            yield

    with torch.no_grad():
        with counted(masking, "importance"), masking.reduced(model, foveate.recipe("aim")):
            model(**given)
        assert calls == ["importance"] * 6
        calls.clear()
        layer = family(model).text(model).layers[1].self_attn
        with counted(layer, "forward"), rerun(model, CASES["fastv"][1]):
            model(**given)
        assert calls == ["forward"] * 2
        calls.clear()
        with counted(Tensor, "topk"), looped(model, CASES["prumerge of 9"][1]):
            model(**given)
        assert calls == ["topk"] * 8  # and the ninth is the extra token


@torch.no_grad()
def test_nothing_is_left_on_the_model() -> None:
    model = tiny.llava()
    given = inputs(model, Prompt())
    before = model(**given).logits
    kept = {id(m): (set(vars(m)), vars(m).get("config")) for m in model.modules()}
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    counts = [len(getattr(m, kind)) for m in model.modules() for kind in hooks]
    for peer, recipe in CASES.values():
        with peers.PEERS[peer].reduced(model, recipe):
            model(**given)
        with (
            pytest.raises(RuntimeError, match="stop"),
            peers.PEERS[peer].reduced(model, recipe),
        ):
            raise RuntimeError("stop")
    assert {id(m): (set(vars(m)), vars(m).get("config")) for m in model.modules()} == kept
    assert [len(getattr(m, kind)) for m in model.modules() for kind in hooks] == counts
    assert torch.equal(model(**given).logits, before)


KNOBS: dict[str, dict[str, Any]] = {
    "importance": {},
    "importance_tau1_it3_d015": {"temperature": 1.0, "iterations": 3, "damping": 0.15},
    "importance_tau05_it1": {"temperature": 0.5, "iterations": 1},
}


def test_importance_is_that_of_the_released_code() -> None:
    """Golden arrays: there every row votes."""
    file = GOLDEN / "aim_importance.npz"
    if not file.is_file():
        pytest.skip(f"no golden arrays in {GOLDEN}")
    arrays = np.load(file)
    cases = sorted({key.split(".")[0] for key in arrays.files if key != "meta"})
    assert json.loads(str(arrays["meta"]))
    for case in cases:
        q, k = (torch.from_numpy(arrays[f"{case}.in.{n}"].astype(np.float32)) for n in "qk")
        alive = torch.from_numpy(arrays[f"{case}.in.alive"]).bool()
        rows = q.shape[2]
        mask = additive(alive, rows, rows, q)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = q @ k.mT * q.shape[-1] ** -0.5 + mask
        for key in [key for key in arrays.files if key.startswith(f"{case}.out.")]:
            expected = torch.from_numpy(arrays[key])
            found = masking.importance(logits, **KNOBS[key.split(".out.")[1]])
            scale = float(expected.abs().max())
            torch.testing.assert_close(found, expected, atol=2e-3 * scale, rtol=2e-3)


def test_masks_of_every_kind_become_the_same_sum() -> None:
    """None, one number a key, and the map itself."""
    like, rows = torch.zeros(1), 4
    causal = torch.ones(rows, rows, dtype=torch.bool).tril()
    seen = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    full = causal & seen[:, None, None].bool()
    low = torch.finfo(torch.float32).min
    made = additive(seen, rows, rows, like)
    assert torch.equal(made == 0, full) and torch.equal(made == low, ~full)
    assert torch.equal(additive(full, rows, rows, like), made)
    assert torch.equal(additive(made, rows, rows, like), made)
    assert torch.equal(additive(None, rows, rows, like)[0, 0] == 0, causal)
    assert torch.equal(additive(None, 1, rows, like), torch.zeros(1, 1, 1, rows))


def test_loops_take_every_image_for_itself() -> None:
    draw = torch.Generator().manual_seed(0)
    x, keys = (torch.randn(2, 20, 6, generator=draw) for _ in range(2))
    image = loops.Image(x, keys, torch.rand(2, 20, generator=draw))
    kept = image.attn.argsort(dim=-1, descending=True)[:, :5]
    both = loops.merge(image, kept, torch.tensor([5, 3]), 4)
    assert both.count.tolist() == [6, 4] and both.keep.shape == (2, 6) and both.x is not None
    for b, n in enumerate((5, 3)):
        one = loops.Image(x[b : b + 1], keys[b : b + 1], image.attn[b : b + 1])
        alone = loops.merge(one, kept[b : b + 1, :n], torch.tensor([n]), 4)
        assert alone.x is not None
        assert torch.equal(alone.x[0], both.x[b, : n + 1])
        assert torch.equal(alone.keep[0], both.keep[b, : n + 1])


RECIPES = {name: foveate.recipe(name, keep=0.5) for name in ("aim", "fastv", "prumerge", "pool")}


def test_each_recipe_goes_to_the_peers_that_carry_it_out() -> None:
    made = peers.carried_out(RECIPES, ["loops", "masking", "rerun"])
    assert list(made) == ["prumerge by loops", "aim by masking", "fastv by rerun"]
    assert made["aim by masking"].recipe is RECIPES["aim"]
    assert peers.carried_out(RECIPES, []) == {}
    for peer in peers.PEERS.values():  # what an error names can be typed
        assert peer.serves(foveate.recipe(peer.example))


@pytest.mark.parametrize(
    ("names", "compare", "message"),
    [
        (["pool"], "masking", "masking carries out .*pagerank.*is that: pool. Try --recipe aim"),
        (["aim"], "loops", "loops carries out prumerge.*Try --recipe prumerge"),
        ([], "rerun", "there are none"),
        (["aim"], "maskin", "no peer 'maskin'. Did you mean 'masking'"),
    ],
)
def test_peers_that_are_refused(names: list[str], compare: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        peers.carried_out({name: RECIPES[name] for name in names}, [compare])


def test_other_definitions_are_not_compared() -> None:
    for knobs in ({"weights": "paper"}, {"order": "raster"}):
        assert not peers.PEERS["loops"].serves(foveate.recipe("prumerge", **knobs))


def test_rerun_cuts_once(models) -> None:
    stages = foveate.Schedule.stages({2: 0.5, 4: 0.25})
    recipe = foveate.Recipe(stages, layers=FastV())
    with (
        pytest.raises(ValueError, match=r"cuts once .*the layers \(2, 4\)"),
        peers.PEERS["rerun"].reduced(models("llava"), recipe),
    ):
        pass
