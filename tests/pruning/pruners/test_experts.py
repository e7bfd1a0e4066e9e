"""Whole experts: which go, what stays, against stock mixtures in float64 that are built smaller by hand."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.errors import UserError
from allocator.model.family.layout import resolve_layout
from allocator.model.live.load import load_model
from allocator.model.live.modeling_pruned import choose, cut, split, stacked
from allocator.model.open import open_model
from allocator.pruning.calibration import routing as routing_
from allocator.pruning.calibration.build import prune_on_pruned_inputs
from allocator.pruning.calibration.routing import Routing
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.pruners.experts import by_contribution, by_reconstruction, by_routing, expert_order

EXPERTS = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "mlp_only_layers": [],
    },
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 24},
}
GROUPS = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 0,
}


def _stock(folder):
    """Return a model as transformers makes it, experts stacked, in float64."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float64, experts_implementation="eager"
    ).eval()


def _smaller(mixture, kept):
    """Return a stock mixture that never had but some experts."""
    small, chosen = copy.deepcopy(mixture), torch.tensor(kept)
    small.gate.weight.data = small.gate.weight.data[chosen]
    small.gate.num_experts = small.experts.num_experts = len(kept)
    for name in ("gate_up_proj", "down_proj"):
        getattr(small.experts, name).data = getattr(small.experts, name).data[chosen]
    for name, buffer in small.gate.named_buffers():
        setattr(small.gate, name, buffer[chosen])
    return small


@pytest.fixture(scope="module", params=EXPERTS)
def folder(request, make_model):
    return make_model(request.param, **EXPERTS[request.param])


@pytest.fixture(scope="module")
def grouped(make_model):
    return make_model("deepseek_v3", **GROUPS)


@pytest.fixture(scope="module")
def mixture(folder):
    return _stock(folder).model.layers[1].mlp


def _inputs(count, seed=0):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _routing(mixture, inputs, batches=3):
    routing = Routing(mixture.gate, split(mixture.experts))
    for batch in inputs.chunk(batches):
        routing.add(batch)
    return routing


