"""The contract of every local pruner. A new one is tested as soon as it is in ``PRUNERS``."""

from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import PRUNERS, make_pruner
from allocator.testing import PrunerContract
from allocator.testing.pruners import SHAPES
from allocator.testing.suites import make_suites

CASES = {name: {"pruner": make_pruner(PrunerSpec(name=name), kind.patterns[0])} for name, kind in PRUNERS.items()}
"""A suite tests all patterns of its pruner."""

globals().update(make_suites(PrunerContract, CASES))


def test_every_pruner_is_under_the_contract_for_every_pattern():
    assert {f"Test_{name}" for name in PRUNERS} <= globals().keys()
    for name, pruner in PRUNERS.items():
        assert globals()[f"Test_{name}"].pruner.patterns == pruner.patterns
        assert {*pruner.patterns} <= SHAPES.keys()
