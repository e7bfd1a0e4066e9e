"""How far a model is from its dense teacher, and from the text.

Logits are made chunk by chunk from the last block's outputs, and never held whole.

Shapes: B sequences, T tokens, D hidden size, V vocabulary, n positions of a chunk, k tokens of a distribution
(V, or the most probable ones).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

from allocator.model.checkpoint.kinds import Kind
from allocator.model.data.examples import Examples
from allocator.model.live.walk import Head

Loss = Literal["kl", "topk_kl", "nll", "hidden"]
"""What a search minimises: the divergence from the teacher's distribution over next tokens; the same with all but
the teacher's :data:`TOP` most probable tokens taken as one outcome; the text's negative log-likelihood; the mean
squared distance of the states that the head reads, relative to the teacher's mean square."""

TOP = 512

_CHUNK_POSITIONS = 256
"""Positions whose logits are held at once: enough for the head's product to run at full speed, few enough for
caches. Part of the numerics, so not derived from free memory."""

_LEAST_TAIL = 1e-7
"""Below this a tail's probability is rounding."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The dense model's distribution over next tokens, for one chunk of positions.

    Attributes:
        probability_nk: p(v) of every token, or of the most probable ones.
        token_nk: Which these are; None for all.
        negentropy_n: Σ p log p, in nats, the tail being one outcome.
    """

    probability_nk: torch.Tensor
    token_nk: torch.Tensor | None
    negentropy_n: torch.Tensor

    @property
    def size_bytes(self) -> int:
        """Memory that they take."""
        tensors = (self.probability_nk, self.token_nk, self.negentropy_n)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@torch.no_grad()
def make_targets(loss: Loss, teacher_btd: torch.Tensor, head: Head) -> Iterator[Targets]:
    """Yield the teacher's targets for ``kl`` or ``topk_kl``, chunk by chunk, from what its head reads."""
    for teacher_nd in _chunks(teacher_btd):
        log_nv = functional.log_softmax(head(teacher_nd), dim=-1, dtype=torch.float32)
        log_nk, token_nk = log_nv, None
        if loss == "topk_kl":
            log_nk, token_nk = log_nv.topk(min(TOP, log_nv.shape[-1]), dim=-1)
        probability_nk = log_nk.exp()
        yield Targets(probability_nk, token_nk, _expected(probability_nk, token_nk, log_nv))


@torch.no_grad()
def divergence(
    targets: Iterable[Targets] | None, student_btd: torch.Tensor, head: Head, tokens_bt: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums over each sequence, [B]: KL(teacher ‖ student), and the student's negative log-likelihood.

    The likelihood covers the T - 1 positions that have a next token. Both in nats, summed in float64. Without
    targets the divergence is 0.
    """
    return sum_divergences(targets, student_btd, head, shift_tokens(tokens_bt))


def shift_tokens(tokens_bt: torch.Tensor) -> torch.Tensor:
    """Return the token that follows each, -100 after the last."""
    return functional.pad(tokens_bt[:, 1:], (0, 1), value=-100)


def find_labels(kind: Kind, examples: Examples) -> torch.Tensor:
    """Return what the text or the labels want at every position that has logits, [B, P]; -100 where nothing."""
    tokens_bt = examples.inputs.get("input_ids")
    if kind.answers == "next":
        assert tokens_bt is not None
        return shift_tokens(tokens_bt)
    if kind.answers == "tokens":  # the text itself, without a mask, says nothing of how well it is guessed
        assert tokens_bt is not None
        return torch.full_like(tokens_bt, -100)
    labels_b = examples.labels
    if kind.answers == "classes" and labels_b is not None:
        return labels_b[:, None]
    first = next(iter(examples.inputs.values()))
    return torch.full((len(first), 1), -100, device=first.device)


def sum_divergences(
    targets: Iterable[Targets] | None, student_bpd: torch.Tensor, head: Head, labels_bp: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what :func:`divergence` does; the likelihood is that of what is wanted at P positions, -100 nothing."""
    kl_n, nll_n = (
        torch.cat(chunks).double()
        for chunks in zip(*chunk_divergences(targets, student_bpd, head, labels_bp), strict=True)
    )
    return kl_n.view(labels_bp.shape).sum(-1), nll_n.view(labels_bp.shape).sum(-1)


def chunk_divergences(
    targets: Iterable[Targets] | None, student_bpd: torch.Tensor, head: Head, labels_bp: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield what :func:`sum_divergences` sums, [n], chunk by chunk."""
    students = _chunks(student_bpd)
    targets_n = [None] * len(students) if targets is None else targets
    for target, student_nd, labels_n in zip(
        targets_n, students, labels_bp.flatten().split(_CHUNK_POSITIONS), strict=True
    ):
        log_nv = functional.log_softmax(head(student_nd), dim=-1, dtype=torch.float32)
        nll_n = functional.nll_loss(log_nv, labels_n, ignore_index=-100, reduction="none")
        if target is None:
            yield torch.zeros_like(nll_n), nll_n
        else:
            yield target.negentropy_n - _expected(target.probability_nk, target.token_nk, log_nv), nll_n


def displacement(teacher_btd: torch.Tensor, student_btd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sums over each sequence, [B], float64: squared distance of two models' states, the teacher's square."""
    distance_bt, teacher_bt = _squares(teacher_btd, student_btd)
    return distance_bt.sum(-1), teacher_bt.sum(-1)


def feature_error(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return squared distances relative to the teacher's squares, averaged over each sequence, [B], float64.

    Relative token by token, for the states of a few tokens are larger by orders of magnitude than those of all others.

    Args:
        teacher: States [B, T, D] of each tower of a model.
        student: The same of another.
    """
    squares = [_squares(teacher_btd, student_btd) for teacher_btd, student_btd in zip(teacher, student, strict=True)]
    return torch.cat([distance_bt / teacher_bt for distance_bt, teacher_bt in squares], 1).mean(-1)


def _squares(teacher_btd: torch.Tensor, student_btd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared distance of two models' states, and the teacher's square, of each token, [B, T], float64."""
    states = (student_btd - teacher_btd).float(), teacher_btd.float()
    distance_bt, teacher_bt = (torch.linalg.vecdot(x_btd, x_btd).double() for x_btd in states)
    return distance_bt, teacher_bt


def _expected(probability_nk: torch.Tensor, token_nk: torch.Tensor | None, log_nv: torch.Tensor) -> torch.Tensor:
    """Return Σ p log q, where what p leaves out is one outcome."""
    if token_nk is None:
        return torch.linalg.vecdot(probability_nk, log_nv)
    log_nk = log_nv.gather(-1, token_nk)
    tail_n = _tail(probability_nk) * _tail(log_nk.exp()).log()
    return torch.linalg.vecdot(probability_nk, log_nk) + tail_n


def _tail(probability_nk: torch.Tensor) -> torch.Tensor:
    return (1.0 - probability_nk.double().sum(-1)).clamp_min(_LEAST_TAIL).float()


def _chunks(hidden_btd: torch.Tensor) -> Sequence[torch.Tensor]:
    return hidden_btd.flatten(0, 1).split(_CHUNK_POSITIONS)
