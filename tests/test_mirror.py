"""Tests mirror the package: whoever looks for the tests of a module finds them."""

from pathlib import Path

TESTS = Path(__file__).parent
PACKAGE = TESTS.parent / "allocator"
APART = ("packaged", "scripts")
"""Folders of what is copied to users, and run by the tests of what copies it."""

ELSEWHERE = {
    "cli.py": "cli/test_commands.py",
    "commands/alignment.py": "cli/test_compare.py",
    "commands/compare.py": "cli/test_compare.py",
    "commands/dense_model.py": "cli/test_commands.py",
    "commands/evaluate.py": "cli/test_commands.py",
    "commands/evaluators.py": "cli/test_commands.py",
    "commands/export.py": "interop/test_contract.py",
    "commands/inspect.py": "cli/test_commands.py",
    "commands/latency.py": "cli/test_constraints.py",
    "commands/prune.py": "cli/test_commands.py",
    "commands/report.py": "cli/test_commands.py",
    "commands/search.py": "cli/test_commands.py",
    "commands/submit.py": "pool/test_jobs.py",
    "core/costs.py": "cli/test_constraints.py",
    "core/errors.py": "cli/test_bad_input.py",
    "core/header.py": "core/test_journal.py",
    "core/latency.py": "evaluation/test_latency.py",
    "core/notify.py": "pruning/calibration/test_factorise.py",
    "core/outcomes.py": "report/test_report.py",
    "core/protocols.py": "searchers/test_loop.py",
    "core/provenance.py": "core/test_plan.py",
    "core/results.py": "report/test_report.py",
    "core/signals.py": "pruning/test_signals.py",
    "core/spending.py": "report/test_report.py",
    "core/strict.py": "cli/test_bad_input.py",
    "core/training_effect.py": "report/test_report.py",
    "core/version.py": "test_wheel.py",
    "evaluation/local.py": "evaluation/test_engine.py",
    "evaluation/spec.py": "evaluation/test_other_engines.py",
    "evaluation/teacher.py": "evaluation/test_engine.py",
    "evaluation/training_states.py": "evaluation/test_training.py",
    "interop/levels.py": "interop/targets/test_levels.py",
    "interop/matrices.py": "interop/test_contract.py",
    "interop/readers/levels.py": "commands/test_import_plan.py",
    "interop/readers/ratios.py": "commands/test_import_plan.py",
    "interop/searches.py": "interop/test_trackers.py",
    "interop/targets/darwinlm.py": "interop/targets/test_levels.py",
    "interop/targets/evopress.py": "interop/targets/test_levels.py",
    "interop/targets/mlflow.py": "interop/test_trackers.py",
    "interop/targets/optuna.py": "interop/test_trackers.py",
    "interop/targets/registry.py": "interop/test_contract.py",
    "interop/targets/tyr.py": "interop/targets/test_levels.py",
    "interop/verification.py": "interop/test_contract.py",
    "interop/weights.py": "interop/targets/test_hf.py",
    "interop/writing.py": "interop/test_contract.py",
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
    "model/open.py": "test_other_models.py",
    "pool/calls.py": "pool/test_actor_pool.py",
    "pool/cluster.py": "pool/test_dispatch.py",
    "pool/runs.py": "pool/test_dispatch.py",
    "pool/worker.py": "pool/test_dispatch.py",
    "pruning/calibration/finite.py": "pruning/calibration/test_build.py",
    "pruning/calibration/problem.py": "pruning/calibration/test_build.py",
    "pruning/calibration/routing.py": "pruning/pruners/test_experts.py",
    "pruning/calibration/streams.py": "pruning/calibration/test_build.py",
    "pruning/levels/compact.py": "pruning/pruners/test_contract.py",
    "pruning/pruners/protocol.py": "pruning/pruners/test_contract.py",
    "report/answers.py": "cli/test_commands.py",
    "report/figures.py": "report/test_report.py",
    "report/marks.py": "report/test_report.py",
    "report/page.py": "report/test_report.py",
    "report/tables/base.py": "report/test_report.py",
    "report/tables/compare.py": "cli/test_compare.py",
    "report/tables/formats.py": "report/test_report.py",
    "report/tables/front.py": "report/test_report.py",
    "report/tables/model.py": "report/test_report.py",
    "report/tables/plan.py": "report/test_report.py",
    "report/tables/result.py": "report/test_report.py",
    "report/tables/status.py": "run/test_status.py",
    "run/config/flags.py": "cli/test_commands.py",
    "run/config/options.py": "searchers/test_settings.py",
    "run/config/run.py": "run/test_rounds.py",
    "run/config/sections.py": "searchers/test_settings.py",
    "run/directory.py": "run/test_rounds.py",
    "run/execution.py": "test_end_to_end.py",
    "run/front_file.py": "cli/test_fronts.py",
    "run/job.py": "test_reference_run.py",
    "run/level_store.py": "cli/test_commands.py",
    "run/model.py": "run/test_rounds.py",
    "run/prepare.py": "test_other_models.py",
    "run/recorder.py": "run/test_status.py",
    "run/reporting.py": "run/test_status.py",
    "run/result.py": "test_end_to_end.py",
    "run/stopping.py": "test_end_to_end.py",
    "searchers/generator.py": "searchers/surrogates/test_quadratic.py",
    "searchers/methods/guided.py": "searchers/test_contract.py",
    "searchers/methods/nsga.py": "searchers/test_fronts.py",
    "searchers/methods/presets.py": "searchers/test_settings.py",
    "searchers/methods/race.py": "searchers/methods/test_auto.py",
    "searchers/methods/sweep.py": "searchers/test_fronts.py",
    "searchers/methods/trust_region.py": "searchers/methods/test_auto.py",
    "searchers/problem.py": "searchers/test_contract.py",
    "searchers/rules/apportion.py": "searchers/rules/test_one_shot.py",
    "searchers/solvers/lagrange.py": "searchers/solvers/test_knapsack.py",
    "searchers/solvers/space_arrays.py": "searchers/solvers/test_knapsack.py",
    "searchers/surrogates/memory.py": "searchers/surrogates/test_quadratic.py",
    "searchers/surrogates/surrogate.py": "searchers/surrogates/test_quadratic.py",
    "searchers/surrogates/tabular.py": "searchers/methods/test_auto.py",
    "testing/evaluators.py": "evaluation/test_contract.py",
    "testing/fronts.py": "searchers/test_fronts.py",
    "testing/landscapes.py": "searchers/methods/test_auto.py",
    "testing/models.py": "evaluation/test_contract.py",
    "testing/problems.py": "pruning/pruners/test_contract.py",
    "testing/pruners.py": "pruning/pruners/test_contract.py",
    "testing/runs.py": "searchers/test_contract.py",
    "testing/searchers.py": "searchers/test_contract.py",
    "testing/spaces.py": "searchers/test_contract.py",
    "testing/targets.py": "interop/test_contract.py",
}
"""The tests of modules that have no file of their own name."""


