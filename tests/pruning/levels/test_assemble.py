import numpy as np
import pytest
import torch

from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.live.load import load_model
from allocator.pruning.levels import assemble
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.compact import item_columns
from allocator.pruning.levels.execute import save_pruned

CASES = ["structured", "structured_qwen2", "structured_bf16", "structured_opt"]
CASES += ["unstructured", "sparsegpt", "unstructured_opt", "n_m"]


@pytest.fixture(params=CASES)
def case(request):
    return request.getfixturevalue(request.param)


class Live:
    """A dense model under a switchboard."""

    def __init__(self, case):
        self._walker, self._space = case.walker(), case.space
        assembler = Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__, self._walker.model)
        self._switchboard = LevelSwitch(self._walker.model, case.layout, assembler)

    def set(self, allocation, wide=False):
        for unit, level in zip(self._space.units, allocation, strict=True):
            self._switchboard.set(unit.name, level, wide)
        return self

    def parameters(self):
        return dict(self._walker.model.named_parameters())

    @torch.inference_mode()
    def logits(self, tokens):
        return self._walker.model(tokens, use_cache=False).logits


def _random(space, seed):
    rng = np.random.default_rng(seed)
    return tuple(int(rng.integers(unit.num_levels)) for unit in space.units)


def test_every_level_and_back_to_dense_is_bit_exact(case, tokens):
    live, probe = Live(case), tokens(2, 2, 16)
    with torch.inference_mode():
        dense = case.walker().model(probe, use_cache=False).logits
    assert torch.equal(live.logits(probe), dense)
    for index, unit in enumerate(case.space.units):
        for level in range(1, unit.num_levels):
            one = [0] * len(case.space.units)
            one[index] = level
            assert not torch.equal(live.set(one).logits(probe), dense)
        assert torch.equal(live.set(case.space.dense).logits(probe), dense)


def test_what_was_switched_before_does_not_matter(case, tokens):
    live, probe = Live(case), tokens(2, 2, 16)
    allocations = [_random(case.space, seed) for seed in range(6)] + [case.space.sparsest]
    fresh = [Live(case).set(allocation).logits(probe) for allocation in allocations]
    for index in [*range(7), 3, 6, 0, 5, 1]:
        assert torch.equal(live.set(allocations[index]).logits(probe), fresh[index])


def test_in_place_equals_saved_and_reloaded(case, tokens, tmp_path):
    probe, space = tokens(2, 2, 16), case.space
    removed = tuple(unit.num_levels - 1 if unit.block == 0 else 0 for unit in space.units)
    for number, allocation in enumerate([space.dense, space.sparsest, removed, *(_random(space, s) for s in range(4))]):
        out = tmp_path / str(number)
        save_pruned(allocation, case.checkpoint, case.layout, space, case.compact.__getitem__, out)
        with torch.inference_mode():
            reloaded = load_model(read_checkpoint(out))(probe, use_cache=False).logits
        in_place = Live(case).set(allocation).logits(probe)
        torch.testing.assert_close(in_place, reloaded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["structured", "structured_qwen2"])
def test_levels_are_the_dense_rows_of_what_is_kept(request, name):
    case = request.getfixturevalue(name)
    assembler = Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__)
    sub_blocks = {sub_block.name: sub_block for sub_block in case.layout.sub_blocks}
    for unit in case.space.units:
        sub_block, order = sub_blocks[unit.name], case.compact[unit.name]["order"].long()
        dense = assembler.unit(unit.name, 0)
        for level in range(1, unit.num_levels):
            tensors = assembler.unit(unit.name, level)
            assert tensors.keys() == dense.keys()
            if unit.kept[level] == 0:
                assert set(tensors.values()) == {None}
                continue
            for module, rows in sub_block.rows.items():
                picked = item_columns(order[: unit.kept[level]], rows)
                for key in {f"{module}.weight", f"{module}.bias"} & dense.keys():
                    assert torch.equal(tensors[key], dense[key][picked])
            assert tensors[f"{sub_block.output}.weight"].shape[1] == unit.kept[level] * sub_block.width


def test_masked_weights_are_zero_and_the_rest_is_dense(unstructured):
    case = unstructured
    assembler = Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__)
    for unit in case.space.units:
        dense = assembler.unit(unit.name, 0)[f"{unit.name}.weight"]
        for level in range(unit.num_levels):
            weight = assembler.unit(unit.name, level)[f"{unit.name}.weight"]
            assert int(weight.count_nonzero()) == unit.kept[level]
            assert torch.equal(weight[weight != 0], dense[weight != 0])


