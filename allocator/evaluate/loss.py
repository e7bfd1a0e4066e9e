"""How far a model is from its dense teacher, and from the text.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

_CHUNK_ELEMENTS = 1 << 22
"""Logits held at once, per model; part of the numerics, so not derived from free memory."""

Head = Callable[[torch.Tensor], torch.Tensor]


@torch.inference_mode()
def divergence(
    teacher_btd: torch.Tensor,
    student_btd: torch.Tensor,
    teacher_head: Head,
    student_head: Head,
    tokens_bt: torch.Tensor,
) -> tuple[float, float]:
    """Return sums over a batch: KL(teacher ‖ student) over all positions, and the student's negative log-likelihood.

    Logits are made chunk by chunk from the last block's outputs, and never held whole. The likelihood covers
    the T - 1 positions of each sequence that have a next token. Both in nats, summed in float64.
    """
    targets_bt = torch.nn.functional.pad(tokens_bt[:, 1:], (0, 1), value=-100)
    kl = nll = 0.0
    rows = _rows_per_chunk(student_head(student_btd[:1, :1]).shape[-1])
    chunks = zip(
        teacher_btd.flatten(0, 1).split(rows),
        student_btd.flatten(0, 1).split(rows),
        targets_bt.flatten().split(rows),
        strict=True,
    )
    for teacher_nd, student_nd, targets_n in chunks:
        teacher_nv = functional.log_softmax(teacher_head(teacher_nd).float(), dim=-1)
        student_nv = functional.log_softmax(student_head(student_nd).float(), dim=-1)
        nll += float(functional.nll_loss(student_nv, targets_n, ignore_index=-100, reduction="none").double().sum())
        kl += float((teacher_nv.exp() * (teacher_nv - student_nv)).sum(-1).double().sum())
    return kl, nll


def _rows_per_chunk(vocabulary: int) -> int:
    return max(1, _CHUNK_ELEMENTS // vocabulary)
