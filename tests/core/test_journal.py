import fcntl
import json

import pytest

from allocator.core.errors import UserError
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.protocols import Expansion, Outcome, Request


def _outcomes(space):
    allocations = [space.dense, space.sparsest, (1,) * len(space.units)]
    return [
        Outcome(
            request=Request(allocation=allocation, tokens=64 << index, split=split),
            measured={"kl": 0.1 * index + 1e-17, "nll": 1 / 3},
            wall_s=0.25,
        )
        for index, allocation in enumerate(allocations)
        for split in ("search", "selection")
    ]


@pytest.fixture
def path(tmp_path, space):
    path = tmp_path / "journal.jsonl"
    with Journal.create(path, JournalHeader(space=space, seed=3)) as journal:
        for outcome in _outcomes(space):
            journal.append(outcome)
    return path


def test_round_trip(path, space):
    journal = Journal.read(path)
    assert list(journal) == _outcomes(space)
    assert len(journal) == 6
    assert journal.space == space
    assert journal.header.seed == 3
    for outcome in _outcomes(space):
        assert journal.get(outcome.request) == outcome
    assert journal.get(Request(allocation=space.dense, tokens=65)) is None
    assert journal.get(Request(allocation=space.dense, tokens=64, split="test")) is None


def test_outcomes_know_the_loss_that_the_header_names(tmp_path, space):
    path = tmp_path / "journal.jsonl"
    outcome = Outcome(
        request=Request(allocation=space.dense, tokens=64),
        measured={"hidden": 0.5, "nll": 1.0},
        wall_s=0.25,
        loss_name="hidden",
    )
    with Journal.create(path, JournalHeader(space=space, loss="hidden")) as journal:
        journal.append(outcome)
    assert list(Journal.read(path)) == [outcome]
    assert outcome.loss == 0.5
    path.write_bytes(path.read_bytes().replace(b'"hidden":0.5', b'"kl":0.5'))
    with pytest.raises(UserError, match="no hidden was measured"):
        Journal.read(path)


def test_training_is_part_of_a_request(path, space):
    """And in the file only where there is some: journals of searches that train nothing are as they were."""
    before = path.read_bytes()
    assert b"training" not in before
    plain = Request(allocation=space.dense, tokens=64)
    known = Journal.read(path).get(plain)
    trained = Outcome(
        request=Request(allocation=space.dense, tokens=64, training=128),
        measured={"kl": 0.1, "kl_before": 0.3, "nll": 1.0},
        wall_s=0.0,
    )
    with Journal.resume(path) as journal:
        journal.append(trained)
    journal = Journal.read(path)
    assert journal.get(trained.request) == trained
    assert (trained.loss, trained.loss_before) == (0.1, 0.3)
    assert journal.get(plain) == known
    assert known.loss_before is None
    assert len(journal) == 7
    path.write_bytes(path.read_bytes().replace(b'"kl_before"', b'"before"'))
    with pytest.raises(UserError, match="no kl was measured before training"):
        Journal.read(path)


def test_what_is_appended_is_seen_by_a_reader_before_close(path, space):
    with Journal.resume(path) as journal:
        journal.append(
            Outcome(request=Request(allocation=space.dense, tokens=4096), measured={"kl": 0.0, "nll": 1.0}, wall_s=0.0)
        )
        assert len(Journal.read(path)) == 7


def test_resume_appends(path, space):
    extra = Outcome(request=Request(allocation=space.dense, tokens=4096), measured={"kl": 0.0, "nll": 1.0}, wall_s=0.0)
    whole = path.read_bytes()
    with Journal.resume(path) as journal:
        assert list(journal) == _outcomes(space)
        journal.append(extra)
        journal.sync()
    assert path.read_bytes().startswith(whole)
    assert list(Journal.read(path)) == [*_outcomes(space), extra]


def test_equal_runs_write_equal_bytes(path, space, tmp_path):
    with Journal.create(tmp_path / "other", JournalHeader(space=space, seed=3)) as journal:
        for outcome in _outcomes(space):
            journal.append(outcome)
    assert (tmp_path / "other").read_bytes() == path.read_bytes()


