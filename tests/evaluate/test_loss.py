import pytest
import torch
from torch import nn

from allocator.evaluate import loss
from allocator.evaluate.loss import divergence, targets


def _reference(teacher_btv, student_btv, tokens_bt):
    """Plain formulas in float64: sums of KL over all positions and of NLL over those with a next token."""
    p = torch.softmax(teacher_btv.double(), dim=-1)
    log_p, log_q = torch.log(p), torch.log(torch.softmax(student_btv.double(), dim=-1))
    kl = (p * (log_p - log_q)).sum()
    nll = -sum(
        log_q[b, t, tokens_bt[b, t + 1]] for b in range(tokens_bt.shape[0]) for t in range(tokens_bt.shape[1] - 1)
    )
    return float(kl), float(nll)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(16, 50, bias=False).requires_grad_(False)
    head.weight.copy_(torch.randn(50, 16, generator=generator))
    teacher, student = (torch.randn(3, 12, 16, generator=generator) for _ in range(2))
    return head, teacher, student, torch.randint(0, 50, (3, 12), generator=generator)


def test_sums_are_those_of_the_plain_formulas(problem):
    head, teacher, student, tokens = problem
    kl, nll = divergence(targets(teacher, head), student, head, tokens)
    expected_kl, expected_nll = _reference(head(teacher), head(student), tokens)
    assert kl == pytest.approx(expected_kl, rel=1e-5)
    assert nll == pytest.approx(expected_nll, rel=1e-5)


def test_small_divergences_are_exact_enough(problem):
    head, teacher, _, tokens = problem
    student = teacher + 1e-2 * torch.randn_like(teacher)
    kl, _ = divergence(targets(teacher, head), student, head, tokens)
    assert kl == pytest.approx(_reference(head(teacher), head(student), tokens)[0], rel=1e-3, abs=1e-5)


def test_two_heads_may_differ(problem):
    head, teacher, student, tokens = problem
    other = nn.Linear(16, 50, bias=False)
    kl, nll = divergence(targets(teacher, head), student, other, tokens)
    expected = _reference(head(teacher), other(student).detach(), tokens)
    assert (kl, nll) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("rows", [1, 5, 12, 36, 1000])
def test_chunks_do_not_matter(problem, monkeypatch, rows):
    head, teacher, student, tokens = problem
    whole = divergence(targets(teacher, head), student, head, tokens)
    monkeypatch.setattr(loss, "_CHUNK_ELEMENTS", rows * 50)
    chunks = list(targets(teacher, head))
    assert [len(chunk.probability_nv) for chunk in chunks][:-1] == [rows] * (len(chunks) - 1)
    assert divergence(chunks, student, head, tokens) == pytest.approx(whole, rel=1e-6)


def test_a_model_is_at_no_distance_from_itself(problem):
    head, teacher, _, tokens = problem
    assert divergence(targets(teacher, head), teacher.clone(), head, tokens)[0] == 0.0


def test_extreme_logits_stay_finite(problem):
    head, teacher, student, tokens = problem
    kl, nll = divergence(targets(1e4 * teacher, head), 1e4 * student, head, tokens)
    assert torch.isfinite(torch.tensor([kl, nll])).all()
    assert kl > 0
