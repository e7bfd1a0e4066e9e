import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.evaluation.trie import plan

LENGTH = 5


def _distinct_prefixes(paths):
    return len({path[:depth] for path in paths for depth in range(1, len(path) + 1)})


def _run(paths, limit):
    """Do what the steps say, with the path so far as the state; return the final states and the blocks run."""
    kept, finals, blocks = {}, {}, 0
    for step in plan(paths, limit):
        path = paths[step.index]
        state = kept[step.start] if step.start else ()
        before, kept = kept, {}
        if step.start in step.keep:
            kept[step.start] = state
        for block in range(step.start, len(path)):
            state = (*state, path[block])
            blocks += 1
            if block + 1 in step.keep:
                kept[block + 1] = state
        kept.update({b: before[b] for b in step.keep if b < step.start})
        assert set(kept) == set(step.keep)
        assert len(kept) <= limit
        finals[step.index] = state
    return finals, blocks


WHOLE = st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 1))] * LENGTH)
ANY = st.tuples(WHOLE, st.integers(1, LENGTH)).map(lambda drawn: drawn[0][: drawn[1]])
PATHS = st.lists(WHOLE | ANY, min_size=1, max_size=12)


@given(PATHS, st.integers(0, LENGTH + 1))
def test_every_path_is_run_as_it_is(paths, limit):
    finals, _ = _run(paths, limit)
    assert finals == dict(enumerate(paths))


@given(PATHS)
def test_nothing_is_run_twice_with_room_for_all(paths):
    assert _run(paths, LENGTH)[1] == _distinct_prefixes(paths)


@given(PATHS)
def test_nothing_is_shared_without_room(paths):
    assert _run(paths, 0)[1] == sum(map(len, paths))


@given(PATHS, st.integers(0, LENGTH))
def test_order_is_lexicographic(paths, limit):
    steps = plan(paths, limit)
    assert [paths[step.index] for step in steps] == sorted(paths)


def test_the_boundary_cheapest_to_run_again_is_dropped():
    """Later paths leave the first one at 4, 3 and 2: 2 is two blocks from the start, 3 and 4 one from the next."""
    a, b = (0,), (1,)
    first = (a,) * 5
    paths = [first, (a, a, a, a, b), (a, a, a, b, b), (a, a, b, b, b)]
    assert [step.keep for step in plan(paths, 3)] == [(2, 3, 4), (2, 3), (2,), ()]
    assert [step.keep for step in plan(paths, 2)] == [(2, 4), (2,), (2,), ()]
    assert [step.start for step in plan(paths, 2)] == [0, 4, 2, 2]
    assert [step.keep for step in plan(paths, 1)] == [(4,), (), (2,), ()]


def test_equal_paths_run_no_block_again():
    path = ((0,),) * LENGTH
    assert [step.start for step in plan([path, path], 1)] == [0, LENGTH]


@pytest.mark.parametrize("blocks", [8, 32])
def test_a_profile_from_one_parent_costs_half(blocks):
    """One level up and one down of each unit: what comes before the unit is shared."""
    parent = [(1,)] * blocks
    paths = [(*parent[:at], (level,), *parent[at + 1 :]) for at in range(blocks) for level in (0, 2)]
    share = sum(blocks - step.start for step in plan(paths, blocks)) / (blocks * len(paths))
    assert share == pytest.approx(0.5, abs=1.5 / blocks)
