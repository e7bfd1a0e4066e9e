"""The pool gives what one process gives, whatever happens to its workers."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from stores import create_store

from allocator.core.errors import UserError
from allocator.core.protocols import Outcome, Request
from allocator.core.space import SearchSpace
from allocator.evaluation.expansion import num_chunks
from allocator.evaluation.local import LocalEvaluator
from allocator.evaluation.spec import EngineSpec, Execution
from allocator.evaluation.training import Training
from allocator.model.data.examples import Examples
from allocator.model.live.load import load_model
from allocator.model.live.walk import BlockWalker
from allocator.pool.actor_pool import MAX_DEATHS
from allocator.pool.calls import ActorCall
from allocator.pool.cluster import Demand, connected
from allocator.pool.dispatch import RayPool
from allocator.pool.runs import cut_runs
from allocator.pruning.calibration.build import prune_on_dense_inputs, prune_on_pruned_inputs
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import LevelStore, StoreBuilder
from allocator.pruning.pruners.protocol import UnitProblem
from allocator.run.config.load import load_config
from allocator.run.prepare import prepare_job

pytestmark = pytest.mark.usefixtures("cluster")

SETTINGS = [
    "tokens.sequence_length=64",
    "tokens.calibration=512",
    "tokens.selection=256",
    "tokens.test=256",
    "search.method=evolution",
    "search.evolution.tokens=[128,256]",
]


@dataclass(frozen=True)
class Bench:
    """What a pool is made from, and what to ask it."""

    spec: EngineSpec
    tokens: dict[str, np.ndarray]
    requests: list[Request]

    @property
    def space(self) -> SearchSpace:
        return self.spec.space


@pytest.fixture(scope="session")
def bench(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """A job with its level store, and twelve random allocations at two fidelities of two splits."""

    config = load_config(None, {"model": str(tiny_model), "text": text_folder, "workers": 0}, SETTINGS)
    job = prepare_job(config)
    walker = BlockWalker(load_model(job.checkpoint), job.layout)
    calibration = job.tokens["calibration"].to_tensors()
    levels = prune_on_dense_inputs(
        Calibration(
            walker=walker,
            checkpoint=job.checkpoint,
            layout=job.layout,
            space=job.space,
            pruner=job.pruner,
            examples=calibration,
        )
    )
    store = create_store(tmp_path_factory.mktemp("pool") / "levels", job.store_key, levels)
    rng = np.random.default_rng(0)
    requests = [
        Request(
            allocation=tuple(int(rng.integers(unit.num_levels)) for unit in job.space.units), tokens=tokens, split=split
        )
        for split, tokens in (("search", 128), ("search", 256), ("selection", 256))
        for _ in range(4)
    ]
    return Bench(job.engine_spec(store), job.tokens, [*requests, Request(allocation=job.space.dense, tokens=256)])


@pytest.fixture
def pool(bench: Bench) -> Iterator[Callable[..., RayPool]]:
    """Makes pools, and closes them."""
    pools: list[RayPool] = []

    def make(workers: int = 1, spec: EngineSpec | None = None, **more: Any) -> RayPool:
        pools.append(RayPool(spec or bench.spec, more.pop("tokens", bench.tokens), workers, **more))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def tokens_of_two(bench: Bench) -> dict[str, Examples]:
    """Those of the bench, and what some tests ask of in addition: text to train on, and sequences that are short."""
    tokens = bench.tokens
    return {**tokens, "training": tokens["calibration"], "short": reshaped(bench, 16)["search"]}


@pytest.fixture(scope="module")
def two(bench: Bench, cluster: None) -> Iterator[RayPool]:
    """Two workers, for tests that leave them as they were; they take no room from the workers of others."""
    made = RayPool(bench.spec, tokens_of_two(bench), 2, demand=Demand(cpus=0))
    yield made
    made.close()


def reshaped(bench: Bench, length: int) -> dict[str, Examples]:
    """Return the same tokens in sequences of another length."""
    return {split: Examples.from_ids(e.inputs["input_ids"].reshape(-1, length)) for split, e in bench.tokens.items()}


def measured(outcomes: Iterator[Outcome]) -> dict[Any, dict[str, float]]:
    return {outcome.request.key: dict(outcome.measured) for outcome in outcomes}


@pytest.fixture(scope="session")
def expected(bench: Bench) -> dict[Any, dict[str, float]]:
    """What one process measures."""
    return measured(LocalEvaluator(bench.spec, bench.tokens).evaluate(bench.requests))


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_outcomes_are_those_of_one_process(
    bench: Bench,
    pool: Callable[..., RayPool],
    expected: dict[Any, Any],
    workers: int,
    request: pytest.FixtureRequest,
) -> None:
    """To the last bit, for any number of workers, in any order, and when asked again."""
    workers_pool = pool(workers) if workers == 1 else request.getfixturevalue("two")
    assert measured(workers_pool.evaluate(bench.requests)) == expected
    assert measured(workers_pool.evaluate(bench.requests[::-1])) == expected
    assert list(workers_pool.evaluate([])) == []


def test_expansions_among_plain_requests_are_those_of_one_process(
    bench: Bench, two: RayPool, expected: dict[Any, Any]
) -> None:
    """To the last bit, and plain requests are what they are without."""
    asked = [replace(request, probe="expansion") for request in bench.requests[::3]]
    batch = [*bench.requests[::2], *asked, *bench.requests[1::2]]
    local, found = (
        {o.request.key: (o.measured, o.sequence_losses, o.expansion) for o in evaluator.evaluate(batch)}
        for evaluator in (LocalEvaluator(bench.spec, bench.tokens), two)
    )
    assert found == local
    for request in batch:
        plain, _, expansion = found[request.key]
        assert (expansion is not None) == (request.probe == "expansion")
        assert request.probe or plain == expected[request.key]


def test_portions_of_an_expansion_are_put_together_in_order(bench: Bench, two: RayPool) -> None:
    """To the last bit, though workers have a part of the text each; and their sequences are those of one pass."""
    tokens, requests = tokens_of_two(bench), [replace(request, split="short") for request in bench.requests[4:6]]
    asked = [replace(request, probe="expansion") for request in requests]
    assert num_chunks(asked[0].tokens, 16) > 1
    local, found = (
        {o.request.key: (o.measured, o.sequence_losses, o.expansion) for o in evaluator.evaluate([*asked, *requests])}
        for evaluator in (LocalEvaluator(bench.spec, tokens), two)
    )
    assert found == local
    for request in asked:
        plain = found[replace(request, probe="").key]
        assert found[request.key][1] == pytest.approx(plain[1], rel=1e-4)


def test_workers_go_on_with_another_engine(bench: Bench, two: RayPool) -> None:
    other = replace(bench.spec, loss="hidden")
    wanted = measured(LocalEvaluator(other, bench.tokens).evaluate(bench.requests))
    for evaluator in (two, LocalEvaluator(bench.spec, bench.tokens)):
        first = measured(evaluator.evaluate(bench.requests))
        evaluator.renew(other)
        changed = measured(evaluator.evaluate(bench.requests))
        evaluator.renew(bench.spec)
        assert changed == wanted != first
        assert measured(evaluator.evaluate(bench.requests)) == first


def test_a_worker_that_cannot_be_renewed_is_replaced(bench: Bench, two: RayPool) -> None:
    """One is dead, one cannot read what it is sent; none answers for the engine that it had."""
    other = replace(bench.spec, loss="hidden")
    wanted = measured(LocalEvaluator(other, bench.tokens).evaluate(bench.requests))
    evaluator = two
    list(evaluator.evaluate(bench.requests[:2]))
    dead, deaf = evaluator._actors.actors
    ray.kill(dead)
    evaluator._spec, evaluator._spec_ref = other, ray.put(other)
    evaluator._actors.renew(lambda actor: actor.renew.remote(Unreadable() if actor == deaf else evaluator._spec_ref))
    assert measured(evaluator.evaluate(bench.requests)) == wanted
    assert dead not in evaluator._actors.actors
    assert deaf not in evaluator._actors.actors
    assert measured(evaluator.evaluate(bench.requests)) == wanted
    evaluator.renew(bench.spec)


class Unreadable:
    """What arrives as an error."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def test_workers_train_as_one_process_does(bench: Bench, two: RayPool, tmp_path: Path) -> None:
    """To the last bit, and from states that another worker left."""
    chosen = [request.allocation for request in bench.requests[:3]]
    stages = [
        [Request(allocation=a, tokens=128, training=128) for a in chosen],
        [Request(allocation=a, tokens=256, training=256) for a in chosen[::-1]],
    ]

    def spec(name: str) -> EngineSpec:
        return replace(bench.spec, training=Training(1e-3, 1, tmp_path / name))

    local = LocalEvaluator(spec("local"), tokens_of_two(bench))
    two.renew(spec("pool"))
    for stage, left in zip(stages, (3, 0), strict=True):
        assert measured(two.evaluate(stage)) == measured(local.evaluate(stage))
        assert len(list((tmp_path / "pool").iterdir())) == left
    two.renew(bench.spec)


