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
from allocator.pool.actor_pool import MAX_DEATHS, ActorPool, Died
from allocator.pool.durations import Task

pytestmark = pytest.mark.usefixtures("cluster")

PATIENCE_S = 1.0


@pytest.fixture
def crew() -> Iterator[Callable[..., ActorPool]]:
    crews: list[ActorPool] = []

    def make(size: int = 2, hire: Callable[[], Any] = Toy.remote, patience_s: float = PATIENCE_S) -> ActorPool:
        said: list[str] = []
        crews.append(ActorPool(hire, size, said.append, patience_s))
        crews[-1].said = said
        return crews[-1]

    yield make
    for each in crews:
        each.close()


def answers(crew: ActorPool, count: int) -> dict[int, Any]:
    found = [crew.next() for _ in range(count)]
    assert len({ticket for ticket, _ in found}) == count
    return dict(found)


def staffed(crew: ActorPool) -> ActorPool:
    """Wait until all its members can take tasks, and have done one."""
    while crew.alive < crew.size:
        answers(crew, len(doubles(crew, 2 * crew.size)))
    return crew


def doubles(crew: ActorPool, count: int) -> dict[int, int]:
    return {crew.add(Task("double", (number,))): 2 * number for number in range(count)}


@pytest.mark.parametrize("size", [1, 3])
def test_every_task_is_answered_once_under_its_number(crew: Callable[..., ActorPool], size: int) -> None:
    made = crew(size)
    expected = doubles(made, 20)
    assert answers(made, 20) == expected
    assert (made.size, made.said) == (size, [])


def test_tasks_may_be_added_while_others_are_under_way(crew: Callable[..., ActorPool]) -> None:
    made = crew()
    expected = doubles(made, 6)
    found = answers(made, 3)
    expected |= doubles(made, 5)
    assert found | answers(made, 8) == expected


def test_nothing_in_time_is_none(crew: Callable[..., ActorPool]) -> None:
    made = crew(1)
    answers(made, len(doubles(made, 1)))
    ticket = made.add(Task("double", (4, 1.0)))
    assert made.next(0.05) is None
    assert made.next() == (ticket, 8)


def test_a_late_task_is_run_elsewhere_and_counted_once(crew: Callable[..., ActorPool], tmp_path: Path) -> None:
    """Its first worker comes back, and works on."""
    made = staffed(crew(2))
    before = made.actors
    slow = made.add(Task("double", (1, 0.2)))
    assert made.next() == (slow, 2)
    for number in range(4):  # what is usual of its sort, for both workers
        made.add(Task("once_slow", (number, 0.0, tmp_path / "before"), 1.0))
    answers(made, 4)
    late = made.add(Task("once_slow", (21, 2.5 * PATIENCE_S, tmp_path / "mark"), 1.0))
    assert made.next() == (late, 42)
    rest = doubles(made, 8)
    assert answers(made, 8) == rest
    assert made.actors == before
    assert made.said == []
    assert (tmp_path / "mark").read_text() == "calledcalled"


def test_a_worker_that_hangs_is_replaced(crew: Callable[..., ActorPool], tmp_path: Path) -> None:
    made = staffed(crew(2))
    for number in range(6):
        made.add(Task("stop", (number, tmp_path), 1.0))
    answers(made, 6)
    before = made.actors
    ticket = made.add(Task("stop", (5, tmp_path / "mark"), 1.0))
    assert made.next() == (ticket, 10)
    hung = int((tmp_path / "mark").read_text())
    while made.actors == before:  # the other has answered; this one is given up when it is long overdue
        answers(made, len(doubles(made, 2)))
        time.sleep(PATIENCE_S / 5)
    assert made.said == ["a worker hangs, and is replaced"]
    end = time.monotonic() + 60
    while Path(f"/proc/{hung}").exists():
        assert time.monotonic() < end, "it was not ended"
        time.sleep(0.05)
    expected = doubles(made, 9)
    assert answers(made, 9) == expected


def test_a_worker_that_hangs_in_the_first_task_of_its_kind_is_replaced(
    crew: Callable[..., ActorPool], tmp_path: Path
) -> None:
    """Nothing tells how long that should take: who is idle does it too."""
    made = crew(2)
    answers(made, len(doubles(made, 6)))
    before = made.actors
    ticket = made.add(Task("stop", (5, tmp_path / "mark"), 1.0))
    assert made.next() == (ticket, 10)
    while made.actors == before:
        answers(made, len(doubles(made, 2)))
        time.sleep(PATIENCE_S / 5)
    assert made.said == ["a worker hangs, and is replaced"]


def test_the_only_worker_that_hangs_is_replaced_and_that_is_told(
    crew: Callable[..., ActorPool], tmp_path: Path
) -> None:
    made = crew(1)
    for number in range(3):
        made.add(Task("stop", (number, tmp_path), 1.0))
    answers(made, 3)
    ticket = made.add(Task("stop", (5, tmp_path / "mark"), 1.0))
    assert made.next() == (ticket, Died("it hung"))
    expected = doubles(made, 3)
    assert answers(made, 3) == expected


