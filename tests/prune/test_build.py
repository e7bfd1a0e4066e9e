import pytest
import torch

from allocator.prune.assemble import Assembler, Switchboard
from allocator.prune.build import prune_all_levels, prune_along, stages, stored
from allocator.prune.pruners import make_pruner
from allocator.prune.statistics import collected


@pytest.fixture
def middle(structured):
    """One level of every unit, in the middle of its ladder."""
    return tuple(1 if unit.part == "attention" else 4 for unit in structured.space.units)


@pytest.fixture
def along(structured, middle):
    case = structured
    return prune_along(middle, case.walker(), case.files, case.layout, case.space, case.pruner, case.tokens)


def test_along_equals_dense_inputs_on_the_first_attention(structured, middle, along):
    name = "model.layers.0.self_attn"
    assert torch.equal(along[name]["order"], structured.compact[name]["order"])
    assert torch.equal(along[name]["output.1"], structured.compact[name]["output.1"])


def test_along_differs_from_dense_inputs_everywhere_else(structured, middle, along):
    for unit, level in list(zip(structured.space.units, middle, strict=True))[1:]:
        own, dense = along[unit.name], structured.compact[unit.name]
        same = torch.equal(own["order"], dense["order"])
        change = (own[f"output.{level}"] - dense[f"output.{level}"]).norm() / dense[f"output.{level}"].norm()
        assert not same or float(change) > 1e-3


def test_along_prunes_on_what_pruned_predecessors_produce(structured, middle, along):
    """Each unit again, from the inputs it gets in a model where exactly the units before it are pruned."""
    case, walker = structured, structured.walker()
    switchboard = Switchboard(
        walker.model, case.layout, Assembler(case.files, case.layout, case.space, along.__getitem__, walker.model)
    )
    for site, unit, level in zip(case.layout.sites, case.space.units, middle, strict=True):
        weight = walker.model.get_submodule(site.output).weight
        with collected(walker.model, [site.output], "gram") as grams, torch.inference_mode():
            for batch in case.tokens.split(4):
                walker.model(batch, use_cache=False)
        expected = case.pruner.levels(unit, site.width, weight, grams[site.output], [level])
        own, again = along[unit.name], expected[f"output.{level}"]
        assert torch.equal(own["order"], expected["order"])
        torch.testing.assert_close(own[f"output.{level}"], again.float(), rtol=1e-4, atol=1e-6)
        switchboard.set(unit.name, level)


def test_along_of_nothing_leaves_the_model_dense(structured, tokens):
    case, walker = structured, structured.walker()
    compact = prune_along(case.space.dense, walker, case.files, case.layout, case.space, case.pruner, case.tokens)
    assert compact == {}
    with torch.inference_mode():
        probe = tokens(2, 1, 16)
        assert torch.equal(walker.model(probe).logits, case.walker().model(probe).logits)


def test_along_of_everything_leaves_no_block(structured, tokens):
    case, walker = structured, structured.walker()
    prune_along(case.space.sparsest, walker, case.files, case.layout, case.space, case.pruner, case.tokens)
    probe = tokens(2, 1, 16)
    hidden = walker.embed(probe)
    assert torch.equal(walker.run_all(hidden), hidden)


def test_along_one_later_unit_equals_dense_inputs(structured):
    case = structured
    allocation = tuple(3 * (unit.name == "model.layers.2.mlp") for unit in case.space.units)
    compact = prune_along(allocation, case.walker(), case.files, case.layout, case.space, case.pruner, case.tokens)
    assert list(compact) == ["model.layers.2.mlp"]
    torch.testing.assert_close(
        compact["model.layers.2.mlp"]["output.3"], case.compact["model.layers.2.mlp"]["output.3"], rtol=0, atol=0
    )


def test_along_works_for_matrices_stage_by_stage(unstructured):
    case = unstructured
    allocation = tuple(5 for _ in case.space.units)
    found = prune_along(allocation, case.walker(), case.files, case.layout, case.space, case.pruner, case.tokens)
    for name in ("q_proj", "k_proj", "v_proj"):
        unit = f"model.layers.0.self_attn.{name}"
        assert torch.equal(found[unit]["removed_at"], case.compact[unit]["removed_at"])
    differs = [
        u.name
        for u in case.space.units
        if not torch.equal(found[u.name]["removed_at"], case.compact[u.name]["removed_at"])
    ]
    assert len(differs) > 12


def test_the_store_is_built_from_dense_inputs(structured):
    case, walker = structured, structured.walker()
    modules = [site.output for site in case.layout.sites]
    with collected(walker.model, modules, "gram") as grams, torch.inference_mode():
        for batch in case.tokens.split(4):
            walker.model(batch, use_cache=False)
    for site, unit in zip(case.layout.sites, case.space.units, strict=True):
        weight = walker.model.get_submodule(site.output).weight
        wanted = range(1, unit.num_levels)
        levels = stored(case.pruner.levels(unit, site.width, weight, grams[site.output], wanted), weight.dtype)
        assert levels.keys() == case.compact[unit.name].keys()
        for key in levels:
            torch.testing.assert_close(levels[key], case.compact[unit.name][key], rtol=1e-4, atol=1e-6)


def test_stages(structured, unstructured):
    names = [
        [[task.module.split("layers.1.")[1] for task in stage] for stage in stages(c.layout, c.space)[1]]
        for c in (structured, unstructured)
    ]
    assert names[0] == [["self_attn.o_proj"], ["mlp.down_proj"]]
    assert names[1] == [
        ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        ["self_attn.o_proj"],
        ["mlp.gate_proj", "mlp.up_proj"],
        ["mlp.down_proj"],
    ]


def test_progress_counts_blocks(structured):
    case, heard = structured, []
    pruner = make_pruner("obs", "structured", 0.01)
    list(prune_all_levels(case.walker(), case.files, case.layout, case.space, pruner, case.tokens, heard.append))
    assert heard == [1, 2, 3]
