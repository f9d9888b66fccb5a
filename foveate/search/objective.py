"""What a search is judged by: one value for each example, the higher the better.

``score``
    the task's own: 1 where greedy decoding would give the example's answer to the letter, or where
    the right one of its choices is the likeliest.
``match``
    1 where greedy decoding would give what the untouched model says; needs no labels.
``kl``
    minus the divergence of the next-token distributions from the untouched model's, averaged over
    what the untouched model says; needs no labels and is much less noisy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from foveate.answer import prompts, tails
from foveate.search.prefix import Batch
from foveate.search.shards import Shards
from foveate.tasks import Example, Task

KINDS = ("score", "match", "kl")


@dataclass(frozen=True)
class Asked:
    """A batch, and where its rows come from.

    Attributes:
        example: of each row, which example of the batch it belongs to.
        right: of each row, whether it is the right answer (choices have wrong ones as well).
        dense: log-probabilities of the untouched model where the answers stand, for ``kl``.
    """

    batch: Batch
    example: tuple[int, ...]
    right: tuple[bool, ...]
    dense: Tensor | None = None

    @property
    def size(self) -> int:
        return max(self.example) + 1


class Calibration:
    """The prompts of a search and their answers, in batches.

    Args:
        tasks: all their examples are asked.
        kind: one of ``KINDS``.
        batch_size: examples at once; each choice is a row of its own.
        shards: the processes that share the examples.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        tasks: Sequence[Task],
        kind: str,
        batch_size: int,
        shards: Shards | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"There is no objective {kind!r}; take one of {', '.join(KINDS)}.")
        self.model, self.processor, self.kind = model, processor, kind
        self._tasks, self._size = tasks, batch_size
        self.shards = shards or Shards()
        count = sum(len(task) for task in tasks)
        if min(len(tasks[0]), count - 1) < self.shards.world:
            raise ValueError(
                f"{count} examples are too few to search with in {self.shards.world} processes; "
                "raise --limit."
            )
        self._digests: list[str] = []

    def __iter__(self) -> Iterator[Asked]:
        """The batches of this process, made anew each time."""
        self._digests = []
        for task in self._tasks:
            mine = self.shards.part(len(task))
            for start in range(0, len(mine), self._size):
                examples = [task.example(i) for i in mine[start : start + self._size]]
                self._digests += map(_digest, examples)
                yield self._asked(examples)
        self._digests = self.shards.joined(self._digests)

    @property
    def fingerprint(self) -> str:
        """Of questions, answers and pixels in any order, once all batches were made."""
        known = "".join([self.kind, *sorted(self._digests)])
        return hashlib.sha256(known.encode()).hexdigest()[:16]

    def prompt(self) -> Any:
        """Arguments of the model's forward for one prompt, the first."""
        return prompts(self.model, self.processor, [self._tasks[0].example(0)])

    def _asked(self, examples: Sequence[Example]) -> Asked:
        if self.kind == "score":
            rows = [(n, e, c) for n, e in enumerate(examples) for c in e.choices or (e.answer,)]
        else:
            rows = [(n, e, e.answer) for n, e in enumerate(examples)]
        inputs = prompts(self.model, self.processor, [e for _, e, _ in rows])
        if self.kind == "score":
            said = tails(self.processor, [c for _, _, c in rows], inputs["input_ids"].device)
        else:
            said = self._dense(inputs, max(e.new_tokens for e in examples))
        right = tuple(c == e.answer for _, e, c in rows)
        return Asked(followed(inputs, *said), tuple(n for n, _, _ in rows), right)

    def _dense(self, inputs: Mapping[str, Any], longest: int) -> tuple[Tensor, Tensor]:
        """What the untouched model says: ids (B, A), its end of turn too, and where they are."""
        start = inputs["input_ids"].shape[1]
        out = self.model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        ids = out[:, start:]
        ends = self.model.generation_config.eos_token_id
        stop = torch.tensor([ends] if isinstance(ends, int) else ends or [-1], device=ids.device)
        over = torch.isin(ids, stop).long()
        return ids, over.cumsum(-1) - over == 0

    def untouched(self, logits: Tensor, asked: Asked) -> tuple[Asked, list[float]]:
        """From the untouched model's ``logits``: what later ones are judged by, and its values."""
        if self.kind == "kl":
            asked = replace(asked, dense=logits.log_softmax(-1).half())
        return asked, self.values(logits, asked)

    def values(self, logits: Tensor, asked: Asked) -> list[float]:
        """The value of each example, from what is predicted where the answers stand (B, A, V)."""
        real = asked.batch.answer >= 0
        target = asked.batch.answer.clamp(min=0)
        logp = logits.log_softmax(-1)
        if self.kind == "kl":
            assert asked.dense is not None
            dense = asked.dense.to(logp)
            apart = (dense.exp() * (dense - logp)).sum(-1)
            return [-float(v) for v in _means(apart, real)]
        if len(asked.example) > asked.size:
            each = _means(logp.gather(-1, target[..., None])[..., 0], real).tolist()
            return [_chosen(asked, each, n) for n in range(asked.size)]
        said = (logits.argmax(-1) == target) | ~real
        return [float(v) for v in said.all(-1)]


def _digest(example: Example) -> str:
    found = hashlib.sha256(f"{example.question}\0{example.answer}\0".encode())
    for image in example.clip.frames if example.clip else (example.image,):
        found.update(image.tobytes())
    return found.hexdigest()


def followed(inputs: Mapping[str, Any], ids: Tensor, real: Tensor) -> Batch:
    """Prompts followed by what is said, ``ids`` (B, A) where ``real``."""
    whole = inputs["input_ids"].shape
    more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}  # nothing real sees padding
    made = dict(inputs)
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape == whole:
            tail = more.get(name, torch.zeros_like(ids))
            made[name] = torch.cat([value, tail.to(value.dtype)], 1)
    return Batch(made, ids.where(real, -100))


def lower(differences: Sequence[float], confidence: float) -> float:
    """What the mean of paired differences is above, with ``confidence``; 0.5 gives the mean.

    By the normal approximation over examples.
    """
    n = len(differences)
    mean = sum(differences) / n
    variance = sum((d - mean) ** 2 for d in differences) / (n - 1)
    return mean - NormalDist().inv_cdf(confidence) * math.sqrt(variance / n)


def _means(values: Tensor, real: Tensor) -> Tensor:
    """Means over the real places of each row, (B,)."""
    return (values * real).sum(-1) / real.sum(-1).clamp(min=1)


def _chosen(asked: Asked, each: list[float], example: int) -> float:
    rows = [r for r, e in enumerate(asked.example) if e == example]
    return float(asked.right[max(rows, key=lambda r: each[r])])
