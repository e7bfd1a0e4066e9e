"""What the dense model says about the text, computed once per batch of sequences."""

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
"""Memory for distributions that are kept; beyond it they are recomputed from hidden states, with equal results."""

LossSums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The loss's numerator and denominator, and the negative log-likelihood, summed over each sequence of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBatch:
    """One batch of sequences, and what of the dense model the loss needs.

    Attributes:
        loss: What the student is judged by.
        examples: The batch itself.
        labels_bp: What the text or the labels want at every position that has logits; -100 where they want nothing.
        hidden_btd: What leaves the last block, where it is needed again.
        kept: The distributions, if there was room for them.
    """

    loss: Loss
    examples: Examples
    labels_bp: torch.Tensor
    hidden_btd: torch.Tensor | None
    kept: tuple[Targets, ...] | None

    @property
    def positions(self) -> int:
        """At how many positions something is wanted: for text, tokens that follow another."""
        return int((self.labels_bp != -100).sum())


class Teacher:
    """Batches by split. The walker's model is made dense whenever something new is to be computed."""

    def __init__(self, walker: BlockWalker, tokens: Mapping[str, Examples], make_dense: Callable[[], None]) -> None:
        self._walker, self._tokens, self._make_dense = walker, tokens, make_dense
        self._cache: dict[tuple[Loss, str, int, int], TeacherBatch] = {}
        self._features: dict[tuple[int, str, int, int], torch.Tensor] = {}
        self._room = KEPT_BYTES

    def batches(self, split: str, tokens: int, loss: Loss) -> list[TeacherBatch]:
        """Return batches on the first ``tokens`` tokens of a split, computing those that are missing."""
        keys = [(loss, split, start, size) for start, size in self._batch_ranges(split, tokens)]
        for key in keys:
            if key not in self._cache:
                *_, start, size = key
                self._make_dense()
                self._cache[key] = self._compute(self._tokens[split][start : start + size], loss)
        return [self._cache[key] for key in keys]

    def features(self, split: str, tokens: int, blocks: int) -> list[torch.Tensor]:
        """Return what leaves the first ``blocks`` blocks of the dense model, [B, T, D] for each batch of sequences."""
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
        """Compare what leaves a student's last block with a batch."""
        total = nll = student_btd.new_zeros(len(student_btd), dtype=torch.float64)
        if batch.loss != "hidden" or batch.positions:
            total, nll = sum_divergences(
                self._targets(batch), *student.logit_inputs(student_btd, batch.examples), batch.labels_bp
            )
        if batch.loss == "hidden":
            assert batch.hidden_btd is not None
            given, own = (
                w.final_states(h, batch.examples) for w, h in ((self._walker, batch.hidden_btd), (student, student_btd))
            )
            return (*displacement(given, own), nll)
        if batch.loss == "nll":
            return nll, (batch.labels_bp != -100).sum(-1).to(nll), nll
        return total, torch.full_like(total, batch.labels_bp.shape[1]), nll

    def gradient(self, batch: TeacherBatch, student: BlockWalker, student_btd: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the loss, summed over a batch, in what leaves a student's last block."""
        leaf_btd = student_btd.detach().requires_grad_()
        if batch.loss == "hidden":
            assert batch.hidden_btd is not None
            given = self._walker.final_states(batch.hidden_btd, batch.examples)
            distance_b, _ = displacement(given, student.final_states(leaf_btd, batch.examples))
            distance_b.sum().backward()
            assert leaf_btd.grad is not None
            return leaf_btd.grad
        read, head = student.logit_inputs(leaf_btd, batch.examples)
        inner = read.detach().requires_grad_()
        # chunk by chunk, so that logits of one chunk alone are held
        for kl_n, nll_n in chunk_divergences(self._targets(batch), inner, head, batch.labels_bp):
            (nll_n if batch.loss == "nll" else kl_n).sum().backward()
        (gradient_btd,) = torch.autograd.grad(read, leaf_btd, inner.grad)
        return gradient_btd

    def _targets(self, batch: TeacherBatch) -> Iterable[Targets] | None:
        if batch.kept is None and batch.loss in ("kl", "topk_kl"):
            assert batch.hidden_btd is not None
            return make_targets(batch.loss, *self._walker.logit_inputs(batch.hidden_btd, batch.examples))
        return batch.kept

    def _batch_ranges(self, split: str, tokens: int) -> list[tuple[int, int]]:
        """Return the first sequence of each batch, and how many it has."""
        length = self._tokens[split].length
        assert tokens % length == 0, f"{tokens} tokens are not whole sequences of {length}"
        assert tokens <= self._tokens[split].num_tokens, f"{tokens} tokens of the {split} split were not packed"
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
        """Return all targets of a batch, or None if there is no room for them."""
        first = next(targets)
        size = first.size_bytes // len(first.negentropy_n) * positions
        if size > self._room:
            return None
        self._room -= size
        return (first, *targets)
