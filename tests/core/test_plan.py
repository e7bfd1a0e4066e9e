import json

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocator.core.budget import Budget, budget_for, repair
from allocator.core.errors import UserError
from allocator.core.plan import SCHEMA, Plan, json_schema
from allocator.core.space import SearchSpace, Unit

HASH = "sha256:" + "0a" * 32


def _plan(space, allocation, budget):
    return Plan(
        model={"id": "tiny", "architecture": "LlamaForCausalLM", "fingerprint": HASH},
        space=space,
        allocation=allocation,
        budget=budget,
        pruner={"name": "obs", "damping": 0.01, "tokens": 2048, "calibration": HASH},
        measured={"dense": {"kl": 0.0, "nll": 1 / 3, "params": 10}, "searched": {"kl": 0.1}},
        provenance={"run": HASH, "searcher": "evolution", "seed": 0, "target": 0.5, "versions": {"torch": "2"}},
    )


@pytest.fixture
def plan(space):
    budget = budget_for(space, 0.5)
    return _plan(space, repair(space, space.dense, budget, range(len(space.units))), budget)


@pytest.fixture
def path(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


@given(st.lists(st.integers(0, 10**15), min_size=2, max_size=6, unique=True).map(lambda ns: sorted(ns, reverse=True)))
def test_times_are_written_in_milliseconds_and_read_to_the_nanosecond(tmp_path_factory, times):
    ladder = tuple(range(len(times) - 1, -1, -1))
    unit = Unit(
        name="u",
        kind="channels",
        part="mlp",
        block=0,
        total=len(times) - 1,
        kept=ladder,
        params=ladder,
        macs=ladder,
        others={"latency_ms": tuple(times)},
    )
    space = SearchSpace("structured", (unit,), {"params": 1, "macs": 1, "latency_ms": 7})
    plan = _plan(space, (1,), Budget(latency_ms=times[1] + 8))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert json.loads(path.read_text())["budget"]["latency_ms"]["limit"] == pytest.approx((times[1] + 8) / 1e6)
    again = Plan.load(path)
    assert again.space.cost((0,), "latency_ms") == times[0] + 7
    assert again.budget == plan.budget


@given(data=st.data())
def test_round_trip(spaces, data, tmp_path_factory):
    space = data.draw(spaces)
    allocation = tuple(data.draw(st.integers(0, unit.num_levels - 1)) for unit in space.units)
    cost = data.draw(st.sampled_from(["params", "macs"]))
    if space.unit_params == 0:
        return
    plan = _plan(space, allocation, Budget(**{cost: space.cost(allocation, cost) + data.draw(st.integers(0, 9))}))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    jsonschema.validate(json.loads(path.read_text()), json_schema())


def test_a_second_save_gives_equal_bytes(path, tmp_path):
    Plan.load(path).save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.json", "plan.json"]


def test_units_are_keyed_by_name_with_counts(path, plan):
    units = json.loads(path.read_text())["units"]
    for unit, level in zip(plan.space.units, plan.allocation, strict=True):
        written = units[unit.name]
        assert (written["level"], written["kept"], written["total"]) == (level, unit.kept[level], unit.total)
        assert written["sparsity"] == pytest.approx(1 - unit.kept[level] / unit.total, abs=1e-6)


def test_the_schema_is_a_valid_schema():
    jsonschema.Draft202012Validator.check_schema(json_schema())


def test_the_schema_file_states_the_version_that_is_written():
    assert json_schema()["properties"]["schema"] == {"const": SCHEMA}
    assert json_schema()["$id"] == f"allocator/plan/{SCHEMA}"


def _some_unit(data):
    return next(unit for unit in data["units"].values() if unit["level"] > 0)


def _set_level(data):
    _some_unit(data)["level"] -= 1


def _set_kept(data):
    _some_unit(data)["kept"] += 1


def _set_level_and_kept(data):
    unit = _some_unit(data)
    unit["level"] -= 1
    unit["kept"] = unit["ladder"]["kept"][unit["level"]]


def _set_level_beyond_the_ladder(data):
    _some_unit(data)["level"] = 99


def _set_achieved(data):
    data["budget"]["params"]["achieved"] -= 1


def _set_limit(data):
    data["budget"]["params"]["limit"] = data["budget"]["params"]["achieved"] - 1


def _set_cost(data):
    data["budget"]["macs"] = data["budget"].pop("params")


def _set_sparsity(data):
    data["sparsity"] = 0.9


def _set_unit_sparsity(data):
    _some_unit(data)["sparsity"] = 0.123


def _set_dense_cost(data):
    data["costs"]["params"]["dense"] += 1


def _set_ladder_order(data):
    _some_unit(data)["ladder"]["kept"].reverse()


def _cut_ladder(data):
    _some_unit(data)["ladder"]["params"].pop()


def _set_total(data):
    _some_unit(data)["total"] += 1


EDITS = [
    _set_level,
    _set_kept,
    _set_level_and_kept,
    _set_level_beyond_the_ladder,
    _set_achieved,
    _set_limit,
    _set_cost,
    _set_sparsity,
    _set_unit_sparsity,
    _set_dense_cost,
    _set_ladder_order,
    _cut_ladder,
    _set_total,
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan_is_refused(path, edit):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=str(path)):
        Plan.load(path)


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda data: data.pop("budget"), "budget"),
        (lambda data: data.update(schema=1), "schema"),
        (lambda data: data.update(kind="allocator.front"), "kind"),
        (lambda data: data.update(extra=1), "extra"),
        (lambda data: data.update(units={}), "units"),
        (lambda data: data["model"].update(fingerprint="sha256:12"), "model.fingerprint"),
        (lambda data: data["budget"]["params"].update(limit="many"), "budget.params.limit"),
    ],
)
def test_a_plan_against_the_schema_is_refused_where_it_is_wrong(path, edit, where):
    data = json.loads(path.read_text())
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=f"not a plan of schema 3.*{where}"):
        Plan.load(path)


def test_a_truncated_plan_is_refused(path):
    whole = path.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(UserError, match="not a readable plan"):
            Plan.load(path)


def test_a_missing_plan_and_a_folder_are_named(tmp_path):
    with pytest.raises(UserError, match="no such plan"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(UserError, match="this is a folder"):
        Plan.load(tmp_path)


def test_a_list_is_no_plan(tmp_path):
    (tmp_path / "plan.json").write_text("[]")
    with pytest.raises(UserError, match="a plan is a JSON object, found list"):
        Plan.load(tmp_path / "plan.json")