def test_executions_are_those_of_one_process(bench: Bench, two: RayPool, tmp_path: Path) -> None:
    """Figures come back in the order of what was asked, whoever is done first."""
    allocations = [request.allocation for request in bench.requests[:3]]

    def executions(name: str) -> list[Execution]:
        return [Execution(a, bool(i % 2), tmp_path / f"{name}{i}") for i, a in enumerate(allocations)]

    local = LocalEvaluator(bench.spec, bench.tokens).execute(executions("local"), 256)
    assert two.execute(executions("pool"), 256) == local
    assert len({figures["params"] for figures in local}) > 1
    for index in range(3):
        checkpoint = [tmp_path / f"{name}{index}" / "model.safetensors" for name in ("local", "pool")]
        assert checkpoint[0].read_bytes() == checkpoint[1].read_bytes()


def test_a_store_is_built_by_all_workers_to_the_last_byte(bench: Bench, two: RayPool, tmp_path: Path) -> None:
    """Blocks that are there already are left alone; progress counts those that are done."""
    spec, names = bench.spec, [unit.name for unit in bench.spec.space.units]
    assert isinstance(spec.store, LevelStore)
    builder, heard = StoreBuilder(tmp_path / "levels", {}), list[int]()
    builder.write(names[0], spec.store(names[0]))
    two.build(builder, builder.missing(spec.space), heard.append)
    assert heard == sorted(heard)
    assert heard[-1] == len(spec.layout.blocks)
    built = builder.finish(names)
    for name in names:
        own, other = (store.folder / f"{name}.safetensors" for store in (built, spec.store))
        assert own.read_bytes() == other.read_bytes()


