"""Searchers and pruners from Python: wrong ones are refused before any work, and runs with them resume and prune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import allocator
from allocator.core.protocols import Outcome, Request
from allocator.core.user_objects import make_plain
from allocator.pruning.levels.compact import NEVER, CompactLevels
from allocator.pruning.pruners.magnitude_wanda import Wanda
from allocator.pruning.pruners.protocol import Refit, UnitProblem
from allocator.searchers.generator import GeneratorSearcher
from allocator.searchers.problem import MethodSettings, SearchProblem

Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Starts(MethodSettings):
    """Measures the starts, at every number of tokens, and ends."""

    tokens: Any = (128, 256)
    more: Any = None

    @property
    def fidelities(self) -> tuple[int, ...]:
        return self.tokens  # type: ignore[no-any-return]

    def make(self, problem: SearchProblem) -> GeneratorSearcher:
        losses: dict[tuple[int, ...], float] = {}

        def run() -> Any:
            for tokens in self.tokens:
                outcomes: Sequence[Outcome] = yield [Request(allocation=a, tokens=tokens) for a in problem.start]
                losses.update({outcome.request.allocation: outcome.loss for outcome in outcomes})
            return "the starts are measured"

        return GeneratorSearcher(run(), lambda: sorted(losses, key=losses.__getitem__))


class Last:
    """Removes the last weights first, whatever they are."""

    name = "last"
    patterns = ("unstructured",)
    need: Any = "nothing"
    refit: Any = None

    def __init__(self, shares: Any = (0.5, 1.0)) -> None:
        self.shares = shares

    def settings(self) -> Mapping[str, Any]:
        return {"shares": self.shares}

    def levels(self, problem: UnitProblem, notify: object = None) -> CompactLevels:
        removed_at = torch.full((problem.weight_oi.numel(),), NEVER, dtype=torch.uint8)
        for level in range(problem.unit.num_levels - 1, 0, -1):
            removed_at[problem.unit.kept[level] : problem.unit.kept[level - 1]] = level
        return {"removed_at": removed_at.view(problem.weight_oi.shape)}


class Variant(Last):
    """A pruner with other attributes."""

    def __init__(self, shares: Any = (), **attributes: Any) -> None:
        super().__init__(shares)
        self.__dict__.update(attributes)


@pytest.fixture
def options(tiny_model: Path, text_folder: Path, tmp_path: Path) -> Options:
    tokens = "sequence_length=32 calibration=128 selection=128 test=128".split()
    return {
        "model": tiny_model,
        "text": text_folder,
        "pattern": "unstructured",
        "target": 0.5,
        "workers": 0,
        "runs_dir": tmp_path,
        "name": "own",
        "settings": ["ladder.sparsities=[0.25,0.5,0.75]", *(f"tokens.{setting}" for setting in tokens)],
    }


class NoMake:
    fidelities = (128,)


WRONG_SEARCHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (lambda: Starts, r"searcher: expected an object, found the class Starts\. Pass searcher=Starts\(\)"),
    "lacks": (NoMake, r"searcher: NoMake lacks num_batches, lag, training, make\. It needs fidelities, num_batches"),
    "fidelities": (lambda: Starts(tokens=(256, 128)), r"expected increasing counts of tokens, .* found \(256, 128\)"),
    "none": (lambda: Starts(tokens=()), r"expected increasing counts of tokens"),
    "one": (lambda: Starts(tokens=128), r"expected increasing counts of tokens, .* found 128"),
    "tensor": (lambda: Starts(more=torch.zeros(1)), r"Starts's settings cannot be recorded: .*Tensor.*\. Use numbers"),
}

WRONG_PRUNERS: dict[str, tuple[Callable[[], Any], str]] = {
    "class": (lambda: Last, r"pruner: expected an object, found the class Last\. Pass pruner=Last\(\)"),
    "lacks": (NoMake, r"pruner: NoMake lacks name, patterns, need, refit, settings, levels"),
    "need": (lambda: Variant(need="variance"), r"Variant\.need: expected gram, norms, moments, nothing, found 'varia"),
    "refit": (lambda: Variant(refit=Refit(0.01)), r"Variant refits, which needs the Gram matrix\. Set its need to"),
    "name": (lambda: Variant(name="wanda"), r"Variant has the name of the package's 'wanda'\. Give it another name"),
    "pattern": (lambda: Variant(patterns=("n:m",)), r"'last' serves n:m pruning, and the pattern is unstructured"),
    "settings": (lambda: Last(torch.zeros(1)), r"Last\.settings\(\) cannot be recorded"),
}


@pytest.mark.parametrize(("searcher", "message"), WRONG_SEARCHERS.values(), ids=WRONG_SEARCHERS)
def test_a_wrong_searcher_is_refused(
    searcher: Callable[[], Any], message: str, options: Options, tmp_path: Path
) -> None:
    with pytest.raises(allocator.UserError, match=message):
        allocator.search(**options, searcher=searcher())
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("pruner", "message"), WRONG_PRUNERS.values(), ids=WRONG_PRUNERS)
def test_a_wrong_pruner_is_refused(pruner: Callable[[], Any], message: str, options: Options, tmp_path: Path) -> None:
    with pytest.raises(allocator.UserError, match=message):
        allocator.search(**options, searcher=Starts(), pruner=pruner())
    assert not any(tmp_path.iterdir())


def test_pruners_of_the_package_may_be_passed(options: Options) -> None:
    result = allocator.search(**options, searcher=Starts(), pruner=Wanda())
    assert result.plan.pruner["name"] == "wanda"


def test_plain_settings_are_what_a_file_gives_back() -> None:
    assert make_plain({"a": (1, 2.5, None), "b": {"c": (True,)}}, "it") == {"a": [1, 2.5, None], "b": {"c": [True]}}


def test_a_run_of_own_parts_resumes_and_its_plan_is_pruned(options: Options, tmp_path: Path) -> None:
    first = allocator.search(**options, searcher=Starts(more=(1, (2, 3))), pruner=Last())
    again = allocator.search(**options, searcher=Starts(more=(1, (2, 3))), pruner=Last(), resume=True)
    assert again.plan == first.plan

    other = r"Pass its own searcher, as allocator\.search\(searcher=\.\.\.\), or choose another --name"
    with pytest.raises(allocator.UserError, match=other):
        allocator.search(**options, searcher=Starts(more=1), pruner=Last(), resume=True)
    with pytest.raises(allocator.UserError, match=r"pass it again as allocator\.search\(searcher=\.\.\.\)"):
        allocator.search(**options, method="custom", pruner=Last(), resume=True)
    with pytest.raises(allocator.UserError, match=r"its pruner\.name is last, .* Pass its own pruner, as allocator"):
        allocator.search(**options, searcher=Starts(more=(1, (2, 3))), resume=True)

    places = {"model": options["model"], "text": options["text"]}
    with pytest.raises(allocator.UserError, match=r"its pruner 'last' is not part of the package\. .*pruner=\.\.\."):
        allocator.prune(first.plan, tmp_path / "without", **places)
    with pytest.raises(allocator.UserError, match=r"made with .*0\.5, 1\.0.*, and this pruner is .*0\.5, 0\.5"):
        allocator.prune(first.plan, tmp_path / "other", pruner=Last((0.5, 0.5)), **places)
    params = allocator.prune(first.plan, tmp_path / "pruned", pruner=Last(), **places)
    assert params == first.figures["searched"]["params"]
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "pruned" / file).read_bytes() == (first.checkpoint / file).read_bytes()
