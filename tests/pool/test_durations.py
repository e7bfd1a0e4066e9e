"""When a task is late follows from what its peers took, and from nothing else."""

from __future__ import annotations

import statistics

import hypothesis.strategies as st
import pytest
from hypothesis import given

from allocator.pool.calls import ActorCall
from allocator.pool.durations import LATE, LONG, Durations

PATIENCE_S = 1.0
seconds = st.floats(1e-3, 1e3)


def measure(size: float | None = 1.0, count: int = 1, patience: float = 1.0) -> ActorCall:
    return ActorCall(method="measure", arguments=(), size=size, count=count, patience=patience)


def after(took_s: list[float], warm: bool = True, size: float | None = 1.0) -> Durations:
    durations = Durations(PATIENCE_S)
    for each in took_s:
        durations.record(measure(size), warm, each)
    return durations


@pytest.mark.parametrize("warm", [True, False])
def test_the_first_of_a_kind_is_given_long(warm: bool) -> None:
    assert Durations(PATIENCE_S).estimate(measure(), warm) == (None, LONG * PATIENCE_S)
    assert after([5.0]).estimate(ActorCall(method="expand", arguments=(), size=1.0), warm) == (None, LONG * PATIENCE_S)


@given(took_s=st.lists(seconds, min_size=1, max_size=20), size=st.floats(0.1, 10), count=st.integers(1, 100))
def test_it_is_late_after_a_multiple_of_the_median_of_its_peers_per_size(took_s, size, count) -> None:
    usual_s, late_s = after(took_s).estimate(measure(size, count), True)
    assert usual_s == pytest.approx(statistics.median(took_s) * size)
    assert late_s == pytest.approx(max(PATIENCE_S, usual_s * (1 + LATE / count**0.5)))


@given(cold_s=seconds, warm_s=seconds, size=st.floats(0.1, 10))
def test_who_has_things_to_load_is_given_the_time_for_it(cold_s: float, warm_s: float, size: float) -> None:
    durations = after([warm_s])
    durations.record(measure(), False, cold_s)
    assert durations.estimate(measure(size), False)[0] == pytest.approx(cold_s + warm_s * size)
    assert durations.estimate(measure(size), True)[0] == pytest.approx(warm_s * size)


def test_what_others_loaded_is_not_what_a_measurement_takes() -> None:
    assert after([100.0], warm=False).estimate(measure(), True) == (None, LONG * PATIENCE_S)


@given(took_s=seconds, patience=st.floats(1, 1e3))
def test_what_one_died_of_is_given_more_time(took_s: float, patience: float) -> None:
    durations = after([took_s])
    assert durations.estimate(measure(patience=patience), True)[1] == pytest.approx(
        patience * durations.estimate(measure(), True)[1]
    )


def test_where_size_tells_nothing_nobody_is_late_soon() -> None:
    assert after([0.01], size=None).estimate(measure(None), True) == (0.01, LONG * PATIENCE_S)


def test_only_the_last_count() -> None:
    assert after([100.0] * 64 + [1.0] * 64).estimate(measure(), True)[0] == 1.0
