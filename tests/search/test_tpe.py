from allocator.search.tpe import Tpe, TpeSettings


def test_trials_come_in_batches_and_begin_with_the_starts(run, space):
    record = run(
        lambda *arguments: Tpe(*arguments[:3], TpeSettings(trials=10, batch=4, tokens=64), arguments[3]), space
    )
    assert [len(batch) for batch in record.batches] == [4, 4, 2]
    assert {r.tokens for batch in record.batches for r in batch} == {64}
