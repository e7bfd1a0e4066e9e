import dataclasses
import itertools
import math
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.core.errors import UserError
from allocator.core.protocols import Request
from allocator.evaluation import engine as engines
from allocator.evaluation import teacher
from allocator.evaluation.engine import Engine
from allocator.evaluation.local import LocalEvaluator
from allocator.evaluation.spec import Execution
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.live.load import load_model
from allocator.pruning.levels.execute import save_pruned


def _random(space, seed):
    rng = np.random.default_rng(seed)
    return tuple(int(rng.integers(unit.num_levels)) for unit in space.units)


def _requests(space):
    allocations = [_random(space, seed) for seed in range(3)] + [space.sparsest, space.dense]
    places = [("search", 32), ("search", 11 * 32), ("search", 4 * 32), ("selection", 6 * 32)]
    return [
        Request(allocation=allocation, tokens=tokens, split=split)
        for allocation, (split, tokens) in itertools.product(allocations, places)
    ] + [Request(allocation=_first(space, allocation), tokens=4 * 32, blocks=1) for allocation in allocations]


def _first(space, allocation):
    """Return an allocation whose first block alone is not dense."""
    return tuple(level if unit.block == 0 else 0 for unit, level in zip(space.units, allocation, strict=True))


def test_a_measurement_does_not_depend_on_what_was_measured_before(spec, splits):
    requests = _requests(spec.space)
    fresh = {r.key: Engine(spec, splits).measure(r).measured for r in requests[::3]}
    used = Engine(spec, splits)
    order = np.random.default_rng(0).permutation(np.tile(np.arange(len(requests)), 2))
    found = [(requests[i], used.measure(requests[i]).measured) for i in order]
    for request, measured in found:
        assert measured == fresh.setdefault(request.key, measured)


def test_targets_kept_or_recomputed_are_the_same(spec, splits, monkeypatch):
    requests = _requests(spec.space)[:6]
    kept = [Engine(spec, splits).measure(request).measured for request in requests]
    monkeypatch.setattr(teacher, "KEPT_BYTES", 0)
    engine = Engine(spec, splits)
    assert [engine.measure(request).measured for request in requests] == kept


def test_the_dense_model_is_at_no_distance_from_itself(engine, spec):
    for allocation in (spec.space.sparsest, spec.space.dense):
        outcome = engine.measure(Request(allocation=allocation, tokens=11 * 32))
    assert outcome.loss == 0.0
    assert outcome.request == Request(allocation=spec.space.dense, tokens=11 * 32)


def test_whatever_is_removed_is_at_a_distance(engine, spec):
    for seed in range(4):
        assert engine.measure(Request(allocation=_random(spec.space, seed), tokens=11 * 32)).loss > 0.0


