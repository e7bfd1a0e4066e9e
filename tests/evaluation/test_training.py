"""What training does to a candidate, and what it must not do. 32 tokens to a sequence, one sequence to a step."""

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from allocator.core.errors import UserError
from allocator.core.protocols import Request
from allocator.evaluation.engine import Engine
from allocator.evaluation.local import LocalEvaluator
from allocator.evaluation.training import Candidate, Trainer, Training
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.live.load import load_model
from allocator.pruning.levels.assemble import Assembler
from allocator.pruning.levels.execute import save_pruned

LENGTH, STEPS = 32, 16


@pytest.fixture(scope="session")
def texts(splits):
    """The splits, and a text to train on in which a token tells the next one."""
    tokens = np.random.default_rng(9).integers(0, 128, (STEPS, 1)) + 7 * np.arange(LENGTH)
    return {**splits, "training": Examples.from_ids(tokens % 128)}


@pytest.fixture(scope="session")
def two_four(make_spec, tiny_model):
    return make_spec(tiny_model, "n:m")


@pytest.fixture
def trained_spec(request, tmp_path):
    """Makes the spec of a pattern one that trains."""

    def make(pattern, rate=1e-3, batch=1, **more):
        own = request.getfixturevalue(pattern)
        training = Training(rate, batch, tmp_path / f"training-{rate}-{batch}")
        return dataclasses.replace(own, training=training, **more)

    return make


def _some(space, seed=1):
    """A random allocation that removes something of most units, and all of none."""
    rng = np.random.default_rng(seed)
    return tuple(int(rng.integers(unit.num_levels - (unit.kept[-1] == 0))) for unit in space.units)


def _trainer(spec, texts, dtype=torch.float32):
    tokens = torch.from_numpy(texts["training"].inputs["input_ids"])
    return Trainer(spec.checkpoint, spec.layout, spec.space, spec.store, spec.training, tokens, dtype, spec.device)


def _train(candidate, texts, until):
    candidate.train(torch.from_numpy(texts["training"].inputs["input_ids"]), until, torch.float32)
    return candidate


def _weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("pattern", ["unstructured", "two_four"])
def test_no_removed_weight_comes_back(trained_spec, texts, pattern):
    """Nor does its gradient leave a trace in the moments; also after going on from a state."""
    spec = trained_spec(pattern, rate=1e-2)
    allocation = tuple(unit.num_levels - 1 for unit in spec.space.units)
    checkpoint, space = spec.checkpoint, spec.space
    pruned = Assembler(checkpoint, spec.layout, space, spec.store)
    before = {
        f"{u.name}.weight": pruned.unit(u.name, level)[f"{u.name}.weight"]
        for u, level in zip(space.units, allocation, strict=True)
    }
    first = _train(_trainer(spec, texts).make_candidate(allocation), texts, 4 * LENGTH)
    second = _trainer(spec, texts).make_candidate(allocation)
    second.resume(4 * LENGTH, first.state())
    _train(second, texts, STEPS * LENGTH)
    removed = 0
    for candidate in (first, second):
        state = candidate.state()
        for unit, (name, weight) in zip(space.units, before.items(), strict=True):
            gone = weight == 0
            assert int(gone.sum()) == unit.total - unit.kept[-1]
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                assert torch.count_nonzero(state[f"{kind} {name}"][gone]) == 0
            assert not torch.equal(state[f"weight {name}"], weight)
            removed += int(gone.sum())
    assert removed


def test_a_structured_candidate_holds_nothing_that_was_removed(trained_spec, texts):
    spec = trained_spec("structured")
    allocation = _some(spec.space)
    model = _train(_trainer(spec, texts).make_candidate(allocation), texts, 2 * LENGTH).model
    assert sum(parameter.numel() for parameter in model.parameters()) == spec.space.cost(allocation)


