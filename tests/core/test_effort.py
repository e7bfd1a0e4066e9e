"""What measurements cost, worked out by hand on units of one block each, at three MACs a parameter."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.effort import EXPANSION_POSITIONS, Trained, candidate_tokens
from allocator.core.protocols import Request

DENSE = 10 + 3 * (100 + 60)


@pytest.fixture(scope="module")
def two_blocks(make_space):
    return make_space([[100, 50], [60, 20]], fixed=10, parts=("mlp",))


def test_what_comes_before_a_difference_is_counted_once(two_blocks):
    requests = [
        Request(allocation=(1, 0), tokens=64),
        Request(allocation=(1, 1), tokens=64),
        Request(allocation=(0, 0), tokens=64),
        Request(allocation=(1, 1), tokens=32),
    ]
    shares = [(10 + 3 * 110) / DENSE, (10 + 3 * 20) / DENSE, 1.0, (10 + 3 * 70) / DENSE]
    tokens = [64, 64, 64, 32]
    assert candidate_tokens(two_blocks, requests) == pytest.approx([t * s for t, s in zip(tokens, shares, strict=True)])


def test_training_counts_three_times_and_shares_nothing(two_blocks):
    """Before training a candidate is measured as all are; after it, from its first block on."""
    requests = [
        Request(allocation=(1, 0), tokens=64),
        Request(allocation=(1, 1), tokens=64, training=128),
        Request(allocation=(1, 1), tokens=64, split="selection", training=128),
    ]
    whole = (10 + 3 * 70) / DENSE
    branch = (10 + 3 * 20) / DENSE
    found = candidate_tokens(two_blocks, requests)
    assert found[1] == pytest.approx(64 * branch + (64 + 3 * 128) * whole)
    assert found[2] == pytest.approx((2 * 64 + 3 * 128) * whole)


def test_training_that_goes_on_costs_what_is_new(two_blocks):
    share, trained = (10 + 3 * 70) / DENSE, Trained()
    stages = [(32, 64), (64, 64), (128, 192)]
    fresh = [64, 0, 128]
    for (tokens, training), new in zip(stages, fresh, strict=True):
        requests = [Request(allocation=(1, 1), tokens=tokens, training=training)]
        for _ in range(2):  # looking at the cost of a batch changes nothing
            cost = candidate_tokens(two_blocks, requests, trained)
        assert cost == pytest.approx([(2 * tokens + 3 * new) * share])
        trained.note(requests)
    anew = [
        Request(allocation=(1, 1), tokens=128, split="selection", training=192),
        Request(allocation=(1, 0), tokens=128, training=192),
    ]
    assert [trained.before(request) for request in anew] == [0, 0]


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 4)), max_size=8))
def test_training_adds_to_what_a_batch_costs_without(two_blocks, drawn):
    requests = [Request(allocation=(a, b), tokens=64, training=32 * times) for a, b, times in drawn]
    plain = candidate_tokens(two_blocks, [Request(allocation=r.allocation, tokens=r.tokens) for r in requests])
    shares = [two_blocks.compute_share(r.allocation) for r in requests]
    added = [s * (64 + 3 * r.training) if r.training else 0.0 for s, r in zip(shares, requests, strict=True)]
    found = candidate_tokens(two_blocks, requests)
    assert found == pytest.approx([a + b for a, b in zip(plain, added, strict=True)])


@pytest.mark.parametrize(("tokens", "few"), [(64, 64), (EXPANSION_POSITIONS, 128), (4096, 128)])
def test_an_expansion_costs_four_dense_passes_and_every_level_on_a_few_tokens(make_space, tokens, few):
    """Whatever the allocation: it runs in dense shapes."""
    space = make_space([[100, 50, 0], [60, 20], [40]], fixed=10, parts=("mlp",))
    levels = 3 * (2 * 100 + 1 * 60) / (10 + 3 * 200)
    for allocation in (space.dense, space.sparsest):
        cost = candidate_tokens(space, [Request(allocation=allocation, tokens=tokens, probe="expansion")])
        assert cost == pytest.approx([4 * tokens + few * levels])


requests_of_two_blocks = st.builds(
    Request,
    allocation=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    tokens=st.sampled_from([64, 1024]),
    probe=st.sampled_from(["", "influence", "expansion"]),
)


@given(st.lists(requests_of_two_blocks, max_size=8, unique_by=lambda request: request.key), st.randoms())
def test_an_expansion_shares_nothing_with_its_batch_in_any_order(two_blocks, requests, random):
    costs = dict(zip(requests, candidate_tokens(two_blocks, requests), strict=True))
    shuffled = random.sample(requests, len(requests))
    assert dict(zip(shuffled, candidate_tokens(two_blocks, shuffled), strict=True)) == costs
    others = [request for request in requests if request.probe != "expansion"]
    assert [costs[request] for request in others] == candidate_tokens(two_blocks, others)
    for request in set(requests) - set(others):
        assert [costs[request]] == candidate_tokens(two_blocks, [request])


def test_some_of_the_blocks_cost_what_they_compute_without_the_head(two_blocks):
    requests = [
        Request(allocation=(1, 0), tokens=64, blocks=1),
        Request(allocation=(1, 1), tokens=64),
        Request(allocation=(1, 0), tokens=64),
        Request(allocation=(0, 0), tokens=64, blocks=1),
    ]
    macs = [3 * 50, 10 + 3 * 20, 10 + 3 * 60, 3 * 100]
    assert candidate_tokens(two_blocks, requests) == pytest.approx([64 * count / DENSE for count in macs])


FIRST_BLOCKS = [Request(allocation=(level, 0), tokens=64, blocks=1) for level in (0, 1)]


@given(st.permutations([*FIRST_BLOCKS, *(Request(allocation=(a, b), tokens=64) for a in (0, 1) for b in (0, 1))]))
def test_every_distinct_block_and_head_is_paid_once(two_blocks, requests):
    """Two first blocks; after each two second ones, with the head."""
    total = 3 * (100 + 50) + 2 * 3 * (60 + 20) + 4 * 10
    assert sum(candidate_tokens(two_blocks, requests)) == pytest.approx(64 * total / DENSE)
