"""What the dense model says about the text, computed once per batch of sequences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from allocator.evaluate.loss import Loss, Targets, displacement, divergence, divergences, targets
from allocator.model.walk import SEQUENCES_PER_BATCH, BlockWalker

KEPT_BYTES = 256 << 20
"""Memory for distributions that are kept; beyond it they are recomputed from hidden states, with equal results."""

Sums = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""The loss's numerator and denominator, and the negative log-likelihood, summed over each sequence of a batch."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One batch of sequences, and what of the dense model the loss needs.

    Attributes:
        loss: What the student is judged by.
        tokens_bt: Token ids.
        hidden_btd: What leaves the last block, where it is needed again.
        kept: The distributions, if there was room for them.
    """

    loss: Loss
    tokens_bt: torch.Tensor
    hidden_btd: torch.Tensor | None
    kept: tuple[Targets, ...] | None

    @property
    def positions(self) -> int:
        """How many tokens follow another."""
        return self.tokens_bt[:, 1:].numel()


class Teacher:
    """Lessons by split. The walker's model must be dense whenever a new lesson is computed."""

    def __init__(self, walker: BlockWalker, tokens: Mapping[str, torch.Tensor]) -> None:
        self._walker, self._tokens = walker, tokens
        self._lessons: dict[tuple[Loss, str, int, int], Lesson] = {}
        self._room = KEPT_BYTES

    def knows(self, split: str, tokens: int, loss: Loss) -> bool:
        """Whether lessons on so many tokens were computed already."""
        return all(key in self._lessons for key in self._keys(split, tokens, loss))

    def lessons(self, split: str, tokens: int, loss: Loss) -> list[Lesson]:
        """Return lessons on the first ``tokens`` tokens of a split, computing those that are missing."""
        keys = self._keys(split, tokens, loss)
        for key in keys:
            if key not in self._lessons:
                *_, start, size = key
                self._lessons[key] = self._compute(self._tokens[split][start : start + size], loss)
        return [self._lessons[key] for key in keys]

    def judge(self, lesson: Lesson, student: BlockWalker, student_btd: torch.Tensor) -> Sums:
        """Compare what leaves a student's last block with a lesson."""
        total, nll = divergence(self._taught(lesson), student_btd, student.logits, lesson.tokens_bt)
        if lesson.loss == "hidden":
            assert lesson.hidden_btd is not None
            return (*displacement(self._walker.states(lesson.hidden_btd), student.states(student_btd)), nll)
        length = lesson.tokens_bt.shape[1]
        if lesson.loss == "nll":
            return nll, torch.full_like(nll, length - 1), nll
        return total, torch.full_like(total, length), nll

    def gradient(self, lesson: Lesson, student: BlockWalker, student_btd: torch.Tensor) -> torch.Tensor:
        """Return the gradient of the loss, summed over a lesson, in what leaves a student's last block."""
        leaf_btd = student_btd.detach().requires_grad_()
        if lesson.loss == "hidden":
            assert lesson.hidden_btd is not None
            distance_b, _ = displacement(self._walker.states(lesson.hidden_btd), student.states(leaf_btd))
            distance_b.sum().backward()
        else:
            # chunk by chunk, so that logits of one chunk alone are held
            for kl_n, nll_n in divergences(self._taught(lesson), leaf_btd, student.logits, lesson.tokens_bt):
                (nll_n if lesson.loss == "nll" else kl_n).sum().backward()
        assert leaf_btd.grad is not None
        return leaf_btd.grad

    def _taught(self, lesson: Lesson) -> Iterable[Targets] | None:
        if lesson.kept is None and lesson.loss in ("kl", "topk_kl"):
            assert lesson.hidden_btd is not None
            return targets(lesson.loss, lesson.hidden_btd, self._walker.logits)
        return lesson.kept

    def _keys(self, split: str, tokens: int, loss: Loss) -> list[tuple[Loss, str, int, int]]:
        length = self._tokens[split].shape[1]
        assert tokens % length == 0, f"{tokens} tokens are not whole sequences of {length}"
        assert tokens <= self._tokens[split].numel(), f"{tokens} tokens of the {split} split were not packed"
        count = tokens // length
        starts = range(0, count, SEQUENCES_PER_BATCH)
        return [(loss, split, start, min(SEQUENCES_PER_BATCH, count - start)) for start in starts]

    def _compute(self, tokens_bt: torch.Tensor, loss: Loss) -> Lesson:
        if loss == "nll":
            return Lesson(loss, tokens_bt, None, None)
        hidden_btd = self._walker.run_all(self._walker.embed(tokens_bt))
        if loss == "hidden":
            return Lesson(loss, tokens_bt, hidden_btd, None)
        kept = self._keep(targets(loss, hidden_btd, self._walker.logits), tokens_bt.numel())
        return Lesson(loss, tokens_bt, hidden_btd if kept is None else None, kept)

    def _keep(self, taught: Iterator[Targets], positions: int) -> tuple[Targets, ...] | None:
        """Return all targets of a batch, or None if there is no room for them."""
        first = next(taught)
        size = first.size_bytes // len(first.negentropy_n) * positions
        if size > self._room:
            return None
        self._room -= size
        return (first, *taught)
