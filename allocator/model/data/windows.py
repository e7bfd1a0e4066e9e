"""Windows of text: every split takes one window from each of its documents in turn, then a second from each.

A window begins where a passage of a document begins. So a split of 32 windows sees 32 documents if it has so many. A
document that is shorter than a window is followed by the next one.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

import numpy as np

from allocator.core.errors import UserError
from allocator.model.data.text import SPLITS, Document, choose_split, hash_name, sort_by_hash

FEWEST = 16
"""If a split has fewer documents of its own, the parts of all documents are shared among the splits."""

PASSAGE = 4096
"""Most characters of a passage where passages are shared among the splits. The length of windows does not change it."""

_PER_TOKEN = 8
"""Most characters of a passage for each token of a window, where whole documents belong to one split."""

_ENDS = (re.compile(r"\n\s*\n"), re.compile(r"[.!?…。！？][\"'”’)\]]*\s"), re.compile(r"\n"), re.compile(r"\s"))
"""Where a passage may end, the best place first: after a paragraph, a sentence, a line, a word."""


@dataclass(frozen=True, slots=True)
class Passage:
    """A part of a document, or all of a short one.

    Attributes:
        name: The document's name, with the number of the passage if there are several.
        document: The document's name.
        text: The text.
    """

    name: str
    document: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """How much of a text a split holds.

    Attributes:
        documents: Number of documents of which the split holds a part.
        total: Number of documents of the text.
        share: Share of the text's characters, in [0, 1].
        shared: Whether documents are few. Other parts of the same documents then serve other splits.
    """

    documents: int
    total: int
    share: float
    shared: bool


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens of a passage that no window holds yet.

    Attributes:
        document: The name of the document.
        ids: The tokens.
        density: Characters for each token.
    """

    document: str
    ids: Sequence[int]
    density: float


class Passages:
    """The passages of a text, by split.

    Documents are assigned to splits by the hash of their names. If a split would have fewer than :data:`FEWEST`
    documents, passages are assigned instead, by the hash of their own names.
    """

    def __init__(self, documents: Sequence[Document], length: int) -> None:
        """Cut documents into passages.

        Args:
            documents: The documents of the text.
            length: Tokens in each window.
        """
        self._length = length
        self._total = len(documents)
        self._size = sum(len(document.text) for document in documents)
        counts = Counter(choose_split(document.name) for document in documents)
        self._shared = min(counts[split] for split in SPLITS) < FEWEST
        self._by_split: dict[str, list[Passage]] = {split: [] for split in SPLITS}
        for document in documents:
            for passage in cut_passages(document, PASSAGE if self._shared else _PER_TOKEN * length):
                name = passage.name if self._shared else passage.document
                self._by_split[choose_split(name)].append(passage)

    def take(
        self, split: str, encode: Callable[[str], list[int]], num_windows: int, separator: int
    ) -> tuple[np.ndarray, Coverage]:
        """Return the first windows of a split, and how much of the text they hold.

        The first windows are the same however many are taken.

        Args:
            split: One of :data:`~allocator.model.data.text.SPLITS`.
            encode: Gives the token ids of a text, without special tokens.
            num_windows: How many windows to take.
            separator: The token put after each passage.

        Returns:
            Token ids, int64, of shape (num_windows, length), and the coverage.

        Raises:
            UserError: The split has too few tokens.
        """
        length = self._length
        left: deque[_Part] = deque()
        windows: list[list[int]] = [[]]
        seen: set[str] = set()
        characters = 0.0
        for part in chain(self._encode(split, encode, separator), _drain(left)):
            taken = part.ids[: length - len(windows[-1])]
            windows[-1].extend(taken)
            seen.add(part.document)
            characters += len(taken) * part.density
            if len(taken) < len(part.ids):
                left.append(replace(part, ids=part.ids[len(taken) :]))
            if len(windows[-1]) == length:
                if len(windows) == num_windows:
                    break
                windows.append([])
        else:
            raise UserError(
                f"text: {num_windows} sequences of {length} tokens need {num_windows * length} tokens, the documents "
                f"hold {sum(map(len, windows))}; give more text, or ask for fewer, with --set tokens.calibration=N (or "
                "selection, or test), or, for the search split, its method's tokens"
            )
        coverage = Coverage(
            documents=len(seen), total=self._total, share=round(characters / self._size, 6), shared=self._shared
        )
        return np.array(windows, dtype=np.int64), coverage

    def _encode(self, split: str, encode: Callable[[str], list[int]], separator: int) -> Iterator[_Part]:
        for passage in take_turns(self._by_split[split]):
            ids = [*encode(passage.text), separator]
            yield _Part(passage.document, ids, len(passage.text) / len(ids))


def describe_coverage(coverages: Mapping[str, Coverage], of: str = "") -> list[str]:
    """Say how much of a text its splits hold, with a notice where they hold little.

    Args:
        coverages: By split.
        of: Name of the text, if there are several.
    """
    text = f"text {of}" if of else "text"
    total = next(iter(coverages.values())).total
    parts = [f"{split} {each.documents} ({each.share:.1%})" for split, each in coverages.items()]
    lines = [f"{text}: parts of its {total:,} documents: {', '.join(parts)}"]
    if any(each.shared for each in coverages.values()):
        lines.append(f"notice: {text} has few documents, so different parts of one may serve different splits")
    few = [split for split, each in coverages.items() if each.documents < FEWEST]
    if few:
        lines.append(
            f"notice: {text}: {' and '.join(few)} hold fewer than {FEWEST} documents, so the plan may fit these rather "
            "than the model. Give more documents, or more tokens to each split"
        )
    return lines


def _drain(parts: deque[_Part]) -> Iterator[_Part]:
    while parts:
        yield parts.popleft()


def cut_passages(document: Document, size: int) -> Iterator[Passage]:
    """Cut a document into passages of at most ``size`` characters, at the best place in their second half."""
    text, start, number = document.text, 0, 0
    while len(text) - start > size:
        end = _find_end(text, start + size // 2, start + size)
        yield Passage(f"{document.name}#{number}", document.name, text[start:end])
        start, number = end, number + 1
    yield Passage(f"{document.name}#{number}" if number else document.name, document.name, text[start:])


def take_turns(passages: Iterable[Passage]) -> list[Passage]:
    """Return passages in turn: one of each document, then a second of each. Hashes of names decide the order."""
    by_document: dict[str, list[Passage]] = {}
    for passage in sort_by_hash(passages):
        by_document.setdefault(passage.document, []).append(passage)
    documents = [by_document[name] for name in sorted(by_document, key=hash_name)]
    return [passage for turn in zip_longest(*documents) for passage in turn if passage is not None]


def _find_end(text: str, least: int, most: int) -> int:
    """Return where a passage ends: after the last paragraph, sentence, line or word that ends between two places."""
    for pattern in _ENDS:
        ends = [match.end() for match in pattern.finditer(text, least, most)]
        if ends:
            return ends[-1]
    return most
