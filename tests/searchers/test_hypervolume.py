"""The hypervolume of a journal against cells that are counted, and as the journal grows."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from allocator.core.effort import candidate_tokens
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request
from allocator.core.space import SearchSpace, Unit
from allocator.searchers.hypervolume import Hypervolume

TOKENS = 64
TWO, THREE, MEASURED = ["kl", "params"], ["kl", "params", "latency_ms"], ["kl", "nll", "params"]


@pytest.fixture(scope="module")
def timed():
    """Four units of five levels; nanoseconds that do not go with parameters."""
    kept, milliseconds = (4, 3, 2, 1, 0), [(9, 9, 8, 1, 0), (7, 3, 3, 3, 2), (12, 11, 10, 9, 1), (5, 4, 4, 4, 4)]
    units = [
        Unit(
            name=f"layers.{index}.mlp",
            kind="channels",
            part="mlp",
            block=index,
            total=4,
            kept=kept,
            params=tuple(10 * count for count in kept),
            macs=tuple(30 * count for count in kept),
            others={"latency_ms": tuple(10**6 * value for value in ladder)},
        )
        for index, ladder in enumerate(milliseconds)
    ]
    return SearchSpace("structured", tuple(units), {"params": 100, "macs": 100, "latency_ms": 5 * 10**6})


def _outcome(allocation, kl, tokens=TOKENS, split="search"):
    return Outcome(
        request=Request(allocation=tuple(allocation), tokens=tokens, split=split),
        measured={"kl": kl, "nll": 1.0 + kl * (2.0 - kl)},
        wall_s=0.0,
    )


def _journal(space, batches):
    return Journal(Path("unused"), JournalHeader(space=space), dict(enumerate(batches)), None)


def _drawn(space, seed):
    """Seven batches, at both fidelities and of both splits; some lose more than the worst of the first batch."""
    rng, asked = np.random.default_rng(seed), {space.sparsest, space.dense}
    batches = [[_outcome(space.sparsest, 1.0), _outcome(space.dense, 0.0)]]
    kinds = [(TOKENS, "search"), (TOKENS, "search"), (TOKENS // 2, "search"), (TOKENS, "selection")]
    for _ in range(6):
        drawn = {tuple(rng.integers(5, size=4).tolist()) for _ in range(6)} - asked
        asked |= drawn
        batches.append([_outcome(each, rng.uniform(0, 1.3), *kinds[rng.integers(4)]) for each in sorted(drawn)])
    return batches


def _counted(points, ideal, reference):
    """The share of the box that points dominate: between all of their coordinates, a cell is dominated or is not."""
    points = np.array(points, dtype=float)
    edges = [
        sorted({low, high, *(min(max(value, low), high) for value in points[:, axis])})
        for axis, (low, high) in enumerate(zip(ideal, reference, strict=True))
    ]
    total = 0.0
    for cell in itertools.product(*(itertools.pairwise(axis) for axis in edges)):
        lows = np.array([low for low, _ in cell])
        total += np.prod([high - low for low, high in cell]) * (points <= lows).all(axis=1).any()
    return total / np.prod(np.subtract(reference, ideal))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("objectives", [TWO, THREE, MEASURED], ids="-".join)
def test_against_counted_cells(timed, objectives, seed):
    batches = _drawn(timed, seed)
    found = Hypervolume(_journal(timed, batches), objectives, TOKENS).to_json()
    box = {"kl": (0.0, 1.0), "nll": (1.0, 2.0), "params": (100, 260), "latency_ms": (12.0, 38.0)}
    assert found["ideal"] == {name: box[name][0] for name in objectives}
    assert found["reference"] == {name: box[name][1] for name in objectives}
    seen, spent, expected = [], 0.0, []
    for batch in batches:
        seen += batch
        spent += sum(candidate_tokens(timed, [outcome.request for outcome in batch]))
        points = [
            [
                timed.cost(o.request.allocation, name) / (10**6 if name == "latency_ms" else 1)
                if name in timed.fixed
                else o.measured[name]
                for name in objectives
            ]
            for o in seen
            if (o.request.tokens, o.request.split) == (TOKENS, "search")
        ]
        expected.append((len(seen), spent, _counted(points, *zip(*(box[name] for name in objectives), strict=True))))
    assert found["value"] == found["curve"][-1][-1] > 0.1
    for (evaluations, tokens, volume), (count, spent, share) in zip(found["curve"], expected, strict=True):
        assert evaluations == count
        assert tokens == round(spent)
        assert volume == pytest.approx(share, abs=1e-6)


@given(data=st.data())
def test_an_outcome_never_lowers_it(spaces, data):
    space = data.draw(spaces)
    assume(space.cost(space.dense, "macs"))
    levels = st.tuples(*(st.integers(0, unit.num_levels - 1) for unit in space.units))
    outcomes = [_outcome(a, kl) for a, kl in data.draw(st.dictionaries(levels, st.floats(0, 2), min_size=1)).items()]
    curve = Hypervolume(_journal(space, [[outcome] for outcome in outcomes]), TWO, TOKENS).curve()
    assert [count for count, _, _ in curve] == list(range(1, len(outcomes) + 1))
    assert all(before[-1] <= after[-1] for before, after in itertools.pairwise(curve))
    assert 0.0 <= curve[0][-1] <= curve[-1][-1] <= 1.0


def test_what_is_beyond_the_reference_adds_nothing(timed):
    begun = [_outcome((2, 2, 2, 2), 0.5)]
    one = Hypervolume(_journal(timed, [begun]), TWO, TOKENS).curve()
    two = Hypervolume(_journal(timed, [begun, [_outcome((4, 4, 4, 4), 0.51)]]), TWO, TOKENS).curve()
    assert one[0][-1] == two[1][-1] == 0.0, "neither is below the reference point in every figure"


def test_a_batch_that_a_kill_cut_short_is_looked_at_again(timed, tmp_path):
    batches = _drawn(timed, 0)
    whole = Hypervolume(_journal(timed, batches), THREE, TOKENS).to_json()
    with Journal.create(tmp_path / "journal.jsonl", JournalHeader(space=timed)) as journal:
        volume, curves = Hypervolume(journal, THREE, TOKENS), []
        for number, batch in enumerate(batches):
            for outcome in batch:
                journal.append(outcome, number)
                if number:
                    curves.append(volume.curve())
        assert volume.to_json() == whole
    assert any(curve != whole["curve"][: len(curve)] for curve in curves), "cut short, a batch leads to less"


def test_every_batch_is_looked_at_once(timed, monkeypatch):
    calls = []
    module = sys.modules[Hypervolume.__module__]
    monkeypatch.setattr(module, "candidate_tokens", lambda *given: calls.append(1) or candidate_tokens(*given))
    volume = Hypervolume(_journal(timed, _drawn(timed, 0)), THREE, TOKENS)
    assert volume.curve() == volume.curve()
    assert len(calls) == 7
