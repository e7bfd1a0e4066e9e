"""The dense model as a teacher: its targets for the loss, computed once for each batch of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from allocator.evaluation.loss import (
    Loss,
    Targets,
    chunk_divergences,
    displacement,
    find_labels,
    make_targets,
    sum_divergences,
)
from allocator.model.data.examples import Examples
from allocator.model.live.walk import SEQUENCES_PER_BATCH, BlockWalker

KEPT_BYTES = 256 << 20
"""Memory for distributions that are kept. Others are recomputed from hidden states, with equal results."""

LossSums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The loss's numerator and denominator, and the negative log-likelihood, summed over each sequence of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBatch:
    """One batch of sequences, with what the loss needs of the dense model.

    Attributes:
        loss: The loss of students.
        examples: The sequences.
        labels_bp: The right answer at every position that has logits; -100 at positions without one.
        hidden_btd: The dense model's output of the last block; None if it is not needed again.
        kept: The dense model's distributions; None if there was no memory for them, or the loss needs none.
    """

    loss: Loss
    examples: Examples
    labels_bp: torch.Tensor
    hidden_btd: torch.Tensor | None
    kept: tuple[Targets, ...] | None

    @property
    def positions(self) -> int:
        """Number of positions with a right answer: for text, tokens that follow another."""
        return int((self.labels_bp != -100).sum())


class Teacher:
    """The batches of every split, each computed when it is first used.

    The walker's model is shared with the engine, and made dense before anything new is computed.
    """

    def __init__(self, walker: BlockWalker, tokens: Mapping[str, Examples], make_dense: Callable[[], None]) -> None:
        self._walker, self._tokens, self._make_dense = walker, tokens, make_dense
        self._cache: dict[tuple[Loss, str, int, int], TeacherBatch] = {}
        self._features: dict[tuple[int, str, int, int], torch.Tensor] = {}
        self._room = KEPT_BYTES

    def batches(self, split: str, tokens: int, loss: Loss) -> list[TeacherBatch]:
        """Return the batches of the first ``tokens`` tokens of a split, and compute those that are missing."""
        keys = [(loss, split, start, size) for start, size in self._batch_ranges(split, tokens)]
        for key in keys:
            if key not in self._cache:
                *_, start, size = key
                self._make_dense()
                self._cache[key] = self._compute(self._tokens[split][start : start + size], loss)
        return [self._cache[key] for key in keys]

    def features(self, split: str, tokens: int, blocks: int) -> list[torch.Tensor]:
        """Return the output of the first ``blocks`` blocks of the dense model, [B, T, D] for each batch."""
        keys = [(blocks, split, start, size) for start, size in self._batch_ranges(split, tokens)]
        for key in keys:
            if key not in self._features:
                *_, start, size = key
                self._make_dense()
                hidden_btd = self._walker.embed(self._tokens[split][start : start + size])
                for index in range(blocks):
                    hidden_btd = self._walker.run(index, hidden_btd)
                self._features[key] = hidden_btd
        return [self._features[key] for key in keys]

    def score(self, batch: TeacherBatch, student: BlockWalker, student_btd: torch.Tensor) -> LossSums:
        """Return the loss of a student on a batch, from the output of its last block, summed over each sequence."""
        total = nll = student_btd.new_zeros(len(student_btd), dtype=torch.float64)
        if batch.loss != "hidden" or batch.positions:
            total, nll = sum_divergences(
                self._targets(batch), *student.logit_inputs(student_btd, batch.examples), batch.labels_bp
            )
        if batch.loss == "hidden":
            assert batch.hidden_btd is not None
            teacher_btd, own_btd = (
                w.final_states(h, batch.examples) for w, h in ((self._walker, batch.hidden_btd), (student, student_btd))
            )
            return (*displacement(teacher_btd, own_btd), nll)
        if batch.loss == "nll":
            return nll, (batch.labels_bp != -100).sum(-1).to(nll), nll
        return total, torch.full_like(total, batch.labels_bp.shape[1]), nll

    def gradient(self, batch: TeacherBatch, student: BlockWalker, student_btd: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a batch's summed loss with respect to the output of a student's last block."""
        leaf_btd = student_btd.detach().requires_grad_()
        if batch.loss == "hidden":
            assert batch.hidden_btd is not None
            teacher_btd = self._walker.final_states(batch.hidden_btd, batch.examples)
            distance_b, _ = displacement(teacher_btd, student.final_states(leaf_btd, batch.examples))
            distance_b.sum().backward()
            assert leaf_btd.grad is not None
            return leaf_btd.grad
        read_bpd, head = student.logit_inputs(leaf_btd, batch.examples)
        inner_bpd = read_bpd.detach().requires_grad_()
        # chunk by chunk, so that the logits of one chunk are in memory
        for kl_n, nll_n in chunk_divergences(self._targets(batch), inner_bpd, head, batch.labels_bp):
            (nll_n if batch.loss == "nll" else kl_n).sum().backward()
        (gradient_btd,) = torch.autograd.grad(read_bpd, leaf_btd, inner_bpd.grad)
        return gradient_btd

    def _targets(self, batch: TeacherBatch) -> Iterable[Targets] | None:
        if batch.kept is None and batch.loss in ("kl", "topk_kl"):
            assert batch.hidden_btd is not None
            return make_targets(batch.loss, *self._walker.logit_inputs(batch.hidden_btd, batch.examples))
        return batch.kept

    def _batch_ranges(self, split: str, tokens: int) -> list[tuple[int, int]]:
        """Return the index of the first sequence of each batch, and the number of its sequences."""
        length = self._tokens[split].length
        assert tokens % length == 0, f"{tokens} tokens are not whole sequences of {length}"
        assert tokens <= self._tokens[split].num_tokens, f"{tokens} tokens of the {split} split were not read"
        count = tokens // length
        return [(start, min(SEQUENCES_PER_BATCH, count - start)) for start in range(0, count, SEQUENCES_PER_BATCH)]

    def _compute(self, examples: Examples, loss: Loss) -> TeacherBatch:
        labels_bp = find_labels(self._walker.kind, examples)
        if loss == "nll":
            return TeacherBatch(loss=loss, examples=examples, labels_bp=labels_bp, hidden_btd=None, kept=None)
        hidden_btd = self._walker.run_all(self._walker.embed(examples))
        if loss == "hidden":
            return TeacherBatch(loss=loss, examples=examples, labels_bp=labels_bp, hidden_btd=hidden_btd, kept=None)
        kept = self._keep(make_targets(loss, *self._walker.logit_inputs(hidden_btd, examples)), labels_bp.numel())
        return TeacherBatch(
            loss=loss,
            examples=examples,
            labels_bp=labels_bp,
            hidden_btd=hidden_btd if kept is None else None,
            kept=kept,
        )

    def _keep(self, targets: Iterator[Targets], positions: int) -> tuple[Targets, ...] | None:
        """Return all targets of a batch; None if there is no memory for them."""
        first = next(targets)
        size = first.size_bytes // len(first.negentropy_n) * positions
        if size > self._room:
            return None
        self._room -= size
        return (first, *targets)
