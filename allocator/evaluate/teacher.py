"""What the dense model says about the text, computed once per batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from allocator.evaluate.loss import Targets, targets
from allocator.model.walk import SEQUENCES_PER_BATCH, BlockWalker

KEPT_BYTES = 256 << 20
"""Memory for distributions that are kept; beyond it they are recomputed from hidden states, with equal results."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """One batch of text and what the dense model makes of it.

    Attributes:
        tokens_bt: Token ids.
        embedded_btd: What enters the first block.
        hidden_btd: What leaves the last block.
        kept: The distributions, if there was room for them.
    """

    tokens_bt: torch.Tensor
    embedded_btd: torch.Tensor
    hidden_btd: torch.Tensor
    kept: tuple[Targets, ...] | None


class Teacher:
    """Lessons by split. The walker's model must be dense whenever a new lesson is computed."""

    def __init__(self, walker: BlockWalker, tokens: Mapping[str, torch.Tensor]) -> None:
        self._walker, self._tokens = walker, tokens
        self._lessons: dict[tuple[str, int, int], Lesson] = {}
        self._room = KEPT_BYTES

    def knows(self, split: str, tokens: int) -> bool:
        """Whether lessons on so many tokens were computed already."""
        return all(key in self._lessons for key in self._keys(split, tokens))

    def lessons(self, split: str, tokens: int) -> list[Lesson]:
        """Return lessons on the first ``tokens`` tokens of a split, computing those that are missing."""
        keys = self._keys(split, tokens)
        for key in keys:
            if key not in self._lessons:
                _, start, size = key
                self._lessons[key] = self._compute(self._tokens[split][start : start + size])
        return [self._lessons[key] for key in keys]

    def targets(self, lesson: Lesson) -> Iterable[Targets]:
        """Return the distributions of a lesson, kept or recomputed."""
        return lesson.kept if lesson.kept is not None else targets(lesson.hidden_btd, self._walker.logits)

    def _keys(self, split: str, tokens: int) -> list[tuple[str, int, int]]:
        length = self._tokens[split].shape[1]
        assert tokens % length == 0, f"{tokens} tokens are not whole sequences of {length}"
        assert tokens <= self._tokens[split].numel(), f"{tokens} tokens of the {split} split were not packed"
        count = tokens // length
        starts = range(0, count, SEQUENCES_PER_BATCH)
        return [(split, start, min(SEQUENCES_PER_BATCH, count - start)) for start in starts]

    def _compute(self, tokens_bt: torch.Tensor) -> Lesson:
        embedded_btd = self._walker.embed(tokens_bt)
        hidden_btd = self._walker.run_all(embedded_btd)
        vocabulary = self._walker.logits(hidden_btd[:1, :1]).shape[-1]
        size = tokens_bt.numel() * (vocabulary + 1) * 4
        kept = None
        if size <= self._room:
            self._room -= size
            kept = tuple(targets(hidden_btd, self._walker.logits))
        return Lesson(tokens_bt, embedded_btd, hidden_btd, kept)
