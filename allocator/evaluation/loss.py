"""The losses: divergence of a model from its dense teacher, and from the text.

Logits are computed chunk by chunk from the last block's outputs, so that one chunk is in memory at a time.

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
"""What a search minimises.

- ``kl``: the divergence from the teacher's distribution over next tokens;
- ``topk_kl``: the same, with all but the teacher's :data:`TOP` most probable tokens taken as one outcome;
- ``nll``: the negative log-likelihood of the text;
- ``hidden``: the mean squared distance of the states that the head reads, relative to the teacher's mean square.
"""

TOP = 512
"""Number of tokens that ``topk_kl`` tells apart."""

_CHUNK_POSITIONS = 256
"""Positions whose logits are in memory at once: many enough for a fast product with the head, few enough for caches.
They are part of the numerics, so they are not derived from free memory."""

_LEAST_TAIL = 1e-7
"""A tail probability below this is rounding error."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The dense model's distribution over next tokens, at one chunk of positions.

    Attributes:
        probability_nk: p(v) of every token, or of the most probable ones.
        token_nk: The ids of these tokens; None for all.
        negentropy_n: Σ p log p, in nats; the tail counts as one outcome.
    """

    probability_nk: torch.Tensor
    token_nk: torch.Tensor | None
    negentropy_n: torch.Tensor

    @property
    def size_bytes(self) -> int:
        """Memory of the tensors."""
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

    The likelihood covers the T - 1 positions that have a next token. Both are in nats, summed in float64. Without
    targets the divergence is 0.
    """
    return sum_divergences(targets, student_btd, head, shift_tokens(tokens_bt))


def shift_tokens(tokens_bt: torch.Tensor) -> torch.Tensor:
    """Return the token that follows each position, [B, T]; -100 after the last."""
    return functional.pad(tokens_bt[:, 1:], (0, 1), value=-100)


def find_labels(kind: Kind, examples: Examples) -> torch.Tensor:
    """Return the right answer at every position that has logits, [B, P]; -100 at positions without one.

    It is the next token of a text, or the label of an example.
    """
    tokens_bt = examples.inputs.get("input_ids")
    if kind.answers == "next":
        assert tokens_bt is not None
        return shift_tokens(tokens_bt)
    if kind.answers == "tokens":  # a masked model reads the text unmasked here, so it has nothing to predict
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
    """Return what :func:`divergence` returns, for labels at P positions; -100 for none."""
    kl_n, nll_n = (
        torch.cat(chunks).double()
        for chunks in zip(*chunk_divergences(targets, student_bpd, head, labels_bp), strict=True)
    )
    return kl_n.view(labels_bp.shape).sum(-1), nll_n.view(labels_bp.shape).sum(-1)


def chunk_divergences(
    targets: Iterable[Targets] | None, student_bpd: torch.Tensor, head: Head, labels_bp: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the divergence and the negative log-likelihood of every position, [n], chunk by chunk."""
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
    """Return the squared distance of two models' states, and the teacher's square, [B]: sums per sequence, float64."""
    distance_bt, teacher_bt = _squares(teacher_btd, student_btd)
    return distance_bt.sum(-1), teacher_bt.sum(-1)


def feature_error(teacher: Sequence[torch.Tensor], student: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return squared distances relative to the teacher's squares, averaged over each sequence, [B], float64.

    They are relative token by token, because the states of a few tokens are larger by orders of magnitude.

    Args:
        teacher: States [B, T, D] of each tower of a model.
        student: The same states of another model.
    """
    squares = [_squares(teacher_btd, student_btd) for teacher_btd, student_btd in zip(teacher, student, strict=True)]
    return torch.cat([distance_bt / teacher_bt for distance_bt, teacher_bt in squares], 1).mean(-1)


def _squares(teacher_btd: torch.Tensor, student_btd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the squared distance of two models' states and the teacher's square at each token, [B, T], float64."""
    states = (student_btd - teacher_btd).float(), teacher_btd.float()
    distance_bt, teacher_bt = (torch.linalg.vecdot(x_btd, x_btd).double() for x_btd in states)
    return distance_bt, teacher_bt


def _expected(probability_nk: torch.Tensor, token_nk: torch.Tensor | None, log_nv: torch.Tensor) -> torch.Tensor:
    """Return Σ p log q; all tokens that p leaves out count as one outcome."""
    if token_nk is None:
        return torch.linalg.vecdot(probability_nk, log_nv)
    log_nk = log_nv.gather(-1, token_nk)
    tail_n = _tail(probability_nk) * _tail(log_nk.exp()).log()
    return torch.linalg.vecdot(probability_nk, log_nk) + tail_n


def _tail(probability_nk: torch.Tensor) -> torch.Tensor:
    return (1.0 - probability_nk.double().sum(-1)).clamp_min(_LEAST_TAIL).float()


def _chunks(hidden_btd: torch.Tensor) -> Sequence[torch.Tensor]:
    return hidden_btd.flatten(0, 1).split(_CHUNK_POSITIONS)
