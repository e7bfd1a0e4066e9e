"""Reading a folder that Hugging Face `datasets` saved. The package is an extra, so this may be skipped."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from allocator.core.errors import UserError
from allocator.model.data.text import read_documents


def _save(folder: Path, column: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({column: ["first text", "", "third text"]})
    with pyarrow.ipc.new_stream(str(folder / "data.arrow"), table.schema) as writer:
        writer.write_table(table)
    state = {"_data_files": [{"filename": "data.arrow"}], "_fingerprint": "0", "_split": None}
    state |= {"_format_columns": None, "_format_kwargs": {}, "_format_type": None, "_output_all_columns": False}
    features = {column: {"dtype": "string", "_type": "Value"}}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))


def test_rows_become_documents(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    _save(tmp_path, "text")
    assert {d.name: d.text for d in read_documents(tmp_path)} == {"row#0": "first text", "row#2": "third text"}


def test_missing_column_is_named(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    _save(tmp_path, "body")
    with pytest.raises(UserError, match=r"no column \"text\" .*body"):
        read_documents(tmp_path)


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dataset_info.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'allocator\[datasets\]'"):
        read_documents(tmp_path)
