"""pinhole for training: low-rank deltas, many questions an image in one row, nothing done twice.

A row is ``prefix + text``: the prefix is the chat header and the image, the text is any number of
question-answer segments. Every segment sees the prefix and itself, at the positions it would have
alone, so a row gives exactly the losses of the separate single-turn conversations.

Weights are merged once a step (``base + b @ a`` in float32, then bf16), as in the released model,
or the deltas stay apart (``merged=False``), which is less work on a CPU. Layers are plain functions
of tensors, so ``torch.compile`` needs one graph for all of them.

Shapes: B rows, P prefix, S text, T = P + S, D width, L layers, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.pinhole.weights import A, B, State

LANGUAGE = "model.language_model.layers.{}."
VISION = "model.vision_tower.encoder.layer.{}."
PROJECTOR = "model.multi_modal_projector."
LANGUAGE_LINEARS: tuple[str, ...] = (
    *(f"self_attn.{n}_proj" for n in "qkvo"),
    *(f"mlp.{n}_proj" for n in ("gate", "up", "down")),
)
VISION_LINEARS: tuple[str, ...] = (*(f"attention.{n}_proj" for n in "qkvo"), "mlp.fc1", "mlp.fc2")
HEAD = 64
SCALE = 2.0


@dataclass(frozen=True)
class Sizes:
    """What the forward needs to know about the model beyond its weights."""

    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    theta: float = 100_000.0
    norm_eps: float = 1e-5
    vision_layers: int = 11
    vision_heads: int = 6
    vision_eps: float = 1e-6


@dataclass(frozen=True)
class Rows:
    """A batch of packed rows on one device. ``target`` is -100 where nothing is asked."""

    pixels: Tensor  # (B, 3, H, W) normalised, or features (B, n, Dv) made before
    prefix: Tensor  # (P,) token ids, the image's placeholders included
    image: Tensor  # (n,) places in the prefix where the image's tokens stand
    text: Tensor  # (B, S) token ids
    segment: Tensor  # (B, S) number of the segment, -1 padding
    position: Tensor  # (B, S) position, counted from the row's start
    target: Tensor  # (B, S) the token each place should predict next
    weight: Tensor  # (B, S) of that prediction in the loss
    places: Tensor | None = None  # (B, P) positions of the prefix, None when they are 0, 1, 2, …


class Stack(nn.Module):
    """One kind of linear layer in every block: frozen base (L, out, in) and deltas of rank r."""

    base: Tensor

    def __init__(self, base: Tensor, rank: int, seed: torch.Generator) -> None:
        super().__init__()
        depth, out, width = base.shape
        self.register_buffer("base", base.float(), persistent=False)
        start = torch.randn(depth, rank, width, generator=seed) * width**-0.5
        self.a = nn.Parameter(start)
        self.b = nn.Parameter(torch.zeros(depth, out, rank))

    def forward(self) -> Tensor:
        """The merged weights in float32: (L, out, in)."""
        return torch.baddbmm(self.base, self.b, self.a, alpha=SCALE)


class Student(nn.Module):
    """pinhole's frozen base with everything that is trained."""

    def __init__(
        self,
        state: State,
        sizes: Sizes,
        positions: Tensor,
        *,
        rank: int = 48,
        vision_rank: int = 32,
        dtype: torch.dtype = torch.bfloat16,
        merged: bool = True,
    ) -> None:
        """``positions``: the vision tower's position table at the working size (1, N+1, D)."""
        super().__init__()
        self.sizes, self.dtype, self.merged = sizes, dtype, merged
        seed = torch.Generator().manual_seed(1)
        self.language = _stacks(state, LANGUAGE, LANGUAGE_LINEARS, sizes.layers, rank, seed)
        self.vision = _stacks(state, VISION, VISION_LINEARS, sizes.vision_layers, vision_rank, seed)
        names = [k for k in state if k.startswith(PROJECTOR)]
        self.projector = nn.ParameterDict(
            {_safe(k): nn.Parameter(state[k].float().clone()) for k in names}
        )
        frozen = {k: v for k, v in state.items() if _kept(k)} | {"positions": positions}
        self.frozen = nn.ParameterDict(
            {_safe(k): nn.Parameter(v.to(dtype), requires_grad=False) for k, v in frozen.items()}
        )
        self._joined: list[Tensor] = []
        self.block: Callable[..., Tensor] = language_block
        self.vision_block: Callable[..., Tensor] = vision_block

    def compile_blocks(self) -> None:
        """Compile the two blocks; every layer shares their graphs."""
        self.block = torch.compile(language_block, dynamic=False)
        self.vision_block = torch.compile(vision_block, dynamic=False)

    def plain_blocks(self) -> None:
        """Undo ``compile_blocks``."""
        self.block, self.vision_block = language_block, vision_block

    def get(self, name: str) -> Tensor:
        return cast(Tensor, self.frozen[_safe(name)])

    def features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D): the last block but one, without CLS."""
        blocks = range(self.sizes.vision_layers)
        return self.encoded(self.embedded(pixels), self.vision_weights(), blocks)[:, 1:]

    def embedded(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N + 1, D): what the encoder's first block is given."""
        stem = "model.vision_tower.embeddings."
        patches = stem + "patch_embeddings.projection."
        weight, bias = self.get(patches + "weight"), self.get(patches + "bias")
        x = F.conv2d(pixels.to(self.dtype), weight, bias, stride=weight.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        cls = self.get(stem + "cls_token").expand(x.shape[0], -1, -1)
        return torch.cat([cls, x], 1) + self.get("positions")

    def vision_weights(self) -> list[Sequence[Tensor]]:
        """Four weights of every block of the encoder, deltas added."""
        q, k, v, o, up, down = (s() for s in self.vision.values())
        return [w.to(self.dtype).unbind(0) for w in (torch.cat([q, k, v], 1), o, up, down)]

    def encoded(self, x: Tensor, weights: list[Sequence[Tensor]], blocks: range) -> Tensor:
        """(B, N + 1, D) through some of the encoder's blocks, ``weights`` of ``vision_weights``."""
        for index in blocks:
            small = self._vision_small(index)
            x = self.vision_block(x, *(w[index] for w in weights), *small, self.sizes)
        return x

    def _vision_small(self, index: int) -> list[Tensor]:
        at = VISION.format(index)
        qkv = torch.cat([self.get(f"{at}attention.{n}_proj.bias") for n in "qkv"])
        names = ["attention.o_proj.bias", "mlp.fc1.bias", "mlp.fc2.bias", "norm1.weight"]
        names += ["norm1.bias", "norm2.weight", "norm2.bias"]
        names += ["layer_scale1.lambda1", "layer_scale2.lambda1"]
        return [qkv, *(self.get(at + n) for n in names)]

    def project(self, features: Tensor, projector: nn.ParameterDict | None = None) -> Tensor:
        """(B, N, Dv) -> (B, N, D), by another projector if one is given."""
        get = {k: v.to(self.dtype) for k, v in (projector or self.projector).items()}
        one, two = (_safe(PROJECTOR + f"linear_{i}.") for i in (1, 2))
        x = F.linear(features, get[one + "weight"], get[one + "bias"])
        return F.linear(F.gelu(x), get[two + "weight"], get[two + "bias"])

    def hidden(self, rows: Rows, image: Tensor) -> Tensor:
        """Last hidden states of the text places: (B, S, D)."""
        table = self.get("model.language_model.embed_tokens.weight")
        head = table[rows.prefix].expand(image.shape[0], -1, -1)
        head = head.index_copy(1, rows.image, image)
        x = torch.cat([head, table[rows.text]], 1)
        prefix = head.shape[1]
        cos, sin = self._rotary(rows.position, rows.places, prefix)
        bias = visible(rows.segment, prefix, self.dtype)
        stacked = self._merged() if self.merged else self._apart()
        for i in range(self.sizes.layers):
            at = LANGUAGE.format(i)
            norms = (f"{at}input_layernorm.weight", f"{at}post_attention_layernorm.weight")
            small = (self.get(n) for n in norms)
            x = self.block(x, cos, sin, bias, *(w[i] for w in stacked), *small, self.sizes)
        return rms_norm(
            x[:, prefix:], self.get("model.language_model.norm.weight"), self.sizes.norm_eps
        )

    def _merged(self) -> list[Sequence[Any]]:
        """Weights of every layer, deltas added: one product, but gradients of whole weights."""
        merged = (torch.cat([s() for s in group], 1) for group in self._groups())
        return [w.to(self.dtype).unbind(0) for w in merged]

    def _apart(self) -> list[Sequence[Any]]:
        """Weights of every layer, deltas apart: a third less work where products are dear (CPU)."""
        groups = self._groups()
        if not self._joined:
            self._joined = [torch.cat([s.base for s in g], 1).to(self.dtype) for g in groups]
        down = [torch.cat([s.a for s in g], 1).to(self.dtype) for g in groups]
        up = [(_diagonal([s.b for s in g]) * SCALE).to(self.dtype) for g in groups]
        return [
            [LowRank(*layer) for layer in zip(*(w.unbind(0) for w in group), strict=True)]
            for group in zip(self._joined, down, up, strict=True)
        ]

    def _groups(self) -> list[list[Stack]]:
        """The layers' linears by what they are applied to, each group in one product."""
        q, k, v, o, gate, up, down = (cast(Stack, s) for s in self.language.values())
        return [[q, k, v], [o], [gate, up], [down]]

    def _rotary(
        self, position: Tensor, places: Tensor | None, prefix: int
    ) -> tuple[Tensor, Tensor]:
        start = torch.arange(prefix, device=position.device).expand(position.shape[0], -1)
        start = start if places is None else places
        place = torch.cat([start, position], 1).float()
        step = torch.arange(0, HEAD, 2, device=place.device).float() / HEAD
        angle = place[..., None] * (self.sizes.theta**-step)
        angle = torch.cat([angle, angle], -1)[:, None]
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
        """Of every place with a target: log-probability, whether it is the argmax, its index."""
        ready = rows.pixels.ndim == 3
        features = rows.pixels.to(self.dtype) if ready else self.features(rows.pixels)
        x = self.hidden(rows, self.project(features)).flatten(0, 1)
        asked = (rows.target.flatten() >= 0).nonzero()[:, 0]
        logits = x[asked] @ self.get("model.language_model.embed_tokens.weight").T
        target = rows.target.flatten()[asked]
        logp = -F.cross_entropy(logits.float(), target, reduction="none")
        return logp, logits.argmax(-1) == target, asked

    @torch.no_grad()
    def export(self) -> State:
        """The trained tensors by the names of ``weights.merge``, bf16."""
        out: State = {}
        groups = ((LANGUAGE, self.language), (VISION, self.vision))
        for pattern, stacks in groups:
            for name, stack in stacks.items():
                assert isinstance(stack, Stack)
                for i in range(stack.a.shape[0]):
                    if not stack.b[i].any():  # never trained (the encoder, on the CPU route)
                        continue
                    key = pattern.format(i) + name.replace("-", ".") + ".weight"
                    out[key + A] = stack.a[i].to(torch.bfloat16).cpu().contiguous()
                    out[key + B] = (stack.b[i] * SCALE).to(torch.bfloat16).cpu().contiguous()
        for key, value in self.projector.items():
            out[key.replace("-", ".")] = value.to(torch.bfloat16).cpu().contiguous()
        return out

    @torch.no_grad()
    def restore(self, trained: Mapping[str, Tensor]) -> None:
        """The inverse of ``export``; deltas that it left out stay as they are.

        Raises:
            ValueError: for deltas of another rank.
        """
        groups = ((LANGUAGE, self.language, "--rank"), (VISION, self.vision, "--vision-rank"))
        for pattern, stacks, option in groups:
            for name, stack in stacks.items():
                assert isinstance(stack, Stack)
                for i in range(stack.a.shape[0]):
                    key = pattern.format(i) + name.replace("-", ".") + ".weight"
                    if key + A not in trained:
                        continue
                    rank, mine = trained[key + A].shape[0], stack.a.shape[1]
                    if rank != mine:
                        raise ValueError(
                            f"The deltas to begin with have rank {rank}, this run has {mine}; "
                            f"give {option} {rank}."
                        )
                    stack.a[i].copy_(trained[key + A])
                    stack.b[i].copy_(trained[key + B].float() / SCALE)
        for key, value in self.projector.items():
            value.copy_(trained[key.replace("-", ".")])


@dataclass(frozen=True)
class LowRank:
    """A frozen weight (out, in) and its delta ``up @ down``, (out, r) and (r, in)."""

    base: Tensor
    down: Tensor
    up: Tensor


def linear(x: Tensor, weight: Tensor | LowRank) -> Tensor:
    """``x @ weight.T``, the delta applied to ``x`` by its factors where it is apart."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    flat = x.flatten(0, -2)
    y = torch.addmm(F.linear(flat, weight.base), F.linear(flat, weight.down), weight.up.T)
    return y.view(*x.shape[:-1], -1)


def language_block(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    bias: Tensor,
    qkv: Tensor | LowRank,
    out: Tensor | LowRank,
    gate_up: Tensor | LowRank,
    down: Tensor | LowRank,
    norm1: Tensor,
    norm2: Tensor,
    sizes: Sizes,
) -> Tensor:
    """One Llama decoder layer: (B, T, D) -> (B, T, D)."""
    rows, length, width = x.shape
    y = linear(rms_norm(x, norm1, sizes.norm_eps), qkv)
    y = y.view(rows, length, -1, HEAD).transpose(1, 2)
    q, k, v = y.split([sizes.heads, sizes.kv_heads, sizes.kv_heads], 1)
    q, k = q * cos + _half_turn(q) * sin, k * cos + _half_turn(k) * sin
    y = _attended(q, k, v, bias)
    x = x + linear(y.transpose(1, 2).reshape(rows, length, width), out)
    gate, up = linear(rms_norm(x, norm2, sizes.norm_eps), gate_up).chunk(2, -1)
    return x + linear(F.silu(gate) * up, down)


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of (B, heads, T, d) to fewer heads of keys: (B, heads, T, d).

    The gradient of PyTorch's fused attention takes a quarter of a training step on a CPU, written
    out it takes a tenth.
    """
    rows, heads, length, width = q.shape
    few = k.shape[1]
    if q.device.type != "cpu":
        k, v = (t.repeat_interleave(heads // few, 1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    scores = (q / math.sqrt(width)).reshape(rows, few, -1, width) @ k.transpose(-1, -2)
    scores = scores.view(rows, heads, length, length)
    shares = (scores if bias is None else scores + bias).softmax(-1)
    return (shares.view(rows, few, -1, length) @ v).view(q.shape)


def vision_block(
    x: Tensor,
    qkv: Tensor,
    out: Tensor,
    up: Tensor,
    down: Tensor,
    qkv_bias: Tensor,
    out_bias: Tensor,
    up_bias: Tensor,
    down_bias: Tensor,
    norm1: Tensor,
    norm1_bias: Tensor,
    norm2: Tensor,
    norm2_bias: Tensor,
    scale1: Tensor,
    scale2: Tensor,
    sizes: Sizes,
) -> Tensor:
    """One DINOv2 block: (B, N+1, D) -> (B, N+1, D)."""
    rows, length, width = x.shape
    y = F.layer_norm(x, (width,), norm1, norm1_bias, sizes.vision_eps)
    y = F.linear(y, qkv, qkv_bias).view(rows, length, 3, sizes.vision_heads, HEAD)
    q, k, v = y.permute(2, 0, 3, 1, 4)
    y = _attended(q, k, v).transpose(1, 2).reshape(rows, length, width)
    x = x + scale1 * F.linear(y, out, out_bias)
    y = F.layer_norm(x, (width,), norm2, norm2_bias, sizes.vision_eps)
    y = F.linear(F.gelu(F.linear(y, up, up_bias)), down, down_bias)
    return x + scale2 * y


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Llama's norm, its statistics in float32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def visible(segment: Tensor, prefix: int, dtype: torch.dtype) -> Tensor:
    """Additive mask (B, 1, T, T): causal, and between text places only within a segment."""
    head = segment.new_full((segment.shape[0], prefix), -2)
    kind = torch.cat([head, segment], 1)
    length = kind.shape[1]
    order = torch.arange(length, device=kind.device)
    past = order[None, :] <= order[:, None]
    near = (kind[:, None, :] == kind[:, :, None]) | (order < prefix)
    allowed = (near & past)[:, None]
    zero = torch.zeros((), dtype=dtype, device=kind.device)
    return torch.where(allowed, zero, zero - torch.inf)


def _half_turn(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat([-right, left], -1)


def _diagonal(parts: Sequence[Tensor]) -> Tensor:
    """Block-diagonal matrices of every layer: [(L, out, r)] -> (L, sum of out, sum of r)."""
    width, at, rows = sum(p.shape[-1] for p in parts), 0, []
    for part in parts:
        rows.append(F.pad(part, (at, width - at - part.shape[-1])))
        at += part.shape[-1]
    return torch.cat(rows, 1)


def _stacks(
    state: State,
    pattern: str,
    names: tuple[str, ...],
    depth: int,
    rank: int,
    seed: torch.Generator,
) -> nn.ModuleDict:
    made = {}
    for name in names:
        base = torch.stack([state[f"{pattern.format(i)}{name}.weight"] for i in range(depth)])
        made[_safe(name)] = Stack(base, rank, seed)
    return nn.ModuleDict(made)


def _kept(name: str) -> bool:
    """Whether a frozen tensor is used as it is (not a stacked weight, not unused)."""
    stacked = any(name.endswith(f"{n}.weight") for n in LANGUAGE_LINEARS + VISION_LINEARS)
    return not stacked and not name.startswith((PROJECTOR, "lm_head"))


def _safe(name: str) -> str:
    """Parameter containers do not take dots."""
    return name.replace(".", "-")
