"""Windows of text: splits see many documents, whatever form the text has."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.errors import UserError
from allocator.model.data.text import SPLITS, Document, choose_split, read_documents
from allocator.model.data.windows import FEWEST, PASSAGE, Passages, cut_passages, describe_coverage, take_turns

SEPARATOR = 0x110000


def encode(text):
    """One token for each character."""
    return [ord(character) for character in text]


def decode(windows):
    return "".join(chr(token) for token in windows.flatten().tolist() if token != SEPARATOR)


def sentences(number, words):
    """A document of sentences that name it."""
    return "".join(f"Sentence {at} of document {number}, with some words. " for at in range(words // 8))


def take(documents, split, count, length=64):
    return Passages(documents, length).take(split, encode, count, SEPARATOR)


def origins(windows):
    """Return the documents that each window holds."""
    texts = [decode(window) for window in windows]
    return [{int(word) for word in text.replace(",", " ").split() if word.isdigit()} for text in texts]


@pytest.fixture(scope="module")
def many():
    return [Document(f"{number}.txt", sentences(number, 400)) for number in range(2000)]


def test_a_split_has_a_window_of_each_of_its_documents(many):
    windows, coverage = take(many, "search", 64)
    assert windows.dtype == np.int64
    assert windows.shape == (64, 64)
    assert coverage.documents == 64
    assert coverage.total == 2000
    assert not coverage.shared
    size = sum(len(document.text) for document in many)
    assert coverage.share == pytest.approx(64 * 64 / size, rel=0.01)


def test_a_second_window_of_a_document_follows_when_all_had_one(many):
    own = [document for document in many if choose_split(document.name) == "selection"]
    _, coverage = take(many, "selection", len(own) + 5)
    assert coverage.documents == len(own)


def test_splits_have_no_document_in_common_where_there_are_many(many):
    seen = {split: take(many, split, 40)[0] for split in SPLITS}
    texts = {split: {decode(window[:32]) for window in windows} for split, windows in seen.items()}
    assert sum(map(len, texts.values())) == len(set.union(*texts.values()))
    for split, windows in seen.items():
        starts = {decode(window).partition("document ")[2].partition(",")[0] for window in windows}
        assert {choose_split(f"{number}.txt") for number in starts if number} <= {split}


def test_few_long_documents_serve_every_split_by_parts():
    documents = [Document(f"{number}.txt", sentences(number, 40_000)) for number in range(40)]
    assert min(sum(choose_split(d.name) == split for d in documents) for split in SPLITS) < FEWEST
    parts = {}
    for split in SPLITS:
        windows, coverage = take(documents, split, 32)
        assert coverage.shared
        assert coverage.documents >= 24
        parts[split] = {decode(window[:40]) for window in windows}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values()))


def test_one_huge_file_gives_windows_from_everywhere(tmp_path):
    (tmp_path / "book.txt").write_text(sentences(7, 400_000), encoding="utf-8")
    documents = read_documents(tmp_path / "book.txt")
    assert len(documents) == 1
    windows, coverage = take(documents, "search", 32, length=128)
    assert (coverage.documents, coverage.total, coverage.shared) == (1, 1, True)
    places = sorted(int(decode(window).partition("Sentence ")[2].partition(" ")[0]) for window in windows)
    assert places[0] < 10_000
    assert places[-1] > 40_000
    assert all(decode(window).startswith("Sentence ") for window in windows)


def test_many_tiny_documents_fill_windows_together(tmp_path):
    lines = [json.dumps({"text": f"tiny {number}."}) for number in range(3000)]
    (tmp_path / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    windows, coverage = take(read_documents(tmp_path / "chat.jsonl"), "search", 8, length=64)
    assert coverage.documents >= 8 * 64 // 12
    assert (windows == SEPARATOR).sum() >= coverage.documents - 8
    assert not coverage.shared


def test_the_first_windows_are_the_same_however_many_are_taken(many):
    few, more = take(many[:300], "search", 3)[0], take(many[:300], "search", 30)[0]
    assert (more[:3] == few).all()


@given(st.lists(st.text(alphabet="ab .\n", min_size=1, max_size=300), min_size=1, max_size=30), st.integers(1, 40))
def test_every_token_is_used_once_before_the_text_is_too_short(texts, length):
    documents = [Document(str(number), text) for number, text in enumerate(texts)]
    for split in SPLITS:
        passages = [
            passage
            for document in documents
            for passage in cut_passages(document, PASSAGE)
            if choose_split(passage.name) == split
        ]
        held = sum(len(passage.text) + 1 for passage in passages)
        if held // length:
            windows, coverage = Passages(documents, length).take(split, encode, held // length, SEPARATOR)
            used = sorted(windows.flatten().tolist())
            rest = sorted([token for passage in passages for token in [*encode(passage.text), SEPARATOR]])
            for token in used:
                rest.remove(token)
            assert len(rest) == held % length
            assert coverage.documents <= len({passage.document for passage in passages})
        with pytest.raises(UserError, match=f"need {(held // length + 1) * length} tokens, the documents hold {held}"):
            Passages(documents, length).take(split, encode, held // length + 1, SEPARATOR)


@given(st.text(alphabet="word .!\n", max_size=4000), st.integers(8, 500))
def test_passages_are_the_document(text, size):
    passages = list(cut_passages(Document("name", text), size))
    assert "".join(passage.text for passage in passages) == text
    assert all(len(passage.text) <= size for passage in passages)
    assert all(len(passage.text) > size // 2 - 1 for passage in passages[:-1])
    names = [passage.name for passage in passages]
    assert names == (["name"] if len(names) == 1 else [f"name#{number}" for number in range(len(names))])
    assert {passage.document for passage in passages} == {"name"}


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("aaaaaaa.\n\nb. c\nd eeeeeee", "aaaaaaa.\n\n"),
        ("aaaa bbbb. c\nd eeeeeeeeee", "aaaa bbbb. "),
        ("aaaa bbbb c\nd eeeeeeeeee", "aaaa bbbb c\n"),
        ("aaaa bbbb c d eeeeeeeeee", "aaaa bbbb c d "),
        ("a" * 40, "a" * 14),
    ],
)
def test_a_passage_ends_after_a_paragraph_a_sentence_a_line_or_a_word(text, end):
    assert next(cut_passages(Document("name", text), 14)).text == end


def test_turns_take_one_passage_of_each_document():
    passages = [p for name in "abc" for p in cut_passages(Document(name, "x" * 30 * (1 + ord(name) - 97)), 10)]
    turns = [passage.document for passage in take_turns(passages)]
    assert len(turns) == len(passages)
    assert set(turns[:3]) == {*"abc"}
    assert set(turns[9:13]) == {*"bc"}
    assert turns[-3:] == ["c"] * 3


def test_what_splits_hold_is_said():
    documents = [Document(f"{number}.txt", sentences(number, 4000)) for number in range(9)]
    passages = Passages(documents, 64)
    coverages = {split: passages.take(split, encode, 16, SEPARATOR)[1] for split in SPLITS}
    whole, shared, few = describe_coverage(coverages)
    assert whole.startswith("text: parts of its 9 documents: calibration 9 (")
    assert shared == "notice: text has few documents, so different parts of one may serve different splits"
    assert "calibration and search and selection and test hold fewer than 16 documents" in few
    assert describe_coverage(coverages, "code")[0].startswith("text code: parts of")
