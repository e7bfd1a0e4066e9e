"""Defects that published code of the field was found to have: one small test for each that would catch it here.

Others have tests of their own elsewhere: figures of a candidate that is not the winner, and budgets that drift
(test_end_to_end.py), pruned weights that come back in training (test_training.py), lost results (test_decide.py,
test_end_to_end.py), levels by position (test_plan.py), seeds that are never used and draws without end within one
searcher (test_searchers.py).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stores import create_store

from allocator.core.budget import Budget
from allocator.core.errors import UserError
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request
from allocator.core.space import SearchSpace
from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.model.live import write
from allocator.model.live.load import load_model
from allocator.model.live.walk import SEQUENCES_PER_BATCH
from allocator.pruning.calibration import problem
from allocator.pruning.calibration.build import prune_on_dense_inputs, prune_on_pruned_inputs
from allocator.pruning.calibration.statistics import Gram
from allocator.pruning.levels import store
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.levels.store import LevelStore
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.evolution import EvolutionSettings
from allocator.searchers.methods.thompson import ThompsonSettings
from allocator.searchers.settings import SearchSettings
from allocator.searchers.study import Study, run_study
from allocator.testing.problems import unit_problem

HEAD_DIM, HEADS, KV_HEADS, HIDDEN = 16, 4, 2, 32
assert HEAD_DIM != HIDDEN // HEADS


@dataclass(frozen=True)
class Case:
    """A model with grouped queries, wide heads and three blocks; what an engine needs; units on dense inputs."""

    spec: EngineSpec
    tokens: torch.Tensor
    compact: dict[str, dict[str, torch.Tensor]]

    @property
    def space(self) -> SearchSpace:
        return self.spec.space

    @property
    def middle(self) -> tuple[int, ...]:
        return tuple(1 if unit.part == "attention" else 4 for unit in self.space.units)

    def calibration(self):
        return self.spec.calibration(Examples.from_ids(self.tokens))


@pytest.fixture(scope="module")
def case(make_model, tmp_path_factory) -> Case:
    shape = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "hidden_size": HIDDEN}
    checkpoint = read_checkpoint(make_model("qwen3", num_hidden_layers=3, **shape))
    layout = resolve_layout(find_family("qwen3"), checkpoint)
    space = build_space(layout, checkpoint, "structured", 0.5)
    spec = EngineSpec(
        checkpoint=checkpoint, layout=layout, space=space, pruner=make_pruner(PrunerSpec(name="obs"), "structured")
    )
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, 128, size=(9, 32)))
    compact = dict(prune_on_dense_inputs(spec.calibration(Examples.from_ids(tokens))))
    built = create_store(tmp_path_factory.mktemp("store") / "levels", {}, compact.items())
    return Case(replace(spec, store=built), tokens, compact)


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# --- calibration inputs ---------------------------------------------------------------------------------------


def test_what_units_are_pruned_on_changes_their_weights(case):
    """A flag for accumulated error that changes nothing: weights stay the same to the bit, whatever it says."""
    other = tuple(2 if unit.part == "attention" else 1 for unit in case.space.units)
    made = [case.compact] + [
        dict(prune_on_pruned_inputs(case.calibration(), along, every_level=True))
        for along in (None, case.middle, other)
    ]
    first, *rest = case.space.units
    for one, two in itertools.combinations(made, 2):
        assert torch.equal(one[first.name]["order"], two[first.name]["order"])  # nothing was pruned before it
        for unit in rest:
            level = f"output.{1 if unit.part == 'attention' else 4}"
            change = (one[unit.name][level] - two[unit.name][level]).norm() / two[unit.name][level].norm()
            assert not torch.equal(one[unit.name]["order"], two[unit.name]["order"]) or float(change) > 1e-3


# --- checkpoints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_is_smaller_by_what_the_plan_says(case, tmp_path):
    """Checkpoints in dense shapes, with columns of zeros: nothing smaller on disk, nothing faster."""
    sizes = {}
    for name, allocation in {"dense": case.space.dense, "middle": case.middle, "least": case.space.sparsest}.items():
        counted = save_pruned(
            allocation, case.spec.checkpoint, case.spec.layout, case.space, case.compact.__getitem__, tmp_path / name
        )
        tensors = load_file(tmp_path / name / "model.safetensors")
        sizes[name] = sum(tensor.nbytes for tensor in tensors.values())
        assert sizes[name] == 4 * counted == 4 * case.space.cost(allocation)
        for tensor in tensors.values():
            assert tensor.ndim == 1 or (tensor.any(0).all() and tensor.any(1).all())
    assert sizes["dense"] > sizes["middle"] > sizes["least"]


def test_key_and_value_heads_are_pruned_in_the_size_that_the_configuration_gives(case, tmp_path):
    """Key and value heads left whole under grouped queries, and a head's size taken for hidden size over heads."""
    attention = [unit for unit in case.space.units if unit.part == "attention"]
    assert all((unit.kind, unit.total, unit.kept) == ("kv_groups", KV_HEADS, (2, 1, 0)) for unit in attention)
    per_group = (2 * HEADS // KV_HEADS + 2) * HEAD_DIM * HIDDEN
    assert all(unit.params[0] - unit.params[1] == per_group for unit in attention)
    save_pruned(
        case.middle, case.spec.checkpoint, case.spec.layout, case.space, case.compact.__getitem__, tmp_path / "out"
    )
    dense, pruned = (
        load_file(folder / "model.safetensors") for folder in (case.spec.checkpoint.folder, tmp_path / "out")
    )
    for unit in attention:
        keep = int(case.compact[unit.name]["order"][0])
        for name, heads in {"q_proj": HEADS // KV_HEADS, "k_proj": 1, "v_proj": 1}.items():
            rows = slice(keep * heads * HEAD_DIM, (keep + 1) * heads * HEAD_DIM)
            weight = f"{unit.name}.{name}.weight"
            assert torch.equal(pruned[weight], dense[weight][rows])
    model = load_model(read_checkpoint(tmp_path / "out"))
    cache = model(case.tokens[:2], use_cache=True).past_key_values
    assert all(layer.keys.shape == layer.values.shape == (2, 1, 32, HEAD_DIM) for layer in cache.layers)


# --- calibration tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4, 9])
@pytest.mark.parametrize("inputs", ["dense", "path"])
def test_statistics_cover_every_calibration_token(case, monkeypatch, inputs, batch):
    """Calibration text in shares whose Hessians are never added up: pruned on a part of it, and nobody knew."""
    monkeypatch.setattr(problem, "SEQUENCES_PER_BATCH", batch)
    seen: dict[str, Gram] = {}

    def solve(problems):
        seen.update({each.task.module: each.statistics for each in problems})
        return [each.solve(case.spec.pruner) for each in problems]

    if inputs == "dense":
        list(prune_on_dense_inputs(case.calibration(), solve=solve))
    else:  # the first sub-block is given what the dense model gives it
        list(prune_on_pruned_inputs(case.calibration(), case.middle, every_level=True, solve=solve))
    assert seen.keys() == {sub_block.output for sub_block in case.spec.layout.sub_blocks}
    assert {statistics.count for statistics in seen.values()} == {case.tokens.numel()}
    model, direct = load_model(case.spec.checkpoint), {}
    for name in seen:
        model.get_submodule(name).register_forward_pre_hook(
            lambda owner, args, name=name: direct.update({name: args[0].flatten(0, -2).double()})
        )
    with torch.inference_mode():
        model(case.tokens, use_cache=False)
    for name in list(seen) if inputs == "dense" else list(seen)[:1]:
        torch.testing.assert_close(seen[name].gram_ii.trace().double(), direct[name].square().sum(), rtol=1e-5, atol=0)
        torch.testing.assert_close(seen[name].gram_ii.double(), direct[name].T @ direct[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shares", [[[0], [1], [2]], [[2, 0], [], [1]]])
def test_blocks_in_shares_are_pruned_as_they_are_together(case, shares):
    """The same defect from the other side: what a worker makes depends on which share of the work is its own."""
    for share in shares:
        found = dict(prune_on_dense_inputs(case.calibration(), share))
        assert found.keys() == {unit.name for unit in case.space.units if unit.block in share}
        assert all(_same(found[name], case.compact[name]) for name in found)


# --- seeds, loops and fall-backs ------------------------------------------------------------------------------

METHODS = {
    "evolution": SearchSettings(
        method="evolution",
        evolution=EvolutionSettings(generations=6, patience=6, offspring=8, tokens=(64,), survivors=(1,)),
    ),
    "tpe": SearchSettings(method="tpe", tpe=TpeSettings(trials=16, batch=4, tokens=64)),
    "gp": SearchSettings(method="gp", gp=GpSettings(trials=16, batch=4, tokens=64)),
    "thompson": SearchSettings(method="thompson", thompson=ThompsonSettings(trials=16, batch=4, tokens=64)),
}


class _Landscape:
    """A loss for every allocation, in no time; a bounded number of them."""

    def __init__(self, space):
        self._space, self._left = space, 500

    def evaluate(self, requests):
        self._left -= len(requests)
        assert self._left >= 0, "the search does not end"
        for request in requests:
            weights = np.random.default_rng(7).uniform(size=len(request.allocation))
            yield Outcome(
                request=request, measured={"kl": float(weights @ np.square(request.allocation)), "nll": 1.0}, wall_s=0.0
            )


def _searched(space, limit, name, seed, path):
    with Journal.create(path, JournalHeader(space=space)) as journal:
        decision = run_study(
            Study(space=space, budget=Budget(params=limit), settings=METHODS[name], seed=seed, selection_tokens=64),
            _Landscape(space),
            journal,
        )
        return decision.searched, [outcome.request for outcome in journal]


@pytest.mark.parametrize("name", METHODS)
def test_the_seed_decides_what_is_tried(space, tmp_path, name):
    """Seeds that are read and never used."""
    limit = space.limit_for(0.5)
    one, again, other = (_searched(space, limit, name, seed, tmp_path / str(i)) for i, seed in enumerate((3, 3, 4)))
    assert one == again
    assert one[1] != other[1]


@pytest.mark.parametrize("name", METHODS)
def test_a_search_with_one_feasible_allocation_ends(space, tmp_path, name):
    """Loops that draw until something fits, or until something is new: here nothing ever does."""
    least = space.cost(space.sparsest)
    searched, asked = _searched(space, least, name, 0, tmp_path / "journal.jsonl")
    assert searched == space.sparsest
    assert {request.allocation for request in asked if space.cost(request.allocation) <= least} == {searched}


@pytest.mark.parametrize(("name", "pattern"), [("obs", "structured"), ("sparsegpt", "unstructured")])
def test_a_failed_factorisation_is_said_and_never_the_identity(case, name, pattern):
    """A Hessian that cannot be inverted, replaced by the identity without a word: 154 modules went unnoticed."""
    checkpoint, layout = case.spec.checkpoint, case.spec.layout
    unit = build_space(layout, checkpoint, pattern, 0.5).units[-1]
    assert "mlp" in unit.name
    output = f"{layout.sub_blocks[-1].output}.weight"
    weight, statistics = write.read_tensors(checkpoint, [output])[output], Gram(48)
    statistics.add(torch.randn(200, 48, generator=torch.Generator().manual_seed(0)))

    def levels(damping, report=lambda message: None):
        return make_pruner(PrunerSpec(name=name, damping=damping), pattern).levels(
            unit_problem(unit, weight, statistics, [1]), report
        )

    statistics.gram_ii[3, 3] *= -1.0
    heard: list[str] = []
    found = levels(0.01, heard.append)
    assert len(heard) == 3
    assert all(message.startswith(f"{unit.name}: the Hessian is not positive definite") for message in heard)
    assert _same(found, levels(float(heard[-1].rpartition("trying ")[2])))
    statistics.gram_ii = torch.eye(48)
    assert not _same(found, levels(0.01))
    statistics.gram_ii = torch.full((48, 48), torch.nan)
    with pytest.raises(UserError, match=f"{unit.name}: the Hessian of its inputs cannot be factorised"):
        levels(0.01)


# --- what an evaluation costs ---------------------------------------------------------------------------------


@pytest.fixture
def engine(case) -> Engine:
    tokens = np.random.default_rng(2).integers(0, 128, size=(8, 128))
    return Engine(replace(case.spec, store=LevelStore(case.spec.store.folder)), {"search": Examples.from_ids(tokens)})


@pytest.mark.parametrize("loss", ["kl", "topk_kl", "nll", "hidden"])
def test_logits_of_a_whole_batch_are_never_held(case, engine, loss):
    """The teacher's logits over the whole vocabulary for all of the text: 134 to 192 GiB."""
    engine._spec = replace(case.spec, loss=loss)
    positions = []
    head = engine._walker.model.get_output_embeddings()
    head.register_forward_pre_hook(lambda owner, args: positions.append(args[0][..., 0].numel()))
    engine.measure(Request(allocation=case.middle, tokens=1024))
    batch = SEQUENCES_PER_BATCH * 128
    assert max(positions) <= 256 < batch
    assert sum(positions) >= 1024


def test_levels_are_read_once(case, engine, monkeypatch):
    """Hundreds of megabytes that are read from disk again for every candidate."""
    opened = []
    for module in (store, write):
        original = module.safe_open
        monkeypatch.setattr(
            module, "safe_open", lambda path, *a, _open=original, **k: opened.append(path) or _open(path, *a, **k)
        )
    engine.measure(Request(allocation=case.middle, tokens=256))
    assert len(opened) == len(set(opened)) == len(case.space.units)
    opened.clear()
    deeper = tuple(level + (unit.part == "mlp") for unit, level in zip(case.space.units, case.middle, strict=True))
    for allocation in (deeper, case.space.sparsest, case.space.dense, case.middle):
        engine.measure(Request(allocation=allocation, tokens=256))
    assert opened == []


def test_a_smaller_candidate_computes_less(case, engine):
    """The whole dense computation for a candidate of half the size: what the hooks count is what the plan says."""
    macs_per_token = []
    for name, module in engine._walker.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_hook(
                lambda owner, args, output: macs_per_token.append(args[0].shape[-1] * output.shape[-1])
            )
    engine.measure(Request(allocation=case.space.dense, tokens=512))
    one_block_gone = tuple(unit.num_levels - 1 if unit.block == 1 else 2 for unit in case.space.units)
    for allocation in (case.space.dense, case.middle, one_block_gone, case.space.sparsest):
        macs_per_token.clear()
        engine.measure(Request(allocation=allocation, tokens=512))
        assert sum(macs_per_token) == case.space.cost(allocation, "macs") - case.space.fixed["macs"]
