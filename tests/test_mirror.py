"""Tests mirror the package: whoever looks for the tests of a module finds them."""

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "allocator"
APART = ("packaged", "scripts")
"""Folders of what is copied to users, and run by the tests of what copies it."""

ELSEWHERE = {
    "cli.py": "cli/test_commands.py",
    "commands/alignment.py": "cli/test_compare.py",
    "commands/api.py": "interop/test_contract.py",
    "commands/compare.py": "cli/test_compare.py",
    "commands/search.py": "cli/test_commands.py",
    "core/costs.py": "cli/test_constraints.py",
    "core/errors.py": "cli/test_bad_input.py",
    "core/header.py": "core/test_journal.py",
    "core/latency.py": "evaluation/test_latency.py",
    "core/notify.py": "pruning/calibration/test_factorise.py",
    "core/protocols.py": "searchers/test_loop.py",
    "core/signals.py": "pruning/test_signals.py",
    "core/version.py": "test_wheel.py",
    "evaluation/teacher.py": "evaluation/test_engine.py",
    "evaluation/training_states.py": "evaluation/test_training.py",
    "interop/readers/ratios.py": "commands/test_import_plan.py",
    "interop/targets/darwinlm.py": "interop/targets/test_levels.py",
    "interop/targets/evopress.py": "interop/targets/test_levels.py",
    "interop/targets/matrices.py": "interop/test_contract.py",
    "interop/targets/mlflow.py": "interop/test_trackers.py",
    "interop/targets/optuna.py": "interop/test_trackers.py",
    "interop/targets/registry.py": "interop/test_contract.py",
    "interop/targets/searches.py": "interop/test_trackers.py",
    "interop/targets/tyr.py": "interop/targets/test_levels.py",
    "interop/targets/weights.py": "interop/targets/test_hf.py",
    "model/checkpoint/foreign.py": "cli/test_bad_models.py",
    "model/checkpoint/kinds.py": "test_other_models.py",
    "model/checkpoint/names.py": "model/checkpoint/test_headers.py",
    "model/checkpoint/stock.py": "test_other_models.py",
    "model/data/examples.py": "model/data/test_read.py",
    "model/family/checks.py": "model/family/test_schema.py",
    "model/family/draft.py": "model/family/test_schema.py",
    "model/family/layout.py": "model/family/test_schema.py",
    "model/family/space.py": "model/family/test_serving_costs.py",
    "model/family/sub_blocks.py": "model/family/test_schema.py",
    "model/live/memory.py": "model/live/test_stream.py",
    "model/live/write.py": "model/live/test_modeling_pruned.py",
    "pool/cluster.py": "pool/test_dispatch.py",
    "pool/worker.py": "pool/test_dispatch.py",
    "pruning/calibration/finite.py": "pruning/calibration/test_build.py",
    "pruning/calibration/problem.py": "pruning/calibration/test_build.py",
    "pruning/calibration/routing.py": "pruning/pruners/test_experts.py",
    "pruning/calibration/streams.py": "pruning/calibration/test_build.py",
    "pruning/pruners/registry.py": "pruning/pruners/test_contract.py",
    "report/curves.py": "report/test_report.py",
    "report/figures.py": "report/test_report.py",
    "report/page.py": "report/test_report.py",
    "report/tables.py": "report/test_report.py",
    "run/config.py": "searchers/test_settings.py",
    "run/directory.py": "run/test_rounds.py",
    "run/job.py": "test_reference_run.py",
    "run/recorder.py": "run/test_status.py",
    "run/reporting.py": "run/test_status.py",
    "searchers/methods/guided.py": "searchers/test_contract.py",
    "searchers/methods/nsga.py": "searchers/test_fronts.py",
    "searchers/methods/presets.py": "searchers/test_settings.py",
    "searchers/methods/race.py": "searchers/methods/test_auto.py",
    "searchers/methods/sweep.py": "searchers/test_fronts.py",
    "searchers/methods/trust_region.py": "searchers/methods/test_auto.py",
    "searchers/rules/apportion.py": "searchers/rules/test_one_shot.py",
    "searchers/script.py": "searchers/surrogates/test_quadratic.py",
    "searchers/solvers/lagrange.py": "searchers/solvers/test_knapsack.py",
    "searchers/solvers/space_arrays.py": "searchers/solvers/test_knapsack.py",
    "searchers/surrogates/surrogate.py": "searchers/surrogates/test_quadratic.py",
    "searchers/surrogates/tabular.py": "searchers/methods/test_auto.py",
}
"""The tests of modules that have no file of their own name."""


def mirrored(module: str) -> str:
    """Return where the tests of a module are looked for first."""
    folder, _, name = module.rpartition("/")
    return f"{folder}/test_{name}".lstrip("/")


def modules() -> set[str]:
    paths = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    return {path.as_posix() for path in paths if not {*APART} & {*path.parts}}


def test_every_module_has_tests_of_its_name_or_says_where_they_are() -> None:
    alone = {module for module in modules() if not (TESTS / mirrored(module)).exists()}
    assert sorted(alone - ELSEWHERE.keys()) == [], "add tests of that name, or a line to the table"


def test_the_table_is_up_to_date() -> None:
    assert sorted(ELSEWHERE.keys() - modules()) == [], "no longer there"
    assert [tests for tests in ELSEWHERE.values() if not (TESTS / tests).exists()] == [], "no longer there"
    assert [m for m in ELSEWHERE if (TESTS / mirrored(m)).exists()] == [], "has tests of its own now"
    assert list(ELSEWHERE) == sorted(ELSEWHERE)