@torch.no_grad()
def test_experts_one_by_one_are_the_stacked_ones(mixture):
    apart = copy.deepcopy(mixture)
    assert stacked(apart.experts)
    apart.experts = split(apart.experts)
    inputs = _inputs(40)[None]
    torch.testing.assert_close(apart(inputs), mixture(inputs), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("kept", [[0, 2, 3], [4, 1, 2]])
def test_a_mixture_without_some_experts_is_one_that_never_had_them(mixture, kept):
    apart = torch.nn.Sequential(copy.deepcopy(mixture))
    experts = split(apart[0].experts)
    gate, rows = apart[0].gate, mixture.gate.weight.data[sorted(kept)]
    cut(gate, len(kept))
    gate.weight.data = rows
    choose(apart, "0.experts", "0.gate", sorted(kept), experts, gate)
    assert [name for name, _ in apart[0].experts.named_children()] == [str(number) for number in sorted(kept)]
    inputs = _inputs(40)[None]
    torch.testing.assert_close(apart(inputs), _smaller(mixture, sorted(kept))(inputs), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_an_empty_mixture_adds_what_stands_beside_it(mixture):
    apart, beside = torch.nn.Sequential(copy.deepcopy(mixture)), copy.deepcopy(mixture)
    choose(apart, "0.experts", "0.gate", [], apart[0].experts, apart[0].gate)
    beside.experts.down_proj.data.zero_()
    torch.testing.assert_close(apart(_inputs(9)[None]), beside(_inputs(9)[None]), rtol=0, atol=0)


@torch.no_grad()
def test_reconstruction_removes_the_expert_that_is_missed_least(mixture):
    inputs, total, least = _inputs(120), mixture.gate.num_experts, mixture.gate.top_k
    order = by_reconstruction(_routing(mixture, inputs), least)
    assert sorted(order) == list(range(total))
    kept, whole = list(range(total)), mixture(inputs[None])
    for expert in order[: total - least]:
        errors = {
            gone: float((_smaller(mixture, [e for e in kept if e != gone])(inputs[None]) - whole).square().sum())
            for gone in kept
        }
        assert errors[expert] <= min(errors.values()) * (1 + 1e-5)  # products of outputs are kept in float32
        kept.remove(expert)


@torch.no_grad()
def test_routing_removes_the_expert_that_gets_least(mixture):
    inputs = _inputs(200)
    _, weights, chosen = mixture.gate(inputs)
    mass = [float(weights[chosen == expert].sum()) for expert in range(mixture.gate.num_experts)]
    assert by_routing(_routing(mixture, inputs)) == sorted(range(len(mass)), key=mass.__getitem__)


@torch.no_grad()
def test_groups_lose_one_expert_each(grouped):
    mixture = _stock(grouped).model.layers[0].mlp
    inputs = _inputs(150)
    routing = _routing(mixture, inputs)
    outputs = torch.stack([expert(inputs) for expert in split(mixture.experts).children()])
    kept, order = list(range(8)), by_contribution(routing, 2, 4)
    for start in range(0, 4, 2):
        _, weights, chosen = _smaller(mixture, kept).gate(inputs)
        score = {
            expert: float(sum((weights * (chosen == place)).sum(1) * outputs[expert].norm(dim=1)))
            for place, expert in enumerate(kept)
        }
        for group, gone in enumerate(order[start : start + 2]):
            own = [expert for expert in kept if expert // 4 == group]
            assert score[gone] == pytest.approx(min(score[expert] for expert in own), rel=1e-5)
        kept = [expert for expert in kept if expert not in order[start : start + 2]]
    levels = expert_order(routing, "reconstruction", 2, 4).view(2, 4)
    assert levels.sort().values.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [row[::-1] for row in levels.tolist()] == [order[0::2], order[1::2]]


@given(st.permutations(range(6)), st.sampled_from([1, 2, 3]))
def test_what_a_level_keeps_the_one_before_keeps_too(ranks, num_groups):
    class Known:
        mass_e = torch.tensor([float(rank) for rank in ranks])

    order = expert_order(Known(), "routing", num_groups, 2).view(num_groups, -1)
    for group, row in enumerate(order.tolist()):
        assert sorted(row) == list(range(group * len(row), (group + 1) * len(row)))
        assert [ranks[e] for e in row] == sorted((ranks[e] for e in row), reverse=True)


@torch.no_grad()
def test_routing_looks_at_no_more_tokens_than_it_has_room_for(mixture, monkeypatch):
    monkeypatch.setattr(routing_, "GRAM_BYTES", 4 * mixture.gate.num_experts**2 * 50)
    routing = _routing(mixture, _inputs(120))
    assert routing.count == len(routing.gram_nee) == 50
    assert float(routing.mass_e.sum()) == pytest.approx(float(mixture.gate(_inputs(120))[1].sum()), rel=1e-6)


@torch.no_grad()
def test_what_is_sent_to_another_process_is_small_and_complete(mixture):
    routing = _routing(mixture, _inputs(60))
    sent = pickle.dumps(routing)
    assert len(sent) < 60 * (mixture.gate.num_experts**2 * 4 + 32 * 8) + 20_000
    least = mixture.gate.top_k
    assert by_reconstruction(pickle.loads(sent), least) == by_reconstruction(routing, least)


@pytest.fixture(scope="module")
def whole(make_case, folder):
    return make_case(folder, "structured", "obs", experts="whole")


def test_a_switched_mixture_is_the_assembled_one(whole):
    model = load_model(whole.checkpoint)
    assembler = Assembler(whole.checkpoint, whole.layout, whole.space, whole.compact.__getitem__, model)
    switchboard = LevelSwitch(model, whole.layout, assembler)
    sub_block = next(sub_block for sub_block in whole.layout.sub_blocks if sub_block.experts and sub_block.block == 1)
    unit = next(unit for unit in whole.space.units if unit.name == sub_block.name)
    stock = _stock(whole.checkpoint.folder)
    order = whole.compact[sub_block.name]["order"].tolist()
    tokens = torch.arange(30).view(2, 15)
    for level in (1, unit.num_levels - 2, 0, 2):
        switchboard.set(unit.name, level)
        expected = copy.deepcopy(stock)
        expected.model.layers[1].mlp = _smaller(stock.model.layers[1].mlp, sorted(order[: unit.kept[level]]))
        with torch.no_grad():
            torch.testing.assert_close(
                model(tokens).logits.double(), expected(tokens).logits, rtol=0, atol=2e-4, msg=f"level {level}"
            )


def test_as_many_experts_stay_as_a_token_is_sent_to(whole):
    for sub_block, unit in zip(whole.layout.sub_blocks, whole.space.units, strict=True):
        if sub_block.experts:
            picked = sub_block.used * sub_block.total
            assert unit.kept[-1] == 0
            assert min(count for count in unit.kept if count) >= picked
            assert len({*unit.macs[1:-1]}) == len(unit.macs[1:-1]), "rows of the router go"


def test_inputs_of_an_expert_are_the_tokens_that_it_gets(make_case, folder):
    case = make_case(folder, "structured", "obs")
    caught = {}

    class Spy:
        name, need, refit = "obs", "gram", case.pruner.refit

        def settings(self):
            return case.pruner.settings()

        def levels(self, problem, notify=None):
            caught[problem.unit.name] = problem.statistics
            return case.pruner.levels(problem)

    # the second level of everything but of the first attention: up to the first mixture nothing else is pruned
    attention = next(
        sub_block.name for sub_block in case.layout.sub_blocks if sub_block.block == 0 and sub_block.part == "attention"
    )
    path = tuple(0 if unit.name == attention else min(2, unit.num_levels - 1) for unit in case.space.units)
    list(prune_on_pruned_inputs(replace(case.calibration(), pruner=Spy()), path, every_level=False))
    stock = _stock(case.checkpoint.folder)
    seen: dict[int, list[torch.Tensor]] = {}

    def note(module, args, output):
        hidden, (_, _, chosen) = args[0], output
        for expert in range(module.num_experts):
            seen.setdefault(expert, []).append(hidden[(chosen == expert).any(1)])

    stock.model.layers[0].mlp.gate.register_forward_hook(note)
    with torch.no_grad():
        stock(case.tokens)
    for expert, hidden in seen.items():
        inputs = torch.cat(hidden)
        own = caught[f"model.layers.0.mlp.experts.{expert}"]
        gate_up = stock.model.layers[0].mlp.experts.gate_up_proj[expert]
        gate, up = (inputs @ gate_up.T).chunk(2, dim=-1)
        entering = torch.nn.functional.silu(gate) * up
        assert own.count == len(inputs)
        assert own.cross_io is None
        torch.testing.assert_close(own.gram_ii.double(), entering.T @ entering, rtol=1e-3, atol=1e-3)


def test_names_of_the_files_are_those_of_the_model(make_model):
    folder = make_model("mixtral", **EXPERTS["mixtral"])
    checkpoint, family = open_model(folder)
    assert checkpoint.stored["model.layers.0.mlp.experts.3.up_proj.weight"] == (
        "model.layers.0.block_sparse_moe.experts.3.w3.weight"
    )
    layout = resolve_layout(family, checkpoint)
    assert {sub_block.name for sub_block in layout.mixtures} == {
        f"model.layers.{block}.mlp.experts" for block in (0, 1)
    }
    assert all(
        sub_block.routed == f"model.layers.{sub_block.block}.mlp"
        for sub_block in layout.mixtures
        for sub_block in layout.sub_blocks
        if sub_block.experts
    )


def test_experts_that_lie_stacked_in_the_files_are_refused(make_model):
    checkpoint, family = open_model(make_model("olmoe"))
    shapes = {name: shape for name, shape in checkpoint.shapes.items() if ".experts." not in name}
    shapes |= {
        f"model.layers.{block}.mlp.experts.{name}": shape
        for block in (0, 1)
        for name, shape in (("gate_up_proj", (4, 48, 32)), ("down_proj", (4, 32, 24)))
    }
    with pytest.raises(UserError, match=r"experts\.0\.down_proj, which OlmoeForCausalLM lacks.*save_pretrained"):
        resolve_layout(family, replace(checkpoint, shapes=shapes))


@pytest.mark.parametrize(("change", "found"), [({"n_group": 3}, "do not divide into 3 groups"), ({}, None)])
def test_experts_must_divide_into_groups(grouped, change, found):
    checkpoint, family = open_model(grouped)
    checkpoint = replace(checkpoint, config={**checkpoint.config, **change})
    if found is None:
        assert {sub_block.least for sub_block in resolve_layout(family, checkpoint).mixtures} == {4}
        return
    with pytest.raises(UserError, match=found):
        resolve_layout(family, checkpoint)
