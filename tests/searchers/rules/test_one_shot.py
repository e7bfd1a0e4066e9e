"""Rules against their formulas, written out anew, and against the budget."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for, denser_moves, fits
from allocator.core.signals import QUANTILES, SIGNALS, Signals
from allocator.core.space import SearchSpace, Unit
from allocator.searchers.rules.apportion import meet_budget, round_to_levels
from allocator.searchers.rules.one_shot import RULES

BLOCKS, PER_BLOCK, STEPS = 4, 3, 400
SIZES = [(60, 40), (30, 40), (80, 20)]


@pytest.fixture(scope="module")
def fine():
    """Matrices of unequal sizes with ladders so fine that rounding hardly shows."""
    units = []
    for index in range(BLOCKS * PER_BLOCK):
        rows, columns = SIZES[index % PER_BLOCK]
        counts = tuple(round(rows * columns * kept / STEPS) for kept in range(STEPS, -1, -1))
        units.append(
            Unit(
                name=f"m{index}",
                kind="matrix",
                part="mlp",
                block=index // PER_BLOCK,
                total=counts[0],
                kept=counts,
                params=counts,
                macs=counts,
            )
        )
    return SearchSpace("unstructured", tuple(units), {"params": 500, "macs": 500})


def signals_of(space, seed, equal=False):
    rng = np.random.default_rng(seed)
    units, blocks = len(space.units), max(unit.block for unit in space.units) + 1

    def positive(*shape):
        return np.ones(shape) if equal else rng.gamma(1.0, size=shape) * 10.0 ** rng.integers(-6, 6)

    counts = [min(unit.total, 40) for unit in space.units]
    fluctuation = np.full((units, max(counts)), np.nan)
    for row, count in zip(fluctuation, counts, strict=True):
        row[:count] = rng.normal(size=count)
    return Signals(
        {
            "outliers": np.minimum(positive(blocks), 1.0),
            "median": positive(blocks),
            "hill": 1.0 + positive(blocks),
            "influence": np.minimum(positive(blocks), 2.0),
            "angle": np.minimum(positive(blocks), 1.0),
            "dims": rng.integers(1, 99, size=(units, 2)),
            "magnitude": np.sort(positive(units, QUANTILES + 1), axis=1),
            "lamp": np.sort(positive(units, QUANTILES + 1), axis=1),
            "fluctuation": fluctuation,
            "gradient": positive(units) * (rng.random(units) < 0.8),
        }
    )


def allocate(name, space, target, signals):
    allocation = RULES[name].allocate(space, budget_for(space, target), target, signals)
    return np.array([unit.sparsity(level) for unit, level in zip(space.units, allocation, strict=True)])


def sizes(space):
    return np.array([unit.params[0] for unit in space.units], dtype=float)


def blocks(space):
    return np.array([unit.block for unit in space.units])


def shifted_to(base, weights, target):
    """The clamped sparsities base + c of which the weighted mean is the target, by a fine grid over c."""
    grid = np.linspace(-2, 2, 200_001)
    means = np.clip(base[None] + grid[:, None], 0, 1) @ weights / weights.sum()
    return np.clip(base + grid[np.searchsorted(means, target)], 0, 1)


def saturated(values, weights, share):
    """The fractions min(1, c · values) of which the weighted mean is a share: full ones fixed and the rest solved."""
    full = np.zeros(len(values), dtype=bool)
    while True:
        c = (share * weights.sum() - weights[full].sum()) / (weights * values)[~full].sum()
        over = (c * values > 1) & ~full
        if not over.any():
            return np.where(full, 1.0, c * values)
        full |= over


NEAR = {"atol": 3 / STEPS, "rtol": 0.0}


@pytest.mark.parametrize("target", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("seed", range(3))
class TestFormulas:
    def test_erk(self, fine, seed, target):
        dims = np.array([SIZES[i % PER_BLOCK] for i in range(len(fine.units))], dtype=float)
        kept = dims.sum(1) / dims.prod(1)
        found = allocate("erk", fine, target, Signals({"dims": dims}))
        np.testing.assert_allclose(found, 1 - saturated(kept, sizes(fine), 1 - target), **NEAR)

    @pytest.mark.parametrize(
        ("rule", "signal", "amount", "sign"), [("owl", "outliers", 0.08, -1), ("dlp", "median", 0.15, 1)]
    )
    def test_owl_and_dlp(self, fine, seed, target, rule, signal, amount, sign):
        values = np.random.default_rng(seed).gamma(2.0, size=BLOCKS)
        scores = values if rule == "owl" else 1 - values / values.sum()
        kept = (scores - scores.min()) / (scores.max() - scores.min()) * amount * 2
        kept = kept - kept.mean() + 1 - target
        assert (np.sign(np.diff(kept)) == -sign * np.sign(np.diff(values))).all()
        found = allocate(rule, fine, target, Signals({signal: values}))
        np.testing.assert_allclose(found, shifted_to((1 - kept)[blocks(fine)], sizes(fine), target), **NEAR)

    def test_alphapruning(self, fine, seed, target):
        alpha = np.random.default_rng(seed).uniform(2, 6, size=BLOCKS)
        shape = (alpha - alpha.min()) / (alpha.max() - alpha.min()) * 0.6 + 0.7
        expected = saturated(shape[blocks(fine)], sizes(fine), target)
        np.testing.assert_allclose(allocate("alphapruning", fine, target, Signals({"hill": alpha})), expected, **NEAR)

    def test_cfsp(self, fine, seed, target):
        angle = np.random.default_rng(seed).uniform(0, 1, size=BLOCKS)
        kept = (1 / (1 + np.exp(-angle)))[blocks(fine)]
        found = allocate("cfsp", fine, target, Signals({"angle": angle}))
        np.testing.assert_allclose(found, 1 - saturated(kept, sizes(fine), 1 - target), **NEAR)

    def test_ecoflap(self, fine, seed, target):
        gradient, weights = np.random.default_rng(seed).gamma(1.0, size=len(fine.units)), sizes(fine)
        kept = np.full(len(weights), 1 - (target + 0.1)) * weights
        while (left := (1 - target) * weights.sum() - kept.sum()) > 1e-9:
            open_ = kept < weights * (1 - 1e-12)
            kept = np.minimum(weights, kept + left * np.where(open_, gradient, 0) / gradient[open_].sum())
        found = allocate("ecoflap", fine, target, Signals({"gradient": gradient}))
        assert found.max() <= target + 0.1 + 1 / STEPS
        np.testing.assert_allclose(found, 1 - kept / weights, **NEAR)

    @pytest.mark.parametrize("rule", ["magnitude", "lamp"])
    def test_one_threshold(self, fine, seed, target, rule):
        rng = np.random.default_rng(seed)
        tables, scores = [], []
        for unit in fine.units:
            score = np.sort(rng.gamma(2.0, scale=rng.uniform(0.8, 1.3), size=unit.total))
            scores.append(score)
            tables.append(score[np.round(np.linspace(0, unit.total - 1, QUANTILES + 1)).astype(int)])
        everything = np.sort(np.concatenate(scores))
        threshold = everything[int(target * len(everything))]
        expected = [(score < threshold).mean() for score in scores]
        found = allocate(rule, fine, target, Signals({rule: np.array(tables)}))
        assert max(expected) < 0.95
        np.testing.assert_allclose(found, expected, **NEAR)


def test_a_threshold_leaves_a_twentieth_of_every_matrix(fine):
    tables = np.linspace(0.0, 1.0, QUANTILES + 1) + 10.0 * (np.arange(len(fine.units)) > 5)[:, None]
    found = allocate("magnitude", fine, 0.7, Signals({"magnitude": tables}))
    assert found[:6] == pytest.approx(0.95, abs=1 / STEPS)
    assert (found * sizes(fine)).sum() / sizes(fine).sum() == pytest.approx(0.7, abs=1e-3)


def structured(*ladders, blocks):
    units = tuple(
        Unit(
            name=f"u{index}",
            kind="channels",
            part="mlp",
            block=block,
            total=len(ladder) - 1,
            kept=tuple(range(len(ladder) - 1, -1, -1)),
            params=ladder,
            macs=ladder,
        )
        for index, (ladder, block) in enumerate(zip(ladders, blocks, strict=True))
    )
    return SearchSpace("structured", units, {"params": 7, "macs": 7})


def test_flap_removes_the_items_of_smallest_score_whatever_their_unit():
    space = structured((80, 60, 40, 20, 0), (40, 20, 0), (80, 60, 40, 20, 0), blocks=[0, 1, 2])
    scores = np.array([[0.9, -0.5, -0.4, 1.1], [-1.0, 2.0, np.nan, np.nan], [-0.6, 0.1, 0.2, 0.3]])
    allocation = RULES["flap"].allocate(space, budget_for(space, 0.4), 0.4, Signals({"fluctuation": scores}))
    assert allocation == (2, 1, 1)  # items of 20 parameters each: four of the ten go


def test_shortgpt_drops_blocks_by_influence_and_the_last_one_takes_back_what_fits():
    space = structured(*[(40, 30, 20, 10, 0)] * 8, blocks=[0, 0, 1, 1, 2, 2, 3, 3])
    influence = np.array([0.4, 0.1, 0.3, 0.2])
    allocation = RULES["shortgpt"].allocate(space, Budget(params=207), 0.375, Signals({"influence": influence}))
    assert allocation[2:4] == (4, 4)  # block 1 goes first, then block 3, of which the half returns
    assert sum(allocation[6:8]) == 4
    assert allocation[:2] == allocation[4:6] == (0, 0)


@given(data=st.data(), seed=st.integers(0, 999), equal=st.booleans(), rule=st.sampled_from(sorted(RULES)))
def test_every_rule_keeps_and_fills_every_budget(spaces, data, seed, equal, rule):
    space = data.draw(spaces)
    budget = Budget(params=data.draw(st.integers(space.cost(space.sparsest), space.cost(space.dense))))
    signals, target = signals_of(space, seed, equal), data.draw(st.floats(0.05, 0.95))
    allocation = RULES[rule].allocate(space, budget, target, signals)
    assert fits(space, allocation, budget)
    assert denser_moves(space, allocation, budget) == []
    assert allocation == RULES[rule].allocate(space, budget, target, signals)


@given(data=st.data())
def test_sparsities_of_an_allocation_at_the_budget_become_that_allocation(spaces, data):
    space = data.draw(spaces)
    levels = tuple(data.draw(st.integers(0, unit.num_levels - 1)) for unit in space.units)
    budget = Budget(params=space.cost(levels))
    sparsities = [unit.sparsity(level) for unit, level in zip(space.units, levels, strict=True)]
    found = round_to_levels(space, budget, sparsities)
    assert space.cost(found) <= budget.limits["params"]
    if not denser_moves(space, levels, budget):
        assert found == levels


def test_the_largest_remainders_are_rounded_up():
    space = structured(*[(40, 30, 20, 10, 0)] * 4, blocks=[0] * 4)
    sparsities = [0.3, 0.45, 0.5, 0.55]  # of 160 parameters 72 go, so 90 of what is kept fits eight tens
    assert round_to_levels(space, Budget(params=7 + 88), sparsities) == (1, 2, 2, 3)


def test_the_member_at_the_budget_is_clamped_and_the_rest_bears_what_is_left(fine):
    weights, base = sizes(fine), np.where(np.arange(len(fine.units)) % 2, 0.8, 0.0)
    found = meet_budget(fine, budget_for(fine, 0.6), lambda x: base + x, -1.0, 1.0)
    np.testing.assert_allclose(found, shifted_to(base, weights, 0.6), atol=1e-3)
    assert (found @ weights) / weights.sum() == pytest.approx(0.6, abs=1e-3)


def portfolio(space, budget, target, signals):
    """Return the distinct allocations of all rules that serve the space and whose signals were collected, by rule."""
    found = {}
    for name, rule in RULES.items():
        if space.pattern in rule.patterns and not signals.missing(rule.needs):
            allocation = rule.allocate(space, budget, target, signals)
            if allocation not in found.values():
                found[name] = allocation
    return found


def test_the_portfolio_holds_each_allocation_once_and_only_what_serves(fine):
    signals = signals_of(fine, 0)
    budget = budget_for(fine, 0.5)
    found = portfolio(fine, budget, 0.5, signals)
    assert len(set(found.values())) == len(found)
    serving = {name: rule for name, rule in RULES.items() if "unstructured" in rule.patterns}
    assert set(found) <= set(serving)
    assert {rule.allocate(fine, budget, 0.5, signals) for rule in serving.values()} == set(found.values())
    assert len(found) > 4
    few = portfolio(fine, budget, 0.5, Signals({"hill": signals["hill"]}))
    assert set(few) == {"uniform", "alphapruning"}
    alike = portfolio(fine, budget, 0.5, Signals({"hill": np.ones(BLOCKS), "outliers": np.ones(BLOCKS)}))
    assert list(alike) == ["uniform"]


def test_every_rule_names_patterns_and_signals():
    for rule in RULES.values():
        assert rule.patterns
        assert set(rule.needs) <= set(SIGNALS)
        assert rule.allocate.__doc__
