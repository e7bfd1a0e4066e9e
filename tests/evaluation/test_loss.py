import pytest
import torch
from torch import nn

from allocator.evaluation import loss
from allocator.evaluation.loss import chunk_divergences, displacement, divergence, make_targets, shift_tokens


def _reference(teacher_btv, student_btv, tokens_bt):
    """Plain formulas in float64: each sequence's sums of KL over all positions and of NLL over those with a next."""
    p = torch.softmax(teacher_btv.double(), dim=-1)
    log_p, log_q = torch.log(p), torch.log(torch.softmax(student_btv.double(), dim=-1))
    kl_b = (p * (log_p - log_q)).sum((1, 2))
    nll_b = [
        -sum(log_q[b, t, tokens_bt[b, t + 1]] for t in range(tokens_bt.shape[1] - 1)) for b in range(tokens_bt.shape[0])
    ]
    return kl_b, torch.stack(nll_b)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(50, 16, generator=generator))
    teacher, student = (torch.randn(3, 12, 16, generator=generator) for _ in range(2))
    return head, teacher, student, torch.randint(0, 50, (3, 12), generator=generator)


def test_sums_are_those_of_the_plain_formulas(problem):
    head, teacher, student, tokens = problem
    kl, nll = divergence(make_targets("kl", teacher, head), student, head, tokens)
    expected_kl, expected_nll = _reference(head(teacher), head(student), tokens)
    assert torch.allclose(kl, expected_kl, rtol=1e-5)
    assert torch.allclose(nll, expected_nll, rtol=1e-5)


def test_small_divergences_are_exact_enough(problem):
    head, teacher, _, tokens = problem
    student = teacher + 1e-2 * torch.randn_like(teacher)
    kl, _ = divergence(make_targets("kl", teacher, head), student, head, tokens)
    assert torch.allclose(kl, _reference(head(teacher), head(student), tokens)[0], rtol=1e-3, atol=1e-5)


def _floats(sums):
    """Sums over a whole batch."""
    return tuple(float(each.sum()) for each in sums)


def test_two_heads_may_differ(problem):
    head, teacher, student, tokens = problem
    other = nn.Linear(16, 50, bias=False)
    found = _floats(divergence(make_targets("kl", teacher, head), student, other, tokens))
    expected = _floats(_reference(head(teacher), other(student).detach(), tokens))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 12, 36, 1000])
def test_chunks_do_not_matter(problem, monkeypatch, rows):
    head, teacher, student, tokens = problem
    whole = _floats(divergence(make_targets("kl", teacher, head), student, head, tokens))
    monkeypatch.setattr(loss, "_CHUNK_POSITIONS", rows)
    chunks = list(make_targets("kl", teacher, head))
    assert [len(chunk.probability_nk) for chunk in chunks][:-1] == [rows] * (len(chunks) - 1)
    assert _floats(divergence(chunks, student, head, tokens)) == pytest.approx(whole, rel=1e-6)


def test_a_model_is_at_no_distance_from_itself(problem):
    head, teacher, _, tokens = problem
    assert not divergence(make_targets("kl", teacher, head), teacher.clone(), head, tokens)[0].any()


def test_extreme_logits_stay_finite(problem):
    head, teacher, student, tokens = problem
    kl, nll = divergence(make_targets("kl", 1e4 * teacher, head), 1e4 * student, head, tokens)
    assert torch.isfinite(torch.stack([kl, nll])).all()
    assert (kl > 0).all()


def _outcomes(logits_btv, top_btk):
    """Probabilities in float64 of the top tokens, and of the rest as one outcome."""
    p = torch.softmax(logits_btv.double(), dim=-1)
    top = p.gather(-1, top_btk)
    return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1)


@pytest.mark.parametrize("top", [1, 8, 49])
def test_the_tail_of_a_top_k_divergence_is_one_outcome(problem, monkeypatch, top):
    head, teacher, student, tokens = problem
    monkeypatch.setattr(loss, "TOP", top)
    found, nll = divergence(make_targets("topk_kl", teacher, head), student, head, tokens)
    chosen = head(teacher).topk(top, dim=-1).indices
    p, q = _outcomes(head(teacher), chosen), _outcomes(head(student), chosen)
    assert found.tolist() == pytest.approx((p * (p / q).log()).sum((1, 2)).tolist(), rel=1e-5)
    assert torch.equal(nll, divergence(None, student, head, tokens)[1])


def test_top_k_of_all_tokens_is_the_divergence(problem):
    head, teacher, student, tokens = problem
    whole = _floats(divergence(make_targets("kl", teacher, head), student, head, tokens))
    found = _floats(divergence(make_targets("topk_kl", teacher, head), student, head, tokens))
    assert found == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ["kl", "topk_kl"])
@pytest.mark.parametrize("top", [8, 512])
def test_no_loss_of_a_model_from_itself(problem, monkeypatch, name, top):
    head, teacher, _, tokens = problem
    monkeypatch.setattr(loss, "TOP", top)
    assert not divergence(make_targets(name, teacher, head), teacher.clone(), head, tokens)[0].any()


def test_displacement_is_the_squared_distance(problem):
    _, teacher, student, _ = problem
    distance, square = displacement(teacher, student)
    expected = (teacher.double() - student.double()).square().sum((1, 2))
    assert distance.tolist() == pytest.approx(expected.tolist(), rel=1e-6)
    assert square.tolist() == pytest.approx(teacher.double().square().sum((1, 2)).tolist(), rel=1e-6)
    assert not displacement(teacher, teacher.clone())[0].any()


@pytest.mark.parametrize("rows", [256, 7])
def test_what_is_summed_has_the_gradient_of_the_plain_formulas(problem, monkeypatch, rows):
    head, teacher, student, tokens = problem
    monkeypatch.setattr(loss, "_CHUNK_POSITIONS", rows)
    exact = student.double().requires_grad_()
    expected = [value.sum() for value in _reference(head(teacher), exact @ head.weight.double().T, tokens)]
    for index, value in enumerate(expected):
        leaf = student.clone().requires_grad_()
        for chunk in chunk_divergences(make_targets("kl", teacher, head), leaf, head, shift_tokens(tokens)):
            chunk[index].sum().backward()
        (gradient,) = torch.autograd.grad(value, exact, retain_graph=True)
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=1e-3, atol=1e-4)
    assert head.weight.grad is None


@pytest.mark.parametrize("name", ["kl", "topk_kl"])
def test_gradients_of_extreme_logits_stay_finite(problem, monkeypatch, name):
    head, teacher, student, tokens = problem
    monkeypatch.setattr(loss, "TOP", 10)
    for one, other in ((1e3, 1e3), (0.0, 1e3), (1e3, 0.0)):
        leaf = (other * student).requires_grad_()
        for kl_n, _ in chunk_divergences(make_targets(name, one * teacher, head), leaf, head, tokens):
            kl_n.sum().backward()
        assert leaf.grad.isfinite().all()


def test_sums_follow_no_gradient(problem):
    head, teacher, student, tokens = problem
    sums = divergence(make_targets("kl", teacher, head), student.requires_grad_(), head, tokens)
    assert not any(each.requires_grad for each in sums)
