"""Where time goes: no host synchronisation, no loop over samples, no work on unarmed layers.

Operations are told to be foveate's by the stack: whoever is nearest to the call, foveate or the
model's own code. So what a model does with its inputs is not counted, nor what its kernels do.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from test_contract import REFUSED, recipe_of
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate import Recipe, Schedule, Scorer, Tokens
from foveate.ops import pagerank
from foveate.ops.attention import received
from foveate.prompt import Flags
from foveate.reducer import discover

OURS = f"{Path(foveate.__file__).parent}/"
MODELS = tuple(f"/transformers/{part}" for part in ("models/", "integrations/", "cache_utils.py"))
METHODS = sorted(discover())
FAMILIES = sorted(tiny.FAMILIES)
BOTH = Recipe(
    Schedule.ramp(0.5, start=2, stop=5),
    entrance=foveate.reducer("prumerge"),
    layers=foveate.reducer("pagerank"),
)
# The only reads: which rows of a prompt are what, and the grids and sizes of its images.
READS = {"prompt.py:read", "entrance.py:_read"}
READERS = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"}
SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2"}


def batch(family: str, images: list[int]) -> dict[str, Any]:
    return tiny.prompt(tiny.FAMILIES[family], images)


def place() -> str:
    """``file:function`` of foveate that is running, or nothing while the model's own code is."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(OURS) and not code.co_name.startswith("__torch_"):
            return f"{code.co_filename.removeprefix(OURS)}:{code.co_name}"
        if any(part in code.co_filename for part in MODELS):
            return ""
        frame = frame.f_back
    return ""


class Operations(TorchDispatchMode):
    """foveate's operations, by place; and the largest tensor that one of them made."""

    def __init__(self, everybody: bool = False) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.largest = 0
        self._everybody = everybody

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        where = "everybody" if self._everybody else place()
        if where:
            name = func.overloadpacket.__name__
            self.count[f"{where} {name}"] += 1
            self.largest = max([self.largest, *(t.numel() for t in made(out))])
            waits = name in SYNCHRONISING or (name == "index" and masks(args[1]))
            if waits and not on_the_host(where, args[0]):
                self.waits[where] += 1
        return out


class Reads(TorchFunctionMode):
    """foveate's reads of tensors from Python, by place; some of them dispatch nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READERS and (where := place()):
            self.waits[where] += not on_the_host(where, args[0])
        return func(*args, **(kwargs or {}))


def on_the_host(where: str, tensor: Tensor) -> bool:
    """Whole numbers that an adapter reads are grids and sizes, which ``_read`` brought there."""
    return where.startswith("adapters/") and not tensor.is_floating_point()


def made(out: Any) -> list[Tensor]:
    values = out if isinstance(out, tuple | list) else [out]
    return [value for value in values if isinstance(value, Tensor)]


def masks(indices: Any) -> bool:
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


@dataclass
class Work:
    """What foveate did in a forward."""

    operations: Counter[str]
    waits: Counter[str]
    largest: int


def work(run: Callable[[], Any]) -> Work:
    with torch.no_grad(), Operations() as done, Reads() as reads:
        run()
    return Work(done.count, done.waits + reads.waits, done.largest)


@contextmanager
def prompted(model: Any, recipe: Recipe, inputs: dict[str, Any]) -> Iterator[Callable[[], Any]]:
    """A reduced prompt, and what runs a decoding step after it."""
    with torch.no_grad(), foveate.reduced(model, recipe):
        cache = model(**inputs, use_cache=True).past_key_values
        token = torch.full_like(inputs["input_ids"][:, :1], 7)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(token)], 1)
        given = {"attention_mask": mask, "position_ids": mask.sum(-1, keepdim=True) - 1}
        if any(name.endswith("grid_thw") for name in inputs):  # M-RoPE
            given["position_ids"] = given["position_ids"].expand(3, -1, -1)
        given |= {"input_ids": token, "past_key_values": cache}
        yield lambda: model(**given, use_cache=True)


# The host never waits


@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["single", "padded"])
@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(m, f, marks=() if f == "llava" or m == "both" else pytest.mark.wide)
        for m in [*METHODS, "both"]
        for f in FAMILIES
        if ("prumerge" if m == "both" else m, f) not in REFUSED
    ],
)
def test_a_prompt_is_read_once_and_nothing_after_it(
    models, method: str, family: str, images: list[int]
) -> None:
    model, inputs = models(family), batch(family, images)
    recipe = BOTH if method == "both" else recipe_of(method)
    with foveate.reduced(model, recipe):
        prefill = work(lambda: model(**inputs, use_cache=True))
    assert set(+prefill.waits) <= READS
    assert prefill.waits["prompt.py:read"] == 1
    with prompted(model, recipe, inputs) as step:
        assert not +work(step).waits


@dataclass(frozen=True)
class Careless(Scorer):
    """A method that reads from the device, one way or another."""

    site = "layers"
    how: str = ""

    def score(self, tokens: Tokens) -> Tensor:
        score = tokens.x.norm(dim=-1)
        match self.how:
            case "item":
                return score / score.max().item()
            case "tolist":
                return torch.tensor(score.tolist())
            case "bool":
                return score if score.sum() > 0 else -score
            case "mask":
                return torch.zeros_like(score).masked_fill(~tokens.valid, score[tokens.valid].max())
            case _:
                return score - score.nonzero().sum()


@pytest.mark.parametrize("how", ["item", "tolist", "bool", "mask", "nonzero"])
def test_the_check_sees_a_read(models, monkeypatch, how: str) -> None:
    monkeypatch.setattr(sys.modules[__name__], "OURS", f"{Path(__file__).parent}/")
    model, inputs = models("llava"), batch("llava", [1])
    with foveate.reduced(model, Recipe(Schedule.step(0.5), layers=Careless(how))):
        assert "test_fast_paths.py:score" in work(lambda: model(**inputs)).waits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_never_waits_for_foveate(family: str, monkeypatch) -> None:
    """CUDA's own word: what it warns of while foveate's code is nearest on the stack."""
    model = tiny.FAMILIES[family].build().cuda()
    inputs = {name: value.cuda() for name, value in batch(family, [2, 0, 1]).items()}
    waits: Counter[str] = Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" in str(message) and (where := place()):
            waits[where] += 1

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("always")
        monkeypatch.setattr(warnings, "showwarning", note)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with foveate.reduced(model, BOTH):
                model(**inputs, use_cache=True)
            assert set(waits) <= READS
            torch.cuda.set_sync_debug_mode("default")
            with prompted(model, BOTH, inputs) as step:
                waits.clear()
                torch.cuda.set_sync_debug_mode("warn")
                step()
            assert not waits
        finally:
            torch.cuda.set_sync_debug_mode("default")


# No loop over samples


@pytest.mark.parametrize(
    ("method", "family"),
    [(m, f) for m in [*METHODS, "both"] for f in ["llava", "internvl"] if (m, f) not in REFUSED],
)
def test_a_larger_batch_takes_no_more_operations(models, method: str, family: str) -> None:
    """Families whose own packing goes image by image are left out."""
    model, recipe = models(family), BOTH if method == "both" else recipe_of(method)
    counts = []
    for images in ([2, 0, 1] * 2, [2, 0, 1] * 3):  # no shape is alone, which would be a shortcut
        inputs = batch(family, images)
        with foveate.reduced(model, recipe):
            prefill = work(lambda inputs=inputs: model(**inputs, use_cache=True))
        with prompted(model, recipe, inputs) as step:
            counts.append((prefill.operations, work(step).operations))
    assert counts[0] == counts[1]


# Only armed layers do more, and only for a prompt


def test_layers_below_a_cut_are_as_they_were(models) -> None:
    model = models("llava")
    layers = model.model.language_model.layers
    with foveate.reduced(model, foveate.recipe("fastv", keep=0.5)):
        hooked = [len(layer._forward_pre_hooks) for layer in layers]
        watched = [
            layer.self_attn.config is not model.model.language_model.config for layer in layers
        ]
    assert hooked == [0, 0, 1, 1, 1, 1]
    assert watched == [False, True, False, False, False, False]


def test_decoding_asks_no_method_and_keeps_no_attention(models) -> None:
    asked: list[int] = []

    @dataclass(frozen=True)
    class Counting(Scorer):
        needs_attention = True
        site = "layers"

        def score(self, tokens: Tokens) -> Tensor:
            asked.append(tokens.q.shape[2])
            return tokens.x.norm(dim=-1)

    model, inputs = models("llava"), batch("llava", [1])
    recipe = Recipe(Schedule.stages({1: 0.7, 4: 0.4}), layers=Counting())
    with foveate.reduced(model, recipe):
        model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert asked == [45, 34]


@pytest.mark.parametrize("method", ["fastv", "prumerge"])
def test_a_decoding_step_without_padding_costs_nothing(models, method: str) -> None:
    """But the shift of position ids, where the entrance numbered the prompt anew."""
    model, inputs = models("llava"), batch("llava", [1])
    with prompted(model, foveate.recipe(method, keep=0.5), inputs) as step:
        done = work(step)
    assert done.operations.total() <= (4 if method == "prumerge" else 0)


def test_an_identity_recipe_counts_the_prompt_and_does_nothing_else(models) -> None:
    model, inputs = models("llava"), batch("llava", [2, 0, 1])
    hooks = [len(m._forward_pre_hooks) for m in model.model.language_model.layers.modules()]
    with foveate.reduced(model, foveate.recipe("aim", keep=1.0)):
        assert hooks == [
            len(m._forward_pre_hooks) for m in model.model.language_model.layers.modules()
        ]
        done = work(lambda: model(**inputs))
    assert {key.split(" ")[0] for key in done.operations} <= {
        "session.py:<dictcomp>",
        "prompt.py:two_d",
        "prompt.py:read",
        "prompt.py:begin",
    }
    assert done.operations.total() <= 25
    assert done.largest <= 5 * inputs["input_ids"].numel()  # nothing as wide as the model


# Memory


def test_a_shortened_cache_is_really_smaller(models) -> None:
    """Every layer owns exactly the bytes it shows: no view of a longer tensor."""
    model, inputs = models("llava"), batch("llava", [1])
    with torch.no_grad(), foveate.reduced(model, BOTH) as report:
        out = model(**inputs, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        for steps in range(2):
            layers = out.past_key_values.layers
            owned = [t.untyped_storage().nbytes() for x in layers for t in (x.keys, x.values)]
            row = 2 * model.config.text_config.head_dim * 4
            assert sum(owned) == report.kv_bytes + steps * len(owned) * row
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)


@pytest.mark.parametrize("length", [6_300, 9_500])
def test_pagerank_of_long_video_makes_no_map(length: int, monkeypatch) -> None:
    """Shapes only (meta tensors), with the tiles of a CPU and of a GPU; 28 heads over 4."""
    q = torch.empty(1, 28, length, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 4, length, 128, dtype=torch.bfloat16, device="meta")
    for tile in (pagerank._TILE_BYTES_CPU, pagerank._TILE_BYTES):
        monkeypatch.setattr(pagerank, "_TILE_BYTES", tile)
        with Operations(everybody=True) as done:
            pagerank.pagerank(q, k, scale=0.1)
        assert done.largest <= max(q.numel(), 64 * 28 * length, tile // 4)
        assert done.largest < length * length
    with Operations(everybody=True) as dense:
        pagerank.pagerank(q, k, scale=0.1, block=length)
    assert dense.largest == 28 * length * length


def test_pagerank_of_bfloat16_accumulates_in_float32() -> None:
    q, k = (torch.randn(1, 4, 200, 16).bfloat16() for _ in range(2))
    found = pagerank.pagerank(q, k, scale=0.25, block=64)
    assert found.dtype == torch.float32
    assert torch.equal(found, pagerank.pagerank(q.float(), k.float(), scale=0.25, block=64))


def test_scores_of_a_few_rows_make_no_map() -> None:
    """30 rows of instruction over 6,300, 28 heads."""
    length, rows = 6_300, 30
    q = torch.empty(1, 28, length, 128, dtype=torch.bfloat16, device="meta")
    k = torch.empty(1, 4, length, 128, dtype=torch.bfloat16, device="meta")
    queries = torch.empty(1, rows, dtype=torch.long, device="meta")
    weight = torch.empty(1, rows, device="meta")
    with Operations(everybody=True) as done:
        received(q, k, queries, weight, scale=0.1, causal=True)
    assert done.largest <= 28 * rows * length


# What is counted in a prompt


def test_a_prompt_is_counted() -> None:
    """Against a loop over rows: padding left and right, nothing, no vision, text after vision."""
    draw = torch.Generator().manual_seed(0)
    for trial in range(20):
        length = 12
        vision = torch.rand(4, length, generator=draw) < (trial % 4) / 3
        valid = torch.rand(4, length, generator=draw) < 0.5 + trial % 3 / 2
        valid[:, -1] |= True
        flags, (more,) = Flags.read(valid, vision, [vision])
        real = (vision & valid).tolist()
        for b in range(4):
            last = max((i for i, v in enumerate(real[b]) if v), default=-1)
            assert flags.instruction[b] == sum(valid[b, last + 1 :].tolist())
            assert flags.counts[b] == sum(real[b])
            assert flags.lengths[b] == sum(valid[b].tolist())
            assert more[b] == sum(vision[b].tolist())
        rising = all(x <= y for row in valid.tolist() for x, y in pairwise(row))
        assert flags.flush == rising
        assert (flags.valid is None) == bool(valid.all())
    assert math.isclose(flags.rows, length)
