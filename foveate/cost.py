"""What a prompt costs: FLOPs and KV bytes of a text model, from its shape and the rows per layer.

Two conventions are offered by name. ``gated`` counts what is computed: 2·m·n·k per product, a gated
MLP of three matrices, scores and values of attention over the full square (as fused kernels are
usually counted), and lm_head on the rows really computed. ``paper`` is the field's two-matrix
formula ``4nd² + 2n²d + 2ndm`` (FastV, PyramidDrop), which counts multiply-adds once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class TextShape:
    """The sizes of a text model that its cost depends on."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp: int
    vocabulary: int
    bytes_per_value: int = 2

    def layer_flops(self, rows: int) -> int:
        """One decoder layer on ``rows`` rows of a prompt (``gated`` convention)."""
        d, q, kv = self.width, self.heads * self.head_width, self.kv_heads * self.head_width
        projections = 2 * rows * d * (2 * q + 2 * kv)
        attention = 4 * rows * rows * q
        return projections + attention + 6 * rows * d * self.mlp

    def prefill_flops(self, rows: Sequence[int], logits: int = 1) -> int:
        """A prompt whose layer l works on ``rows[l]`` rows; lm_head on ``logits`` rows."""
        return sum(map(self.layer_flops, rows)) + 2 * logits * self.width * self.vocabulary

    def paper_flops(self, rows: Sequence[int]) -> int:
        """The two-matrix formula ``4nd² + 2n²d + 2ndm`` summed over layers."""
        d, m = self.width, self.mlp
        return sum(4 * n * d * d + 2 * n * n * d + 2 * n * d * m for n in rows)

    def kv_bytes(self, rows: Sequence[int]) -> int:
        """Keys and values of ``rows[l]`` rows in layer l."""
        return sum(rows) * 2 * self.kv_heads * self.head_width * self.bytes_per_value