def test_measurements_are_means_in_nats_per_token(structured, splits, tmp_path):
    spec, allocation = structured, _random(structured.space, 1)
    outcome = Engine(spec, splits).measure(Request(allocation=allocation, tokens=5 * 32))
    save_pruned(allocation, spec.checkpoint, spec.layout, spec.space, spec.store, tmp_path / "out")
    tokens = splits["search"][:5].to_tensors().inputs["input_ids"]
    with torch.inference_mode():
        dense = load_model(spec.checkpoint)(tokens).logits.double().log_softmax(-1)
        pruned = load_model(read_checkpoint(tmp_path / "out"))(tokens).logits.double().log_softmax(-1)
    kl_bt = (dense.exp() * (dense - pruned)).sum(-1)
    kl = kl_bt.mean()
    assert outcome.sequence_losses == pytest.approx(kl_bt.mean(-1).tolist(), rel=1e-4)
    nll = -pruned[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
    assert outcome.measured["kl"] == pytest.approx(float(kl), rel=1e-4)
    assert outcome.measured["nll"] == pytest.approx(float(nll), rel=1e-4)


def test_what_leaves_some_blocks_is_compared_with_what_leaves_the_dense_ones(structured, splits, tmp_path):
    spec, space = structured, structured.space
    blocks = len(spec.layout.blocks) - 1
    drawn = zip(space.units, _random(space, 1), strict=True)
    allocation = tuple(level if unit.block < blocks else 0 for unit, level in drawn)
    whole = Request(allocation=_random(space, 2), tokens=5 * 32)
    outcomes = Engine(spec, splits).measure_batch([Request(allocation=allocation, tokens=5 * 32, blocks=blocks), whole])
    outcome = next(each for each in outcomes if each.request.blocks)
    save_pruned(allocation, spec.checkpoint, spec.layout, space, spec.store, tmp_path / "out")
    tokens = splits["search"][:5].to_tensors().inputs["input_ids"]
    with torch.inference_mode():
        dense, pruned = (
            load_model(checkpoint)(tokens, output_hidden_states=True).hidden_states[blocks].double()
            for checkpoint in (spec.checkpoint, read_checkpoint(tmp_path / "out"))
        )
    error_b = ((pruned - dense).square().sum(-1) / dense.square().sum(-1)).mean(-1)
    assert outcome.sequence_losses == pytest.approx(error_b.tolist(), rel=1e-4)
    assert outcome.measured == {"features": outcome.loss}
    assert outcome.loss == pytest.approx(float(error_b.mean()), rel=1e-4)


def test_parts_are_the_loss_of_each_sequence_for_every_loss(structured, splits):
    allocation = _random(structured.space, 1)
    for loss in ("kl", "topk_kl", "nll", "hidden"):
        spec = dataclasses.replace(structured, loss=loss)
        outcome = Engine(spec, splits).measure(Request(allocation=allocation, tokens=5 * 32))
        for index, part in enumerate(outcome.sequence_losses):
            own = {**splits, "search": splits["search"][index : index + 1]}
            assert part == pytest.approx(
                Engine(spec, own).measure(Request(allocation=allocation, tokens=32)).loss, rel=1e-5
            )
        assert len(outcome.sequence_losses) == 5


def test_a_fidelity_is_a_prefix(structured, splits):
    allocation = _random(structured.space, 2)
    each = []
    for index in range(2):
        own = {**splits, "search": splits["search"][index : index + 1]}
        each.append(Engine(structured, own).measure(Request(allocation=allocation, tokens=32)).measured)
    both = Engine(structured, splits).measure(Request(allocation=allocation, tokens=64)).measured
    for name in ("kl", "nll"):
        assert both[name] == pytest.approx((each[0][name] + each[1][name]) / 2, rel=1e-5)


def test_tokens_beyond_the_fidelity_do_not_matter(structured, splits):
    request = Request(allocation=_random(structured.space, 2), tokens=3 * 32)
    changed = splits["search"].inputs["input_ids"].copy()
    changed[3:] = 0
    other = Engine(structured, {**splits, "search": Examples.from_ids(changed)}).measure(request).measured
    assert other == Engine(structured, splits).measure(request).measured


@pytest.mark.parametrize("recompute", [False, True])
def test_execution_saves_counts_and_measures_on_the_test_split(engine, spec, splits, tmp_path, recompute):
    allocation = _random(spec.space, 3)
    figures = engine.execute(Execution(allocation, recompute, tmp_path / "out"), 7 * 32)
    assert figures["params"] == spec.space.cost(allocation)
    assert figures["perplexity"] == pytest.approx(math.exp(figures["nll"]))
    again = Engine(spec, splits).measure_checkpoint(tmp_path / "out", "test", 7 * 32)
    assert again == {name: figures[name] for name in ("kl", "nll", "perplexity")}


def test_an_assembled_execution_measures_as_in_place(structured, splits, tmp_path):
    allocation = _random(structured.space, 4)
    engine = Engine(structured, splits)
    figures = engine.execute(Execution(allocation, False, tmp_path / "out"), 7 * 32)
    in_place = engine.measure(Request(allocation=allocation, tokens=7 * 32, split="test"))
    assert figures["kl"] == pytest.approx(in_place.loss, rel=1e-4)
    assert figures["nll"] == pytest.approx(in_place.measured["nll"], rel=1e-4)


def test_recomputing_is_another_model(structured, splits, tmp_path):
    allocation = tuple(1 for _ in structured.space.units)
    engine = Engine(structured, splits)
    figures = [engine.execute(Execution(allocation, again, tmp_path / str(again)), 7 * 32) for again in (False, True)]
    assert figures[0]["params"] == figures[1]["params"]
    assert figures[0]["kl"] != figures[1]["kl"]


def test_executions_leave_measurements_as_they_are(engine, spec, tmp_path):
    request = Request(allocation=_random(spec.space, 0), tokens=4 * 32)
    before = engine.measure(request).measured
    engine.execute(Execution(spec.space.sparsest, True, tmp_path / "out"), 32)
    assert engine.measure(request).measured == before


def test_a_dense_checkpoint_has_no_divergence(structured, splits):
    figures = Engine(structured, splits).measure_checkpoint(structured.checkpoint.folder, "test", 7 * 32)
    assert figures["kl"] == 0.0


def test_an_engine_without_a_store_measures_checkpoints(structured, splits):
    bare = dataclasses.replace(structured, store=None, pruner=None)
    dense = structured.checkpoint.folder
    assert Engine(bare, splits).measure_checkpoint(dense, "test", 64)["kl"] == 0.0


def test_a_loss_that_is_not_finite_is_an_error(structured, splits, tmp_path):
    broken = shutil.copytree(structured.checkpoint.folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the loss is not finite"):
        Engine(structured, splits).measure_checkpoint(broken, "test", 64)


def test_the_local_evaluator_answers_every_request(structured, splits):
    evaluator = LocalEvaluator(structured, splits)
    requests = _requests(structured.space)[:5]
    outcomes = list(evaluator.evaluate(requests))
    assert sorted(o.request.key for o in outcomes) == sorted(r.key for r in requests)
    assert all(o.wall_s > 0 and set(o.measured) == {"kl", "nll"} for o in outcomes)


def _family(space):
    """Allocations that agree up to different blocks: random ones, their children, and some with parts removed."""
    rng = np.random.default_rng(7)
    parents = [_random(space, 5), _random(space, 6), space.dense, space.sparsest]
    children = []
    for parent in parents:
        for _ in range(4):
            child = list(parent)
            for index in rng.choice(len(child), size=2, replace=False):
                child[index] = int(rng.integers(space.units[index].num_levels))
            children.append(tuple(child))
    gone = [
        tuple(unit.num_levels - 1 if unit.block == block else 1 for unit in space.units)
        for block in range(space.units[-1].block + 1)
    ]
    return list(dict.fromkeys([*parents, *children, *gone]))


@pytest.mark.parametrize("limit", [0, 1, 2, 100])
def test_a_batch_measures_what_each_alone_measures(spec, splits, monkeypatch, limit):
    boundary = 11 * 32 * spec.checkpoint.config["hidden_size"] * (2 if spec.dtype == "bfloat16" else 4)
    monkeypatch.setattr(engines, "BOUNDARY_BYTES", limit * boundary)
    family = _family(spec.space)
    requests = [Request(allocation=allocation, tokens=tokens) for tokens in (11 * 32, 32) for allocation in family]
    alone = Engine(spec, splits)
    expected = {request.key: alone.measure(request).measured for request in requests}
    judged = _watch_final_states(monkeypatch)
    for allocation in family:
        list(alone.measure_batch([Request(allocation=allocation, tokens=11 * 32)]))
    singly, judged[:] = dict(zip(family, _by(judged, 3), strict=True)), []
    batch = Engine(spec, splits)
    assert {o.request.key: o.measured for o in batch.measure_batch(requests)} == expected
    states = _by(judged[: 3 * len(family)], 3)
    for allocation, found in zip(sorted(family), states, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, singly[allocation], strict=True))


def _watch_final_states(monkeypatch):
    """Return a list that gets what leaves the last block, as it is judged."""
    judged = []
    score = teacher.Teacher.score

    def watched(self, batch, student, student_btd):
        judged.append(student_btd)
        return score(self, batch, student, student_btd)

    monkeypatch.setattr(teacher.Teacher, "score", watched)
    return judged


def _by(items, size):
    return [items[start : start + size] for start in range(0, len(items), size)]


def test_a_batch_runs_fewer_blocks(structured, splits, monkeypatch):
    family = _family(structured.space)
    engine = Engine(structured, splits)
    short = [Request(allocation=_first(structured.space, a), tokens=32, blocks=1) for a in family[:3]]
    requests = [Request(allocation=a, tokens=32) for a in family] + list(
        {request.key: request for request in short}.values()
    )
    list(
        engine.measure_batch([Request(allocation=structured.space.dense, tokens=32), requests[-1]])
    )  # so that the teacher is known
    ran = []
    run = engine._walker.run
    monkeypatch.setattr(engine._walker, "run", lambda index, hidden: ran.append(index) or run(index, hidden))
    list(engine.measure_batch(requests))
    paths = [engine._path(request) for request in requests]
    assert len(ran) == len({path[:depth] for path in paths for depth in range(1, len(path) + 1)})
    assert len(ran) < 3 * len(family)


def test_outcomes_share_the_time_of_a_batch(structured, splits):
    engine = Engine(structured, splits)
    start = time.perf_counter()
    outcomes = list(engine.measure_batch([Request(allocation=a, tokens=11 * 32) for a in _family(structured.space)]))
    assert 0 < sum(outcome.wall_s for outcome in outcomes) <= time.perf_counter() - start


@pytest.mark.parametrize("loss", ["kl", "topk_kl", "nll", "hidden"])
def test_every_loss_is_measured_under_its_name(spec, splits, tmp_path, loss):
    engine = Engine(dataclasses.replace(spec, loss=loss), splits)
    outcomes = [engine.measure(Request(allocation=a, tokens=11 * 32)) for a in (spec.space.dense, spec.space.sparsest)]
    assert all(set(o.measured) == {loss, "nll"} and o.loss == o.measured[loss] for o in outcomes)
    assert loss == "nll" or outcomes[0].loss == 0.0 < outcomes[1].loss
    plain = Engine(spec, splits).measure(Request(allocation=spec.space.sparsest, tokens=11 * 32))
    assert plain.measured["nll"] == outcomes[1].measured["nll"]
    figures = engine.execute(Execution(spec.space.sparsest, False, tmp_path / "out"), 64)
    assert set(figures) == {"params", "kl", "nll", "perplexity"}


@pytest.mark.parametrize("loss", ["topk_kl", "hidden"])
def test_losses_agree_with_a_float64_reference(structured, splits, tmp_path, loss):
    spec, allocation = dataclasses.replace(structured, loss=loss), _random(structured.space, 1)
    outcome = Engine(spec, splits).measure(Request(allocation=allocation, tokens=5 * 32))
    save_pruned(allocation, spec.checkpoint, spec.layout, spec.space, spec.store, tmp_path / "out")
    tokens = splits["search"][:5].to_tensors().inputs["input_ids"]
    with torch.inference_mode():
        dense = load_model(spec.checkpoint)(tokens, output_hidden_states=True)
        pruned = load_model(read_checkpoint(tmp_path / "out"))(tokens, output_hidden_states=True)
    if loss == "topk_kl":
        log_p, log_q = (out.logits.double().log_softmax(-1) for out in (dense, pruned))
        expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    else:
        own, other = (out.hidden_states[-1].double() for out in (dense, pruned))
        expected = (own - other).square().mean() / own.square().mean()
    assert outcome.loss == pytest.approx(float(expected), rel=1e-4)


def test_without_a_device_nothing_starts(structured, splits):
    if torch.cuda.is_available():
        pytest.skip("the device is there")
    with pytest.raises(UserError, match="no CUDA device"):
        Engine(dataclasses.replace(structured, device="cuda"), splits)


def test_influence_of_blocks_is_that_of_the_saved_model_and_the_same_in_any_batch(spec, splits, tmp_path):
    space, tokens = spec.space, 4 * 32
    allocations = [space.dense, *(_random(space, seed) for seed in range(4))]
    allocations += [(*space.dense[:-1], 1), space.sparsest]
    plain = [Request(allocation=allocation, tokens=tokens) for allocation in allocations]
    asked = [dataclasses.replace(request, probe="influence") for request in plain]
    together = {o.request.key: o.measured for o in Engine(spec, splits).measure_batch([*plain, *asked])}
    blocks = {f"influence.{block}" for block in range(len(spec.layout.blocks))}
    for without, request in zip(plain, asked, strict=True):
        alone = Engine(spec, splits).measure(request).measured
        assert together[request.key] == alone
        assert {name: value for name, value in alone.items() if name not in blocks} == together[without.key]
        assert blocks == alone.keys() - together[without.key].keys()
    assert spec.store is not None
    save_pruned(allocations[1], spec.checkpoint, spec.layout, space, spec.store, tmp_path / "out")
    model = load_model(read_checkpoint(tmp_path / "out"), torch.float32)
    doors = []
    for name in spec.layout.blocks:
        model.get_submodule(name).register_forward_hook(
            lambda m, args, output: doors.append((args[0], output[0] if isinstance(output, tuple) else output))
        )
    with torch.no_grad():
        model(splits["search"][:4].to_tensors().inputs["input_ids"])
    measured = together[asked[1].key]
    for block, (entering, leaving) in enumerate(doors):
        a, b = entering.double(), leaving.double()
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
        tolerance = 0.05 if spec.dtype == "bfloat16" else 1e-4
        assert measured[f"influence.{block}"] == pytest.approx(float((1 - cosine).mean()), rel=tolerance, abs=1e-6)
