"""The contract of evaluators, for a pool of two workers."""

import pytest

from allocator.pool.cluster import Demand
from allocator.pool.dispatch import RayPool
from allocator.testing import EvaluatorContract


class TestRayPool(EvaluatorContract):
    @pytest.fixture(scope="class", autouse=True)
    def connected(self, cluster):
        """Ray is there before the pool is made."""

    def make(self, spec, tokens):
        return RayPool(spec, tokens, 2, demand=Demand(cpus=0))

    def test_it_has_two_workers(self, evaluator):
        assert evaluator.alive == 2
