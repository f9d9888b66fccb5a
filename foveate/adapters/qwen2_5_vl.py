"""Qwen2.5-VL: dynamic resolution, windowed encoder, 2 × 2 patch merger, M-RoPE.

Quirks: survivors keep their 3-D positions. The encoder works in window order and merges four
patches into a token, so observations are averaged over the four and put back into raster order.
Its last layer attends to the whole image (or frame), one call each. Every temporal step of a video
is a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from foveate.adapter import Adapter, Grid, Observed, Seen, Shrink, Shrunk, resized


class Qwen25VL(Adapter):
    """Qwen2.5-VL."""

    family: ClassVar[str] = "Qwen2.5-VL"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2_5_vl",)
    modalities: ClassVar[tuple[str, ...]] = ("image", "video")
    positions: ClassVar[str] = "keep"
    aligned: ClassVar[bool] = False

    def vision_attention(self, model: nn.Module) -> nn.Module:
        return cast(Any, self.base(model)).visual.blocks[-1].attn  # type: ignore[no-any-return]

    def middle_attention(self, model: nn.Module, last: nn.Module, depth: float) -> nn.Module:
        """The nearest layer that attends to the whole image; some of 2.5's see windows."""
        visual = cast(Any, self.base(model)).visual
        every = range(len(visual.blocks))
        wanted, whole = depth * len(every), getattr(visual, "fullatt_block_indexes", every)
        return visual.blocks[min(whole, key=lambda index: abs(index - wanted))].attn  # type: ignore[no-any-return]

    def groups(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[list[int]]:
        steps = [t for t, _, _ in _grid(modality, call)]
        return [[size // t] * t for size, t in zip(sizes, steps, strict=True)]

    def grids(
        self, modality: str, call: Mapping[str, Any], sizes: Sequence[int]
    ) -> list[Grid | None]:
        return [(h // 2, w // 2) for t, h, w in _grid(modality, call) for _ in range(t)]

    def observe(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], seen: Sequence[Seen]
    ) -> list[Observed]:
        visual = cast(Any, self.base(model)).visual
        back = self.raster(visual, call[f"{modality}_grid_thw"])
        sizes = [h * w // 4 for t, h, w in _grid(modality, call) for _ in range(t)]

        def tokens(name: str) -> list[Tensor]:
            rows = torch.cat([getattr(s, name)[0] for s in seen], dim=1)  # (H, patches, d)
            pooled = rows.unflatten(1, (-1, 4)).mean(2)
            if back is not None:
                pooled = pooled.index_select(1, back.to(rows.device, non_blocking=True))
            return list(torch.split(pooled, sizes, dim=1))

        return [
            Observed(q, k, torch.arange(q.shape[1], device=q.device), None, seen[0].scale)
            for q, k in zip(tokens("q"), tokens("k"), strict=True)
        ]

    def raster(self, visual: Any, grid_thw: Tensor) -> Tensor | None:
        """The place in window order of each token, (tokens,); None where there are no windows."""
        return _window_order(visual, grid_thw).argsort()

    def shrink(
        self, model: nn.Module, modality: str, call: Mapping[str, Any], shape: Shrink
    ) -> Shrunk:
        config = cast(Any, model.config).vision_config
        pixels = "pixel_values" if modality == "image" else "pixel_values_videos"
        grids = _grid(modality, call)
        parts = call[pixels].split([t * h * w for t, h, w in grids])
        patches, small, changes = [], [], []
        for part, (t, h, w) in zip(parts, grids, strict=True):
            new = shape((h // 2, w // 2))
            frames = _frames(part, (t, h, w), config)
            size = (new[0] * 2 * config.patch_size, new[1] * 2 * config.patch_size)
            patches.append(_patches(resized(frames, *size), t, config))
            small.append((t, new[0] * 2, new[1] * 2))
            changes += [((h // 2, w // 2), new)] * t
        thw = torch.tensor(small, device=call[pixels].device)
        return {**call, pixels: torch.cat(patches), f"{modality}_grid_thw": thw}, changes


def _grid(modality: str, call: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    return [(t, h, w) for t, h, w in call[f"{modality}_grid_thw"].tolist()]


def _window_order(visual: Any, grid_thw: Tensor) -> Tensor:
    """The encoder's own permutation of tokens into windows, (tokens,)."""
    import importlib

    module = importlib.import_module(type(visual).__module__)
    order, _ = module.get_vision_window_index(
        grid_thw,
        spatial_merge_size=visual.spatial_merge_size,
        window_size=visual.window_size,
        patch_size=visual.patch_size,
        kwargs={},
    )
    return cast(Tensor, order)


def _frames(patches: Tensor, grid: tuple[int, int, int], config: Any) -> Tensor:
    """Flattened patches back to frames (t·T, C, H, W)."""
    (t, h, w), p, m = grid, config.patch_size, config.spatial_merge_size
    x = patches.view(t, h // m, w // m, m, m, config.in_channels, config.temporal_patch_size, p, p)
    x = x.permute(0, 6, 5, 1, 3, 7, 2, 4, 8)  # t T C | h/m m p | w/m m p
    return x.reshape(t * config.temporal_patch_size, config.in_channels, h * p, w * p)


def _patches(frames: Tensor, t: int, config: Any) -> Tensor:
    """Inverse of :func:`_frames`."""
    p, m, (height, width) = config.patch_size, config.spatial_merge_size, frames.shape[-2:]
    x = frames.view(
        t,
        config.temporal_patch_size,
        config.in_channels,
        height // (m * p),
        m,
        p,
        width // (m * p),
        m,
        p,
    )
    return x.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * (height // p) * (width // p), -1)
