"""pinhole: the bundled reference VLM, assembled from parts that pip can install.

LLaVA layout: DINOv2 ViT-S/14 at 224 px (256 vision tokens) -> two-layer MLP ->
SmolLM2-135M-Instruct.
What comes out is a plain ``transformers`` model and processor. See ``docs/pinhole.md``.
"""

from foveate.pinhole.assembly import load, path

__all__ = ["load", "path"]
