"""The contract of the evaluator of one process. That of the pool is in tests/pool/test_contract.py."""

from allocator.evaluation.local import LocalEvaluator
from allocator.testing import EvaluatorContract


class TestLocalEvaluator(EvaluatorContract):
    def make(self, spec, tokens):
        return LocalEvaluator(spec, tokens)

    def test_it_has_no_workers(self, evaluator):
        assert evaluator.alive == 0
