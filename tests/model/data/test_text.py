import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest

from allocator.core.errors import UserError
from allocator.model.data.text import (
    LONGEST_LIBRARY_DOCUMENT,
    SPLITS,
    Document,
    choose_split,
    read_documents,
)

PINNED = [
    ("argparse.py", "calibration"),
    ("json/decoder.py", "calibration"),
    ("book.jsonl#0", "calibration"),
    ("naïve/é0.md", "calibration"),
    ("asyncio/m0.py", "calibration"),
    ("document000.txt", "calibration"),
    ("book.jsonl#4", "search"),
    ("naïve/é95.md", "search"),
    ("asyncio/m7.py", "search"),
    ("document026.txt", "search"),
    ("book.jsonl#3", "selection"),
    ("naïve/é6.md", "selection"),
    ("asyncio/m26.py", "selection"),
    ("document006.txt", "selection"),
    ("book.jsonl#1", "test"),
    ("naïve/é13.md", "test"),
    ("asyncio/m10.py", "test"),
    ("document005.txt", "test"),
]


@pytest.mark.parametrize(("name", "split"), PINNED)
def test_the_split_of_a_name_never_changes(name, split):
    assert choose_split(name) == split


def test_shares_of_splits():
    counts = Counter(choose_split(f"folder/file{number}.py") for number in range(20_000))
    shares = {split: counts[split] / 20_000 for split in SPLITS}
    assert shares == pytest.approx({"calibration": 0.8, "search": 0.06, "selection": 0.04, "test": 0.1}, abs=0.01)


def test_no_token_is_in_two_splits(text_folder):
    by_split = {split: set() for split in SPLITS}
    for document in read_documents(text_folder):
        by_split[choose_split(document.name)].add((document.name, document.text))
    assert all(by_split.values())
    assert sum(map(len, by_split.values())) == len(set.union(*by_split.values()))


def test_json_lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": ""}\n{"text": "tw\\u00f6\\u2028", "id": 3}\r\n', encoding="utf-8")
    documents = sorted(read_documents(path), key=lambda document: document.name)
    assert documents == [Document("text.jsonl#1", "one"), Document("text.jsonl#4", "twö\u2028")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'text': 1}", "line 2 is not JSON"),
        ('{"text": 1}', r"line 2 has no string under the key \"text\" \(found the keys \['text'\]\)"),
        ('{"body": "a"}', r"line 2 .*found the keys \['body'\]"),
        ('["a"]', "line 2 .*found list"),
        ("null", "line 2 .*found NoneType"),
    ],
)
def test_a_wrong_json_line_is_named(tmp_path, line, message):
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read_documents(path)


def test_a_folder_is_read_recursively_by_suffix_in_one_order(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("a.txt", "deep/b.md", "deep/er/c.py"):
        (tmp_path / name).write_text(name)
    (tmp_path / "deep" / "d.jsonl").write_text(json.dumps({"text": "deep/d.jsonl"}))
    (tmp_path / "ignored.bin").write_bytes(b"\xff\xfe")
    documents = read_documents(tmp_path)
    assert {d.text for d in documents} == {"a.txt", "deep/b.md", "deep/er/c.py", "deep/d.jsonl"}
    assert {d.name for d in documents} == {"a.txt", "deep/b.md", "deep/er/c.py", "deep/d.jsonl#1"}
    (tmp_path / "a.txt").rename(tmp_path / "swap")
    (tmp_path / "swap").rename(tmp_path / "a.txt")
    assert read_documents(tmp_path) == documents


def test_the_order_does_not_depend_on_where_the_folder_lies(text_folder, tmp_path):
    shutil.copytree(text_folder, tmp_path / "elsewhere")
    assert read_documents(tmp_path / "elsewhere") == read_documents(text_folder)


def test_a_saved_data_set_without_its_library_is_refused_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'allocator\[datasets\]'"):
        read_documents(tmp_path)


def test_text_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no documents"):
        read_documents(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no documents"):
        read_documents(tmp_path / "empty.txt")


def test_text_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("naïve".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 \(byte 2\)"):
        read_documents(tmp_path)


@pytest.mark.parametrize("name", [None, Path("python")])
def test_the_standard_library_is_text(name):
    documents = read_documents(name)
    names = {d.name for d in documents}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert len(documents) > 300
    assert not any(part in {"test", "tests", "site-packages"} for name in names for part in name.split("/"))
    assert max(len(d.text.encode()) for d in documents) <= LONGEST_LIBRARY_DOCUMENT
    assert {choose_split(name) for name in names} == set(SPLITS)