def test_problems_are_solved_by_workers_in_order(bench: Bench, two: RayPool) -> None:
    calibration = bench.spec.calibration(bench.tokens["calibration"])
    seen = list[int]()

    def solve(problems: Sequence[UnitProblem]) -> list[CompactLevels]:
        seen.append(len(problems))
        return two.solve(problems)

    def pruned(**more: Any) -> dict[str, CompactLevels]:
        return dict(prune_on_pruned_inputs(calibration, None, every_level=True, **more))

    found, expected = pruned(solve=solve), pruned()
    assert sum(seen) == len(bench.spec.space.units)
    for name, levels in expected.items():
        assert all(torch.equal(found[name][key], tensor) for key, tensor in levels.items())


class Dying(RayPool):
    """A pool whose workers do no work, and die of some requests."""

    marks: Path
    deadly: Any

    def _start_actor(self) -> Any:
        marks, deadly = self.marks, self.deadly

        @ray.remote(max_restarts=0)
        class Mortal:
            def ready(self) -> str:
                return "toy"

            def measure(self, requests: Sequence[Request]) -> list[Outcome]:
                (marks / f"{len(list(marks.iterdir()))}-{os.getpid()}").touch()
                if deadly(requests, len(list(marks.glob(f"*-{os.getpid()}")))):
                    os._exit(1)
                return [
                    Outcome(request=request, measured={"kl": float(sum(request.allocation))}, wall_s=0.0)
                    for request in requests
                ]

        return Mortal.options(num_cpus=1).remote()


def dying(bench: Bench, marks: Path, deadly: Callable[[Sequence[Request], int], bool], workers: int = 1) -> Dying:
    """Make such a pool; ``deadly`` gets a run of requests, and how many runs the worker has begun."""
    marks.mkdir()
    said: list[str] = []
    made = type("Dying", (Dying,), {"marks": marks, "deadly": staticmethod(deadly), "said": said})
    return made(bench.spec, bench.tokens, workers, said.append)


def test_a_worker_that_dies_is_replaced(bench: Bench, tmp_path: Path) -> None:
    """Each worker dies of its third run; every request is answered all the same, once."""
    pool = dying(bench, tmp_path / "marks", lambda requests, own: own == 3)
    try:
        outcomes = list(pool.evaluate(bench.requests))
    finally:
        pool.close()
    assert sorted(o.request.key for o in outcomes) == sorted(request.key for request in bench.requests)
    assert [o.loss for o in outcomes] == [sum(o.request.allocation) for o in outcomes]
    assert pool.said
    assert all("a worker died and is replaced" in message for message in pool.said)