@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
def test_training_is_that_of_a_plain_loop_on_the_checkpoint(trained_spec, texts, tmp_path, pattern):
    """AdamW by hand, on the loss that transformers computes, with zeros laid on the weights."""
    spec = trained_spec(pattern, batch=2)
    allocation = _some(spec.space)
    save_pruned(allocation, spec.checkpoint, spec.layout, spec.space, spec.store, tmp_path / "out")
    model = load_model(read_checkpoint(tmp_path / "out")).requires_grad_(True)
    zeros = {name: p.detach() == 0 for name, p in model.named_parameters()} if pattern == "unstructured" else {}
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in model.named_parameters()}
    for step in range(1, 4):
        tokens = torch.from_numpy(texts["training"].inputs["input_ids"][2 * step - 2 : 2 * step])
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad * ~zeros[name] if name in zeros else p.grad
                first, second = means[name]
                first.mul_(0.9).add_(0.1 * grad)
                second.mul_(0.999).add_(0.001 * grad**2)
                p.mul_(1 - 1e-3 * 0.01)
                p.sub_(1e-3 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8))
    found = _weights(_train(_trainer(spec, texts).make_candidate(allocation), texts, 3 * 2 * LENGTH).model)
    expected = _weights(model)
    assert found.keys() == expected.keys()
    dense = _weights(load_model(read_checkpoint(tmp_path / "out")))
    for name, weight in expected.items():
        assert torch.allclose(found[name], weight, rtol=1e-3, atol=2e-5), name
        assert not torch.equal(weight, dense[name])