def test_a_torn_last_line_is_tolerated_at_every_byte(path, space):
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    start = len(whole) - len(lines[-1])
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        assert list(Journal.read(path)) == _outcomes(space)[:-1]
        assert path.stat().st_size == cut
    with Journal.resume(path) as journal:
        journal.append(_outcomes(space)[-1])
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: b"",
        lambda line: b"[1, 2]",
        lambda line: line.replace(b'"tokens"', b'"tokons"'),
        lambda line: line.replace(b'"allocation":[', b'"allocation":[0,'),
        lambda line: line.replace(b'"allocation":[', b'"allocation":[9'),
        lambda line: line.replace(b'"allocation":[', b'"allocation":[-'),
        lambda line: line.replace(b'"kl"', b'"lk"'),
        lambda line: b"\xff" + line,
    ],
)
@pytest.mark.parametrize("open_", [Journal.read, Journal.resume])
def test_a_damaged_line_is_named_and_nothing_is_changed(path, damage, open_):
    lines = path.read_bytes().splitlines()
    changed = damage(lines[3])
    assert changed != lines[3]
    data = b"\n".join([*lines[:3], changed, *lines[4:]]) + b'\n{"torn'
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"line 4 of 7 is damaged.*keep its first 3 lines"):
        open_(path)
    assert path.read_bytes() == data


def test_a_second_writer_is_refused_and_a_reader_is_not(path):
    with Journal.resume(path):
        with pytest.raises(UserError, match="another process is writing this run"):
            Journal.resume(path)
        assert len(Journal.read(path)) == 6
    Journal.resume(path).close()


def test_a_journal_that_is_replaced_before_it_is_locked_is_refused(path, monkeypatch):
    """As by a driver that goes on to its next round, and lets go of the journal that it replaced."""
    flock = fcntl.flock

    def late(file, how):
        path.with_name("next").write_bytes(path.read_bytes())
        path.with_name("next").replace(path)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another process is writing this run"):
        Journal.resume(path)


