"""The report of small runs whose numbers can be worked out by hand."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from allocator.core.budget import Budget
from allocator.core.errors import UserError
from allocator.core.header import JournalHeader
from allocator.core.journal import Journal
from allocator.core.outcomes import LOSSES, build_front, read_front, select_comparable
from allocator.core.plan import Plan
from allocator.core.protocols import Outcome, Request
from allocator.core.space import Allocation, SearchSpace, Unit
from allocator.core.spending import sum_spending, trace_convergence
from allocator.core.training_effect import summarise_training
from allocator.report import figures
from allocator.report.marks import collect_candidates, collect_marks, collect_starts, restore_allocations
from allocator.report.page import write_report
from allocator.report.tables.formats import format_change, format_figure
from allocator.report.tables.front import format_hypervolume, front_table
from allocator.report.tables.model import format_ladder, space_table
from allocator.report.tables.plan import plan_table
from allocator.report.tables.result import list_results, result_table

LOW, HIGH = 100, 1000
UNIFORM, TWO_RATE, SEARCHED = (1, 2, 1, 2), (0, 3, 0, 3), (0, 4, 0, 2)
LIMIT = 100 + 4 * 10 + 4 * 100
MODEL = {"id": "a<b>&[c]", "architecture": "LlamaForCausalLM", "fingerprint": "sha256:" + "0" * 64}
VERSIONS = {"python": "3.11.0", "torch": "2.0.0"}


def structured() -> SearchSpace:
    """Two blocks; a KV group costs 10 parameters, an eighth of the channels 100; 100 are fixed."""
    units = []
    for block in range(2):
        groups = (4, 2, 1, 0)
        params = tuple(10 * kept for kept in groups)
        units.append(Unit(f"layers.{block}.attn", "kv_groups", "attention", block, 4, groups, params, params))
        channels = (4, 3, 2, 1, 0)
        params = tuple(100 * kept for kept in channels)
        units.append(Unit(f"layers.{block}.mlp", "channels", "mlp", block, 4, channels, params, params))
    return SearchSpace("structured", tuple(units), {"params": 100, "macs": 20})


def unstructured() -> SearchSpace:
    units = [
        Unit(f"layers.{block}.{part}.{name}", "matrix", part, block, 100, (100, 70, 40), (100, 70, 40), (100,) * 3)
        for block in range(3)
        for part, name in (("attention", "q_proj"), ("attention", "o_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"))
    ]
    return SearchSpace("unstructured", tuple(units), {"params": 100, "macs": 20})


def outcome(allocation: Sequence[int], kl: float, tokens: int = HIGH, split: str = "search") -> Outcome:
    return Outcome(Request(tuple(allocation), tokens, split), {"kl": kl, "nll": 1.0 + kl}, 0.5)


OUTCOMES = (
    outcome(UNIFORM, 0.8),
    outcome(TWO_RATE, 0.6),
    outcome((1, 3, 1, 2), 0.1, tokens=LOW),
    outcome((0, 0, 0, 0), 0.0),
    outcome((0, 3, 1, 3), 0.7),
    outcome(SEARCHED, 0.4),
    outcome(SEARCHED, 0.2, tokens=2 * HIGH, split="selection"),
)


def write_journal(
    folder: Path, outcomes: Sequence[Outcome], space: SearchSpace, limit: int = LIMIT, objectives: Sequence[str] = ()
) -> Journal:
    folder.mkdir(parents=True, exist_ok=True)
    header = JournalHeader(
        identity={"text": {"test": "sha256:" + "1" * 64}, "space": "sha256:" + "2" * 64},
        model=MODEL,
        asked="target 0.5",
        method="evolution",
        seed=3,
        objectives=tuple(objectives),
        selection=2 * HIGH if objectives else 0,
        tokens=(LOW, HIGH),
        budget=Budget(params=limit),
        space=space,
        device="cpu",
        versions=VERSIONS,
    )
    with Journal.create(folder / "journal.jsonl", header) as journal:
        for batch, item in enumerate(outcomes):
            journal.append(item, batch)
    return Journal.read(folder / "journal.jsonl")


def measured() -> dict[str, dict[str, float]]:
    def figures_of(params: int, sparsity: float, kl: float) -> dict[str, float]:
        return {"params": params, "sparsity": sparsity, "kl": kl, "nll": 2 + kl, "perplexity": 7.5 + kl}

    return {
        "dense": figures_of(980, 0.0, 0.0),
        "uniform": figures_of(540, 0.5, 0.8),
        "two_rate": figures_of(380, 0.681818, 0.5),
        "searched": figures_of(380, 0.681818, 0.456),
        "searched_assembled": figures_of(380, 0.681818, 0.45),
        "uniform_assembled": figures_of(540, 0.5, 0.75),
    }


def result_of(space: SearchSpace, named: Mapping[str, Allocation]) -> dict[str, Any]:
    units = [
        {
            "name": unit.name,
            "part": unit.part,
            "kind": unit.kind,
            "block": unit.block,
            "sparsity": {name: round(unit.sparsity(levels[index]), 6) for name, levels in named.items()},
        }
        for index, unit in enumerate(space.units)
    ]
    return {
        "schema": 3,
        "kind": "allocator.result",
        "model": MODEL,
        "pattern": space.pattern,
        "asked": "target 0.5",
        "method": "evolution",
        "seed": 3,
        "budget": {"params": {"limit": LIMIT, "achieved": space.cost(named["searched"])}},
        "measured": measured(),
        "units": units,
        "search": {"evaluations": 7, "candidate_tokens": 1, "store_tokens": 4096},
        "wall_s": {"store": 1.0, "search": 2.0, "execute": 3.0, "total": 6.0},
        "tokens": {"calibration": 4096, "search": HIGH, "selection": 2 * HIGH, "test": 32768},
        "versions": VERSIONS,
    }


NAMED = {"uniform": UNIFORM, "two_rate": TWO_RATE, "searched": SEARCHED}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    folder, space = tmp_path / "runs" / "small", structured()
    write_journal(folder, OUTCOMES, space)
    (folder / "result.json").write_text(json.dumps(result_of(space, NAMED)))
    pruner = {"name": "obs", "damping": 0.01, "calibration": "sha256:" + "3" * 64}
    provenance = {"run": "sha256:" + "4" * 64, "searcher": "evolution", "seed": 3, "target": 0.5, "versions": VERSIONS}
    plan = Plan(MODEL, space, SEARCHED, Budget(params=LIMIT), pruner, measured(), provenance)
    (folder / "plan.json").write_text(json.dumps(plan.to_json()))
    return folder


def shown(table: Table, width: int = 80) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_result_table_against_hand(finished: Path) -> None:
    text = shown(result_table(json.loads((finished / "result.json").read_text())))
    lines = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert lines["dense"] == ["980", "0.00%", "7.50", "0.0000", "—"]
    assert lines["uniform"] == ["540", "50.00%", "8.30", "0.8000", "—"]
    assert lines["two-rate uniform"] == ["380", "68.18%", "8.00", "0.5000", "\N{MINUS SIGN}37.5%"]
    assert lines["searched"] == ["380", "68.18%", "7.96", "0.4560", "\N{MINUS SIGN}43.0%"]
    assert lines["searched, assembled"][-1] == "\N{MINUS SIGN}40.0%", "0.45 against 0.75, not against 0.8"
    assert "…" not in text
    assert "[c]" in text, "a model id is not markup"


def test_result_table_tolerates_missing_rows() -> None:
    result = result_of(structured(), NAMED)
    result["measured"] = {"searched": {"params": 1_234_567, "kl": 0.5}, "by_hand": {"kl": 0.4}}
    rows = list_results(result)
    assert [row.key for row in rows] == ["searched", "by_hand"]
    assert all(row.versus_uniform is None for row in rows)
    assert "1,234,567" in shown(result_table(result))


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "—"), (0.0, "0.0%"), (1e-9, "0.0%"), (0.5, "+50.0%"), (-0.4296, "\N{MINUS SIGN}43.0%")],
)
def test_change(value: float | None, text: str) -> None:
    assert format_change(value) == text


def test_space_table_fits_80_columns_and_adds_up() -> None:
    text = shown(space_table(structured()))
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"layers\.1\.attn +kv_groups +4 +4 2 1 0 +40\n", text)
    assert re.search(r"embeddings, norms, head +fixed +100\n", text)
    assert re.search(r"whole model +980\n", text)


@pytest.mark.parametrize(
    ("kind", "kept", "text"),
    [
        ("kv_groups", (4, 3, 2, 1, 0), "4 3 2 1 0"),
        ("channels", tuple(range(704, -1, -88)), "704 .. 0 by 88"),
        ("channels", (704, 616, 500, 40, 8, 0), "704 616 .. 0, 6 levels"),
        ("matrix", (1000, 800, 725, 650, 500, 200), "80% .. 20%, 6 levels"),
    ],
)
def test_ladder(kind: str, kept: tuple[int, ...], text: str) -> None:
    assert format_ladder(Unit("u", kind, "mlp", 0, kept[0], kept, kept, kept)) == text


def test_front_table_shortens_a_long_front() -> None:
    points = [{"params": 1000 - i, "sparsity": i / 1000, "kl": i / 10, "allocation": []} for i in range(200)]
    front = {"tokens": HIGH, "loss": "kl", "objectives": ["kl", "params"], "points": points}
    text = shown(front_table(front))
    assert "200 points" in text
    assert "1,000" in text
    assert "801" in text, "both ends are shown"
    assert len(text.splitlines()) < 32


@pytest.mark.parametrize(("loss", "heading"), [("kl", "KL"), ("topk_kl", "top-k KL")])
def test_a_front_names_the_loss_of_its_run(tmp_path: Path, space: SearchSpace, loss: str, heading: str) -> None:
    header = JournalHeader(tokens=(HIGH,), budget=Budget(params=9999), space=space, loss=loss)
    request = Request(space.dense, HIGH)
    journal = Journal(tmp_path, header, {0: [Outcome(request, {loss: 0.25, "nll": 1.0}, 0.5, loss)]}, None)
    front = build_front(journal)
    assert [point[loss] for point in front["points"]] == [0.25]
    assert re.search(rf"removed +.? *{heading}\b", shown(front_table(front)))
    drawn = [
        figures.front_figure(front, cloud=collect_candidates(journal)),
        figures.convergence_figure(trace_convergence(journal), {}, journal.loss),
    ]
    assert all(LOSSES[loss] in figure.axes[0].get_ylabel() for figure in drawn)


def test_plan_table(finished: Path) -> None:
    text = shown(plan_table(Plan.load(finished / "plan.json")))
    assert re.search(r"layers\.0\.mlp +channels +0 +4 +100\.0%", text)
    assert re.search(r"whole model +parameters +380 +980 +68\.18%", text)


def test_convergence_against_hand(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, OUTCOMES, structured())
    # Dense forward: 20 + 80 + 800 = 900 multiply-accumulates.
    uniform, two_rate, low = 1000 * 460 / 900, 1000 * 300 / 900, 100 * 360 / 900
    dense, other, searched = 1000.0, 1000 * 280 / 900, 1000 * 300 / 900
    spent = [uniform, uniform + two_rate]
    spent += [spent[-1] + low + dense + other, spent[-1] + low + dense + other + searched]
    curve = trace_convergence(journal)
    assert [x for x, _ in curve] == pytest.approx(spent)
    assert [y for _, y in curve] == [0.8, 0.6, 0.6, 0.4], "neither the low fidelity nor the dense model counts"


@given(
    st.lists(
        st.tuples(
            st.tuples(*(st.integers(0, top) for top in (3, 4, 3, 4))),
            st.floats(0, 10),
            st.sampled_from([LOW, HIGH]),
            st.sampled_from(["search", "selection"]),
        ),
        max_size=12,
    )
)
def test_convergence_is_monotone(drawn: list[tuple[Allocation, float, int, str]]) -> None:
    space = structured()
    header = JournalHeader(tokens=(LOW, HIGH), budget=Budget(params=LIMIT), space=space)
    journal = Journal(Path("unused"), header, {batch: [outcome(*item)] for batch, item in enumerate(drawn)}, None)
    curve = trace_convergence(journal)
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(curve))
    eligible = [o.loss for o in select_comparable(journal) if space.cost(o.request.allocation) <= LIMIT]
    assert len(curve) == len(eligible)
    assert not eligible or curve[-1][1] == min(eligible)


def test_front_marks_and_spending(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, OUTCOMES, structured())
    front = build_front(journal)
    assert [(point["params"], point["kl"]) for point in front["points"]] == [(980, 0.0), (380, 0.4), (360, 0.7)]
    named = restore_allocations(journal.space, result_of(structured(), NAMED)["units"])
    assert named == NAMED
    assert collect_marks(journal, named)["uniform"] == {"params": 540, "macs": 460, "kl": 0.8, "nll": 1.8}
    assert [(point["params"], point["kl"]) for point in collect_candidates(journal)] == [
        (540, 0.8),
        (380, 0.6),
        (980, 0.0),
        (360, 0.7),
        (380, 0.4),
    ]
    assert collect_starts(journal) == [], "a search of one budget begins with no front of uniform allocations"
    spending = {(line.split, line.tokens): line for line in sum_spending(journal)}
    assert spending["search", HIGH].evaluations == 5
    assert spending["selection", 2 * HIGH].candidate_tokens == pytest.approx(2000 * 300 / 900)
    assert spending["search", LOW].wall_s == 0.5


def trained(allocation: Sequence[int], before: float, after: float) -> Outcome:
    return Outcome(Request(tuple(allocation), HIGH, training=64), {"kl": after, "kl_before": before, "nll": 1.0}, 0.5)


def test_what_training_changed(tmp_path: Path) -> None:
    """Two batches, each in the order that it had before training, and all in all the other way round."""
    batches = {
        0: [outcome(UNIFORM, 0.9)],
        1: [trained((level, 3, 0, 3), 1 + level / 10, 0.5 + level / 10) for level in range(3)],
        2: [trained((level, 3, 1, 3), 2 + level / 10, 0.1 + level / 10) for level in range(3)],
    }
    space = structured()
    header = JournalHeader(tokens=(HIGH,), budget=Budget(params=LIMIT), space=space)
    journal = Journal(tmp_path, replace(header, training={"tokens": [64]}), batches, None)
    (line,) = summarise_training(journal)
    assert (line["split"], line["tokens"], line["training"], line["evaluations"]) == ("search", HIGH, 64, 6)
    assert (line["before"], line["after"]) == pytest.approx((1.6, 0.4))
    # Ranks 1..6 against 4 5 6 1 2 3: 1 - 6 Σd² / (n (n² - 1)) = 1 - 6 · 54 / 210.
    assert line["rank_correlation"] == pytest.approx(1 - 6 * 54 / 210)
    assert line["rank_correlation_in_batch"] == pytest.approx(1.0)
    assert len(select_comparable(journal)) == 6, "what was not trained is not compared with what was"
    marks = collect_marks(journal, {"uniform": UNIFORM, "searched": (0, 3, 0, 3)})
    assert {name: (mark["params"], mark["kl"]) for name, mark in marks.items()} == {
        "searched": (100 + 40 + 40 + 200, 0.5)
    }
    assert [(line.training, line.evaluations) for line in sum_spending(journal)] == [(0, 1), (64, 6)]
    assert summarise_training(Journal(tmp_path, header, {0: [outcome(UNIFORM, 0.9)]}, None)) == []


def test_result_table_of_a_search_that_trains(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    line = {"split": "search", "tokens": HIGH, "training": 8192, "evaluations": 6, "rank_correlation": 0.876}
    result["search"]["training"] = [{**line, "training": 0 + 2048, "rank_correlation": None}, line]
    result["measured"]["uniform_trained"] = {**result["measured"]["uniform"], "kl": 0.4}
    result["measured"]["searched_trained"] = {**result["measured"]["searched"], "kl": 0.3}
    text = shown(result_table(result))
    lines = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert lines["searched, trained"][-1] == "\N{MINUS SIGN}25.0%", "0.3 against 0.4"
    assert "trained on 8,192 tokens" in text
    assert "— after 2,048, 0.88 after 8,192." in re.sub(r"\s+", " ", text)


def test_a_result_of_another_run_is_refused(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    result["units"][0]["name"] = "layers.7.attn"
    (finished / "result.json").write_text(json.dumps(result))
    with pytest.raises(UserError, match="two runs"):
        write_report(finished)
    assert not (finished / "report.html").exists()


class _Links(HTMLParser):
    """Collects what a page would fetch or run."""

    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "link", "img", "iframe", "image"):
            self.outside.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href") and value and value[0] != "#"]


def assert_self_contained(page: str) -> None:
    links = _Links()
    links.feed(page)
    assert links.outside == []
    assert not re.search(r"https?://|url\((?!#)|@import", page)


def test_page_of_a_finished_run(finished: Path) -> None:
    path = write_report(finished)
    assert path == finished / "report.html"
    page = path.read_text()
    assert_self_contained(page)
    assert "a&lt;b&gt;&amp;[c]" in page
    assert "a<b>" not in page
    assert "not finished" not in page
    assert page.count("<svg") == 3
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "380 of 980 parameters are left" in text
    gains = "\N{MINUS SIGN}43.0% against uniform and \N{MINUS SIGN}8.8% against two-rate uniform."
    assert f"At the same budget this is {gains}" in text
    assert "layers.0.mlp channels 0 4 100.0% 50.0%" in text
    assert "the level store took 4,096 calibration tokens" in text
    assert "allocator prune plan.json --out DIR" in text
    assert "obs, damping 0.01" in text
    assert str(finished.parent) not in page, "names in the page are relative"
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"#([a-z]+-[\w.-]+)", page)) <= set(ids)


def test_page_is_deterministic(finished: Path) -> None:
    def read() -> list[bytes]:
        return [path.read_bytes() for path in sorted([*finished.glob("figures/*"), finished / "report.html"])]

    write_report(finished)
    first = read()
    write_report(finished)
    assert read() == first
    assert len(first) == 4
    assert not any(b"<dc:date>" in data or b"matplotlib.org" in data for data in first)
    for path in finished.glob("figures/*.svg"):
        ET.parse(path)


@pytest.mark.parametrize("measurements", [0, 1, len(OUTCOMES)])
def test_page_of_an_unfinished_run(tmp_path: Path, measurements: int) -> None:
    folder = tmp_path / "half"
    write_journal(folder, OUTCOMES[:measurements], structured())
    page = write_report(folder).read_text()
    assert_self_contained(page)
    assert "This run is not finished." in page
    assert "allocator search --resume --name half" in page
    assert "plan.json" not in page
    assert page.count("<svg") == (2 if measurements else 0)
    assert (folder / "figures" / "front.svg").exists() == (measurements > 0)


def test_a_folder_without_a_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such journal"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["{", '{"kind": "allocator.plan", "schema": 1}'])
def test_a_damaged_result_changes_nothing(finished: Path, content: str) -> None:
    (finished / "result.json").write_text(content)
    with pytest.raises(UserError, match=r"result\.json"):
        write_report(finished)
    assert not (finished / "report.html").exists()
    assert not (finished / "figures").exists()


def test_sparsity_figure_takes_bars_or_a_heat_map() -> None:
    bars = figures.sparsity_figure(result_of(structured(), NAMED)["units"])
    assert [axes.get_title(loc="left") for axes in bars.axes] == ["attention", "mlp"]
    assert [bar.get_height() for bar in bars.axes[1].containers[0]] == [1.0, 0.5]
    levels = tuple(index % 3 for index in range(12))
    cells = figures.sparsity_figure(result_of(unstructured(), dict.fromkeys(NAMED, levels))["units"])
    assert [text.get_text() for text in cells.axes[0].texts] == ["0", "30", "30", "60", "60", "0"]
    assert "<image" not in figures.to_svg(cells, "cells"), "vectors only"


def test_front_figure_steps_where_the_budget_buys_more(tmp_path: Path) -> None:
    journal = write_journal(tmp_path, OUTCOMES, structured())
    figure = figures.front_figure(build_front(journal), cloud=collect_candidates(journal))
    step = next(line for line in figure.axes[0].lines if line.get_label() == "front")
    assert step.get_drawstyle() == "steps-post"
    assert np.asarray(step.get_xdata()).tolist()[:3] == [360, 380, 980]
    assert np.asarray(step.get_ydata()).tolist() == [0.7, 0.4, 0.0, 0.0]


@pytest.fixture
def front_run(finished: Path) -> Path:
    """The run, as a search of a front; members have 80 multiply-accumulates less than parameters."""
    (finished / "journal.jsonl").unlink()
    journal = write_journal(finished, OUTCOMES, structured(), 980, ["params", "macs"])
    kept = {
        "ideal": {"kl": 0.0, "params": 100, "macs": 20},
        "reference": {"kl": 0.8, "params": 980, "macs": 900},
        "value": 0.25,
        "curve": [[1, 511, 0.0], [2, 844, 0.125], [7, 3000, 0.25]],
    }
    (finished / "front.json").write_text(json.dumps({**build_front(journal), "hypervolume": kept}))
    return finished


def test_page_of_a_front(front_run: Path) -> None:
    page = write_report(front_run).read_text()
    assert_self_contained(page)
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))
    assert "index parameters macs removed KL selection 0 980 900 0.00% 0.0000 —" in text
    chosen = re.search(r'<tr class="chosen"><td class="n">1</td>.*', page)
    assert chosen
    assert re.findall(r">([^<]+)</td>", chosen[0]) == ["1", "380", "300", "68.18%", "0.4000", "0.2000"]
    assert "dominates 0.2500 of the box" in text
    assert "the reference point (kl 0.8000, params 980, macs 900)." in text
    assert "allocator plan . --index INDEX --out other.json" in text
    assert "Convergence" not in text, "the least loss within the budget is that of the densest member"
    drawn = {path.stem for path in (front_run / "figures").iterdir()}
    assert drawn == {"front", "hypervolume", "sparsity"}
    (front_run / "front.json").write_text("{}")
    with pytest.raises(UserError, match=r"front\.json: not the front of a run"):
        write_report(front_run)


def test_front_figure_has_a_panel_for_each_cost(front_run: Path) -> None:
    journal, front = Journal.read(front_run / "journal.jsonl"), read_front(front_run / "front.json")
    marks, starts = collect_marks(journal, NAMED), collect_starts(journal)
    assert [(start["params"], start["kl"]) for start in starts] == [(540, 0.8)], "the first batch"
    figure = figures.front_figure(front, marks, collect_candidates(journal), starts, {"params": 500})
    assert [axes.get_xlabel() for axes in figure.axes] == [
        "parameters of the whole model",
        "multiply-accumulates of matrices per token",
    ]

    def drawn(axes: Any, label: str) -> list[list[tuple[float, float]]]:
        lines = [line for line in axes.lines if line.get_label() == label]
        return [list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines]

    params, macs = figure.axes
    assert drawn(params, "measured again") == [[(380, 0.4)]]
    assert drawn(macs, "measured again") == [[(300, 0.4)]]
    assert drawn(macs, "searched") == [[(300, 0.4)]]
    assert drawn(macs, "uniform") == [[(460, 0.8)]] * 2
    assert len(drawn(params, "budget")) == 1
    assert drawn(macs, "budget") == []
    assert len(figure.legends[0].get_texts()) == 6


def test_hypervolume_figure_and_line(front_run: Path) -> None:
    kept = read_front(front_run / "front.json")["hypervolume"]
    assert format_hypervolume(kept) == (
        "hypervolume 0.2500 after 7 evaluations; reference point: kl 0.8000, params 980, macs 900"
    )
    axes = figures.hypervolume_figure(kept["curve"]).axes[0]
    assert np.asarray(axes.lines[0].get_xdata()).tolist() == [1, 2, 7]
    assert np.asarray(axes.lines[0].get_ydata()).tolist() == [0.0, 0.125, 0.25]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("evaluations", "hypervolume of the front")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [("params", 1_234_567, "1,234,567"), ("latency_ms", 12.34567, "12.346"), ("nll", 2.0, "2.0000")],
)
def test_figures_are_shown_in_their_units(name: str, value: float, text: str) -> None:
    assert format_figure(name, value) == text
