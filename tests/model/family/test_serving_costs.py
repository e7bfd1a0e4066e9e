"""Costs of serving against what is counted in executed models and saved checkpoints."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from allocator.core.errors import UserError
from allocator.core.latency import LatencySettings, LatencyTable, Timing
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.serving_costs import Workload, add_serving_costs, describe_shape, describe_size
from allocator.model.family.space import build_space
from allocator.model.live.load import build_shaped_model
from allocator.model.open import open_model

MODELS = {
    "llama": ("llama", {}, "kv_groups"),
    "a head width of its own": ("qwen3", {"head_dim": 16}, "kv_groups"),
    "biases": ("qwen2", {}, "kv_groups"),
    "a window": ("mistral", {"sliding_window": 9}, "kv_groups"),
    "query heads": ("llama", {"num_key_value_heads": 2}, "query_heads"),
    "projections around the blocks": ("opt", {"word_embed_proj_dim": 24}, "kv_groups"),
    "whole attention or none": ("olmo3", {"sliding_window": 9}, "kv_groups"),
    "experts": ("mixtral", {}, "kv_groups"),
    "a gate that stays beside experts": ("qwen2_moe", {}, "kv_groups"),
    "latent attention, and what all tokens pass beside experts": ("deepseek_v3", {"q_lora_rank": 12}, "kv_groups"),
}
WORK = Workload(batch=2, prompt=12, generate=5)


@pytest.fixture(scope="module", params=MODELS)
def served_space(request, make_model):
    kind, overrides, attention = MODELS[request.param]
    checkpoint, family = open_model(make_model(kind, **overrides))
    layout = resolve_layout(family, checkpoint, attention)
    return (
        checkpoint,
        layout,
        add_serving_costs(build_space(layout, checkpoint, "structured", 0.5), layout, checkpoint, WORK),
    )


def _allocations(space):
    rng = np.random.default_rng(0)
    drawn = [tuple(int(rng.integers(unit.num_levels)) for unit in space.units) for _ in range(4)]
    return [space.dense, space.sparsest, *drawn]


def _model(checkpoint, layout, space, allocation):
    kept = {unit.name: unit.kept[level] for unit, level in zip(space.units, allocation, strict=True)}
    model = build_shaped_model(checkpoint, layout, kept, torch.float32)
    model.config._attn_implementation = "eager"  # the counter knows matrix products
    return model


def _macs(model, ids, **inputs):
    """Count the multiply-accumulates of matrix products."""
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        answer = model(ids, logits_to_keep=1, **inputs)
    return counter.get_total_flops() // 2, answer


def test_macs_and_cache_are_those_of_executed_models(served_space):
    checkpoint, layout, space = served_space
    ids = torch.randint(0, 128, (WORK.batch, WORK.context), generator=torch.Generator().manual_seed(0))
    for allocation in _allocations(space):
        model = _model(checkpoint, layout, space, allocation)
        prefill, _ = _macs(model, ids[:, : WORK.prompt], use_cache=False)
        assert space.cost(allocation, "prefill_macs") == prefill
        with torch.no_grad():
            before = model(ids[:, :-1], use_cache=True).past_key_values
        decode, after = _macs(model, ids[:, -1:], past_key_values=before, use_cache=True)
        assert space.cost(allocation, "decode_macs") == decode
        layers = after.past_key_values.layers
        held = sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))
        assert space.cost(allocation, "kv_bytes") == held


def test_bytes_of_weights_are_those_of_the_model(served_space):
    checkpoint, layout, space = served_space
    for allocation in _allocations(space):
        tensors = _model(checkpoint, layout, space, allocation).state_dict().values()
        distinct = {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor.numel()}
        assert space.cost(allocation, "weight_bytes") == sum(distinct.values())


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_a_dense_mixture_costs_the_same_whatever_it_loses(make_model, kind):
    checkpoint, family = open_model(make_model(kind))
    dense = []
    for experts, pattern in (("whole", "structured"), ("inside", "structured"), ("inside", "unstructured")):
        layout = resolve_layout(family, checkpoint, experts=experts)
        space = add_serving_costs(build_space(layout, checkpoint, pattern, 0.5), layout, checkpoint, WORK)
        dense.append([space.cost(space.dense, cost) for cost in ("params", "macs", "prefill_macs", "weight_bytes")])
    assert dense[0] == dense[1] == dense[2]


def test_bytes_of_a_router_are_of_its_own_type(make_model):
    folder = make_model("deepseek_v3", dtype="bfloat16")
    checkpoint, family = open_model(folder)
    own = {name: "F32" for name in checkpoint.shapes if name.endswith("e_score_correction_bias")}
    checkpoint = replace(checkpoint, dtypes={**checkpoint.dtypes, **own})  # as DeepSeek's are
    layout = resolve_layout(family, checkpoint)
    space = add_serving_costs(build_space(layout, checkpoint, "structured", 0.5), layout, checkpoint, WORK)
    unit = next(unit for unit in space.units if unit.kind == "experts")
    number = 2 * (3 * 12 * 32 + 32) + 4  # three matrices and a row of the router; a bias
    assert unit.costs("weight_bytes") == tuple(count * number for count in unit.kept)


@pytest.mark.parametrize("pattern", ["unstructured", "n:m"])
def test_masks_save_nothing_in_service(make_model, pattern):
    checkpoint = read_checkpoint(make_model())
    layout = resolve_layout(find_family("llama"), checkpoint)
    masked, whole = (
        add_serving_costs(build_space(layout, checkpoint, each, 0.5), layout, checkpoint, WORK)
        for each in (pattern, "structured")
    )
    for cost in ("prefill_macs", "decode_macs", "weight_bytes", "kv_bytes"):
        assert masked.cost(masked.dense, cost) == masked.cost(masked.sparsest, cost) == whole.cost(whole.dense, cost)


@pytest.fixture
def table(make_model):
    checkpoint = read_checkpoint(make_model())
    layout = resolve_layout(find_family("llama"), checkpoint)
    shapes = {describe_shape(sub_block, checkpoint): sub_block.total for sub_block in layout.sub_blocks}

    def timing(kept, nanoseconds):
        return Timing(kept=kept, prefill_ns=nanoseconds, decode_ns=nanoseconds // 10, spread=0.0)

    return (
        checkpoint,
        layout,
        LatencyTable(
            device={"type": "cpu"},
            versions={},
            settings=LatencySettings(batch=2, prompt=12, generate=5, dtype="float32", threads=1, repeats=3),
            model=describe_size(checkpoint, layout),
            fixed=timing(0, 1000),
            units={
                shape: tuple(timing(kept, 100 * kept + 7) for kept in range(total, -1, -1))
                for shape, total in shapes.items()
            },
        ),
    )


def test_latency_adds_up_over_the_table(table):
    checkpoint, layout, own = table
    space = add_serving_costs(build_space(layout, checkpoint, "structured", 0.5), layout, checkpoint, WORK, own)
    for allocation in _allocations(space):
        kept = [unit.kept[level] for unit, level in zip(space.units, allocation, strict=True)]
        prefill = 1000 + sum(100 * count + 7 for count in kept)
        decode = 100 + sum((100 * count + 7) // 10 for count in kept)
        assert space.cost(allocation, "prefill_ms") == prefill
        assert space.cost(allocation, "decode_ms") == decode
        assert space.cost(allocation, "latency_ms") == prefill + 5 * decode


def test_masks_save_no_time(table):
    checkpoint, layout, own = table
    space = add_serving_costs(build_space(layout, checkpoint, "unstructured", 0.5), layout, checkpoint, WORK, own)
    whole = add_serving_costs(build_space(layout, checkpoint, "structured", 0.5), layout, checkpoint, WORK, own)
    assert space.cost(space.dense, "latency_ms") == space.cost(space.sparsest, "latency_ms")
    assert space.cost(space.dense, "latency_ms") == whole.cost(whole.dense, "latency_ms")


def test_a_table_is_read_as_it_was_written(table, tmp_path):
    *_, own = table
    own.save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == own


def test_no_level_is_faster_than_a_sparser_one_and_shapes_between_are_interpolated():
    timings = tuple(
        Timing(kept=kept, prefill_ns=time, decode_ns=time, spread=0.0)
        for kept, time in ((8, 800), (6, 500), (4, 700), (0, 10))
    )
    fixed = Timing(kept=0, prefill_ns=0, decode_ns=0, spread=0.0)
    settings = LatencySettings(batch=1, prompt=1, generate=1, dtype="float32", threads=1, repeats=1)
    own = LatencyTable(device={}, versions={}, settings=settings, model={}, fixed=fixed, units={"shape": timings})
    assert own.ladder("shape", (8, 7, 6, 5, 4, 2, 0))[0] == (800, 700, 700, 700, 700, 355, 10)
    with pytest.raises(UserError, match="no sub-block of shape 'another'"):
        own.ladder("another", (8, 0))
    with pytest.raises(UserError, match="measured with 0 to 8 items, and levels keep 0 to 9"):
        own.ladder("shape", (9, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "not a latency table: at device: Field required"),
        ("[1, 2]", "a latency table is a JSON object"),
        ('{"schema": 2}', "not a latency table"),
        ("no", "not a readable latency table"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, content, message):
    (tmp_path / "table.json").write_text(content)
    with pytest.raises(UserError, match=message):
        LatencyTable.load(tmp_path / "table.json")


def test_a_table_for_another_workload_or_model_is_refused(table, make_model):
    checkpoint, layout, own = table
    space = build_space(layout, checkpoint, "structured", 0.5)
    with pytest.raises(
        UserError, match=r"workload\.latency: the table is for batch 2, .* and the run asks for batch 1, 12"
    ):
        add_serving_costs(space, layout, checkpoint, Workload(1, 12, 5), own)
    deeper = read_checkpoint(make_model(num_hidden_layers=3))
    other = resolve_layout(find_family("llama"), deeper)
    with pytest.raises(UserError, match=r"the table is for a model of .*'blocks': 2.* and this one has .*'blocks': 3"):
        add_serving_costs(build_space(other, deeper, "structured", 0.5), other, deeper, WORK, own)