@pytest.mark.parametrize("pattern", ["structured", "unstructured", "two_four"])
def test_training_that_goes_on_is_training_from_the_start(trained_spec, texts, pattern, monkeypatch):
    resumed, resume = [], Candidate.resume
    monkeypatch.setattr(Candidate, "resume", lambda self, *state: resumed.append(state[0]) or resume(self, *state))
    spec = trained_spec(pattern, batch=2)
    allocation = _some(spec.space)
    going_on, anew = _trainer(spec, texts), dataclasses.replace(spec.training, folder=spec.training.folder / "none")
    for steps in (1, 3):
        going_on.train(Request(allocation=allocation, tokens=32 * steps, training=steps * 2 * LENGTH), keep=True)
    assert len(list(spec.training.folder.iterdir())) == 2
    last = Request(allocation=allocation, tokens=352, training=8 * 2 * LENGTH)
    found = _weights(going_on.train(last, keep=False))
    expected = _weights(_trainer(dataclasses.replace(spec, training=anew), texts).train(last, keep=False))
    assert resumed == [2 * LENGTH, 6 * LENGTH]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_state_cut_short_is_as_none(trained_spec, texts):
    spec = trained_spec("structured")
    allocation = _some(spec.space)
    first, second = (Request(allocation=allocation, tokens=tokens, training=4 * tokens) for tokens in (32, 64))
    expected = _weights(_trainer(spec, texts).train(second, keep=False))
    _trainer(spec, texts).train(first, keep=True)
    (state,) = spec.training.folder.iterdir()
    state.write_bytes(state.read_bytes()[:1000])
    found = _weights(_trainer(spec, texts).train(second, keep=False))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_masters_are_float32_whatever_evaluations_compute_in(trained_spec, texts):
    spec = trained_spec("structured", dtype="bfloat16")
    model = _trainer(spec, texts, torch.bfloat16).train(
        Request(allocation=_some(spec.space), tokens=32, training=64), keep=True
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    (state,) = spec.training.folder.iterdir()
    assert {tensor.dtype for tensor in load_file(state).values()} == {torch.float32}


@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_engine_s_own_model_is_untouched(trained_spec, texts, pattern, dtype):
    spec = trained_spec(pattern, rate=1e-2, dtype=dtype)
    engine, space = Engine(spec, texts), spec.space
    plain = [Request(allocation=a, tokens=11 * 32) for a in (_some(space), space.sparsest, space.dense)]
    before = [engine.measure(request).measured for request in plain]
    trained = [engine.measure(dataclasses.replace(request, training=128)) for request in plain]
    assert [engine.measure(request).measured for request in plain] == before
    assert before[-1]["kl"] == 0.0
    for outcome, untrained in zip(trained, before, strict=True):
        assert outcome.loss_before == outcome.measured["kl_before"] == untrained["kl"]
        assert outcome.loss != untrained["kl"]
        assert len(outcome.sequence_losses) == 11


@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
def test_without_a_rate_nothing_changes(trained_spec, texts, pattern):
    """What is trained is what is measured before: the same weights at the same places."""
    spec = trained_spec(pattern, rate=0.0)
    for seed in range(3):
        outcome = Engine(spec, texts).measure(Request(allocation=_some(spec.space, seed), tokens=11 * 32, training=64))
        assert outcome.loss == pytest.approx(outcome.loss_before, rel=1e-5)


def test_the_loss_on_the_training_text_falls(trained_spec, texts):
    spec = trained_spec("structured", rate=1e-2)
    own = {**texts, "search": texts["training"]}
    allocation, tokens = _some(spec.space), STEPS * LENGTH
    losses = [
        Engine(spec, own).measure(Request(allocation=allocation, tokens=tokens, training=training)).measured["nll"]
        for training in (0, tokens // 4, tokens // 2, tokens)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 1.0


def test_a_batch_measures_what_each_alone_measures(trained_spec, texts):
    spec = trained_spec("unstructured")
    requests = [
        Request(allocation=_some(spec.space, seed), tokens=tokens, training=training)
        for seed in range(3)
        for tokens, training in ((32, 0), (32, 64), (352, 128))
    ]
    alone = {}
    for request in requests:
        shutil.rmtree(spec.training.folder, ignore_errors=True)
        alone[request.key] = dict(Engine(spec, texts).measure(request).measured)
    assert {o.request.key: dict(o.measured) for o in Engine(spec, texts).measure_batch(requests)} == alone


def test_states_are_kept_from_one_stage_to_the_next(trained_spec, texts):
    """Those of lower fidelities go when a stage is done; the last stage, on the whole split, keeps none."""
    spec = trained_spec("structured")
    folder, evaluator = spec.training.folder, LocalEvaluator(spec, texts)
    candidates = [_some(spec.space, seed) for seed in range(4)]
    kept = []
    for count, tokens, training in ((4, 32, 64), (3, 64, 64), (2, 128, 128), (2, 352, 256)):
        list(evaluator.evaluate([Request(allocation=a, tokens=tokens, training=training) for a in candidates[:count]]))
        kept.append(sorted(path.stem.split("-")[1:] for path in folder.iterdir()))
    assert kept == [[["32", "64"]] * 4, [["64", "64"]] * 3, [["128", "128"]] * 2, []]


def test_training_that_diverges_is_an_error(trained_spec, texts):
    spec = trained_spec("structured", rate=1e30)
    engine, request = Engine(spec, texts), Request(allocation=_some(spec.space), tokens=32, training=256)
    with pytest.raises(UserError, match=r"loss is not finite.*training\.learning_rate"):
        engine.measure(request)


def test_a_full_disk_is_the_user_s(trained_spec, texts, monkeypatch):
    from allocator.evaluation import training_states as states

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(states, "save_file", full)
    spec = trained_spec("structured")
    with pytest.raises(UserError, match="No space left"):
        Engine(spec, texts).measure(Request(allocation=_some(spec.space), tokens=32, training=64))
    assert list(spec.training.folder.iterdir()) == []


def test_an_expert_without_tokens_goes_on_as_if_never_interrupted(make_model, tmp_path):
    """It has no gradient in some steps, and the optimizer passes it over then."""
    checkpoint = read_checkpoint(make_model("mixtral", num_experts_per_tok=1))
    training = Training(learning_rate=1e-2, batch_sequences=1, folder=tmp_path)
    tokens = torch.randint(0, 128, (6, 4), generator=torch.Generator().manual_seed(0))

    def candidate():
        return Candidate(load_model(checkpoint), {}, training)

    straight, first, second = candidate(), candidate(), candidate()
    straight.train(tokens, 24, torch.float32)
    first.train(tokens, 12, torch.float32)
    second.resume(12, first.state())
    second.train(tokens, 24, torch.float32)
    steps = {float(step) for key, step in straight.state().items() if key.startswith("step ")}
    assert len(steps) > 1, "some expert is passed over"
    for name, tensor in straight.state().items():
        assert torch.equal(second.state()[name], tensor), name
