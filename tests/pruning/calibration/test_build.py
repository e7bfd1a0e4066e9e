import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.model.live.walk import BlockWalker
from allocator.pruning.calibration.build import prune_on_dense_inputs, prune_on_pruned_inputs
from allocator.pruning.calibration.problem import Calibration, plan_stages
from allocator.pruning.calibration.statistics import Gram, collect_statistics
from allocator.pruning.calibration.streams import find_nearest
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.pruners.protocol import PrunerSpec, Refit
from allocator.pruning.pruners.registry import make_pruner
from allocator.testing.problems import unit_problem


@pytest.fixture
def middle(structured):
    """One level of every unit, in the middle of its ladder."""
    return tuple(1 if unit.part == "attention" else 4 for unit in structured.space.units)


@pytest.fixture
def along(structured, middle):
    return dict(prune_on_pruned_inputs(structured.calibration(), middle, every_level=False))


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- dense inputs ---------------------------------------------------------------------------------------------


def test_the_store_is_built_from_dense_inputs(structured):
    case, walker = structured, structured.walker()
    modules = [sub_block.output for sub_block in case.layout.sub_blocks]
    with collect_statistics(walker.model, modules, "gram") as grams, torch.inference_mode():
        for batch in case.tokens.split(4):
            walker.model(batch, use_cache=False)
    for sub_block, unit in zip(case.layout.sub_blocks, case.space.units, strict=True):
        weight = walker.model.get_submodule(sub_block.output).weight
        levels = case.pruner.levels(unit_problem(unit, weight, grams[sub_block.output], width=sub_block.width))
        assert levels.keys() == case.compact[unit.name].keys()
        for key in levels:
            found = case.compact[unit.name][key]
            torch.testing.assert_close(levels[key].to(found.dtype), found, rtol=1e-4, atol=1e-6)


def test_a_solver_gets_the_independent_problems_of_a_block(unstructured):
    seen = []

    def solve(problems):
        seen.append([problem.task.module for problem in problems])
        return [problem.solve(unstructured.pruner) for problem in reversed(problems)][::-1]

    found = dict(prune_on_dense_inputs(unstructured.calibration(), solve=solve))
    assert [len(names) for names in seen] == [7, 7, 7]
    assert all(_same(found[name], unstructured.compact[name]) for name in found)


def test_weights_that_are_not_finite_are_an_error_that_names_the_tensor(structured, broken_weight):
    calibration = structured.calibration(broken_weight)
    with pytest.raises(Exception, match=r"model\.layers\.1\.mlp\.down_proj"):
        list(prune_on_dense_inputs(calibration))


# --- along a path ---------------------------------------------------------------------------------------------


def test_on_the_first_attention_a_path_is_the_dense_model(structured, middle, along):
    name = "model.layers.0.self_attn"
    assert torch.equal(along[name]["order"], structured.compact[name]["order"])
    torch.testing.assert_close(along[name]["output.1"], structured.compact[name]["output.1"], rtol=1e-3, atol=1e-5)


