"""The pages tell the truth: commands parse, code compiles, names exist, links resolve."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import allocator
from allocator.cli import app
from allocator.core.errors import UserError
from allocator.model.family.schema import Family
from allocator.run.config.load import read_keys, validate

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINKED = [*PAGES, ROOT / "benchmarks" / "README.md", ROOT / "runs" / "README.md"]
README_WORDS = 1300

OTHER_PROGRAMS = {"export", "ray", "kubectl", "pip", "lm_eval", "optuna-dashboard", "source"}
"""Programs whose arguments are not checked here. The commands for Ray are run by tests/pool/test_jobs.py."""

EXECUTED = {
    "allocator export --list": "hf-padded",
    "allocator plan runs/reference": "2,091,072",
    "allocator front runs/reference": "2,091,072",
    "allocator front runs/reference --csv": "2091072",
    "allocator plan runs/reference --index 1": "2,088,768",
    "allocator plan runs/reference --knee": "parameters",
    "allocator plan runs/reference --where 'params <= 0.56x'": "parameters",
    "allocator plan runs/reference --best params": "2,076,096",
    "allocator inspect": "model.layers.0",
    "allocator inspect --pattern unstructured --target 0.6": "model.layers.0",
    "allocator inspect --explain": "skip",
    "allocator inspect --suggest": "schema: 1",
}
"""Commands that are run here, with a string that each must print.

The others need a model, a cluster or minutes. tests/test_end_to_end.py runs the main path of the pages (search, front,
plan, prune, evaluate, resume), tests/pool/test_jobs.py the recipe of docs/cluster.md, tests/interop the exports.
"""

COVERED_ELSEWHERE = {
    "compare": "tests/cli/test_compare.py",
    "evaluate": "tests/test_end_to_end.py",
    "export": "tests/interop/test_contract.py",
    "front": "tests/cli/test_fronts.py",
    "import": "tests/cli/test_import.py",
    "inspect": "tests/cli/test_commands.py",
    "latency": "tests/cli/test_constraints.py",
    "plan": "tests/cli/test_fronts.py",
    "prune": "tests/test_end_to_end.py",
    "report": "tests/cli/test_commands.py",
    "search": "tests/test_end_to_end.py",
    "status": "tests/cli/test_commands.py",
    "submit": "tests/pool/test_jobs.py",
}
"""The test that executes each verb of the pages."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(language: str) -> list[Block]:
    return [block for page in PAGES for block in fenced(page) if block.language == language]


def fenced(page: Path) -> Iterator[Block]:
    language, start, lines = None, 0, list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            lines.append(line)
        elif language is None:
            language, start, lines = line[3:].strip(), number, []
        else:
            yield Block(page, start, language, "\n".join(lines))
            language = None
    assert language is None, f"{page}: a block has no end"


@dataclass(frozen=True)
class Command:
    """A command of a page: its words, without a prompt, comments, redirections and variables."""

    where: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.where} {shlex.join(self.words)}"


def commands() -> list[Command]:
    return [
        Command(f"{block.page.relative_to(ROOT)}", words)
        for block in blocks("sh")
        for line in block.text.replace("\\\n", " ").splitlines()
        if (words := split(line))
    ]


def split(line: str) -> tuple[str, ...]:
    words = shlex.split(line, comments=True)
    for index, word in enumerate(words):
        if word in (">", ">>", "|", "&&"):
            words = words[:index]
            break
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    return tuple(words)


COMMANDS = commands()
OURS = list(dict.fromkeys(c for c in COMMANDS if Path(c.words[0]).name == "allocator"))
PYTHON = blocks("python")


VERBS: Any = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def parsed(words: tuple[str, ...]) -> dict[str, Any]:
    """Return the arguments that the command line makes of words, without running it."""
    verb, *rest = words
    assert verb in VERBS, f"allocator has no verb {verb}"
    parameters: dict[str, Any] = VERBS[verb].make_context(verb, rest, resilient_parsing=False).params
    return parameters


@pytest.mark.parametrize("command", OURS, ids=str)
def test_a_command_parses(command: Command) -> None:
    if len(command.words) == 2 and command.words[1].startswith("--"):
        assert command.words[1] == "--help"
        return
    parsed(command.words[1:])
    assert command.words[1] in COVERED_ELSEWHERE, "name the test that executes this verb"