@pytest.mark.parametrize("place", [0, 5, -1])
def test_what_kills_worker_after_worker_alone_is_a_failure(bench: Bench, tmp_path: Path, place: int) -> None:
    """The run that it is in is halved until it is alone, and all others are measured."""
    poison = sorted(bench.requests, key=lambda request: request.key)[place].key

    def deadly(requests: Sequence[Request], own: int) -> bool:
        return any(request.key == poison for request in requests)

    pool = dying(bench, tmp_path / "marks", deadly, workers=2)
    try:
        outcomes = list(pool.evaluate(bench.requests))
    finally:
        pool.close()
    assert sorted(o.request.key for o in outcomes) == sorted(request.key for request in bench.requests)
    (failure,) = (outcome for outcome in outcomes if outcome.failed)
    assert failure.request.key == poison
    assert f"{MAX_DEATHS} workers died" in failure.failed
    assert "." not in failure.failed, "no address is told"
    assert failure.failed in pool.said[-1]
    alone = [message for message in pool.said if "its task is run again" in message]
    assert len(alone) == MAX_DEATHS - 1


def test_workers_lost_while_they_were_idle_fail_no_allocation(bench: Bench, tmp_path: Path) -> None:
    """As when a node is lost between two batches of one."""
    pool = dying(bench, tmp_path / "marks", lambda requests, own: False, workers=2)
    try:
        while pool.alive < 2:
            list(pool.evaluate(bench.requests))
        for request in bench.requests[:6]:
            for actor in pool._actors.actors:
                ray.kill(actor)
            (outcome,) = pool.evaluate([request])
            assert not outcome.failed
    finally:
        pool.close()


def test_what_is_left_of_an_expansion_that_fails_is_dropped(bench: Bench, tmp_path: Path) -> None:
    tokens = reshaped(bench, 16)
    (tmp_path / "marks").mkdir()

    class Half(Dying):
        """The first chunk kills; the second takes long."""

        marks, deadly = tmp_path / "marks", None

        def _start_actor(self) -> Any:
            @ray.remote(max_restarts=0)
            class Mortal:
                def ready(self) -> str:
                    return "toy"

                def renew(self, spec: Any) -> None:
                    pass

                def expand(self, request: Request, index: int) -> None:
                    if index == 0:
                        os._exit(1)
                    time.sleep(600)

                def measure(self, requests: Sequence[Request]) -> list[Outcome]:
                    return [Outcome(request=request, measured={"kl": 1.0}, wall_s=0.0) for request in requests]

            return Mortal.options(num_cpus=1).remote()

    # without what a worker would import torch for
    light: Any = SimpleNamespace(threads=1, space=bench.space, training=None, loss=bench.spec.loss)
    pool = Half(light, tokens, 2)
    try:
        (outcome,) = pool.evaluate([replace(bench.requests[4], probe="expansion")])
        assert "3 workers died" in outcome.failed
        pool.renew(light)
        assert len(list(pool.evaluate(bench.requests))) == len(bench.requests)
    finally:
        pool.close()


def test_a_task_of_another_sort_that_kills_every_worker_stops_the_run(bench: Bench, tmp_path: Path) -> None:
    """With what to do."""
    pool = dying(bench, tmp_path / "marks", lambda requests, own: True)
    try:
        with pytest.raises(UserError, match=rf"{MAX_DEATHS} workers died .* on the same task") as caught:
            list(pool._run([ActorCall(method="measure", arguments=(bench.requests,))]))
    finally:
        pool.close()
    assert "resume" in str(caught.value)
    assert len(pool.said) == MAX_DEATHS - 1
    assert len(list((tmp_path / "marks").iterdir())) == MAX_DEATHS


def test_deaths_of_different_tasks_are_not_added_up(bench: Bench, tmp_path: Path) -> None:
    """Each run kills a worker, the first time that it is tried."""
    marks = tmp_path / "tried"
    marks.mkdir()

    def deadly(requests: Sequence[Request], own: int) -> bool:
        first = requests[0]
        mark = marks / f"{first.split}-{first.tokens}-{first.allocation}"
        new = not mark.exists()
        mark.touch()
        return new

    pool = dying(bench, tmp_path / "marks", deadly, workers=2)
    try:
        outcomes = list(pool.evaluate(bench.requests))
    finally:
        pool.close()
    assert {outcome.request.key for outcome in outcomes} == {request.key for request in bench.requests}
    assert not any(outcome.failed for outcome in outcomes)
    assert len(pool.said) >= len(cut_runs(bench.requests, 2)) - 2


