"""How far a model is from its dense teacher, and from the text.

Logits are made chunk by chunk from the last block's outputs, and never held whole.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, n positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

_CHUNK_ELEMENTS = 1 << 22
"""Logits held at once; part of the numerics, so not derived from free memory."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""From outputs of the last block to logits."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The dense model's distribution over next tokens, for one chunk of positions.

    Attributes:
        probability_nv: p(v) of every token.
        negentropy_n: Σ p log p, in nats.
    """

    probability_nv: torch.Tensor
    negentropy_n: torch.Tensor


@torch.inference_mode()
def targets(teacher_btd: torch.Tensor, head: Head) -> Iterator[Targets]:
    """Yield the teacher's targets, chunk by chunk."""
    for teacher_nd in _chunks(teacher_btd, head):
        log_nv = functional.log_softmax(head(teacher_nd).float(), dim=-1)
        probability_nv = log_nv.exp()
        yield Targets(probability_nv, torch.linalg.vecdot(probability_nv, log_nv))


@torch.inference_mode()
def divergence(
    taught: Iterable[Targets], student_btd: torch.Tensor, head: Head, tokens_bt: torch.Tensor
) -> tuple[float, float]:
    """Return sums over a batch: KL(teacher ‖ student) over all positions, and the student's negative log-likelihood.

    The likelihood covers the T - 1 positions of each sequence that have a next token. Both in nats, summed in
    float64.
    """
    next_bt = functional.pad(tokens_bt[:, 1:], (0, 1), value=-100)
    kl = nll = 0.0
    start = 0
    for target, student_nd in zip(taught, _chunks(student_btd, head), strict=True):
        log_nv = functional.log_softmax(head(student_nd).float(), dim=-1)
        next_n = next_bt.flatten()[start : start + len(log_nv)]
        start += len(log_nv)
        nll += float(functional.nll_loss(log_nv, next_n, ignore_index=-100, reduction="none").double().sum())
        kl += float((target.negentropy_n - torch.linalg.vecdot(target.probability_nv, log_nv)).double().sum())
    return kl, nll


def _chunks(hidden_btd: torch.Tensor, head: Head) -> Iterable[torch.Tensor]:
    vocabulary = head(hidden_btd[:1, :1]).shape[-1]
    return hidden_btd.flatten(0, 1).split(max(1, _CHUNK_ELEMENTS // vocabulary))
