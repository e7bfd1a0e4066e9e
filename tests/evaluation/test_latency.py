"""Times of sub-blocks, each from the first to the last of the modules that it consists of."""

import pytest

from allocator.core.latency import LatencySettings
from allocator.evaluation import latency
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family


@pytest.mark.parametrize("kind", ["llama", "opt"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_sub_blocks_are_timed_within_every_pass(make_model, kind, share):
    checkpoint = read_checkpoint(make_model(kind))
    layout = resolve_layout(find_family(kind), checkpoint)
    kept = {sub_block.name: int(sub_block.total * share) for sub_block in layout.sub_blocks}
    settings = LatencySettings(batch=1, prompt=12, generate=4, dtype="float32", threads=1, repeats=3)
    (timed,) = latency._in_turns(checkpoint, layout, [kept], list(kept), settings, "cpu", lambda done: None)
    for total, own in timed.values():
        assert own.keys() == kept.keys()
        assert len(total) == 3
        for whole, *each in zip(total, *own.values(), strict=True):
            assert all(time > 0 for time in each)
            assert sum(each) < whole
