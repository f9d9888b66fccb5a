"""What the encoder's attention saw arrives at the token that its patch becomes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import tiny_masks
import tiny_rope
import torch
from torch import Tensor

from foveate.adapter import Seen, family
from foveate.watch import Watch

ENCODER = {
    "ovis2": "vision_tower.transformer",
    "video-llava": "image_tower",
    "video-llava (video)": "video_tower",
}
CASES = [
    ("aya-vision", ["large"]),
    ("command-a-vision", ["image"]),
    ("internvl-tiles", ["large"]),
    ("llava", ["image"]),
    ("llava-next", ["image", "tall", "large"]),
    ("llava-next-video", ["tall"]),
    ("llava-next-video (video)", ["image"]),
    ("llava-onevision", ["tall", "large"]),
    ("llava-onevision", ["one of several", "one of several"]),
    ("llava-onevision (video)", ["image", "image"]),
    ("molmo-2", ["image", "small"]),
    ("molmo-2", ["video"]),
    ("ovis2", ["large"]),
    ("video-llava", ["image"]),
    ("video-llava (video)", ["image"]),
    ("vip-llava", ["image"]),
]


@pytest.mark.parametrize(("name", "shown"), CASES, ids=str)
@torch.no_grad()
def test_a_patch_is_seen_where_it_is_felt(models, name: str, shown: list[str]) -> None:
    """A changed row of the encoder changes the same tokens in features and in what is observed."""
    model = models(name)
    base, adapter = family(model).base(model), family(model)
    inputs = tiny.prompt(tiny.FAMILIES[name], [shown])
    modality = "video" if "pixel_values_videos" in inputs else "image"
    encode = getattr(base, f"get_{modality}_features")
    call = {k: v for k, v in inputs.items() if k in inspect.signature(encode).parameters}
    rows: dict[str, Any] = {"change": 0.0}

    def changed(_: Any, __: Any, out: Any) -> Any:
        def add(hidden: Tensor) -> Tensor:
            rows["shape"] = hidden.shape
            return hidden + rows["change"]

        out.last_hidden_state = add(out.last_hidden_state)
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(h if h is None else add(h) for h in out.hidden_states)
        return out

    def features() -> Tensor:
        return torch.cat(list(encode(**call).pooler_output))

    hook = base.get_submodule(ENCODER.get(name, "vision_tower")).register_forward_hook(changed)
    try:
        plain = features()
        tiles, length, width = rows["shape"]
        q = torch.randn(tiles, 2, length, 4)

        def observed(q: Tensor) -> Tensor:
            groups = adapter.observe(model, modality, call, [Seen(q, q, 1.0)])
            return torch.cat([group.q[:, group.at] for group in groups], dim=1)

        looked = observed(q)
        assert looked.shape[1] == len(plain)
        felt_at_all = 0
        for row in range(0, tiles * length, 5):
            rows["change"] = torch.zeros(tiles * length, width)
            rows["change"][row] = 3 * torch.randn(width)
            rows["change"] = rows["change"].view(tiles, length, width)
            other = q.clone()
            other[row // length, :, row % length] += 1.0
            felt = (features() - plain).abs().amax(-1) > 1e-6
            seen = (observed(other) - looked).abs().amax((0, 2)) > 1e-6
            assert torch.equal(felt, seen), (row, felt.nonzero(), seen.nonzero())
            felt_at_all += int(felt.any())
        assert felt_at_all > tiles
    finally:
        hook.remove()


def patches_of(model: Any, modality: str, call: dict[str, Any]) -> tuple[list[Seen], Any, Any]:
    """What the encoder's last attention saw; its output as a leaf; the features made of that."""
    seen: list[Seen] = []
    leaf: list[torch.Tensor] = []
    attention = family(model).vision_attention(model)

    def cut_off(module: Any, args: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        leaf.append(first.detach().requires_grad_())
        return (leaf[0], *output[1:]) if isinstance(output, tuple) else leaf[0]

    handle, watch = attention.register_forward_hook(cut_off), Watch([(attention, seen.append)])
    encode = getattr(family(model).base(model), f"get_{modality}_features")
    features = encode(**call, return_dict=True).pooler_output
    watch.remove()
    handle.remove()
    return seen, leaf[0], torch.cat([feature.flatten(0, -2) for feature in features])


MAPPED = [*tiny_rope.FAMILIES, *tiny_masks.FAMILIES]


@pytest.mark.parametrize("name", MAPPED)
def test_a_token_is_seen_as_its_patches_were(models, name: str) -> None:
    """The patches of a token are those that its gradient reaches; their mean is what it saw."""
    model, made = models(name), tiny.FAMILIES[name]
    for shown in ("image", *made.more):
        (picture,) = made.pictures([shown])
        call = picture.make(3)
        modality = "video" if any("video" in key for key in call) else "image"
        seen, leaf, tokens = patches_of(model, modality, call)
        views = family(model).observe(model, modality, call, seen)
        assert sum(picture.groups) == len(tokens)
        assert [len(view.at) for view in views] == list(picture.groups)
        for part in ("q", "k"):
            rows = torch.cat([getattr(s, part).transpose(1, 2).flatten(0, 1) for s in seen])
            found = torch.cat([getattr(view, part)[:, view.at] for view in views], 1)
            for t, token in enumerate(tokens):
                (slope,) = torch.autograd.grad(token.sum(), leaf, retain_graph=True)
                own = slope.flatten(0, -2).abs().sum(-1) > 0
                assert torch.allclose(found[:, t], rows[own].mean(0), atol=1e-6)
