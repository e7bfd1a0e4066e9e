"""Bad input: one clear message with the remedy, exit code 2, and nothing changed on disk."""

from __future__ import annotations

import itertools
import json
import os
import pkgutil
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from forked import Command

from allocator.core.files import file_fingerprint
from allocator.model.family.schema import load_shipped_families

Refused = Callable[..., str]
Args = list[object]


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): file_fingerprint(p) if p.is_file() else "/" for p in folder.rglob("*")}


def refused_by_process(here: Path, *arguments: object, fresh: bool = False) -> str:
    """Run a process that must refuse, and return its message; a fresh one imports all anew."""
    before = tree(here)
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    if fresh:
        line = [sys.executable, "-m", "allocator", *map(str, arguments)]
        done = subprocess.run(line, cwd=here, env=environment, capture_output=True, text=True, check=False)
        code, out, err = done.returncode, done.stdout, done.stderr
    else:
        command = Command(arguments, here, environment)
        out, err = command.communicate()
        code = command.wait()
    assert (code, out) == (2, ""), err
    lines = [line for line in err.splitlines() if line != "checking ..."]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    assert tree(here) == before
    return lines[0]


def edit_json(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_weights(model: Path, change: Callable[[Any], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


# --- a real process: what a user sees on the terminal ---------------------------------------------------------


def test_process_model_folder_missing(here: Path) -> None:
    message = refused_by_process(here, "search", "--model", here / "no-such-model", "--workers", 0, fresh=True)
    assert f"{here / 'no-such-model'}: no such folder" in message
    assert "tiny-python-llama" in message


def test_process_no_such_ray_address(search_args: Args, here: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"  # bound, and nobody listens
        message = refused_by_process(here, *search_args, "--workers", 1, "--address", address)
    assert f"no Ray cluster answers at {address}" in message
    assert "ray start --head" in message


# --- the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "search"])
def test_model_folder_missing(refused: Refused, here: Path, command: str) -> None:
    named = [here / "gone"] if command == "inspect" else ["--model", here / "gone"]
    message = refused(command, *named)
    assert f"{here / 'gone'}: no such folder" in message
    assert "Give a local Hugging Face folder" in message


def test_model_is_a_file(refused: Refused, here: Path) -> None:
    (here / "model.safetensors").write_bytes(b"weights")
    assert "no such folder" in refused("inspect", here / "model.safetensors")


def test_model_folder_without_configuration(refused: Refused, here: Path) -> None:
    (here / "model").mkdir()
    message = refused("inspect", here / "model")
    assert str(here / "model" / "config.json") in message
    assert "Give a local Hugging Face folder" in message


def test_model_without_weights(refused: Refused, tiny_model: Path, here: Path) -> None:
    (here / "model").mkdir()
    shutil.copy(tiny_model / "config.json", here / "model")
    message = refused("inspect", here / "model")
    assert "no *.safetensors" in message
    assert "save_pretrained" in message


def test_model_with_damaged_weights(refused: Refused, tiny_model: Path, here: Path) -> None:
    shutil.copytree(tiny_model, here / "model")
    weights = here / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refused("inspect", here / "model")
    assert str(weights) in message
    assert "Copy it again" in message


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_model_with_weights_that_are_not_finite(
    refused: Refused, search_args: Args, tiny_model: Path, here: Path, name: str, value: float
) -> None:
    shutil.copytree(tiny_model, here / "model")
    edit_weights(here / "model", lambda tensors: tensors[name][-1].fill_(value))
    message = refused(*search_args, "--model", here / "model")
    assert f"{here / 'model' / 'model.safetensors'}: {name} holds NaN or infinity" in message
    assert "Repair or replace the model" in message


@pytest.mark.parametrize("inputs", ["dense", "expected", "path"])
def test_activations_that_are_not_finite(
    cli: Callable[..., Any], search_args: Args, tiny_model: Path, here: Path, inputs: str
) -> None:
    """Known no sooner than the block is reached: what was finished before it stays."""
    shutil.copytree(tiny_model, here / "model")
    for part in ("gate", "up"):
        name = f"model.layers.1.mlp.{part}_proj.weight"
        edit_weights(here / "model", lambda tensors, name=name: tensors[name].mul_(1e25))
    answer = cli(*search_args, "--model", here / "model", "--set", f"pruner.inputs={inputs}")
    assert answer.code == 2
    lines = answer.err.splitlines()
    assert lines[1].startswith("text: parts of its ")
    assert [line for line in lines[:-1] if "text" not in line] == ["checking ...", "level store ..."]
    assert lines[-1].startswith("error: calibration: the inputs of model.layers.1.mlp.down_proj are not all finite")
    run = here / "runs" / "run"
    (partial,) = run.glob(".levels.*.partial")
    assert {path.name for path in run.iterdir()} == {partial.name, "journal.jsonl", "run.yaml", "status.json"}
    finished = {path.stem for path in partial.glob("*.safetensors")}
    before = {"model.layers.0.self_attn", "model.layers.0.mlp"}
    assert finished == (before if inputs == "dense" else before | {"model.layers.1.self_attn"})


def test_model_is_no_causal_language_model(refused: Refused, tiny_model: Path, here: Path) -> None:
    shutil.copytree(tiny_model, here / "model")
    edit_json(here / "model" / "config.json", lambda c: c.update(architectures=["LlamaForTokenClassification"]))
    message = refused("search", "--model", here / "model")
    assert "'LlamaForTokenClassification'" in message
    assert "cannot be pruned" in message
    assert "ForCausalLM" in message


def test_unknown_architecture(refused: Refused, tiny_model: Path, here: Path) -> None:
    shutil.copytree(tiny_model, here / "model")
    edit_json(
        here / "model" / "config.json", lambda c: c.update(model_type="mamba", architectures=["MambaForCausalLM"])
    )
    message = refused("search", "--model", here / "model")
    assert "'mamba'" in message
    known = message.partition("known: ")[2].partition(". ")[0].split(", ")
    assert known == sorted(load_shipped_families())
    assert "allocator inspect MODEL --suggest" in message
    assert "--set family=FILE" in message


def test_model_that_is_pruned_already(refused: Refused, own_run: Path) -> None:
    message = refused("inspect", own_run / "checkpoint")
    assert "pruned already" in message
    assert "Give the dense model" in message


# --- the target -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["0", "1", "1.5", "-0.1", "nan"])
@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
def test_target_outside_its_range(refused: Refused, search_args: Args, target: str, pattern: str) -> None:
    message = refused(*search_args, f"--target={target}", "--pattern", pattern)
    assert "expected a share in (0, 1)" in message
    assert f"found {float(target)}" in message


@pytest.mark.parametrize(("pattern", "reach"), [("structured", None), ("unstructured", 0.2)])
def test_target_out_of_reach_of_the_ladder(
    refused: Refused, search_args: Args, tiny_model: Path, pattern: str, reach: float | None
) -> None:
    message = refused(*search_args, "--target", 0.5, "--pattern", pattern, "--set", "ladder.sparsities=[0.1,0.2]")
    assert "0.5 is out of reach" in message
    words = message.replace(",", "").split()
    most = float(words[words.index("to") + 1])
    assert 0.0 < most < 0.5
    if reach is not None:
        assert most == pytest.approx(reach, abs=0.03)
    assert "Ask for less" in message


def test_target_out_of_reach_of_n_m(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--target", 0.51, "--pattern", "n:m", "--set", 'ladder.patterns=["2:4"]')
    assert "0.51 is out of reach of the ladders, which remove 0 to 0.5000" in message


def test_groups_that_do_not_divide_a_width(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--pattern", "n:m", "--set", 'ladder.patterns=["1:5"]')
    assert (
        "rows of model.layers.0.self_attn.q_proj hold 32 weights, which is not a multiple of the group size 5"
        in message
    )
    assert "--pattern unstructured" in message


def test_sparsities_of_n_m(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--pattern", "n:m", "--set", "ladder.sparsities=[0.5]")
    assert "ladder.sparsities: the levels of n:m are those of ladder.patterns, 2:4, 1:4" in message


def test_plan_of_a_target_out_of_the_runs_reach(refused: Refused, own_run: Path) -> None:
    message = refused("plan", own_run, "--target", 0.999)
    assert "0.999" in message


# --- text and tokens ------------------------------------------------------------------------------------------


def test_text_missing(refused: Refused, search_args: Args, here: Path) -> None:
    message = refused(*search_args, "--text", here / "gone.txt")
    assert f"{here / 'gone.txt'} does not exist" in message
    assert "give a .jsonl file, a text file or a folder" in message


def test_text_too_short(refused: Refused, search_args: Args, here: Path) -> None:
    (here / "short").mkdir()
    for number in range(64):
        (here / "short" / f"{number}.txt").write_text(f"a little text, number {number}\n")
    message = refused(*search_args, "--text", here / "short", "--set", "tokens.calibration=65536")
    assert "calibration split" in message
    assert "need 65536 tokens" in message
    assert "the documents hold" in message
    assert "give more text" in message


def test_text_with_nothing_in_a_split(refused: Refused, search_args: Args, here: Path) -> None:
    (here / "one.txt").write_text("one small document\n")
    message = refused(*search_args, "--text", here / "one.txt")
    assert "need" in message
    assert "give more text" in message


def test_text_with_broken_lines(refused: Refused, search_args: Args, here: Path) -> None:
    (here / "text.jsonl").write_text('{"text": "good"}\n{"text": \n')
    message = refused(*search_args, "--text", here / "text.jsonl")
    assert "line 2 is not JSON" in message


def test_training_that_is_no_whole_batches(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--set", "search.evolution.training=[0,192]", "--set", "training.batch_sequences=2")
    assert "search.evolution.training: 192 tokens are not whole batches of 2 sequences of 64" in message
    assert "Ask for 256, or set training.batch_sequences" in message


def test_training_by_another_method(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--set", "search.method=tpe", "--set", "search.evolution.training=[0,64]")
    assert "evolution alone trains its candidates, and search.method is tpe" in message
    assert "search.method=evolution" in message


def test_training_text_too_short(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--set", "search.evolution.training=[0,6400000]")
    assert "training split" in message
    assert "6400000 tokens" in message


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("tokens.calibration=32", "calibration asks for 32 tokens"),
        ("tokens.calibration=100", "calibration asks for 100"),
        ("tokens.selection=65", "selection asks for 65"),
        ("tokens.test=1000", "test asks for 1000"),
        ("search.evolution.tokens=[100,256]", "search asks for 100"),
    ],
)
def test_tokens_that_are_no_whole_sequences(refused: Refused, search_args: Args, setting: str, name: str) -> None:
    message = refused(*search_args, "--set", setting)
    assert name in message
    assert "not a multiple of the sequence length 64. Ask for " in message


def test_evaluate_tokens_that_are_no_whole_sequences(refused: Refused, own_run: Path, tiny_model: Path) -> None:
    message = refused("evaluate", own_run / "checkpoint", "--model", tiny_model, "--tokens", 100)
    assert "100 is not a multiple of the sequence length" in message


def test_sequences_longer_than_the_model_reads(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--set", "tokens.sequence_length=2048")
    assert "2048" in message


# --- the configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["inspect", "search"])
def test_unknown_pattern(refused: Refused, command: str) -> None:
    message = refused(command, "--pattern", "semi-structured")
    assert "'semi-structured'" in message
    assert "'structured'" in message
    assert "'unstructured'" in message


def test_unknown_loss(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--set", "loss=mse")
    assert "loss" in message
    assert "topk_kl" in message


def test_a_device_that_is_not_there(refused: Refused, search_args: Args) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("the device is there")
    message = refused(*search_args, "--workers", 0, "--set", "device=cuda")
    assert "no CUDA device" in message
    assert "device=cpu" in message


def test_unknown_method(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--set", "search.method=anneal")
    assert "search.method" in message
    assert "'anneal'" in message
    assert all(name in message for name in ("evolution", "nsga2", "tpe", "gp", "thompson"))


def test_unknown_pruner(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--set", "pruner.name=wanda")
    assert "'wanda' does not serve structured pruning" in message
    assert "obs" in message


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("tarjet=0.5", "target"),
        ("serach=1", "search"),
        ("search.metod=tpe", "method"),
        ("search.evolution.ofspring=3", "offspring"),
        ("tokens.calibraton=64", "calibration"),
        ("ladder.sparsity=[0.5]", "sparsities"),
    ],
)
def test_unknown_key_in_set(refused: Refused, search_args: Args, key: str, near: str) -> None:
    message = refused(*search_args, "--set", key)
    assert f"unknown key '{key.partition('=')[0]}'" in message
    assert f"did you mean '{near}'?" in message


@pytest.mark.parametrize(
    ("content", "key", "near"),
    [
        ("modell: x\n", "modell", "model"),
        ("target: 0.5\nsearch:\n  evolution:\n    generatoins: 3\n", "search.evolution.generatoins", "generations"),
    ],
)
def test_unknown_key_in_run_file(refused: Refused, here: Path, content: str, key: str, near: str) -> None:
    (here / "run.yaml").write_text(content)
    message = refused("search", "run.yaml")
    assert "run.yaml" in message
    assert f"unknown key '{key}'" in message
    assert f"did you mean '{near}'?" in message


def test_key_at_the_wrong_level(refused: Refused) -> None:
    assert "'seed' is a key of the top level" in refused("search", "--set", "search.seed=7")


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("workers=-1", "-1"),
        ("seed=soon", "soon"),
        ("name=../elsewhere", "../elsewhere"),
        ("ladder.sparsities=[0.5,0.2]", "increasing"),
        ("ladder.patterns=[2:4]", "in quotes"),
        ("ladder.patterns='2:4'", "in quotes"),
        ('ladder.patterns=["2:4:8"]', "in quotes"),
        ("ladder.patterns=[]", "groups of one size"),
        ('ladder.patterns=["4:4"]', "ever fewer kept"),
        ('ladder.patterns=["1:0"]', "ever fewer kept"),
        ('ladder.patterns=["1:4","2:4"]', "ever fewer kept"),
        ('ladder.patterns=["2:4","2:4"]', "ever fewer kept"),
        ('ladder.patterns=["2:4","2:8"]', "groups of one size"),
        ("search.evolution.survivors=[4]", "survivors"),
        ("search.evolution.training=[64]", "each of the 2 stages"),
        ("training.learning_rate=0", "greater than 0"),
        ("training.batch_sequences=0", "greater than or equal to 1"),
        ("target", "expected key=value"),
        ("target=[", "not YAML"),
        ("target.inner=1", "not a group of keys"),
    ],
)
def test_values_that_cannot_be(refused: Refused, search_args: Args, setting: str, found: str) -> None:
    assert found in refused(*search_args, "--target", 0.5, "--set", setting)


@pytest.mark.parametrize(
    ("content", "found"),
    [("target: [0.5\n", "not YAML"), ("a: b: c\n", "not YAML"), ("- target\n", "found list"), ("\xff", "run.yaml")],
)
def test_malformed_run_file(refused: Refused, here: Path, content: str, found: str) -> None:
    (here / "run.yaml").write_text(content, encoding="latin-1")
    message = refused("search", "run.yaml")
    assert "run.yaml" in message
    assert found in message


def test_run_file_missing(refused: Refused) -> None:
    assert "gone.yaml" in refused("search", "gone.yaml")


# --- the run folder -------------------------------------------------------------------------------------------


def test_run_directory_not_writable(refused: Refused, search_args: Args, here: Path) -> None:
    # root may write everywhere, so the folder of runs is put below a regular file
    (here / "file").write_text("not a folder")
    message = refused(*search_args, "--runs-dir", here / "file" / "deeper" / "runs")
    assert f"{here / 'file'}: not a folder that can be written to" in message
    assert "--runs-dir" in message


def test_run_exists(refused: Refused, search_args: Args, own_run: Path) -> None:
    message = refused(*search_args)
    assert "runs/run: the run exists already" in message
    assert "--resume" in message
    assert "--name" in message


def test_a_run_that_another_process_begins_at_the_same_moment(
    cli: Callable[..., Any], search_args: Args, finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is first has it; the other is refused, and leaves nothing."""
    from allocator.core.journal import Journal

    create, run = Journal.create, here / "runs" / "run"

    def too_late(path: Path, header: Any) -> Journal:
        shutil.copytree(finished, run)
        return create(path, header)

    monkeypatch.setattr(Journal, "create", too_late)
    answer = cli(*search_args)
    assert answer.code == 2
    assert answer.err.splitlines()[-1] == (
        "error: runs/run: another process has begun this run meanwhile. Wait for it, or choose another --name"
    )
    assert tree(run) == tree(finished)
    assert list(run.parent.iterdir()) == [run]


def test_nothing_to_resume(refused: Refused, search_args: Args) -> None:
    message = refused(*search_args, "--resume")
    assert "runs/run" in message
    assert "without --resume" in message


def test_nothing_to_resume_for_a_run_file(refused: Refused, here: Path, tiny_model: Path) -> None:
    (here / "run.yaml").write_text(f"model: {tiny_model}\nname: run\n")
    message = refused("search", "run.yaml", "--resume")
    assert "runs/run: no run of this name to resume" in message
    assert "Leave out --resume" in message


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (["--seed", 1], "seed"),
        (["--target", 0.4], "target"),
        (["--pattern", "unstructured"], "pattern"),
        (["--set", "search.evolution.generations=9"], "search"),
        (["--set", "tokens.calibration=256"], "tokens"),
    ],
)
def test_resume_with_another_configuration(refused: Refused, own_run: Path, change: Args, key: str) -> None:
    message = refused("search", "--resume", "--name", "run", "--runs-dir", "runs", *change)
    assert "holds another search" in message
    assert f"its {key} is" in message
    assert "run.yaml" in message
    assert "--name" in message


def test_resume_with_another_model(refused: Refused, own_run: Path, tiny_qwen2: Path) -> None:
    message = refused("search", "--resume", "--name", "run", "--runs-dir", "runs", "--model", tiny_qwen2)
    assert "its model is sha256:" in message


def test_resume_with_other_text(refused: Refused, own_run: Path, text_folder: Path, here: Path) -> None:
    shutil.copytree(text_folder, here / "other")
    for path in (here / "other").iterdir():
        path.write_text(path.read_text().upper())
    message = refused("search", "--resume", "--name", "run", "--runs-dir", "runs", "--text", here / "other")
    assert "its text is" in message


@pytest.mark.parametrize("content", ["[1", "- a list", "\xff\xfe"])
def test_resume_with_a_damaged_run_file(refused: Refused, own_run: Path, content: str) -> None:
    (own_run / "run.yaml").write_text(content, encoding="latin-1")
    message = refused("search", "--resume", "--name", "run", "--runs-dir", "runs")
    assert "runs/run/run.yaml" in message
    assert "Restore it" in message


# --- the journal ----------------------------------------------------------------------------------------------


def _damage(journal: Path, how: str) -> None:
    lines = journal.read_bytes().splitlines(keepends=True)
    if how == "corrupt":
        lines[3] = lines[3][:10] + b"\x00\x00\x00" + lines[3][13:]
    elif how == "level outside its ladder":
        entry = json.loads(lines[3])
        entry["allocation"][0] = 99
        lines[3] = json.dumps(entry).encode() + b"\n"
    elif how == "truncated at the head":
        lines = lines[1:]
    elif how == "empty":
        lines = []
    elif how == "foreign":
        lines = [b'{"loss": 1.0, "step": 1}\n', b'{"loss": 0.9, "step": 2}\n']
    elif how == "foreign, one line without an end":
        lines = [b"\x89PNG something else altogether"]
    journal.write_bytes(b"".join(lines))


DAMAGES = [
    "corrupt",
    "level outside its ladder",
    "truncated at the head",
    "empty",
    "foreign",
    "foreign, one line without an end",
]


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("command", [["search", "--resume", "--name", "run", "--runs-dir", "runs"], ["report"]])
def test_damaged_journal(refused: Refused, own_run: Path, command: Args, how: str) -> None:
    _damage(own_run / "journal.jsonl", how)
    message = refused(*command, *([own_run] if command == ["report"] else []))
    assert "journal.jsonl" in message
    assert any(remedy in message for remedy in ("Restore the file", "start again"))


def test_damaged_journal_under_plan(refused: Refused, own_run: Path) -> None:
    _damage(own_run / "journal.jsonl", "corrupt")
    message = refused("plan", own_run, "--target", 0.5)
    assert "journal.jsonl: line 4" in message
    assert "Restore the file" in message


# --- the level store ------------------------------------------------------------------------------------------


@pytest.fixture
def store(finished: Path, here: Path) -> Path:
    return Path(shutil.copytree(finished / "levels", here / "store"))


def _a_unit(store: Path) -> Path:
    return store / "model.layers.1.mlp.safetensors"


def test_store_with_a_corrupt_file(refused: Refused, search_args: Args, store: Path) -> None:
    data = bytearray(_a_unit(store).read_bytes())
    data[-1] ^= 1
    _a_unit(store).write_bytes(data)
    message = refused(*search_args, "--set", f"store={store}")
    assert f"{_a_unit(store)}: damaged" in message
    assert f"Remove {store}" in message


def test_store_with_a_truncated_file(refused: Refused, search_args: Args, store: Path) -> None:
    _a_unit(store).write_bytes(_a_unit(store).read_bytes()[:1000])
    message = refused(*search_args, "--set", f"store={store}")
    assert f"{_a_unit(store)}: damaged" in message


def test_store_with_a_missing_file(refused: Refused, search_args: Args, store: Path) -> None:
    _a_unit(store).unlink()
    message = refused(*search_args, "--set", f"store={store}")
    assert f"{_a_unit(store)}: missing" in message
    assert f"Remove {store}" in message


def test_store_with_a_file_that_is_no_safetensors(refused: Refused, search_args: Args, store: Path) -> None:
    _a_unit(store).write_bytes(b"something else")
    hashed = file_fingerprint(_a_unit(store))
    edit_json(store / "manifest.json", lambda m: m["units"].update({"model.layers.1.mlp": hashed}))
    message = refused(*search_args, "--set", f"store={store}")
    assert f"{_a_unit(store)}: not readable" in message


@pytest.mark.parametrize(
    "content",
    [
        '{"schema": 1, "kind": "alloc',
        '{"name": "some other manifest"}',
        "[]",
        '{"schema": 1, "kind": "allocator.levels", "key": {}}',
        '{"schema": 1, "kind": "allocator.levels", "key": [], "units": {}}',
        '{"schema": 2, "kind": "allocator.levels", "key": {}, "units": {}}',
    ],
)
def test_store_with_a_bad_manifest(refused: Refused, search_args: Args, store: Path, content: str) -> None:
    (store / "manifest.json").write_text(content)
    message = refused(*search_args, "--set", f"store={store}")
    assert str(store / "manifest.json") in message
    assert any(remedy in message for remedy in ("Remove", "Restore"))


def test_store_that_lacks_a_unit(refused: Refused, search_args: Args, store: Path) -> None:
    edit_json(store / "manifest.json", lambda m: m["units"].pop("model.layers.1.mlp"))
    message = refused(*search_args, "--set", f"store={store}")
    assert "model.layers.1.mlp" in message
    assert f"Remove {store}" in message


def test_store_of_another_model(refused: Refused, search_args: Args, store: Path, tiny_qwen2: Path) -> None:
    message = refused(*search_args, "--model", tiny_qwen2, "--set", f"store={store}")
    assert f"{store}: the level store was built for another model" in message
    assert "--set store=FOLDER" in message


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("tokens.calibration=256", "calibration"),
        ("tokens.sequence_length=128", "calibration"),
        ("pruner.damping=0.1", "pruner"),
        ("pruner.bias=true", "pruner"),
        ("pruner.inputs=dense", "pruner"),
        ("pruner.inputs=path", "pruner"),
        ("ladder.align=8", "space"),
    ],
)
def test_store_of_other_settings(refused: Refused, search_args: Args, store: Path, setting: str, key: str) -> None:
    message = refused(*search_args, "--set", f"store={store}", "--set", setting)
    assert f"built for another {key}" in message


def test_store_of_other_weights(
    refused: Refused, search_args: Args, store: Path, make_model: Callable[..., Path]
) -> None:
    message = refused(
        *search_args, "--model", make_model("llama", num_hidden_layers=3, seed=1), "--set", f"store={store}"
    )
    assert f"{store}: the level store was built for another model" in message


def test_store_along_another_path(
    refused: Refused, cli: Callable[..., Any], search_args: Args, own_run: Path, here: Path
) -> None:
    path = ["--set", "pruner.inputs=path"]
    assert cli(*search_args, "--name", "uniform", *path).code == 0
    store = here / "runs" / "uniform" / "levels"
    along = ["--name", "other", "--set", f"pruner.along={own_run / 'plan.json'}"]
    message = refused(*search_args, *path, *along, "--set", f"store={store}")
    assert f"{store}: the level store was built for another pruner" in message
    message = refused(*search_args, *path, *along, "--name", "uniform", "--resume")
    assert "its pruner.along is" in message


@pytest.mark.parametrize("name", ["chapter1.tex", "weights.safetensors"])
def test_store_in_an_unrelated_folder_is_not_wiped(refused: Refused, search_args: Args, here: Path, name: str) -> None:
    (here / "thesis").mkdir()
    (here / "thesis" / name).write_text("years of work")
    message = refused(*search_args, "--set", f"store={here / 'thesis'}")
    assert f"{here / 'thesis'}: not a level store" in message
    assert name in message
    assert "--set store=FOLDER" in message


def test_store_that_is_a_model_folder_is_not_wiped(
    refused: Refused, search_args: Args, tiny_model: Path, here: Path
) -> None:
    shutil.copytree(tiny_model, here / "model")
    assert "not a level store" in refused(*search_args, "--set", f"store={here / 'model'}")


def test_store_that_cannot_be_written(refused: Refused, search_args: Args, here: Path) -> None:
    (here / "file").write_text("not a folder")
    for place in (here / "file", here / "file" / "store"):
        message = refused(*search_args, "--set", f"store={place}")
        assert f"{here / 'file'}: not a folder that can be written to" in message
        assert "--set store=FOLDER" in message


@contextmanager
def small_disk() -> Iterator[None]:
    """From the fourth unit on no file may be larger than 4 KiB, so that writing fails half-way, as on a full disk."""
    from allocator.pruning.levels.store import StoreBuilder

    write, written, limits = StoreBuilder.write, itertools.count(1), resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(self: StoreBuilder, unit: str, levels: Any) -> None:
        if next(written) == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        write(self, unit, levels)

    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StoreBuilder, "write", limited)
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_in_the_middle_of_the_store(
    cli: Callable[..., Any], search_args: Args, finished: Path, here: Path
) -> None:
    """The remedy works: what is resumed ends as what was never interrupted."""
    with small_disk():
        answer = cli(*search_args)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    message = answer.err[answer.err.index("error: ") :]
    assert "run/levels: the level store cannot be written" in message
    assert "Free some space and resume: finished units are kept" in message
    assert "--set store=FOLDER" in message
    (partial,) = (here / "runs" / "run").glob(".levels.*.partial")
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    assert kept.keys() == {f"model.layers.{name}.safetensors" for name in ("0.self_attn", "0.mlp", "1.self_attn")}
    assert not list(partial.glob(".*"))
    assert cli("search", "--resume", "--name", "run", "--runs-dir", "runs").code == 0
    levels = here / "runs" / "run" / "levels"
    for name in ("model.layers.0.self_attn.safetensors", "model.layers.0.mlp.safetensors"):  # a whole block
        assert (levels / name).stat().st_mtime_ns == kept[name]
    for name in ("plan.json", "levels/manifest.json", "checkpoint/model.safetensors"):
        assert (here / "runs" / "run" / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.parametrize("place", ["allocator.core.journal.Journal.append", "allocator.evaluation.engine.save_pruned"])
def test_full_disk_later(
    cli: Callable[..., Any], search_args: Args, finished: Path, here: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In the journal or in a checkpoint: what was measured is not lost."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    module, _, name = place.rpartition(".")
    owner = pkgutil.resolve_name(module.replace("journal.Journal", "journal:Journal"))
    original, calls = getattr(owner, name), itertools.count(1)

    def limited(*arguments: Any) -> Any:
        if next(calls) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, limits[1]))
        return original(*arguments)

    monkeypatch.setattr(owner, name, limited)
    try:
        answer = cli(*search_args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert answer.code == 2
    assert "Traceback" not in answer.err
    assert "Free some space: a search goes on with --resume" in answer.err
    assert not list((here / "runs" / "run").glob(".executing-*"))
    assert cli("search", "--resume", "--name", "run", "--runs-dir", "runs").code == 0
    assert (here / "runs" / "run" / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


def test_resume_with_a_damaged_store(refused: Refused, unfinished: Path) -> None:
    (unfinished / "levels" / "model.layers.0.mlp.safetensors").write_bytes(b"")
    journal = (unfinished / "journal.jsonl").read_bytes()
    (unfinished / "journal.jsonl").write_bytes(journal[: journal.rfind(b"\n") + 1])
    message = refused("search", "--resume", "--name", "run", "--runs-dir", "runs")
    assert "model.layers.0.mlp.safetensors: damaged" in message


# --- what units are pruned on ---------------------------------------------------------------------------------


def test_path_without_being_asked_for(refused: Refused, search_args: Args, own_run: Path) -> None:
    along = ["--name", "other", "--set", f"pruner.along={own_run / 'plan.json'}"]
    for inputs in ("dense", "expected"):
        message = refused(*search_args, *along, "--set", f"pruner.inputs={inputs}")
        assert f"pruner.along: it needs pruner.inputs=path, found {inputs}. Set pruner.inputs=path, or" in message
    assert "found the default. Set pruner.inputs=path" in refused(*search_args, *along)


@pytest.mark.parametrize("name", ["gone.json", "damaged.json", "run"])
def test_path_that_is_no_plan(refused: Refused, search_args: Args, own_run: Path, here: Path, name: str) -> None:
    (here / "damaged.json").write_text((own_run / "plan.json").read_text()[:-100])
    (here / "run").mkdir()
    path = ["--set", "pruner.inputs=path", "--set", f"pruner.along={here / name}"]
    assert f"{here / name}: " in refused(*search_args, "--name", "other", *path)


@pytest.mark.parametrize(
    "other", [["--set", "ladder.align=8"], ["--pattern", "unstructured"], ["--set", "pruner.bias=true"], "model"]
)
def test_path_of_another_model_or_ladder(
    refused: Refused, search_args: Args, own_run: Path, tiny_qwen2: Path, other: Any
) -> None:
    other = ["--model", tiny_qwen2] if other == "model" else other
    path = ["--set", "pruner.inputs=path", "--set", f"pruner.along={own_run / 'plan.json'}"]
    message = refused(*search_args, "--name", "other", *path, *other)
    assert f"pruner.along: {own_run / 'plan.json'} is a plan for another model or other ladders" in message
    assert "leave pruner.along out for uniform" in message


def test_unknown_inputs(refused: Refused, search_args: Args) -> None:
    assert "pruner.inputs" in refused(*search_args, "--set", "pruner.inputs=pruned")


# --- the plan -------------------------------------------------------------------------------------------------


PLAN_DAMAGES: dict[str, Callable[[Any], object]] = {
    "foreign": lambda plan: (plan.clear(), plan.update(epochs=3)),
    "no units": lambda plan: plan.pop("units"),
    "unknown key": lambda plan: plan.update(note="mine"),
    "another schema": lambda plan: plan.update(schema=1),
    "level beyond its ladder": lambda plan: plan["units"]["model.layers.0.mlp"].update(level=99),
    "another level": lambda plan: plan["units"]["model.layers.0.mlp"].update(level=8, kept=0, sparsity=1.0),
    "ladders of unequal length": lambda plan: plan["units"]["model.layers.0.mlp"]["ladder"]["params"].pop(),
    "a ladder that rises": lambda plan: plan["units"]["model.layers.0.mlp"]["ladder"]["kept"].reverse(),
    "a larger limit": lambda plan: plan["budget"]["params"].update(achieved=10**9, limit=10**9),
    "a unit missing": lambda plan: plan["units"].pop("model.layers.0.mlp"),
}


@pytest.mark.parametrize("how", PLAN_DAMAGES)
def test_damaged_plan(refused: Refused, own_run: Path, tiny_model: Path, here: Path, how: str) -> None:
    edit_json(own_run / "plan.json", PLAN_DAMAGES[how])
    message = refused("prune", own_run / "plan.json", "--model", tiny_model, "--out", here / "out")
    assert str(own_run / "plan.json") in message
    assert message == refused("plan", own_run)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\x80\x81"])
def test_plan_that_is_no_json_object(refused: Refused, own_run: Path, here: Path, content: str) -> None:
    (own_run / "plan.json").write_text(content, encoding="latin-1")
    assert str(own_run / "plan.json") in refused("prune", own_run / "plan.json", "--out", here / "out")


@pytest.mark.parametrize("name", ["gone.json", "runs", "file/plan.json"])
def test_plan_that_is_not_there(refused: Refused, own_run: Path, here: Path, name: str) -> None:
    (here / "file").write_text("not a folder")
    assert f"{here / name}: " in refused("prune", here / name, "--out", here / "out")


def test_plan_for_another_model(refused: Refused, own_run: Path, tiny_qwen2: Path, here: Path) -> None:
    message = refused("prune", own_run / "plan.json", "--model", tiny_qwen2, "--out", here / "out")
    assert "another model" in message
    assert "--model" in message


def test_plan_for_a_model_with_other_weights(
    refused: Refused, own_run: Path, make_model: Callable[..., Path], here: Path
) -> None:
    other = make_model("llama", num_hidden_layers=3, seed=1)
    message = refused("prune", own_run / "plan.json", "--model", other, "--out", here / "out")
    assert "another model" in message


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_prune_to_what_exists(refused: Refused, own_run: Path, tiny_model: Path, here: Path, kind: str) -> None:
    out = here / "out"
    out.mkdir() if kind == "folder" else out.write_text("precious")
    message = refused("prune", own_run / "plan.json", "--model", tiny_model, "--out", out)
    assert f"{out}: exists already" in message
    assert "--out" in message


def test_prune_to_where_nothing_can_be_written(refused: Refused, own_run: Path, tiny_model: Path, here: Path) -> None:
    (here / "file").write_text("not a folder")
    message = refused("prune", own_run / "plan.json", "--model", tiny_model, "--out", here / "file" / "out")
    assert str(here / "file") in message
    assert "--out" in message


def test_prune_with_other_calibration_text(
    refused: Refused, own_run: Path, tiny_model: Path, text_folder: Path, here: Path
) -> None:
    shutil.rmtree(own_run / "levels")
    shutil.copytree(text_folder, here / "other")
    for path in (here / "other").iterdir():
        path.write_text(path.read_text().upper())
    message = refused(
        "prune", own_run / "plan.json", "--model", tiny_model, "--text", here / "other", "--out", here / "out"
    )
    assert "other calibration text" in message
    assert "--text" in message


def test_prune_from_a_store_with_another_ladder(
    refused: Refused, cli: Callable[..., Any], search_args: Args, own_run: Path, tiny_model: Path, here: Path
) -> None:
    args = [*search_args, "--name", "other", "--set", "ladder.sparsities=[0.25,0.5,0.75,1.0]"]
    assert cli(*args).code == 0
    message = refused(
        "prune",
        own_run / "plan.json",
        *("--model", tiny_model, "--store", here / "runs" / "other" / "levels", "--out", here / "out"),
        *("--execution", "assemble"),
    )
    assert "built for another space" in message


@pytest.mark.parametrize("place", ["gone", "thesis"])
def test_prune_from_no_store(refused: Refused, own_run: Path, tiny_model: Path, here: Path, place: str) -> None:
    (here / "thesis").mkdir()
    (here / "thesis" / "chapter1.tex").write_text("years of work")
    message = refused(
        "prune",
        own_run / "plan.json",
        *("--model", tiny_model, "--execution", "assemble", "--store", here / place, "--out", here / "out"),
    )
    assert "no finished level store" in message
    assert "--store" in message


def test_prune_from_a_store_that_is_not_asked_for(
    refused: Refused, own_run: Path, tiny_model: Path, here: Path
) -> None:
    message = refused(
        "prune",
        own_run / "plan.json",
        *("--model", tiny_model, "--store", own_run / "levels", "--out", here / "out"),
    )
    assert "the execution of this plan is recompute" in message
    assert "--execution assemble" in message


def test_prune_by_a_plan_that_does_not_say_how(refused: Refused, own_run: Path, tiny_model: Path, here: Path) -> None:
    plan = json.loads((own_run / "plan.json").read_text())
    del plan["pruner"]["sequence_length"]
    (here / "plan.json").write_text(json.dumps(plan))
    message = refused("prune", here / "plan.json", "--model", tiny_model, "--out", here / "out")
    assert "its pruner lacks sequence_length" in message


def test_unknown_execution(refused: Refused, own_run: Path, tiny_model: Path, here: Path) -> None:
    message = refused(
        "prune", own_run / "plan.json", "--model", tiny_model, "--execution", "magic", "--out", here / "out"
    )
    assert "expected assemble or recompute, found 'magic'" in message


# --- what is read from a run ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["front", "plan", "report"])
@pytest.mark.parametrize("name", ["gone", "empty", "file"])
def test_no_run_there(refused: Refused, here: Path, command: str, name: str) -> None:
    (here / "empty").mkdir()
    (here / "file").write_text("not a folder")
    assert str(here / name) in refused(command, here / name)


@pytest.mark.parametrize("content", ["{", "[]", '{"kind": "something else"}', '{"kind": "allocator.front"}'])
def test_damaged_front(refused: Refused, own_run: Path, content: str) -> None:
    (own_run / "front.json").write_text(content)
    message = refused("front", own_run)
    assert str(own_run / "front.json") in message
    assert message == refused("front", own_run, "--json")


@pytest.mark.parametrize("content", ["{", '{"kind": "something else"}'])
def test_damaged_result(refused: Refused, own_run: Path, content: str) -> None:
    (own_run / "result.json").write_text(content)
    assert str(own_run / "result.json") in refused("report", own_run)


def test_plan_written_to_where_nothing_can_be(refused: Refused, own_run: Path, here: Path) -> None:
    message = refused("plan", own_run, "--out", here / "gone" / "plan.json")
    assert str(here / "gone") in message
    assert "--out" in message


def test_evaluate_what_is_no_checkpoint(refused: Refused, tiny_model: Path, here: Path) -> None:
    (here / "empty").mkdir()
    assert str(here / "empty") in refused("evaluate", here / "empty", "--model", tiny_model)


def test_evaluate_a_checkpoint_of_another_model(
    refused: Refused, own_run: Path, tiny_qwen2: Path, text_folder: Path
) -> None:
    message = refused("evaluate", own_run / "checkpoint", "--model", tiny_qwen2, "--text", text_folder, "--tokens", 512)
    assert "--model" in message
