"""Speed and memory by stage: the untouched model and reduced ones, side by side in one process.

What is timed, for every row alike: ``prefill_ms`` is one forward of the multimodal base model over
the prompt *less* the time inside its vision encoder and projector. That leaves embedding, reducing,
cutting, masks and the text model, but not lm_head; nothing that a recipe adds can hide.
``vision_ms`` is the encoder and projector, ``ttft_ms`` the whole forward with lm_head on the last
row, ``decode_ms`` one further token. ``reduce_ms`` is the part of ``prefill_ms`` that the report
calls reducing.

``attainable_ms`` is what the same lengths cost without any method: the untouched model is timed on
text-only prompts of every length n that occurs, padded alike, in the same rounds, and Σ_l T(n_l)/L
is the bound. ``efficiency`` is attainable_ms ÷ prefill_ms.
"""

from foveate.bench.machine import Peak, about, device_name, peak_bytes, version_of, versions
from foveate.bench.run import DENSE, IDENTITY, Settings, bench
from foveate.bench.stopwatch import Forward, Stopwatch
from foveate.bench.verdicts import verdict

__all__ = [
    "DENSE",
    "IDENTITY",
    "Forward",
    "Peak",
    "Settings",
    "Stopwatch",
    "about",
    "bench",
    "device_name",
    "peak_bytes",
    "verdict",
    "version_of",
    "versions",
]
