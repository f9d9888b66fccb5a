"""The trained part of pinhole: a projector and low-rank deltas, and how they join the base.

File layout (safetensors, bf16). Names are those of ``LlavaForConditionalGeneration.state_dict()``:
``NAME`` replaces that tensor; ``NAME.lora_a`` (r, in) and ``NAME.lora_b`` (out, r) add ``b @ a``.
The header's metadata says what was trained on what, for how long and under which licences.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

State = dict[str, torch.Tensor]

A, B = ".lora_a", ".lora_b"


def file() -> Path:
    """Where the trained weights are in the package."""
    return Path(__file__).with_name("weights.safetensors")


def merge(state: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor]) -> State:
    """The base ``state`` (float32) with the trained tensors joined in."""
    merged = dict(state)
    for name, tensor in trained.items():
        if name.endswith(A):
            target = name.removesuffix(A)
            delta = trained[target + B].float() @ tensor.float()
            merged[target] = merged[target].float() + delta
        elif not name.endswith(B):
            merged[name] = tensor.float()
    unknown = sorted(set(merged) - set(state))
    if unknown:
        raise ValueError(f"trained weights name tensors pinhole does not have: {unknown[:3]}")
    return merged
