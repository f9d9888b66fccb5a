"""What the encoder's attention saw arrives at the token that its patch becomes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from foveate.adapter import Seen, family

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