def test_a_worker_that_dies_is_replaced_and_its_task_told(crew: Callable[..., ActorPool]) -> None:
    made = staffed(crew(2, patience_s=10.0))
    expected = {made.add(Task("double", (number, 1.0))): 2 * number for number in range(2)}
    first = made.actors[0]
    ray.kill(first)
    found = answers(made, 2)
    (lost,) = (ticket for ticket, value in found.items() if isinstance(value, Died))
    assert found == {**expected, lost: Died("ActorDiedError")}
    assert first not in made.actors
    expected = doubles(made, 6)
    assert answers(made, 6) == expected


def test_workers_that_died_while_they_were_idle_are_charged_to_one_task_at_most(crew: Callable[..., ActorPool]) -> None:
    """The first finds out; then all are asked whether they live."""
    made = staffed(crew(4, patience_s=10.0))
    killed = made.actors[:3]
    for actor in killed:
        ray.kill(actor)
    for actor in killed:
        with pytest.raises(RayActorError):  # they die a moment after they are told to
            ray.get(actor.ready.remote())
    died = 0
    for number in range(12):
        ticket = made.add(Task("double", (number,)))
        answer = made.next()
        assert answer in ((ticket, 2 * number), (ticket, Died("ActorDiedError")))
        died += isinstance(answer[1], Died)
    assert died <= 1
    assert made.alive >= 1


def test_workers_that_cannot_start_do_not_stop_those_that_work(crew: Callable[..., ActorPool]) -> None:
    hired: list[Any] = []

    def hire() -> Any:
        hired.append(Toy.remote())
        if len(hired) > 2:
            ray.kill(hired[-1])
        return hired[-1]

    made = staffed(crew(2, hire, patience_s=10.0))
    ray.kill(made.actors[0])
    for number in range(40):
        ticket = made.add(Task("double", (number, 0.1)))
        assert made.next() in ((ticket, 2 * number), (ticket, Died("ActorDiedError")))
    assert any("cannot be started, and is tried again; 1 of 2 are there" in message for message in made.said)
    assert made.size == 2


def test_a_task_of_unknown_size_is_not_taken_for_a_hang(crew: Callable[..., ActorPool]) -> None:
    """However short others of its method were; where another is idle it has a try too."""
    made = staffed(crew(1, patience_s=0.05))
    for number in range(6):
        made.add(Task("double", (number, 0.0)))
    answers(made, 6)
    ticket = made.add(Task("double", (4, 2.0)))
    assert made.next() == (ticket, 8)
    assert made.said == []


def test_nobody_works_on_what_was_dropped_after_all_is_settled(crew: Callable[..., ActorPool]) -> None:
    made = staffed(crew(2, patience_s=10.0))
    before = made.actors
    long, short = made.add(Task("double", (1, 60.0))), made.add(Task("double", (2, 0.1)))
    assert made.next() == (short, 4)
    made.drop(long)
    made.settle()
    assert len(set(before) & set(made.actors)) == 1
    made.renew(lambda actor: actor.renew.remote())
    expected = doubles(made, 5)
    assert answers(made, 5) == expected


def test_workers_that_cannot_start_stop_the_crew(crew: Callable[..., ActorPool]) -> None:
    """Rather than being replaced for ever."""
    hired: list[Any] = []

    def hire() -> Any:
        hired.append(Toy.remote())
        ray.kill(hired[-1])
        return hired[-1]

    made = crew(2, hire)
    made.add(Task("double", (1,)))
    with pytest.raises(UserError, match=r"none can be started .* then resume"):
        made.next()
    assert len(hired) <= 2 + MAX_DEATHS + 2


def test_what_a_task_raises_is_raised(crew: Callable[..., ActorPool]) -> None:
    made = crew(1)
    made.add(Task("fail", ()))
    with pytest.raises(ValueError, match="as told"):
        made.next()


def test_a_full_disk_of_a_worker_is_known_by_its_number(crew: Callable[..., ActorPool]) -> None:
    made = crew(1)
    made.add(Task("fill", ()))
    with pytest.raises(OSError, match="No space left on device") as error:
        made.next()
    assert (error.value.errno, error.value.filename) == (errno.ENOSPC, "/dev/full")


def test_mixed_hardware_is_said_once(crew: Callable[..., ActorPool]) -> None:
    kinds = iter(["A100", "H100", "H100"])
    made = staffed(crew(3, lambda: Toy.remote(next(kinds))))
    assert made.said == ["notice: workers run on A100 and H100; the plan may differ by rounding"]


def test_members_that_are_renewed_take_tasks_after_it(crew: Callable[..., ActorPool]) -> None:
    made = crew(2)
    answers(made, len(doubles(made, 4)))
    made.renew(lambda actor: actor.renew.remote())
    assert made.alive == 0
    expected = doubles(made, 4)
    assert answers(made, 4) == expected