def test_order_of_items_does_not_change_the_function(structured, tokens):
    """A level without refit computes what the dense model with those columns zeroed computes."""
    case, probe = structured, tokens(3, 2, 16)
    walker, sub_block = case.walker(), case.layout.sub_blocks[2]
    unit = next(u for u in case.space.units if u.name == sub_block.name)
    order = case.compact[sub_block.name]["order"].long()
    output = walker.model.get_submodule(sub_block.output)
    kept = item_columns(order[: unit.kept[1]], sub_block.width)
    compact = {**case.compact, sub_block.name: {"order": order, "output.1": output.weight[:, kept].clone()}}
    with torch.inference_mode():
        gone = sorted(set(range(output.weight.shape[1])) - set(kept.tolist()))
        output.weight[:, gone] = 0.0
        masked = walker.model(probe, use_cache=False).logits
    live = Live(type(case)(case.checkpoint, case.layout, case.space, case.pruner, case.tokens, compact))
    allocation = tuple(int(u.name == sub_block.name) for u in case.space.units)
    torch.testing.assert_close(live.set(allocation).logits(probe), masked, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["structured", "structured_qwen2", "structured_opt"])
@pytest.mark.parametrize("blocks", [{0}, {1}, {0, 1, 2}])
@torch.inference_mode()
def test_cached_forward_equals_uncached_with_attention_removed(request, name, blocks, tokens, tmp_path):
    case = request.getfixturevalue(name)
    allocation = tuple(
        unit.num_levels - 1 if unit.part == "attention" and unit.block in blocks else 2 * (unit.part == "mlp")
        for unit in case.space.units
    )
    save_pruned(allocation, case.checkpoint, case.layout, case.space, case.compact.__getitem__, tmp_path / "out")
    model, probe = load_model(read_checkpoint(tmp_path / "out")), tokens(5, 2, 12)
    whole = model(probe, use_cache=False).logits
    prefix = model(probe[:, :5], use_cache=True)
    steps, cache = [prefix.logits], prefix.past_key_values
    for position in range(5, 12):
        out = model(probe[:, position : position + 1], past_key_values=cache, use_cache=True)
        steps.append(out.logits)
        cache = out.past_key_values
        assert cache.get_seq_length() == position + 1
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["structured", "structured_qwen2", "structured_bf16"])
def test_switching_between_levels_copies_no_row(request, name):
    case = request.getfixturevalue(name)
    live = Live(case)
    for sub_block, unit in zip(case.layout.sub_blocks, case.space.units, strict=True):
        rows = {f"{module}.{kind}" for module in sub_block.rows for kind in ("weight", "bias")}
        places = set()
        for level in range(1, unit.num_levels):
            live.set(tuple(level if u is unit else 0 for u in case.space.units))
            if unit.kept[level]:
                own = {key: p for key, p in live.parameters().items() if key in rows}
                places.add(tuple((key, p.data_ptr()) for key, p in own.items()))
        assert len(places) == 1


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_output_projections_are_kept_within_a_limit(structured, monkeypatch, limit):
    monkeypatch.setattr(assemble, "OUTPUT_BYTES", limit)
    live, space = Live(structured), structured.space
    name = f"{structured.layout.sub_blocks[0].output}.weight"

    def visit():
        live.set(tuple(int(unit.name == structured.layout.sub_blocks[0].name) for unit in space.units))
        return live.parameters()[name].data

    first = visit()
    live.set(space.dense)
    assert torch.equal(visit(), first)
    assert (visit().data_ptr() == first.data_ptr()) == (limit > 0)


def test_unaligned_tensors_of_a_live_model_are_moved(case):
    """So that a level is the same bits whether it was never left or switched back to."""
    walker = case.walker()
    for parameter in walker.model.parameters():
        shifted = torch.empty(parameter.numel() + 1, dtype=parameter.dtype)[1:].view_as(parameter)
        parameter.data = shifted.copy_(parameter.data)
    Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__, walker.model)
    names = {unit.name for unit in case.space.units}
    for name, parameter in walker.model.named_parameters():
        if any(name.startswith(f"{unit}.") for unit in names):
            assert parameter.data_ptr() % 64 == 0


def test_dense_tensors_are_held_once(case):
    """Those of a live model are its own; whatever was switched, no other copy of a row stays."""
    walker = case.walker()
    assembler = Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__, walker.model)
    own = {name: p.data_ptr() for name, p in walker.model.named_parameters()}
    for unit in case.space.units:
        assert all(tensor.data_ptr() == own[key] for key, tensor in assembler.unit(unit.name, 0).items())
    sizes = {key: tensor.nbytes for unit in case.space.units for key, tensor in assembler.unit(unit.name, 0).items()}
    for seed in range(3):
        for unit, level in zip(case.space.units, _random(case.space, seed), strict=True):
            assembler.unit(unit.name, level)
    held = {t.untyped_storage().data_ptr(): t.nbytes for tensors in assembler._dense.values() for t in tensors.values()}
    assert sum(held.values()) <= sum(sizes.values())


