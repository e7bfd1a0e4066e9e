"""The pruners by name: defaults, and settings that go to a plan and back."""

import pytest

from allocator.core.errors import UserError
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import PRUNERS, make_pruner, pruners_for

SPECS = [
    (PrunerSpec(name="obs", damping=0.3, bias=True, experts="routing"), "structured"),
    (PrunerSpec(name="obs", damping=0.02), "structured"),
    (PrunerSpec(name="sparsegpt", damping=0.3), "unstructured"),
    (PrunerSpec(name="wanda"), "n:m"),
    (PrunerSpec(name="magnitude"), "unstructured"),
]


def test_the_default_of_a_pattern_is_the_first_that_serves_it():
    assert pruners_for("structured")[0] == "obs"
    for pattern in ("unstructured", "n:m"):
        assert pruners_for(pattern)[:3] == ("sparsegpt", "wanda", "magnitude")
    assert [make_pruner(PrunerSpec(), p).name for p in ("structured", "n:m")] == ["obs", "sparsegpt"]


@pytest.mark.parametrize(("spec", "pattern"), SPECS, ids=lambda value: getattr(value, "name", value))
def test_a_plans_record_makes_the_same_pruner(spec, pattern):
    pruner = make_pruner(spec, pattern)
    record = {"name": pruner.name, **pruner.settings(), "inputs": "expected", "tokens": 4096, "dtype": "float32"}
    again = make_pruner(PrunerSpec.from_plan(record), pattern)
    assert type(again) is type(pruner)
    assert again.settings() == pruner.settings()
    assert again.refit == pruner.refit


def test_what_is_recorded_of_a_pruner():
    assert list(make_pruner(SPECS[0][0], "structured").settings().items()) == [
        ("damping", 0.3),
        ("bias", True),
        ("experts", "routing"),
    ]
    assert make_pruner(SPECS[1][0], "structured").settings() == {"damping": 0.02, "bias": False}
    assert make_pruner(SPECS[2][0], "unstructured").settings() == {"damping": 0.3}
    assert make_pruner(SPECS[3][0], "n:m").settings() == {}


@pytest.mark.parametrize("name", PRUNERS)
def test_a_pruner_has_its_name_and_refits_from_gram_matrices_alone(name):
    pruner = make_pruner(PrunerSpec(name=name), PRUNERS[name].patterns[0])
    assert pruner.name == PRUNERS[name].name == name
    assert (pruner.refit is not None) == (name in ("obs", "sparsegpt"))
    assert pruner.refit is None or pruner.need == "gram"


def test_an_unknown_name_is_refused_with_those_that_serve():
    with pytest.raises(UserError, match=r"pruner\.name: 'mine' does not serve n:m pruning; these do: sparsegpt, wanda"):
        make_pruner(PrunerSpec(name="mine"), "n:m")