@pytest.mark.parametrize("command", [c for c in OURS if {"--set", "--method", "--constraint"} & {*c.words}], ids=str)
def test_settings_of_a_command_are_known(command: Command) -> None:
    values = parsed(command.words[1:])
    flags: dict[str, Any] = {}
    for option, key in (
        ("pattern", "pattern"),
        ("target", "target"),
        ("constraint", "constraints"),
        ("constraints", "constraints"),
        ("objective", "objectives"),
        ("objectives", "objectives"),
    ):
        value = values.get(option)
        if value not in (None, (), []):
            flags[key] = list(value) if key in ("constraints", "objectives") else value
    assignments = [f"search.{key}={values[key]}" for key in ("method", "budget") if values.get(key) is not None]
    assignments += next((list(values[key]) for key in ("set_", "settings", "set") if values.get(key)), [])
    validate(read_keys(values.get("file"), flags, assignments))


def test_an_unknown_flag_an_unknown_key_and_a_missing_argument_are_found() -> None:
    with pytest.raises(Exception, match="No such option"):
        parsed(("search", "--pruner", "obs"))
    with pytest.raises(Exception, match=r"(?i)missing (option|parameter)"):
        parsed(("prune", "plan.json"))
    with pytest.raises(UserError, match="unknown key"):
        validate(read_keys(None, {}, ["search.guided.patients=3"]))


@pytest.mark.parametrize("verb", sorted(COVERED_ELSEWHERE))
def test_a_verb_is_executed_by_another_test(verb: str) -> None:
    test = ROOT / COVERED_ELSEWHERE[verb]
    assert test.is_file()
    said = test.read_text(encoding="utf-8")
    assert f'"{verb}"' in said or f"allocator {verb}" in said, f"{test} does not run {verb}"


@pytest.mark.parametrize("line", EXECUTED)
def test_a_command_runs(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(app, shlex.split(line)[1:])
    assert result.exit_code == 0, result.output
    assert EXECUTED[line] in result.output


@pytest.mark.parametrize("command", list(dict.fromkeys(c for c in COMMANDS if c not in OURS)), ids=str)
def test_another_program_is_called_with_what_exists(command: Command) -> None:
    program, *arguments = command.words
    if program == "make":
        rules = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{re.escape(target)}:", rules, re.MULTILINE) for target in arguments)
    elif Path(program).name == "python":
        check_python(arguments)
    else:
        assert program in OTHER_PROGRAMS


def check_python(arguments: list[str]) -> None:
    if arguments[:2] == ["-m", "pytest"]:
        paths = [word for word in arguments[2:] if "/" in word]
        assert all((ROOT / path).exists() for path in paths)
        return
    if arguments[0] == "-m":
        script = ROOT / f"{arguments[1].replace('.', '/')}.py"
    else:
        script = ROOT / arguments[0]
    if script.parent == ROOT:
        return  # a script that an export leaves, or the reader's own
    source = script.read_text(encoding="utf-8")
    for word in arguments:
        assert not word.startswith("--") or f'"{word}"' in source, f"{script.name} has no {word}"


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_code_compiles_and_names_what_exists(block: Block) -> None:
    tree = ast.parse(block.text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "allocator":
            assert hasattr(allocator, node.attr), node.attr
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("allocator"):
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_modules_that_a_page_names_exist(page: Path) -> None:
    said = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for path in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", said):
        places = (ROOT / path, ROOT / "allocator" / path)
        of_a_run = path in ("levels/", "checkpoint/", "figures/")
        assert of_a_run or any(place.exists() for place in places), path


def test_the_names_of_the_table_of_verbs_exist() -> None:
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    verbs = set(re.findall(r"^\| `allocator\.(\w+)`", page, re.MULTILINE))
    assert verbs
    assert all(hasattr(allocator, name) for name in verbs)
    assert {n for n in allocator.__all__ if n[0].islower()} <= verbs, "a verb is missing in docs/python.md"


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_is_a_family_or_a_run_file(block: Block) -> None:
    data = yaml.safe_load(block.text)
    if "model_types" in data:
        Family.model_validate(data)
    else:
        validate(data)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    found: set[str] = set()
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        inside ^= line.startswith("```")
        if not inside and (match := re.match(r"#+ (.*)", line)):
            found.add(re.sub(r"[^\w\- ]", "", match[1].lower()).replace(" ", "-"))
    return found


def links(page: Path) -> list[str]:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "x", text))


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(there), f"{page.name}: {link}"


def test_the_makefile_names_what_exists() -> None:
    words = re.findall(r"(?:tests|search_spaces|allocator|docs|runs)/[\w./*-]+", (ROOT / "Makefile").read_text("utf-8"))
    named = {word for word in words if not word.startswith("runs/demo")}
    assert any("environments" in word for word in named)
    assert [word for word in named if not any(ROOT.glob(word.replace("%", "*")))] == []


def test_every_page_is_in_both_indices() -> None:
    names = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    index = set(links(ROOT / "docs" / "README.md"))
    assert names <= index
    assert {f"docs/{name}" for name in names} <= set(links(ROOT / "README.md"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS
