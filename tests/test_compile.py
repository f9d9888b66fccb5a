"""torch.compile with a recipe attached, and the attention implementations that can be watched."""

from __future__ import annotations

from typing import Any

import pytest
import tiny
import torch
from test_fast_paths import BOTH, batch
from torch._dynamo.utils import counters
from transformers import AttentionInterface, CompileConfig

import foveate
from foveate import Recipe


@pytest.fixture(autouse=True)
def anew():
    """Each test compiles for itself."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model: Any, inputs: dict[str, Any], **how: Any) -> tuple[Any, Any]:
    """Logits of a generation with a static cache, decoding as it is and compiled."""
    config = CompileConfig(**({"backend": "eager", "mode": None, "fullgraph": True} | how))
    config._compile_all_devices = True  # generate compiles by itself on accelerators only
    more = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False}
    more |= {"output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**inputs, **more, disable_compile=True)
    fast = model.generate(**inputs, **more, compile_config=config)
    return torch.stack(plain.logits), torch.stack(fast.logits)


@pytest.mark.parametrize("family", ["llava", pytest.param("qwen2.5-vl", marks=pytest.mark.heavy)])
def test_decoding_compiles_into_one_graph(family: str) -> None:
    """A padded batch, an entrance and four cuts; no break anywhere."""
    model = tiny.FAMILIES[family].build()
    with foveate.reduced(model, BOTH):
        plain, fast = compiled(model, batch(family, [2, 0, 1]))
    assert torch.allclose(plain, fast, atol=2e-6)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_decoding_compiles_without_vision_too() -> None:
    model = tiny.FAMILIES["llava"].build()
    with foveate.reduced(model, BOTH):
        plain, fast = compiled(model, batch("llava", [0]))
    assert torch.allclose(plain, fast, atol=2e-6)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.fixture
def inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """It needs a C++ compiler and a minute, and its own imports warn."""
    monkeypatch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")  # some module has imported that one


@pytest.mark.heavy
@pytest.mark.usefixtures("inductor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*distutils:UserWarning")
@pytest.mark.parametrize("recipe", [BOTH, foveate.recipe("fastv", keep=0.5)], ids=["both", "fastv"])
def test_decoding_compiles_with_inductor(recipe: Recipe) -> None:
    """What generate does by itself on an accelerator."""
    model = tiny.FAMILIES["llava"].build()
    with foveate.reduced(model, recipe):
        plain, fast = compiled(model, batch("llava", [2, 0, 1]), backend="inductor")
    assert torch.allclose(plain, fast, atol=2e-5)


@pytest.mark.heavy
@torch.no_grad()
def test_a_compiled_prompt_is_right() -> None:
    """With a break at each hook: the rows that are left are chosen by plain Python."""
    model, inputs = tiny.FAMILIES["llava"].build(), batch("llava", [2, 0, 1])
    with foveate.reduced(model, foveate.recipe("fastv", keep=0.5)):
        plain = model(**inputs).logits
        fast = torch.compile(model, backend="eager")(**inputs).logits
    assert torch.allclose(plain, fast, atol=2e-6)
    assert counters["graph_break"]


@pytest.mark.heavy
@pytest.mark.usefixtures("inductor")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*distutils:UserWarning")
@torch.no_grad()
def test_flex_attention() -> None:
    """transformers compiles it."""
    model, inputs = tiny.FAMILIES["llava"].build(), batch("llava", [2, 0, 1])
    with foveate.reduced(model, foveate.recipe("fastv", keep=0.5)):
        expected = model(**inputs).logits[:, -1]
    model.set_attn_implementation({"text_config": "flex_attention"})
    with foveate.reduced(model, foveate.recipe("fastv", keep=0.5)):
        assert torch.allclose(model(**inputs).logits[:, -1], expected, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("images", [[1], [2, 0, 1]], ids=["single", "padded"])
@torch.no_grad()
def test_flash_attention(images: list[int]) -> None:
    pytest.importorskip("flash_attn")
    model = tiny.FAMILIES["llava"].build().to("cuda", torch.bfloat16)
    inputs = {name: value.cuda() for name, value in batch("llava", images).items()}
    found = []
    for implementation in ("sdpa", "flash_attention_2"):
        model.set_attn_implementation({"text_config": implementation})
        with foveate.reduced(model, foveate.recipe("fastv", keep=0.5)):
            found.append(model(**inputs).logits[:, -1].float())
    assert torch.allclose(*found, atol=5e-2)


def test_an_attention_without_a_mask_function_is_refused() -> None:
    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> Any:
        raise AssertionError

    AttentionInterface.register("unmasked", attention)
    model = tiny.FAMILIES["llava"].build()
    model.set_attn_implementation({"text_config": "unmasked"})
    with pytest.raises(ValueError, match=r"'unmasked' has no mask function.*Accepted: eager"):
        foveate.attach(model, BOTH)
    assert foveate.session.session_of(model) is None