def test_batches_that_are_under_way_at_once_are_all_answered(
    bench: Bench, two: RayPool, expected: dict[Any, Any]
) -> None:
    """By whichever iterator is at it, each once."""
    first, second, third = (two.evaluate(bench.requests[place::3]) for place in range(3))
    found = [*first, *second, *third]
    assert len(found) == len(bench.requests)
    assert {outcome.request.key: dict(outcome.measured) for outcome in found} == expected
    assert list(first) == list(third) == []


@pytest.mark.parametrize("workers", [1, 2, 4, 7, 13, 40])
def test_runs_are_neighbours_of_falling_length(bench: Bench, workers: int) -> None:
    """In lexicographic order, each request once, and half of all in the first run of every worker."""
    runs = cut_runs(bench.requests[::-1], workers)
    lengths = [len(run) for run in runs]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[-1] == 1
    assert lengths[0] == -(-len(bench.requests) // (2 * workers))
    flat = [(request.split, request.tokens, request.allocation) for run in runs for request in run]
    assert flat == sorted((r.split, r.tokens, r.allocation) for r in bench.requests)


def test_a_users_error_on_a_worker_stays_one(
    bench: Bench, pool: Callable[..., RayPool], make_model: Callable[..., Path]
) -> None:
    """A model whose weights are not numbers is the user's to mend; nobody died of it."""
    from safetensors.numpy import load_file, save_file

    from allocator.model.checkpoint.headers import read_checkpoint

    folder = make_model("llama", num_hidden_layers=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = np.full_like(tensors["model.norm.weight"], np.nan)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    broken = pool(1, replace(bench.spec, checkpoint=read_checkpoint(folder), store=None), notify=said.append)
    with pytest.raises(UserError, match="not finite"):
        list(broken.evaluate([Request(allocation=bench.space.dense, tokens=128)]))
    assert said == []


def test_a_worker_that_cannot_start_is_no_death(bench: Bench, pool: Callable[..., RayPool], tmp_path: Path) -> None:
    """What went wrong is told, once, and not called a lack of memory."""
    said: list[str] = []
    gone = replace(bench.spec, checkpoint=replace(bench.spec.checkpoint, folder=tmp_path / "gone"))
    broken = pool(1, gone, notify=said.append)
    with pytest.raises(Exception, match="gone") as caught:
        list(broken.evaluate([Request(allocation=bench.space.dense, tokens=128)]))
    assert "workers died" not in str(caught.value)
    assert said == []


def test_close_ends_the_workers(bench: Bench, tmp_path: Path) -> None:
    pool = dying(bench, tmp_path / "marks", lambda requests, own: False, workers=2)
    list(pool.evaluate(bench.requests[:2]))
    pids = ray.get([worker.__ray_call__.remote(lambda _: os.getpid()) for worker in pool._actors.actors])
    assert all(Path(f"/proc/{pid}").exists() for pid in pids)
    pool.close()
    pool.close()
    end = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < end, "the workers did not end"
        time.sleep(0.01)


def test_a_connection_that_is_there_is_kept(bench: Bench) -> None:
    """A pool and a search inside somebody's Ray session do not end that session."""
    with connected(1, Demand(), None):
        RayPool(bench.spec, bench.tokens, 1).close()
    assert ray.is_initialized()


@pytest.mark.parametrize(
    ("demand", "needs"),
    [
        (Demand(gpus=0.5), "1 CPU, 0.5 GPU"),
        (Demand(cpus=3), "3 CPU"),
        (Demand(resources={"a100": 0.25}), "1 CPU, 0.25 a100"),
    ],
    ids=["gpus", "cpus", "resources"],
)
def test_what_no_node_has_is_refused(demand: Demand, needs: str) -> None:
    """Rather than left to wait for ever."""
    with pytest.raises(UserError, match=rf"each needs {needs} on one node, .* has 2 CPU"), connected(1, demand, None):
        pass


def test_room_for_fewer_workers_is_said() -> None:
    """For more may start when nodes join."""
    said: list[str] = []
    with connected(3, Demand(), None, said.append):
        pass
    assert said == ["notice: the cluster has room for 2 of 3 workers; more start as nodes join"]


@pytest.mark.parametrize(
    ("demand", "room"), [(Demand(), 8), (Demand(2), 4), (Demand(gpus=0.1), 8), (Demand(gpus=0.3), 3), (Demand(9), 0)]
)
def test_room_on_a_node(demand: Demand, room: int) -> None:
    assert demand.count_room({"CPU": 8.0, "GPU": 1.0, "memory": 1e9}) == room
