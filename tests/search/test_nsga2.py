from allocator.core.budget import budget_for, repair
from allocator.core.front import pareto_front
from allocator.search.nsga2 import Nsga2, Nsga2Settings


def _make(space, budget, start, seed):
    return Nsga2(space, budget, start, Nsga2Settings(generations=6, population=12, tokens=64), seed)


def test_populations_then_one_batch_at_the_budget(run, space):
    record = run(_make, space)
    assert len(record.batches) == 1 + 6 + 1
    assert all(len(batch) <= 12 for batch in record.batches[:-1])
    budget, order = budget_for(space, 0.5), range(len(space.units))
    last = [r.allocation for r in record.batches[-1]]
    assert last == [repair(space, a, budget, order) for a in last]
    assert 0 < len(last) <= 8


def test_the_front_ranges_over_sizes(run, space):
    record = run(_make, space)
    front = pareto_front(space, [o for batch in record.told for o in batch])
    sparsities = [space.sparsity(o.request.allocation) for o in front]
    assert min(sparsities) == 0.0
    assert max(sparsities) > 0.9
    assert len(front) >= 8
