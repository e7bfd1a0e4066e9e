"""Nodes join and are lost in the middle of a search; the plan is that of one process."""

import json
from pathlib import Path

from forked import Python

import allocator

SETTINGS = [
    "tokens.sequence_length=64",
    "tokens.calibration=512",
    "tokens.selection=256",
    "tokens.test=256",
    "search.method=steady",
    "search.steady.tokens=[128,256]",
    "search.steady.trials=150",
    "search.steady.patience=150",
    "search.steady.lag=6",
]


def test_nodes_that_join_are_used_and_lost_ones_survived(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    local = allocator.search(
        str(tiny_model), text=text_folder, workers=0, name="local", runs_dir=tmp_path, settings=SETTINGS
    )
    script = Path(__file__).with_name("nodes.py")
    done = Python([script, tmp_path, tiny_model, text_folder, *SETTINGS])
    out, err = done.communicate()
    assert done.returncode == 0, err
    told = json.loads(out.splitlines()[-1])
    assert told["alive"][0] == 1
    assert max(told["alive"]) == 3
    assert told["alive"][-1] == 1
    assert any("room for 1 of 3 workers" in message for message in told["said"])
    assert any("a worker died and is replaced" in message for message in told["said"])
    assert (tmp_path / "nodes" / "plan.json").read_bytes() == (local.folder / "plan.json").read_bytes()