HEADS = {"hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2}
MORE = {
    "query heads": ("qwen2", {**HEADS, "tie_word_embeddings": False}, {"attention": "query_heads"}),
    "query heads with norms": ("qwen3", HEADS, {"attention": "query_heads", "bias": True}),
    "added biases": ("llama", {}, {"bias": True}),
    "norms over all heads": ("olmo2", {}, {}),
    "biases of its own": ("llama", {"attention_bias": True, "mlp_bias": True}, {"bias": True}),
}


@pytest.fixture(params=[*CASES, *MORE], scope="module")
def any_case(request, make_case, make_model):
    if request.param in CASES:
        return request.getfixturevalue(request.param)
    kind, overrides, pruning = MORE[request.param]
    return make_case(make_model(kind, **overrides), "structured", "obs", **pruning)


def _one_by_one(space):
    """Every level of every unit, the others dense."""
    return [
        tuple(level if other is unit else 0 for other in space.units)
        for unit in space.units
        for level in range(unit.num_levels)
    ]


def _random_ones(space):
    return [_random(space, seed) for seed in range(4)] + [space.sparsest, space.dense]


def test_dense_shapes_give_what_small_ones_give_at_every_level(any_case, tokens):
    plain, wide, probe = Live(any_case), Live(any_case), tokens(2, 2, 16)
    shapes = {key: tensor.shape for key, tensor in any_case.walker().model.named_parameters()}
    for allocation in [*_one_by_one(any_case.space), *_random_ones(any_case.space)]:
        expected = plain.set(allocation).logits(probe)
        found = wide.set(allocation, wide=True).logits(probe)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        own = {key: tensor.shape for key, tensor in wide.parameters().items()}
        assert own.items() >= shapes.items()
        assert all(key.endswith(".bias") for key in own.keys() - shapes.keys())


def test_in_dense_shapes_levels_differ_in_what_is_written_alone(any_case):
    """So that they can be subtracted: rows lie in one order, and what reads the removed is zero."""
    case = any_case
    assembler = Assembler(case.checkpoint, case.layout, case.space, case.compact.__getitem__)
    sub_blocks = {sub_block.name: sub_block for sub_block in case.layout.sub_blocks}
    for unit in case.space.units:
        levels = [assembler.wide(unit.name, level) for level in range(unit.num_levels)]
        assembler.unit(unit.name, 0)
        again = [assembler.wide(unit.name, level) for level in reversed(range(unit.num_levels))][::-1]
        module = sub_blocks[unit.name].output if unit.kind != "matrix" else unit.name
        dense = levels[0]
        for level, (tensors, other) in enumerate(zip(levels, again, strict=True)):
            assert tensors.keys() == other.keys()
            assert all(torch.equal(tensor, other[key]) for key, tensor in tensors.items())
            assert tensors.keys() - {f"{module}.bias"} == dense.keys() - {f"{module}.bias"}
            for key in tensors.keys() & dense.keys():
                assert tensors[key].shape == dense[key].shape
                if not key.startswith(f"{module}."):
                    assert torch.equal(tensors[key], dense[key])
            weight = tensors[f"{module}.weight"]
            assert torch.equal(weight, dense[f"{module}.weight"]) == (level == 0)
            if unit.kind != "matrix":
                kept = unit.kept[level] * sub_blocks[unit.name].width
                by_group = weight.unflatten(1, (unit.num_groups, -1))
                assert not by_group[:, :, kept // unit.num_groups :].any()
                assert (weight.abs().sum(0) > 0).sum() == kept
            if unit.kept[level] == 0:
                assert not any(tensors[key].any() for key in tensors if key.startswith(f"{module}."))


def test_between_dense_shapes_and_small_ones_no_bit_is_lost(any_case):
    live, allocations = Live(any_case), _random_ones(any_case.space)
    fresh = {
        (allocation, wide): {
            key: tensor.clone() for key, tensor in Live(any_case).set(allocation, wide).parameters().items()
        }
        for allocation in allocations
        for wide in (False, True)
    }
    for seed in range(12):
        rng = np.random.default_rng(seed)
        key = (allocations[rng.integers(len(allocations))], bool(rng.integers(2)))
        found = live.set(*key).parameters()
        assert found.keys() == fresh[key].keys()
        assert all(torch.equal(tensor, fresh[key][name]) for name, tensor in found.items())