def test_a_refused_file_is_not_kept_locked(path):
    good = path.read_bytes()
    path.write_bytes(good + b"damage\n")
    with pytest.raises(UserError) as error:
        Journal.resume(path)
    path.write_bytes(good)
    Journal.resume(path).close()
    assert "line 8" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        b"notes of mine\nwithout an end",
        b"a letter",
        b"\x89PNG\r\n\x1a\n\x00\x00",
        json.dumps({"kind": "allocator.plan", "schema": 1}).encode() + b"\n",
        json.dumps({"kind": "allocator.journal", "schema": 99, "space": {"units": []}}).encode() + b"\n",
        json.dumps({"kind": "allocator.journal", "schema": 1}).encode() + b"\n",
        b"",
    ],
)
@pytest.mark.parametrize("open_", [Journal.read, Journal.resume])
def test_a_foreign_file_is_refused_and_left_as_it_is(tmp_path, content, open_):
    path = tmp_path / "journal.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=str(path)):
        open_(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("open_", [Journal.read, Journal.resume])
def test_a_missing_file_is_named(tmp_path, open_):
    with pytest.raises(UserError, match="no such journal"):
        open_(tmp_path / "journal.jsonl")
    assert not list(tmp_path.iterdir())


def test_create_never_overwrites(path, space):
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        Journal.create(path, JournalHeader(space=space))
    assert path.read_bytes() == before


def test_what_was_asked_beside_the_loss_keeps_its_own_entry(tmp_path, space):
    path = tmp_path / "journal.jsonl"
    plain = Request(allocation=space.dense, tokens=64)
    asked = Request(allocation=space.dense, tokens=64, probe="influence")
    with Journal.create(path, JournalHeader(space=space)) as journal:
        journal.append(Outcome(request=plain, measured={"kl": 0.5, "nll": 2.0}, wall_s=0.0))
        assert journal.get(asked) is None
        journal.append(Outcome(request=asked, measured={"kl": 0.5, "nll": 2.0, "influence.0": 0.25}, wall_s=0.0))
    again = Journal.read(path)
    assert again.get(plain).measured == {"kl": 0.5, "nll": 2.0}
    assert again.get(asked).measured["influence.0"] == 0.25


def _expansion(space):
    """Values that only survive if every digit does."""
    rows = [
        [(index + 1) / 3 * 10.0 ** (-4 * level) for level in range(u.num_levels)] for index, u in enumerate(space.units)
    ]
    return Expansion(tuple(tuple(-value for value in row) for row in rows), tuple(map(tuple, rows)))


@pytest.fixture
def expanded(path, space):
    """An outcome with an expansion, appended to the journal as its seventh."""
    request = Request(allocation=(1,) * len(space.units), tokens=64, probe="expansion")
    outcome = Outcome(
        request=request,
        measured={"kl": 0.25, "nll": 2.0},
        wall_s=0.5,
        sequence_losses=(0.125, 0.375),
        expansion=_expansion(space),
    )
    with Journal.resume(path) as journal:
        journal.append(outcome, batch=3)
    return outcome


def test_an_expansion_comes_back_digit_by_digit_beside_the_plain_outcome(path, space, expanded):
    journal, plain = Journal.read(path), Request(allocation=(1,) * len(space.units), tokens=64)
    assert journal.get(expanded.request) == expanded
    assert journal.get(expanded.request).expansion == _expansion(space)
    assert journal.get(plain) is None
    with Journal.resume(path) as journal:
        journal.append(Outcome(request=plain, measured={"kl": 0.25, "nll": 2.0}, wall_s=0.5), batch=3)
    journal = Journal.read(path)
    assert journal.get(plain).expansion is None
    assert [outcome.request for outcome in journal.batches[-1]] == [expanded.request, plain]
    assert {line.get("also") for line in map(json.loads, path.read_text().splitlines()[1:])} == {None, "expansion"}


def test_an_evaluator_without_gradients_may_leave_an_expansion_out(path, space):
    outcome = Outcome(
        request=Request(allocation=space.dense, tokens=64, probe="expansion"),
        measured={"kl": 0.0, "nll": 2.0},
        wall_s=0.5,
    )
    with Journal.resume(path) as journal:
        journal.append(outcome)
    assert b'"expansion":{' not in path.read_bytes()
    assert Journal.read(path).get(outcome.request) == outcome


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda entry: {**entry, "also": "curvature"}, "unknown probe 'curvature'"),
        (lambda entry: {**entry, "also": ["expansion"]}, "unknown probe "),
        (lambda entry: _with(entry, "slope", lambda rows: rows[1:]), "an expansion of other ladders"),
        (lambda entry: _with(entry, "slope", lambda rows: rows[::-1]), "an expansion of other ladders"),
        (lambda entry: _with(entry, "size", lambda rows: [rows[0][1:], *rows[1:]]), "an expansion of other ladders"),
        (lambda entry: _with(entry, "size", lambda rows: [*rows, []]), "an expansion of other ladders"),
        (lambda entry: _with(entry, "size", lambda rows: None), "TypeError"),
        (lambda entry: _with(entry, "size", lambda rows: [["much"] * len(row) for row in rows]), "ValueError"),
        (lambda entry: {**entry, "expansion": {"slope": entry["expansion"]["slope"]}}, "size"),
        (lambda entry: {**entry, "expansion": [1.0]}, "TypeError"),
        (lambda entry: {**entry, "expansion": None}, "TypeError"),
    ],
)
@pytest.mark.parametrize("open_", [Journal.read, Journal.resume])
def test_a_damaged_expansion_is_named(path, expanded, damage, reason, open_):
    *lines, last = path.read_text().splitlines()
    path.write_text("\n".join([*lines, json.dumps(damage(json.loads(last)))]) + "\n")
    with pytest.raises(UserError, match=rf"line 8 of 8 is damaged.*{reason}"):
        open_(path)


def _with(entry, name, change):
    return {**entry, "expansion": {**entry["expansion"], name: change(entry["expansion"][name])}}