CONTRACTS = {
    "searchers/methods": "searchers/test_contract.py",
    "pruning/pruners": "pruning/pruners/test_contract.py",
    "interop/targets": "interop/test_contract.py",
}
"""Rooms of a registry, and the suite that every member of it passes. A new member needs no line here."""


def mirrored(module: str) -> str:
    """Return where the tests of a module are looked for first."""
    folder, _, name = module.rpartition("/")
    return f"{folder}/test_{name}".lstrip("/")


def modules() -> set[str]:
    paths = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("__")}
    return {path.as_posix() for path in paths if not {*APART} & {*path.parts}}


def test_every_module_has_tests_of_its_name_or_says_where_they_are() -> None:
    alone = {module for module in modules() if not (TESTS / mirrored(module)).exists()}
    alone -= {module for module in alone if module.rpartition("/")[0] in CONTRACTS}
    assert all((TESTS / suite).is_file() for suite in CONTRACTS.values())
    assert sorted(alone - ELSEWHERE.keys()) == [], "add tests of that name, or a line to the table"


def test_the_table_is_up_to_date() -> None:
    assert sorted(ELSEWHERE.keys() - modules()) == [], "no longer there"
    assert [tests for tests in ELSEWHERE.values() if not (TESTS / tests).exists()] == [], "no longer there"
    assert [m for m in ELSEWHERE if (TESTS / mirrored(m)).exists()] == [], "has tests of its own now"
    assert list(ELSEWHERE) == sorted(ELSEWHERE)
