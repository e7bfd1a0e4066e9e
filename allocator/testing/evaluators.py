"""The contract of evaluators: they give what one engine in one process gives.

::

    class TestMine(EvaluatorContract):
        def make(self, spec, tokens):
            return MyEvaluator(spec, tokens)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from allocator.core.protocols import Outcome
from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec, Evaluator, Execution
from allocator.model.data.examples import Examples
from allocator.pruning.calibration.build import prune_on_pruned_inputs
from allocator.pruning.levels.compact import CompactLevels
from allocator.pruning.levels.store import StoreBuilder
from allocator.testing.models import Bench, make_bench

Figures = dict[Any, dict[str, float]]
"""What was measured, by the key of the request."""


def read_figures(outcomes: Iterable[Outcome]) -> Figures:
    """Return what was measured by request, so that the order is left out."""
    return {outcome.request.key: dict(outcome.measured) for outcome in outcomes}


class EvaluatorContract:
    """What every evaluator promises. A subclass says how one is made; it is made once for all tests."""

    def make(self, spec: EngineSpec, tokens: Mapping[str, Examples]) -> Evaluator:
        """Return the evaluator to test."""
        raise NotImplementedError("say how the evaluator is made")

    @pytest.fixture(scope="class")
    def bench(self, tmp_path_factory: pytest.TempPathFactory) -> Bench:
        """Return a tiny model with its level store and tokens."""
        return make_bench(tmp_path_factory.mktemp("bench"))

    @pytest.fixture(scope="class")
    def evaluator(self, bench: Bench) -> Iterator[Evaluator]:
        """Yield the evaluator, and close it in the end."""
        evaluator = self.make(bench.spec, bench.tokens)
        yield evaluator
        evaluator.close()

    @pytest.fixture(scope="class")
    def expected(self, bench: Bench) -> Figures:
        """Return what an engine measures one by one."""
        engine = Engine(bench.spec, bench.tokens)
        return read_figures(engine.measure(request) for request in bench.list_requests())

    def test_outcomes_are_those_of_one_engine(self, evaluator: Evaluator, bench: Bench, expected: Figures) -> None:
        """To the last bit, in any order, whatever else is in the batch, and again."""
        requests = bench.list_requests()
        outcomes = list(evaluator.evaluate(requests))
        assert len(outcomes) == len(requests)
        assert all(outcome.wall_s > 0 and not outcome.failed for outcome in outcomes)
        assert read_figures(outcomes) == expected
        assert read_figures(evaluator.evaluate(requests[::-1])) == expected
        few = {request.key for request in requests[::2]}
        assert read_figures(evaluator.evaluate(requests[::2])) == {key: expected[key] for key in few}
        assert list(evaluator.evaluate([])) == []

    def test_batches_that_are_under_way_at_once_are_all_answered(
        self, evaluator: Evaluator, bench: Bench, expected: Figures
    ) -> None:
        """Each request once, by whichever iterator is used first."""
        first, second, third = (evaluator.evaluate(bench.list_requests()[number::3]) for number in range(3))
        outcomes = [*first, *second, *third]
        assert len(outcomes) == len(expected)
        assert read_figures(outcomes) == expected

    def test_it_continues_with_another_engine(self, evaluator: Evaluator, bench: Bench, expected: Figures) -> None:
        """After ``renew``, measurements are those of the other specification; so they are after another ``renew``."""
        requests, other = bench.list_requests(), replace(bench.spec, loss="hidden")
        engine = Engine(other, bench.tokens)
        evaluator.renew(other)
        changed = read_figures(evaluator.evaluate(requests))
        evaluator.renew(bench.spec)
        assert changed == read_figures(engine.measure(request) for request in requests)
        assert read_figures(evaluator.evaluate(requests)) == expected

    def test_a_store_is_built_to_the_last_byte(self, evaluator: Evaluator, bench: Bench, tmp_path: Path) -> None:
        """Units that are there are left alone; progress counts the blocks that are done."""
        names, done = [unit.name for unit in bench.space.units], list[int]()
        builder = StoreBuilder(tmp_path / "levels", {})
        levels = bench.store(names[0])
        assert levels is not None
        builder.write(names[0], levels)
        evaluator.build(builder, builder.missing(bench.space), done.append)
        assert done == sorted(done)
        assert done[-1] == len(bench.spec.layout.blocks)
        built = builder.finish(names)
        for name in names:
            one, other = (store.folder / f"{name}.safetensors" for store in (built, bench.store))
            assert one.read_bytes() == other.read_bytes()

    def test_problems_are_solved_in_order(self, evaluator: Evaluator, bench: Bench) -> None:
        """The levels of independent problems are those that the pruner returns."""
        calibration = bench.spec.calibration(bench.tokens["calibration"])

        def prune(**more: Any) -> dict[str, CompactLevels]:
            return dict(prune_on_pruned_inputs(calibration, None, every_level=True, **more))

        solved, expected = prune(solve=evaluator.solve), prune()
        assert solved.keys() == expected.keys()
        for name, levels in expected.items():
            assert all(torch.equal(solved[name][key], tensor) for key, tensor in levels.items())

    def test_checkpoints_are_saved_and_measured_in_order(
        self, evaluator: Evaluator, bench: Bench, tmp_path: Path
    ) -> None:
        """Figures and files equal those of one engine, whether levels come from the store or are pruned again."""

        def list_executions(name: str) -> list[Execution]:
            return [Execution(bench.draw(seed), bool(seed % 2), tmp_path / f"{name}{seed}") for seed in range(3)]

        engine = Engine(bench.spec, bench.tokens)
        expected = [engine.execute(execution, 64) for execution in list_executions("engine")]
        assert evaluator.execute(list_executions("own"), 64) == expected
        assert len({figures["params"] for figures in expected}) > 1
        for seed in range(3):
            one, other = (tmp_path / f"{name}{seed}" / "model.safetensors" for name in ("engine", "own"))
            assert one.read_bytes() == other.read_bytes()

    def test_workers_are_counted(self, evaluator: Evaluator) -> None:
        """The number of workers is not negative."""
        assert evaluator.alive >= 0
