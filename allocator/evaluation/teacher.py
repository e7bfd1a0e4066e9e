"""What the dense model says about the text, computed once per batch of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from allocator.evaluation.loss import Loss, Targets, displacement, divergences, summed, targets, wanted
from allocator.model.data.examples import Shown
from allocator.model.live.walk import SEQUENCES_PER_BATCH, BlockWalker

KEPT_BYTES = 256 << 20
"""Memory for distributions that are kept; beyond it they are recomputed from hidden states, with equal results."""

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The loss's numerator and denominator, and the negative log-likelihood, summed over each sequence of a batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """One batch of sequences, and what of the dense model the loss needs.

    Attributes:
        loss: What the student is judged by.
        shown: Token ids [B, T], or other examples.
        wanted_bp: What the text or the labels want at every position that has logits; -100 where they want nothing.
        hidden_btd: What leaves the last block, where it is needed again.
        kept: The distributions, if there was room for them.
    """

    loss: Loss
    shown: Shown
    wanted_bp: torch.Tensor
    hidden_btd: torch.Tensor | None
    kept: tuple[Targets, ...] | None

    @property
    def positions(self) -> int:
        """At how many positions something is wanted: for text, tokens that follow another."""
        return int((self.wanted_bp != -100).sum())


class Teacher:
    """Lessons by split. The walker's model is made dense whenever something new is to be computed."""

    def __init__(self, walker: BlockWalker, tokens: Mapping[str, Shown], make_dense: Callable[[], None]) -> None:
        self._walker, self._tokens, self._make_dense = walker, tokens, make_dense
        self._lessons: dict[tuple[Loss, str, int, int], Lesson] = {}
        self._features: dict[tuple[int, str, int, int], torch.Tensor] = {}
        self._room = KEPT_BYTES

    def lessons(self, split: str, tokens: int, loss: Loss) -> list[Lesson]:
        """Return lessons on the first ``tokens`` tokens of a split, computing those that are missing."""
        keys = [(loss, split, start, size) for start, size in self._batches(split, tokens)]
        for key in keys:
            if key not in self._lessons:
                *_, start, size = key
                self._make_dense()
                self._lessons[key] = self._compute(self._tokens[split][start : start + size], loss)
        return [self._lessons[key] for key in keys]

    def features(self, split: str, tokens: int, blocks: int) -> list[torch.Tensor]:
        """Return what leaves the first ``blocks`` blocks of the dense model, [B, T, D] for each batch of sequences."""
        keys = [(blocks, split, start, size) for start, size in self._batches(split, tokens)]
        for key in keys:
            if key not in self._features:
                *_, start, size = key
                self._make_dense()
                hidden_btd = self._walker.embed(self._tokens[split][start : start + size])
                for index in range(blocks):
                    hidden_btd = self._walker.run(index, hidden_btd)
                self._features[key] = hidden_btd
        return [self._features[key] for key in keys]

    def judge(self, lesson: Lesson, student: BlockWalker, student_btd: torch.Tensor) -> Sums:
        """Compare what leaves a student's last block with a lesson."""
        total = nll = student_btd.new_zeros(len(student_btd), dtype=torch.float64)
        if lesson.loss != "hidden" or lesson.positions:
            total, nll = summed(
                self._taught(lesson), *student.logit_inputs(student_btd, lesson.shown), lesson.wanted_bp
            )
        if lesson.loss == "hidden":
            assert lesson.hidden_btd is not None
            given, own = (
                w.final_states(h, lesson.shown) for w, h in ((self._walker, lesson.hidden_btd), (student, student_btd))
            )
            return (*displacement(given, own), nll)
        if lesson.loss == "nll":
            return nll, (lesson.wanted_bp != -100).sum(-1).to(nll), nll
        return total, torch.full_like(total, lesson.wanted_bp.shape[1]), nll

    def gradient(self, lesson: Lesson, student: BlockWalker, student_btd: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the loss, summed over a lesson, in what leaves a student's last block."""
        leaf_btd = student_btd.detach().requires_grad_()
        if lesson.loss == "hidden":
            assert lesson.hidden_btd is not None
            given = self._walker.final_states(lesson.hidden_btd, lesson.shown)
            distance_b, _ = displacement(given, student.final_states(leaf_btd, lesson.shown))
            distance_b.sum().backward()
            assert leaf_btd.grad is not None
            return leaf_btd.grad
        read, head = student.logit_inputs(leaf_btd, lesson.shown)
        inner = read.detach().requires_grad_()
        # chunk by chunk, so that logits of one chunk alone are held
        for kl_n, nll_n in divergences(self._taught(lesson), inner, head, lesson.wanted_bp):
            (nll_n if lesson.loss == "nll" else kl_n).sum().backward()
        (gradient_btd,) = torch.autograd.grad(read, leaf_btd, inner.grad)
        return gradient_btd

    def _taught(self, lesson: Lesson) -> Iterable[Targets] | None:
        if lesson.kept is None and lesson.loss in ("kl", "topk_kl"):
            assert lesson.hidden_btd is not None
            return targets(lesson.loss, *self._walker.logit_inputs(lesson.hidden_btd, lesson.shown))
        return lesson.kept

    def _batches(self, split: str, tokens: int) -> list[tuple[int, int]]:
        """Return the first sequence of each batch, and how many it has."""
        length = self._tokens[split].shape[1]
        assert tokens % length == 0, f"{tokens} tokens are not whole sequences of {length}"
        assert tokens <= self._tokens[split].numel(), f"{tokens} tokens of the {split} split were not packed"
        count = tokens // length
        return [(start, min(SEQUENCES_PER_BATCH, count - start)) for start in range(0, count, SEQUENCES_PER_BATCH)]

    def _compute(self, shown: Shown, loss: Loss) -> Lesson:
        wanted_bp = wanted(self._walker.kind, shown)
        if loss == "nll":
            return Lesson(loss=loss, shown=shown, wanted_bp=wanted_bp, hidden_btd=None, kept=None)
        hidden_btd = self._walker.run_all(self._walker.embed(shown))
        if loss == "hidden":
            return Lesson(loss=loss, shown=shown, wanted_bp=wanted_bp, hidden_btd=hidden_btd, kept=None)
        kept = self._keep(targets(loss, *self._walker.logit_inputs(hidden_btd, shown)), wanted_bp.numel())
        return Lesson(
            loss=loss, shown=shown, wanted_bp=wanted_bp, hidden_btd=hidden_btd if kept is None else None, kept=kept
        )

    def _keep(self, taught: Iterator[Targets], positions: int) -> tuple[Targets, ...] | None:
        """Return all targets of a batch, or None if there is no room for them."""
        first = next(taught)
        size = first.size_bytes // len(first.negentropy_n) * positions
        if size > self._room:
            return None
        self._room -= size
        return (first, *taught)
