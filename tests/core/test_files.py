import os

import pytest

from allocator.core.files import write_atomic


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_what_fails_leaves_nothing_and_changes_nothing(tmp_path, monkeypatch, at):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    path = tmp_path / "front.json"
    write_atomic(path, "before")
    monkeypatch.setattr(os, at, full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
