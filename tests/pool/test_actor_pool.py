"""No task is lost or answered twice, whatever happens to those that work on it."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayActorError
from toys import Toy

from allocator.core.errors import UserError
from allocator.pool.actor_pool import MAX_DEATHS, ActorPool
from allocator.pool.calls import ActorCall, WorkerLost

pytestmark = pytest.mark.usefixtures("cluster")

PATIENCE_S = 1.0


@pytest.fixture
def start_pool() -> Iterator[Callable[..., ActorPool]]:
    pools: list[ActorPool] = []

    def make(size: int = 2, start_actor: Callable[[], Any] = Toy.remote, patience_s: float = PATIENCE_S) -> ActorPool:
        messages: list[str] = []
        pools.append(ActorPool(start_actor, size, messages.append, patience_s))
        pools[-1].messages = messages
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def answers(pool: ActorPool, count: int) -> dict[int, Any]:
    found = [pool.next() for _ in range(count)]
    assert len({ticket for ticket, _ in found}) == count
    return dict(found)


def warm_up(pool: ActorPool) -> ActorPool:
    """Wait until all its members can take tasks, and have done one."""
    while pool.alive < pool.size:
        answers(pool, len(doubles(pool, 2 * pool.size)))
    return pool


def doubles(pool: ActorPool, count: int) -> dict[int, int]:
    return {pool.add(ActorCall(method="double", arguments=(number,))): 2 * number for number in range(count)}


@pytest.mark.parametrize("size", [1, 3])
def test_every_task_is_answered_once_under_its_number(start_pool: Callable[..., ActorPool], size: int) -> None:
    made = start_pool(size)
    expected = doubles(made, 20)
    assert answers(made, 20) == expected
    assert (made.size, made.messages) == (size, [])


def test_tasks_may_be_added_while_others_are_under_way(start_pool: Callable[..., ActorPool]) -> None:
    made = start_pool()
    expected = doubles(made, 6)
    found = answers(made, 3)
    expected |= doubles(made, 5)
    assert found | answers(made, 8) == expected


def test_nothing_in_time_is_none(start_pool: Callable[..., ActorPool]) -> None:
    made = start_pool(1)
    answers(made, len(doubles(made, 1)))
    ticket = made.add(ActorCall(method="double", arguments=(4, 1.0)))
    assert made.next(0.05) is None
    assert made.next() == (ticket, 8)


def test_a_late_task_is_run_elsewhere_and_counted_once(start_pool: Callable[..., ActorPool], tmp_path: Path) -> None:
    """Its first worker comes back, and works on."""
    made = warm_up(start_pool(2))
    before = made.actors
    slow = made.add(ActorCall(method="double", arguments=(1, 0.2)))
    assert made.next() == (slow, 2)
    for number in range(4):  # what is usual of its sort, for both workers
        made.add(ActorCall(method="once_slow", arguments=(number, 0.0, tmp_path / "before"), size=1.0))
    answers(made, 4)
    late = made.add(ActorCall(method="once_slow", arguments=(21, 2.5 * PATIENCE_S, tmp_path / "mark"), size=1.0))
    assert made.next() == (late, 42)
    rest = doubles(made, 8)
    assert answers(made, 8) == rest
    assert made.actors == before
    assert made.messages == []
    assert (tmp_path / "mark").read_text() == "calledcalled"


def test_a_worker_that_hangs_is_replaced(start_pool: Callable[..., ActorPool], tmp_path: Path) -> None:
    made = warm_up(start_pool(2))
    for number in range(6):
        made.add(ActorCall(method="stop", arguments=(number, tmp_path), size=1.0))
    answers(made, 6)
    before = made.actors
    ticket = made.add(ActorCall(method="stop", arguments=(5, tmp_path / "mark"), size=1.0))
    assert made.next() == (ticket, 10)
    hung = int((tmp_path / "mark").read_text())
    while made.actors == before:  # the other has answered; this one is given up when it is long overdue
        answers(made, len(doubles(made, 2)))
        time.sleep(PATIENCE_S / 5)
    assert made.messages == ["a worker hangs, and is replaced"]
    end = time.monotonic() + 60
    while Path(f"/proc/{hung}").exists():
        assert time.monotonic() < end, "it was not ended"
        time.sleep(0.05)
    expected = doubles(made, 9)
    assert answers(made, 9) == expected


def test_a_worker_that_hangs_in_the_first_task_of_its_kind_is_replaced(
    start_pool: Callable[..., ActorPool], tmp_path: Path
) -> None:
    """Nothing tells how long that should take: who is idle does it too."""
    made = start_pool(2)
    answers(made, len(doubles(made, 6)))
    before = made.actors
    ticket = made.add(ActorCall(method="stop", arguments=(5, tmp_path / "mark"), size=1.0))
    assert made.next() == (ticket, 10)
    while made.actors == before:
        answers(made, len(doubles(made, 2)))
        time.sleep(PATIENCE_S / 5)
    assert made.messages == ["a worker hangs, and is replaced"]


def test_the_only_worker_that_hangs_is_replaced_and_that_is_told(
    start_pool: Callable[..., ActorPool], tmp_path: Path
) -> None:
    made = start_pool(1)
    for number in range(3):
        made.add(ActorCall(method="stop", arguments=(number, tmp_path), size=1.0))
    answers(made, 3)
    ticket = made.add(ActorCall(method="stop", arguments=(5, tmp_path / "mark"), size=1.0))
    assert made.next() == (ticket, WorkerLost("it hung"))
    expected = doubles(made, 3)
    assert answers(made, 3) == expected


def test_a_worker_that_dies_is_replaced_and_its_task_told(start_pool: Callable[..., ActorPool]) -> None:
    made = warm_up(start_pool(2, patience_s=10.0))
    expected = {made.add(ActorCall(method="double", arguments=(number, 1.0))): 2 * number for number in range(2)}
    first = made.actors[0]
    ray.kill(first)
    found = answers(made, 2)
    (lost,) = (ticket for ticket, value in found.items() if isinstance(value, WorkerLost))
    assert found == {**expected, lost: WorkerLost("ActorDiedError")}
    assert first not in made.actors
    expected = doubles(made, 6)
    assert answers(made, 6) == expected


def answer_until_dead(actor: Any) -> None:
    """Ask an actor until it is dead, which it is a moment after it was told to die."""
    for _ in range(600):
        ray.get(actor.ready.remote())
        time.sleep(0.1)


def test_workers_that_died_while_they_were_idle_are_charged_to_one_task_at_most(
    start_pool: Callable[..., ActorPool],
) -> None:
    """The first finds out; then all are asked whether they live."""
    made = warm_up(start_pool(4, patience_s=10.0))
    killed = made.actors[:3]
    for actor in killed:
        ray.kill(actor)
    for actor in killed:
        with pytest.raises(RayActorError):
            answer_until_dead(actor)
    died = 0
    for number in range(12):
        ticket = made.add(ActorCall(method="double", arguments=(number,)))
        answer = made.next()
        assert answer in ((ticket, 2 * number), (ticket, WorkerLost("ActorDiedError")))
        died += isinstance(answer[1], WorkerLost)
    assert died <= 1
    assert made.alive >= 1


def test_workers_that_cannot_start_do_not_stop_those_that_work(start_pool: Callable[..., ActorPool]) -> None:
    started: list[Any] = []

    def start_actor() -> Any:
        started.append(Toy.remote())
        if len(started) > 2:
            ray.kill(started[-1])
        return started[-1]

    made = warm_up(start_pool(2, start_actor, patience_s=10.0))
    ray.kill(made.actors[0])
    for number in range(40):
        ticket = made.add(ActorCall(method="double", arguments=(number, 0.1)))
        assert made.next() in ((ticket, 2 * number), (ticket, WorkerLost("ActorDiedError")))
    assert any("cannot be started, and is tried again; 1 of 2 are there" in message for message in made.messages)
    assert made.size == 2


def test_a_task_of_unknown_size_is_not_taken_for_a_hang(start_pool: Callable[..., ActorPool]) -> None:
    """However short others of its method were; where another is idle it has a try too."""
    made = warm_up(start_pool(1, patience_s=0.05))
    for number in range(6):
        made.add(ActorCall(method="double", arguments=(number, 0.0)))
    answers(made, 6)
    ticket = made.add(ActorCall(method="double", arguments=(4, 2.0)))
    assert made.next() == (ticket, 8)
    assert made.messages == []


def test_nobody_works_on_what_was_dropped_after_all_is_settled(start_pool: Callable[..., ActorPool]) -> None:
    made = warm_up(start_pool(2, patience_s=10.0))
    before = made.actors
    long, short = (
        made.add(ActorCall(method="double", arguments=(1, 60.0))),
        made.add(ActorCall(method="double", arguments=(2, 0.1))),
    )
    assert made.next() == (short, 4)
    made.drop(long)
    made.drain()
    assert len(set(before) & set(made.actors)) == 1
    made.renew(lambda actor: actor.renew.remote())
    expected = doubles(made, 5)
    assert answers(made, 5) == expected


def test_workers_that_cannot_start_stop_the_crew(start_pool: Callable[..., ActorPool]) -> None:
    """Rather than being replaced for ever."""
    started: list[Any] = []

    def start_actor() -> Any:
        started.append(Toy.remote())
        ray.kill(started[-1])
        return started[-1]

    made = start_pool(2, start_actor)
    made.add(ActorCall(method="double", arguments=(1,)))
    with pytest.raises(UserError, match=r"none can be started .* then resume"):
        made.next()
    assert len(started) <= 2 + MAX_DEATHS + 2


def test_what_a_task_raises_is_raised(start_pool: Callable[..., ActorPool]) -> None:
    made = start_pool(1)
    made.add(ActorCall(method="fail", arguments=()))
    with pytest.raises(ValueError, match="as told"):
        made.next()


def test_a_full_disk_of_a_worker_is_known_by_its_number(start_pool: Callable[..., ActorPool]) -> None:
    made = start_pool(1)
    made.add(ActorCall(method="fill", arguments=()))
    with pytest.raises(OSError, match="No space left on device") as error:
        made.next()
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")


def test_mixed_hardware_is_messages_once(start_pool: Callable[..., ActorPool]) -> None:
    kinds = iter(["A100", "H100", "H100"])
    made = warm_up(start_pool(3, lambda: Toy.remote(next(kinds))))
    assert made.messages == ["notice: workers run on A100 and H100; the plan may differ by rounding"]


def test_members_that_are_renewed_take_tasks_after_it(start_pool: Callable[..., ActorPool]) -> None:
    made = start_pool(2)
    answers(made, len(doubles(made, 4)))
    made.renew(lambda actor: actor.renew.remote())
    assert made.alive == 0
    expected = doubles(made, 4)
    assert answers(made, 4) == expected
