from hypothesis import given
from hypothesis import strategies as st

from allocator.core.front import pareto_front
from allocator.core.protocols import Outcome, Request

OBJECTIVES = ("kl", "params")


def _outcome(allocation, kl):
    return Outcome(
        request=Request(allocation=tuple(allocation), tokens=64), measured={"kl": kl, "nll": 0.0}, wall_s=0.0
    )


@given(data=st.data())
def test_front_is_non_dominated_and_complete(spaces, data):
    space = data.draw(spaces)
    levels = st.tuples(*(st.integers(0, unit.num_levels - 1) for unit in space.units))
    kl = st.sampled_from([0.0, 0.1, 0.2, 0.5, 1.0])
    outcomes = [_outcome(a, k) for a, k in data.draw(st.dictionaries(levels, kl, max_size=25)).items()]

    def point(outcome):
        return space.cost(outcome.request.allocation), outcome.loss

    def dominated(outcome):
        params, kl = point(outcome)
        return any(p <= params and k <= kl and (p, k) != (params, kl) for p, k in map(point, outcomes))

    front = pareto_front(space, outcomes, OBJECTIVES)
    assert {point(o) for o in front} == {point(o) for o in outcomes if not dominated(o)}
    points = [point(o) for o in front]
    assert len(set(points)) == len(points)
    assert points == sorted(points, reverse=True)
    assert pareto_front(space, outcomes[::-1], OBJECTIVES) == front


def test_of_equal_points_the_first_by_allocation_is_kept(make_space):
    space = make_space([[10, 0], [10, 0]])
    front = pareto_front(space, [_outcome((1, 0), 0.3), _outcome((0, 1), 0.3)], OBJECTIVES)
    assert [o.request.allocation for o in front] == [(0, 1)]


def test_of_nothing_there_is_no_front(space):
    assert pareto_front(space, [], OBJECTIVES) == []