def _streams(model, tokens, module, norm):
    """The input of a projection, and the residual stream that it adds to (what enters the norm before it)."""
    inputs, residuals, outputs = [], [], []

    def keep(owner, args, output):
        inputs.append(args[0])
        outputs.append(output)

    handles = [
        model.get_submodule(module).register_forward_hook(keep),
        model.get_submodule(norm).register_forward_pre_hook(lambda owner, args: residuals.append(args[0])),
    ]
    with torch.inference_mode():
        for batch in tokens.split(4):
            model(batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return [torch.cat([batch.flatten(0, -2) for batch in table]).double() for table in (inputs, residuals, outputs)]


NORMS = {
    "structured": ("input_layernorm", "post_attention_layernorm"),
    "structured_opt": ("self_attn_layer_norm", "final_layer_norm"),
}
"""Of each case, the norms before attention and before the feed-forward network."""


@pytest.mark.parametrize("name", NORMS)
def test_along_a_path_refits_make_up_for_what_the_residual_stream_lacks(request, name):
    """Each refit again, by least squares on whole models, pruned up to the unit and dense."""
    case = request.getfixturevalue(name)
    middle = tuple(1 if unit.part == "attention" else 4 for unit in case.space.units)
    along = dict(prune_on_pruned_inputs(case.calibration(), middle, every_level=False))
    walker, whole = case.walker(), case.walker().model
    switchboard = LevelSwitch(
        walker.model, case.layout, Assembler(case.checkpoint, case.layout, case.space, along.__getitem__, walker.model)
    )
    for sub_block, unit, level in zip(case.layout.sub_blocks, case.space.units, middle, strict=True):
        norm = f"{case.layout.blocks[sub_block.block]}.{NORMS[name][sub_block.part == 'mlp']}"
        x, residual, _ = _streams(walker.model, case.tokens, sub_block.output, norm)
        _, whole_residual, whole_output = _streams(whole, case.tokens, sub_block.output, norm)
        project = whole.get_submodule(sub_block.output)
        dense, bias = project.weight.double(), 0.0 if project.bias is None else project.bias.double()
        target = whole_output - bias + whole_residual - residual
        damping = 0.01 * x.square().sum(0).mean()
        rows = torch.cat([x, damping.sqrt() * torch.eye(x.shape[1])])
        nearest = torch.linalg.lstsq(rows, torch.cat([target, damping.sqrt() * dense.T])).solution
        order = along[unit.name]["order"][: unit.kept[level]].long()
        columns = (order[:, None] * sub_block.width + torch.arange(sub_block.width)).flatten()
        expected = torch.linalg.lstsq(rows[:, columns], rows @ nearest).solution.T
        found = along[unit.name][f"output.{level}"].double()
        assert float((found - expected).norm() / expected.norm()) < 1e-3
        switchboard.set(unit.name, level)


def test_every_level_along_a_path_includes_that_of_the_path(structured, middle, along):
    every = dict(prune_on_pruned_inputs(structured.calibration(), middle, every_level=True))
    for unit, level in zip(structured.space.units, middle, strict=True):
        assert set(every[unit.name]) == set(structured.compact[unit.name])
        assert torch.equal(every[unit.name]["order"], along[unit.name]["order"])
        torch.testing.assert_close(every[unit.name][f"output.{level}"], along[unit.name][f"output.{level}"])


def test_along_nothing_the_model_stays_dense(structured, tokens):
    calibration = structured.calibration()
    assert dict(prune_on_pruned_inputs(calibration, structured.space.dense, every_level=False)) == {}
    with torch.inference_mode():
        probe = tokens(2, 1, 16)
        dense = structured.walker().model(probe).logits
        assert torch.equal(calibration.walker.model(probe).logits, dense)


def test_along_everything_no_block_is_left(structured, tokens):
    calibration = structured.calibration()
    list(prune_on_pruned_inputs(calibration, structured.space.sparsest, every_level=False))
    hidden = calibration.walker.embed(Examples.from_ids(tokens(2, 1, 16)))
    assert torch.equal(calibration.walker.run_all(hidden), hidden)


def test_matrices_are_pruned_stage_by_stage(unstructured):
    allocation = tuple(5 for _ in unstructured.space.units)
    found = dict(prune_on_pruned_inputs(unstructured.calibration(), allocation, every_level=False))
    for name in ("q_proj", "k_proj", "v_proj"):
        unit = f"model.layers.0.self_attn.{name}"
        assert torch.equal(found[unit]["removed_at"], unstructured.compact[unit]["removed_at"])
    differs = [
        u.name
        for u in unstructured.space.units
        if not torch.equal(found[u.name]["removed_at"], unstructured.compact[u.name]["removed_at"])
    ]
    assert len(differs) > 12


def test_sparsegpt_aims_at_the_dense_outputs_along_a_path(unstructured):
    """Near the dense model's hidden states: nearer than levels made on dense inputs."""
    case = replace(unstructured, pruner=make_pruner(PrunerSpec(name="sparsegpt"), "unstructured"))
    allocation = tuple(5 for _ in case.space.units)
    distances = {}
    with torch.inference_mode():
        for name in ("dense", "path"):
            calibration = case.calibration()
            made = (
                prune_on_dense_inputs(calibration)
                if name == "dense"
                else prune_on_pruned_inputs(calibration, allocation, every_level=False)
            )
            compact, walker, whole = dict(made), case.walker(), case.walker()
            assembler = Assembler(case.checkpoint, case.layout, case.space, compact.__getitem__, walker.model)
            switchboard = LevelSwitch(walker.model, case.layout, assembler)
            for unit, level in zip(case.space.units, allocation, strict=True):
                switchboard.set(unit.name, level)
            examples = Examples.from_ids(case.tokens)
            expected = whole.run_all(whole.embed(examples))
            distances[name] = float((walker.run_all(walker.embed(examples)) - expected).norm() / expected.norm())
    assert distances["path"] < 0.95 * distances["dense"]


# --- expectation ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(structured):
    return dict(prune_on_pruned_inputs(structured.calibration(), None, every_level=True))


def test_the_expectation_is_the_average_over_levels_by_what_they_keep(structured, expected):
    """The order of the first block's channels again, from attention outputs averaged by hand."""
    case, model, whole = structured, structured.walker().model, structured.walker().model
    attention, mlp = case.space.units[:2]
    switchboard = LevelSwitch(
        model, case.layout, Assembler(case.checkpoint, case.layout, case.space, expected.__getitem__, model)
    )
    layer = whole.model.layers[0]
    total = 0.0
    for level, kept in enumerate(attention.kept):
        if kept:
            switchboard.set(attention.name, level)
            _, _, output = _streams(
                model, case.tokens, "model.layers.0.self_attn.o_proj", "model.layers.0.input_layernorm"
            )
            total = total + output * kept / sum(attention.kept)
    x, whole_residual, whole_output = _streams(
        whole, case.tokens, "model.layers.0.mlp.down_proj", "model.layers.0.post_attention_layernorm"
    )
    _, residual, _ = _streams(whole, case.tokens, "model.layers.0.self_attn.o_proj", "model.layers.0.input_layernorm")
    with torch.inference_mode():
        normed = layer.post_attention_layernorm((residual + total).float())
        x = (layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)).double()
    target = whole_output + whole_residual - residual - total
    damping = 0.01 * x.square().sum(0).mean()
    rows = torch.cat([x, damping.sqrt() * torch.eye(x.shape[1])])
    dense = layer.mlp.down_proj.weight.double()
    nearest = torch.linalg.lstsq(rows, torch.cat([target, damping.sqrt() * dense.T])).solution
    order = expected[mlp.name]["order"][: mlp.kept[4]].long()
    wanted = torch.linalg.lstsq(rows[:, order], rows @ nearest).solution.T
    found = expected[mlp.name]["output.4"].double()
    assert float((found - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("mode", ["path", "expected"])
def test_units_that_are_known_are_not_pruned_again(structured, middle, mode):
    along = middle if mode == "path" else None
    whole = dict(prune_on_pruned_inputs(structured.calibration(), along, every_level=True))
    done = {name: whole[name] for name in list(whole)[:3]}
    rest = dict(prune_on_pruned_inputs(structured.calibration(), along, True, known=done.get))
    assert list(rest) == list(whole)[3:]
    assert all(_same(rest[name], whole[name]) for name in rest)


ODD = {
    "one token again and again": lambda tensors: None,
    "dead channels": lambda tensors: tensors["model.layers.1.mlp.gate_proj.weight"][:40].zero_(),
    "a block that adds nothing": lambda tensors: [
        tensors[f"model.layers.1.{name}.weight"].zero_() for name in ("self_attn.o_proj", "mlp.down_proj")
    ],
}


@pytest.mark.parametrize("mode", ["dense", "expected", "path"])
@pytest.mark.parametrize(
    ("pattern", "pruner"), [("structured", "obs"), ("unstructured", "sparsegpt"), ("n:m", "wanda")]
)
@pytest.mark.parametrize("odd", ODD)
def test_odd_models_and_texts_are_pruned_without_a_word(tiny_model, tmp_path, tokens, odd, pattern, pruner, mode):
    """Hessians of rank one, inputs that are always zero, residual streams that stay as they are."""
    folder, heard = shutil.copytree(tiny_model, tmp_path / "model"), []
    tensors = load_file(folder / "model.safetensors")
    ODD[odd](tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = read_checkpoint(folder)
    layout = resolve_layout(find_family("llama"), checkpoint)
    space = build_space(layout, checkpoint, pattern, 0.5)
    text = torch.full((2, 16), 7) if odd == "one token again and again" else tokens(3, 5, 16)
    walker, own = BlockWalker(load_model(checkpoint), layout), make_pruner(PrunerSpec(name=pruner), pattern)
    calibration = Calibration(
        walker=walker,
        checkpoint=checkpoint,
        layout=layout,
        space=space,
        pruner=own,
        examples=Examples.from_ids(text),
        notify=heard.append,
    )
    along = tuple(1 for _ in space.units) if mode == "path" else None
    found = dict(
        prune_on_dense_inputs(calibration) if mode == "dense" else prune_on_pruned_inputs(calibration, along, True)
    )
    assert found.keys() == {unit.name for unit in space.units}
    assert all(torch.isfinite(tensor).all() for compact in found.values() for tensor in compact.values())
    assert heard == []


def test_stages(structured, unstructured):
    names = [
        [[task.module.split("layers.1.")[1] for task in stage.tasks] for stage in plan_stages(c.layout, c.space)[1]]
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
    heard = []
    list(prune_on_dense_inputs(replace(structured.calibration(), progress=heard.append)))
    list(prune_on_pruned_inputs(replace(structured.calibration(), progress=heard.append), None, True))
    assert heard == [1, 2, 3, 1, 2, 3]


# --- data types and intercepts --------------------------------------------------------------------------------


def test_in_bfloat16_blocks_add_up_and_targets_do_not_drown(structured_bf16):
    case, heard = structured_bf16, []
    middle = tuple(1 if unit.part == "attention" else 4 for unit in case.space.units)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        walker = BlockWalker(load_model(case.checkpoint, dtype), case.layout)
        calibration = replace(case.calibration(), walker=walker, notify=heard.append)
        found[dtype] = dict(prune_on_pruned_inputs(calibration, middle, every_level=False))
    assert heard == []
    exact, rounded = (found[dtype]["model.layers.0.self_attn"] for dtype in found)
    assert torch.equal(exact["order"], rounded["order"])
    one, other = exact["output.1"].float(), rounded["output.1"].float()
    assert float((one - other).norm() / one.norm()) < 0.02


@pytest.mark.parametrize("intercept", [False, True])
def test_the_nearest_weight_is_least_squares_with_or_without_an_intercept(intercept):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) + torch.arange(6)
    target = torch.randn(400, 3, generator=generator) + x @ torch.randn(6, 3, generator=generator) + 7.0
    dense = torch.randn(3, 6, generator=generator)
    statistics = Gram(6)
    for rows in range(0, 400, 100):
        statistics.add(x[rows : rows + 100])
        statistics.add_targets(x[rows : rows + 100], target[rows : rows + 100])
    found = find_nearest(dense, statistics, Refit(0.01, intercept), "unit", print)
    inputs, aims = x.double(), target.double()
    if intercept:
        inputs, aims = inputs - inputs.mean(0), aims - aims.mean(0)
    damping = (0.01 * inputs.square().sum(0).mean()).sqrt() * torch.eye(6).double()
    rows = torch.cat([inputs, damping])
    expected = torch.linalg.lstsq(rows, torch.cat([aims, damping @ dense.double().T])).solution.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_bias_gives_back_the_mean_of_what_was_lost_before(structured):
    """With the first block's sub-blocks gone, what they added on average comes back at the next projection."""
    case = replace(structured, pruner=make_pruner(PrunerSpec(name="obs", bias=True), "structured"))
    walker, whole = case.walker(), case.walker().model
    with torch.no_grad():
        for model in (walker.model, whole):
            model.model.layers[0].mlp.down_proj.weight.add_(0.5)  # channels are not negative on average: a large mean
    gone = {"model.layers.0.self_attn", "model.layers.0.mlp"}
    allocation = tuple(
        unit.num_levels - 1 if unit.name in gone else int(unit.name == "model.layers.1.self_attn")
        for unit in case.space.units
    )
    calibration = replace(case.calibration(), walker=walker)
    compact = dict(prune_on_pruned_inputs(calibration, allocation, every_level=False))
    sub_block = next(sub_block for sub_block in case.layout.sub_blocks if sub_block.name == "model.layers.1.self_attn")
    norm = "model.layers.1.input_layernorm"
    _, residual, output = _streams(walker.model, case.tokens, sub_block.output, norm)
    _, whole_residual, whole_output = _streams(whole, case.tokens, sub_block.output, norm)
    lost = (whole_output + whole_residual - residual).mean(0)
    torch.testing.assert_close(output.mean(0), lost, rtol=1e-3, atol=1e-3)
    assert f"bias.{1}" in compact[sub_block.name]
