"""What the loop makes of allocations that cannot be measured."""

import pytest

from allocator.core.errors import UserError
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Outcome, Request
from allocator.searchers.loop import Measurer


class Ill:
    """Fails on allocations that begin with an odd level; the others lose what their levels sum to."""

    def __init__(self):
        self.asked = []

    def evaluate(self, requests):
        for request in requests:
            self.asked.append(request)
            if request.allocation[0] % 2:
                yield Outcome(request=request, measured={}, wall_s=0.0, failed="3 workers died")
            else:
                loss = float(sum(request.allocation)) / request.tokens
                yield Outcome(
                    request=request, measured={"kl": loss, "nll": 1 + loss}, wall_s=0.0, sequence_losses=(loss, loss)
                )


@pytest.fixture
def path(tmp_path, space):
    path = tmp_path / "journal.jsonl"
    Journal.create(path, JournalHeader(space=space)).close()
    return path


def requests(*firsts, tokens=64):
    return [Request(allocation=(first, last, 0, 0, 0, 0), tokens=tokens) for last, first in enumerate(firsts)]


def test_a_failure_is_twice_as_bad_as_the_worst_on_the_same_text(path):
    with Journal.resume(path) as journal:
        measurer = Measurer(Ill(), journal)
        measurer.measure(requests(4, tokens=32))
        bad, good = measurer.measure(requests(1, 2))
        assert (good.loss, bad.loss) == (3 / 64, 6 / 64)
        assert bad.measured == {"kl": 6 / 64, "nll": 2 + 6 / 64}
        assert bad.sequence_losses == (6 / 64, 6 / 64)
        assert not bad.failed
        (again,) = measurer.measure(requests(1))
        assert again == bad
    assert [outcome.request for outcome in Journal.read(path)] == [*requests(4, tokens=32), requests(1, 2)[1]]


def test_a_failure_is_known_after_a_resume(path):
    answers, asked = [], []
    for _ in range(2):
        with Journal.resume(path) as journal:
            evaluator = Ill()
            answers.append(Measurer(evaluator, journal).measure(requests(2, 1, 4)))
            asked.append(len(evaluator.asked))
    assert answers[0] == answers[1]
    assert asked == [3, 0]
    assert b'"failed":"3 workers died"' in path.read_bytes()


def test_where_most_fail_the_run_stops_with_the_cause_and_a_resume_tries_again(path):
    for _ in range(2):
        evaluator = Ill()
        with Journal.resume(path) as journal, pytest.raises(UserError, match=r"2 of 3 .* 3 workers died.* then resume"):
            Measurer(evaluator, journal).measure(requests(1, 2, 3))
        assert requests(1, 2, 3)[0] in evaluator.asked
    assert len(Journal.read(path)) == 1


def test_failures_are_counted_over_the_whole_run(path):
    with Journal.resume(path) as journal:
        measurer = Measurer(Ill(), journal)
        measurer.measure(requests(2, 4, 2, 4))
        for last in range(4):
            (answer,) = measurer.measure([Request(allocation=(1, last, 1, 0, 0, 0), tokens=64)])
            assert answer.loss == 2 * 7 / 64
        with pytest.raises(UserError, match="5 of 9"):
            measurer.measure([Request(allocation=(3, 0, 1, 0, 0, 0), tokens=64)])


def test_where_nothing_else_is_known_on_the_text_the_run_stops(path):
    with Journal.resume(path) as journal:
        measurer = Measurer(Ill(), journal)
        measurer.measure(requests(2, 4))
        with pytest.raises(UserError, match="nothing can be measured on 32 tokens"):
            measurer.measure(requests(1, tokens=32))
