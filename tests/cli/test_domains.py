"""Several texts side by side: each is measured apart, and may be an objective of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import allocator
from allocator.core.budget import denser_moves, fits
from allocator.core.journal import Journal
from allocator.core.plan import Plan
from allocator.run.config.load import load_config
from allocator.run.prepare import prepare_job

LENGTH = 64
SMALL = {
    "tokens.sequence_length": LENGTH,
    "tokens.calibration": 512,
    "tokens.selection": 512,
    "tokens.test": 512,
    "search.tokens": [128, 256],
    "search.nsga.generations": 4,
    "search.nsga.population": 8,
    "search.nsga.profile": 128,
    "search.nsga.tokens": 256,
}
NAMES = ["kl.words", "kl.digits"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of numbers."""
    folder = tmp_path_factory.mktemp("digits")
    rng = np.random.default_rng(1)
    for number in range(120):
        lines = (" ".join(map(str, rng.integers(0, 10**6, size=12))) for _ in range(20))
        (folder / f"table{number:03}.txt").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def settings(text_folder: Path, digits: Path) -> list[str]:
    domains = {"domains.words": str(text_folder), "domains.digits": str(digits)}
    return [f"{key}={json.dumps(value)}" for key, value in {**SMALL, **domains}.items()]


@pytest.fixture(scope="module")
def both(tiny_model: Path, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished search of the front between two domains, at one budget. Read only."""
    runs = tmp_path_factory.mktemp("domains")
    common: dict[str, Any] = {"objectives": NAMES, "target": 0.5, "workers": 0, "runs_dir": runs}
    return allocator.search(tiny_model, name="both", settings=settings, **common).folder


def test_every_split_takes_sequences_of_each_in_turn(
    tiny_model: Path, text_folder: Path, digits: Path, settings: list[str]
) -> None:
    flags: dict[str, Any] = {"model": str(tiny_model), "workers": 0, "target": 0.5}
    mixed = prepare_job(load_config(None, flags, settings)).tokens
    for place, folder in enumerate((text_folder, digits)):
        own = [each for each in settings if not each.startswith("domains")]
        alone = prepare_job(load_config(None, {**flags, "text": folder}, own)).tokens
        for split, rows in mixed.items():
            ids, own_ids = rows.inputs["input_ids"][place::2], alone[split].inputs["input_ids"]
            assert (ids == own_ids[: len(ids)]).all()


def test_the_front_lies_between_the_domains(both: Path) -> None:
    front = json.loads((both / "front.json").read_text())
    assert front["objectives"] == NAMES
    points = [[point[name] for name in NAMES] for point in front["points"]]
    assert len(points) >= 2
    assert points == sorted(points)
    assert [b for _, b in points] == sorted((b for _, b in points), reverse=True)
    for point in front["points"]:
        assert point["kl"] == pytest.approx((point["kl.words"] + point["kl.digits"]) / 2)
    assert yaml.safe_load((both / "run.yaml").read_text())["search"]["method"] == "nsga2"


def test_where_no_cost_is_small_the_budget_is_filled(both: Path) -> None:
    journal, plan = Journal.read(both / "journal.jsonl"), Plan.load(both / "plan.json")
    assert fits(journal.space, plan.allocation, plan.budget)
    assert not denser_moves(journal.space, plan.allocation, plan.budget)


def test_each_domain_is_measured_apart(both: Path, tiny_model: Path, text_folder: Path, digits: Path) -> None:
    """The saved checkpoint's figures are those of measuring it on each text alone."""
    measured = json.loads((both / "result.json").read_text())["measured"]["searched"]
    for name, folder in zip(NAMES, (text_folder, digits), strict=True):
        alone = allocator.evaluate(both / "checkpoint", model=tiny_model, text=folder, tokens=256, length=LENGTH)
        assert measured[name] == pytest.approx(alone["kl"], rel=1e-5)


def test_a_plan_is_chosen_by_a_domain(both: Path, cli: Callable[..., Any]) -> None:
    points = json.loads((both / "front.json").read_text())["points"]
    for bound in sorted(point["kl.words"] for point in points):
        out = both.parent / f"chosen {bound}.json"
        assert cli("plan", both, "--where", f"kl.words <= {bound}", "--best", "kl.digits", "--out", out).code == 0
        figures = Plan.load(out).measured["search_split"]
        assert figures["kl.words"] <= bound
        assert figures["kl.digits"] == min(point["kl.digits"] for point in points if point["kl.words"] <= bound)


def test_a_plan_is_executed_again_from_the_texts_in_order(
    both: Path, tiny_model: Path, text_folder: Path, digits: Path, cli: Callable[..., Any], tmp_path: Path
) -> None:
    flags = ["prune", both / "plan.json", "--model", tiny_model]
    out = tmp_path / "again"
    answer = cli(*flags, "--text", text_folder, "--text", digits, "--out", out)
    assert answer.code == 0, answer.err
    assert (out / "model.safetensors").read_bytes() == (both / "checkpoint" / "model.safetensors").read_bytes()
    swapped = cli(*flags, "--text", digits, "--text", text_folder, "--out", tmp_path / "other")
    assert swapped.code == 2
    assert "the plan was made with other calibration text" in swapped.err


def test_the_front_is_shown(both: Path, cli: Callable[..., Any]) -> None:
    shown = cli("front", both)
    assert shown.code == 0
    assert "kl.words" in shown.out
    assert "kl.digits" in shown.out


def test_likelihood_is_an_objective_beside_the_loss(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in SMALL.items()]
    common: dict[str, Any] = {"objectives": ["nll", "params"], "workers": 0, "text": text_folder, "runs_dir": tmp_path}
    run = allocator.search(tiny_model, name="likelihood", settings=settings, **common).folder
    front = json.loads((run / "front.json").read_text())
    assert front["objectives"] == ["kl", "nll", "params"]
    assert all({"kl", "nll", "params"} <= point.keys() for point in front["points"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--objective", "kl.words"], "objectives: unknown 'kl.words'"),
        (["--set", "domains={a: x, b: y}", "--objective", "kl.a"], "objectives: kl.a alone makes no front"),
        (["--set", "objectives=5"], "objectives"),
        (["--set", "objectives=[[1]]"], "objectives"),
        (["--set", "domains.words=x.txt"], "domains: expected two domains or more. For one text, set text"),
        (["--set", "domains={a: x, 2b: y}"], "domains"),
        (["--text", "a.txt", "--set", "domains={a: x, b: y}"], "domains: domains and text exclude each other"),
        (
            ["--set", "domains={a: x, b: y}", "--objective", "kl.a", "--objective", "params", "--method", "sweep"],
            "objectives: sweep serves the loss and costs alone. Use --method nsga2",
        ),
    ],
)
def test_bad_input(refused: Callable[..., str], tiny_model: Path, given: list[str], message: str) -> None:
    assert message in refused("search", "--model", tiny_model, *given)


def test_domains_that_are_missing_or_too_many(
    refused: Callable[..., str], tiny_model: Path, text_folder: Path, settings: list[str]
) -> None:
    sets = [part for each in settings for part in ("--set", each)]
    flags = ["search", "--model", tiny_model, *sets]
    assert "domains.digits: " in refused(*flags, "--set", "domains.digits=nowhere")
    few = refused(*flags, "--set", "search.tokens=[64, 256]")
    assert "domains: search asks for 64 tokens" in few
    assert "takes 128" in few
