"""Every command on a tiny run, for people and for programs."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from allocator.core.plan import Plan
from allocator.searchers.rules.baselines import uniform

Cli = Callable[..., Any]

COMMANDS = [
    "inspect",
    "search",
    "submit",
    "compare",
    "status",
    "front",
    "plan",
    "prune",
    "export",
    "import",
    "evaluate",
    "report",
]
HEAVY = ["torch", "ray", "transformers", "pymoo", "optuna", "numpy", "matplotlib"]


def answered(answer: Any) -> Any:
    """The answer, which must be a success without a word of trouble."""
    assert answer.code == 0, answer
    assert "Traceback" not in answer.err
    assert "error:" not in answer.err
    return answer


# --- help -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help(cli: Cli, command: str | None) -> None:
    answer = answered(cli(*([command] if command else []), "--help"))
    if command is None:
        assert all(name in answer.out for name in COMMANDS)
    else:
        assert "--json" in answer.out
        assert f"allocator {command} [OPTIONS]" in answer.out


def test_no_command_is_help(cli: Cli) -> None:
    assert "Usage:" in "".join((answer := cli()).out + answer.err)


def test_help_imports_nothing_heavy() -> None:
    helps = [["allocator", "--help"], *(["allocator", command, "--help"] for command in COMMANDS)]
    script = f"""
import sys
from allocator.cli import main
for sys.argv in {helps!r}:
    try:
        main()
    except SystemExit as end:
        assert not end.code, sys.argv
sys.stderr.write(",".join(name for name in {HEAVY!r} if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""


def test_module_and_script_are_the_same() -> None:
    done = [
        subprocess.run(command, capture_output=True, text=True, check=True).stdout
        for command in (
            [sys.executable, "-m", "allocator", "--help"],
            [Path(sys.executable).parent / "allocator", "--help"],
        )
    ]
    assert done[0].replace("python -m allocator", "allocator") == done[1]


# --- inspect --------------------------------------------------------------------------------------------------


def test_inspect(cli: Cli, tiny_model: Path) -> None:
    answer = answered(cli("inspect", tiny_model))
    assert "model.layers.2.self_attn" in answer.out
    assert "target 0.5: params <= " in answer.out
    assert answer.err == ""


def test_inspect_says_what_goes_as_a_whole(cli: Cli, tiny_model: Path, make_model: Callable[..., Path]) -> None:
    line = "attention is removed as a whole or not at all"
    assert line in answered(cli("inspect", make_model("olmo2"))).out
    assert line not in answered(cli("inspect", make_model("olmo2"), "--pattern", "unstructured")).out
    assert line not in answered(cli("inspect", tiny_model)).out


@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
def test_inspect_json(cli: Cli, tiny_model: Path, pattern: str) -> None:
    data = answered(cli("inspect", tiny_model, "--pattern", pattern, "--target", 0.4, "--json")).json
    tensors = load_file(tiny_model / "model.safetensors")
    in_units = sum(t.size for name, t in tensors.items() if "self_attn" in name or "mlp" in name)
    assert data["params"]["dense"] == sum(t.size for t in tensors.values())
    assert data["params"]["in_units"] == in_units
    assert data["params"]["fixed"] == data["params"]["dense"] - in_units
    assert data["budget"]["params"] == data["params"]["fixed"] + in_units * 6 // 10
    assert data["uniform"]["params"] <= data["budget"]["params"]
    assert len(data["units"]) == (6 if pattern == "structured" else 21)


def test_inspect_reads_headers_alone(cli: Cli, tiny_model: Path, here: Path) -> None:
    """A model of 192 GiB, of which only the header exists: the rest is a hole in the file."""
    folder = here / "large"
    folder.mkdir()
    config = json.loads((tiny_model / "config.json").read_text())
    width = 65536
    config.update(hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1, vocab_size=16)
    config.update(num_attention_heads=16, num_key_value_heads=16, head_dim=width // 16, tie_word_embeddings=True)
    (folder / "config.json").write_text(json.dumps(config))
    block = "model.layers.0"
    shapes = {f"{block}.self_attn.{name}_proj.weight": [width, width] for name in "qkvo"}
    shapes |= {f"{block}.mlp.{name}_proj.weight": [4 * width, width] for name in ("gate", "up")}
    shapes |= {f"{block}.mlp.down_proj.weight": [width, 4 * width], "model.embed_tokens.weight": [16, width]}
    shapes |= {f"{block}.{name}_layernorm.weight": [width] for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = [width]
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, size = end, 4 if len(shape) == 1 else 4 * shape[1]
        end = start + shape[0] * size
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    data = answered(cli("inspect", folder, "--json")).json
    assert data["params"]["in_units"] == 16 * width * width
    assert end > 192 * 2**30
    shutil.rmtree(folder)


# --- search ---------------------------------------------------------------------------------------------------


def test_search(cli: Cli, search_args: list[object], here: Path) -> None:
    answer = answered(cli(*search_args))
    for word in ("dense", "uniform", "two-rate", "searched", "runs/run/plan.json", "runs/run/report.html", "next"):
        assert word in answer.out
    assert "search ..." in answer.err
    left = {path.name for path in (here / "runs" / "run").iterdir()}
    assert {"run.yaml", "journal.jsonl", "levels", "front.json", "plan.json", "report.html"} <= left
    assert {"result.json", "checkpoint"} <= left
    assert not [name for name in left if name.startswith(".")]
    assert [path.name for path in (here / "runs").iterdir()] == ["run"]


def test_resume_or_begin(cli: Cli, search_args: list[object], here: Path) -> None:
    answered(cli(*search_args, "--resume-or-begin"))
    plan = (here / "runs" / "run" / "plan.json").read_bytes()
    assert "resuming" in answered(cli(*search_args, "--resume-or-begin")).err
    assert (here / "runs" / "run" / "plan.json").read_bytes() == plan


def test_status(cli: Cli, own_run: Path) -> None:
    answer = answered(cli("status", own_run))
    assert answer.out.startswith("state       finished ")
    assert "allocations" in answer.out
    assert "best KL" in answer.out
    assert (answer.err, answered(cli("status", own_run, "--json")).json["state"]) == ("", "finished")


def test_search_json(cli: Cli, search_args: list[object], here: Path) -> None:
    data = answered(cli(*search_args, "--json")).json
    assert data["folder"] == "runs/run"
    assert data["checkpoint"] == "runs/run/checkpoint"
    stored = json.loads((here / "runs" / "run" / "result.json").read_text())
    assert {key: data[key] for key in stored} == stored


def test_json_is_alone_on_standard_output(cli: Cli, search_args: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a library prints, as Ray does when a worker dies."""
    from allocator.commands import search as workflow

    def noisy(*arguments: Any) -> Any:
        print("(raylet) A worker died")
        return prepare(*arguments)

    prepare = workflow.prepare_job
    monkeypatch.setattr(workflow, "prepare_job", noisy)
    answer = answered(cli(*search_args, "--json"))
    assert answer.json["seed"] == 0
    assert "(raylet)" in answer.err


OTHER_METHODS = {
    "tpe": ["search.tpe.trials=6", "search.tpe.batch=3", "search.tpe.tokens=128"],
    "gp": ["search.gp.trials=6", "search.gp.batch=3", "search.gp.tokens=128"],
    "thompson": ["search.thompson.trials=9", "search.thompson.batch=3", "search.thompson.tokens=128"],
}


@pytest.mark.parametrize(
    ("pattern", "method", "settings"),
    [
        pytest.param(
            pattern,
            method,
            settings,
            id=f"{pattern}-{method}-settings{number}",
            marks=pytest.mark.slow if (pattern == "structured") == (method == "tpe") else (),
        )
        for pattern in ("structured", "unstructured")
        for number, (method, settings) in enumerate(OTHER_METHODS.items())
    ],
)
def test_search_by_other_methods(
    cli: Cli, search_args: list[object], method: str, settings: list[str], pattern: str
) -> None:
    flags = [part for setting in settings for part in ("--set", setting)]
    data = answered(cli(*search_args, *flags, "--set", f"search.method={method}", "--pattern", pattern, "--json")).json
    assert data["method"] == method
    assert data["measured"]["searched"]["params"] <= data["budget"]["params"]["limit"]


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_search_by_the_group(
    cli: Cli, search_args: list[object], tiny_model: Path, text_folder: Path, here: Path, name: str
) -> None:
    """The plan is n:m in the saved checkpoint, group by group; plan, front, prune and evaluate go on from there."""
    pruner = () if name == "sparsegpt" else ("--set", f"pruner.name={name}")
    data = answered(cli(*search_args, "--pattern", "n:m", "--target", 0.5, *pruner, "--json")).json
    plan = json.loads((here / "runs" / "run" / "plan.json").read_text())
    assert (data["pattern"], plan["pattern"], plan["pruner"]["name"]) == ("n:m", "n:m", name)
    saved = load_file(Path(data["checkpoint"]) / "model.safetensors")
    for module, unit in plan["units"].items():
        kept = np.count_nonzero(saved[f"{module}.weight"].reshape(-1, 4), axis=1)
        assert (kept == (4, 2, 1)[unit["level"]]).all()
    counted = sum(unit["kept"] for unit in plan["units"].values()) + plan["costs"]["params"]["fixed"]
    assert (
        counted
        == data["measured"]["searched"]["params"]
        == plan["budget"]["params"]["achieved"]
        <= plan["budget"]["params"]["limit"]
    )
    run, where = here / "runs" / "run", ("--model", tiny_model, "--text", text_folder)
    for execution in ("assemble", "recompute"):
        out = here / execution
        answer = answered(cli("prune", run / "plan.json", "--out", out, "--execution", execution, *where, "--json"))
        assert answer.json["params"] == counted
    own = here / plan["pruner"]["execution"] / "model.safetensors"
    assert own.read_bytes() == (Path(data["checkpoint"]) / "model.safetensors").read_bytes()
    figures = answered(cli("evaluate", out, *where, "--length", 64, "--tokens", 512, "--json")).json
    assert figures["params"] == counted
    answered(cli("front", run))
    answered(cli("plan", run))


def test_inspect_by_the_group(cli: Cli, tiny_model: Path) -> None:
    arguments = ("inspect", tiny_model, "--pattern", "n:m", "--set", 'ladder.patterns=["6:8","4:8","0:8"]')
    data = answered(cli(*arguments, "--json")).json
    assert {unit["group"] for unit in data["units"]} == {8}
    assert data["uniform"]["sparsity"] == 0.5
    assert "n:m search space: 21 units" in answered(cli(*arguments)).out


@pytest.mark.parametrize(
    ("multiple", "kept", "channels"),
    [
        (8, [480, 416, 360, 304, 240, 176, 120, 64, 0], 4),
        (64, [480, 448, 384, 320, 256, 192, 128, 64, 0], 28),
        (128, [480, 384, 256, 128, 0], 60),
    ],
)
def test_inspect_says_what_aligned_widths_cost(cli: Cli, multiple: int, kept: list[int], channels: int) -> None:
    """The packaged model has 480 channels in every MLP; their eighths are 60."""
    align = ["--set", f"ladder.align={multiple}"]
    asked = ["--target", 0.43, "--constraint", "kv_bytes <= 0.5x"]
    data, free = (answered(cli("inspect", *asked, *flags, "--json")).json for flags in (align, []))
    assert all(unit["kept"] == kept for unit in data["units"] if unit["kind"] == "channels")
    assert max(min(abs(count - width) for width in kept) for count in range(0, 481, 60)) == channels
    assert data["align"]["multiple"] == multiple
    assert data["align"]["parts"] == {
        "mlp": {"levels": len(kept), "unaligned": 9, "furthest": round(channels / 480, 6)}
    }
    assert data["budget"] == free["budget"]
    assert data["align"]["unused"]["params"] == {
        "aligned": data["budget"]["params"] - data["uniform"]["params"],
        "unaligned": free["budget"]["params"] - free["uniform"]["params"],
    }
    assert set(data["align"]["unused"]) == {"params", "kv_bytes"}
    assert "align" not in free
    words = answered(cli("inspect", *asked, *align)).out
    assert (
        f"align {multiple}: mlp has {len(kept)} levels of 9, at most {channels / 480:.2%} of its channels away" in words
    )


def test_inspect_says_what_aligned_widths_leave_of_a_budget(cli: Cli) -> None:
    align = ["inspect", "--set", "ladder.align=64"]
    assert "uniform leaves unused: params 16,220 (30,044 with align 1)" in answered(cli(*align, "--target", 0.43)).out
    # 336 of 480 channels become 320, so that more goes than was asked for
    only = [*align, "--set", "ladder.sparsities=[0.3]", "--target", 0.3]
    assert re.search(r"params [\d,]+ \(out of reach with align 1\)", answered(cli(*only)).out)
    assert "align" not in answered(cli(*align, "--pattern", "unstructured", "--json")).json


def test_search_from_a_run_file(cli: Cli, finished: Path, here: Path) -> None:
    """The run file that a run leaves repeats the run; flags override it."""
    answered(cli("search", finished / "run.yaml", "--runs-dir", here / "again"))
    again = here / "again" / "finished"
    assert (again / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    data = answered(cli("search", finished / "run.yaml", "--runs-dir", here, "--seed", 5, "--json")).json
    assert data["seed"] == 5


def test_store_is_reused(cli: Cli, search_args: list[object], finished: Path, here: Path) -> None:
    shutil.copytree(finished / "levels", here / "shared")
    answer = answered(cli(*search_args, "--set", f"store={here / 'shared'}"))
    assert f"level store {here / 'shared'} fits and is reused" in answer.err
    run = here / "runs" / "run"
    assert not (run / "levels").exists()
    assert (run / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()


@pytest.mark.parametrize("inputs", ["dense", "path", "expected"])
def test_pruning_on_other_inputs(
    cli: Cli, search_args: list[object], tiny_model: Path, text_folder: Path, finished: Path, here: Path, inputs: str
) -> None:
    """All lead to a plan that says so and can be executed again to the same bytes; what is expected is the default."""
    answered(cli(*search_args, "--set", f"pruner.inputs={inputs}"))
    run = here / "runs" / "run"
    own, usual = (Plan.load(folder / "plan.json") for folder in (run, finished))
    assert own.budget == usual.budget
    assert own.pruner["inputs"] == inputs
    assert usual.pruner["inputs"] == "expected"
    along = list(uniform(own.space, own.budget)) if inputs == "path" else None
    assert own.pruner.get("along") == along
    pruned, whole = (_bytes(folder / "levels") for folder in (run, finished))
    assert pruned.keys() == whole.keys()
    changed = [pruned[f"{unit.name}.safetensors"] != whole[f"{unit.name}.safetensors"] for unit in own.space.units[1:]]
    assert all(changed) if inputs != "expected" else not any(changed)
    again = ["prune", run / "plan.json", "--model", tiny_model]
    answered(cli(*again, "--text", text_folder, "--out", here / "recomputed", "--execution", "recompute"))
    answered(cli(*again, "--text", text_folder, "--out", here / "assembled", "--execution", "assemble"))
    answered(cli(*again, "--store", run / "levels", "--out", here / "stored", "--execution", "assemble"))
    assert _bytes(here / "recomputed") == _bytes(run / "checkpoint") != _bytes(here / "assembled")
    assert _bytes(here / "stored") == _bytes(here / "assembled")


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_more_damping_is_said(cli: Cli, search_args: list[object], make_model: Callable[..., Path], here: Path) -> None:
    """Of 160 inputs, 64 tokens say little: without damping, rounding leaves the Hessian indefinite."""
    wide = make_model("llama", intermediate_size=160)
    few = ["--model", wide, "--set", "tokens.calibration=64"]
    answer = answered(cli(*search_args, *few, "--set", "pruner.damping=1e-9"))
    assert "model.layers.0.mlp: the Hessian is not positive definite with damping 1e-09; trying 1e-08" in answer.err
    for plan in ("uniform", "searched"):  # each is pruned again along its own path
        assert f"{plan}: model.layers.1.mlp: the Hessian is not positive definite with damping 1e-09" in answer.err
    answer = answered(cli(*search_args, *few, "--name", "damped"))
    assert "Hessian" not in answer.err


# --- what is read from a run ----------------------------------------------------------------------------------


def test_front(cli: Cli, finished: Path) -> None:
    answer = answered(cli("front", finished))
    assert "Pareto front" in answer.out
    assert f"allocator plan {finished}" in answer.out


def test_front_json(cli: Cli, finished: Path) -> None:
    data = answered(cli("front", finished, "--json")).json
    assert data == json.loads((finished / "front.json").read_text())
    kls = [point["kl"] for point in data["points"]]
    params = [point["params"] for point in data["points"]]
    assert kls == sorted(kls)
    assert params == sorted(params, reverse=True)


def test_plan(cli: Cli, finished: Path) -> None:
    answer = answered(cli("plan", finished))
    assert "model.layers.0.mlp" in answer.out
    data = answered(cli("plan", finished, "--json")).json
    assert data == json.loads((finished / "plan.json").read_text())


def test_plan_out(cli: Cli, own_run: Path, here: Path) -> None:
    answer = answered(cli("plan", own_run, "--out", here / "mine.json"))
    assert f"allocator prune {here / 'mine.json'}" in answer.out
    assert (here / "mine.json").read_bytes() == (own_run / "plan.json").read_bytes()


def test_plan_of_a_target_is_taken_from_the_front(cli: Cli, own_run: Path, here: Path) -> None:
    front = answered(cli("front", own_run, "--json")).json
    asked = 0.3
    data = answered(cli("plan", own_run, "--target", asked, "--out", here / "other.json", "--json")).json
    within = [point for point in front["points"] if point["sparsity"] >= asked]
    best = min(within, key=lambda point: point["kl"])
    assert [unit["level"] for unit in data["units"].values()] == best["allocation"]
    assert data["costs"]["params"]["achieved"] == best["params"]
    assert data["sparsity"] >= asked
    assert data["measured"]["search_split"]["kl"] == best["kl"]
    assert Plan.load(here / "other.json").to_json() == data


def test_report(cli: Cli, own_run: Path) -> None:
    (own_run / "report.html").unlink()
    answer = answered(cli("report", own_run))
    assert str(own_run / "report.html") in answer.out
    assert "<svg" in (own_run / "report.html").read_text()
    assert answered(cli("report", own_run, "--json")).json == {"report": str(own_run / "report.html")}


def test_front_and_report_of_an_unfinished_run(cli: Cli, unfinished: Path) -> None:
    assert answered(cli("front", unfinished, "--json")).json["points"]
    assert "Pareto front" in answered(cli("front", unfinished)).out
    answered(cli("report", unfinished))
    page = (unfinished / "report.html").read_text()
    assert "<svg" in page
    assert "--resume" in page


def test_report_of_a_run_that_measured_nothing_yet(cli: Cli, unfinished: Path) -> None:
    journal = unfinished / "journal.jsonl"
    journal.write_bytes(journal.read_bytes().splitlines(keepends=True)[0])
    (unfinished / "front.json").unlink()
    answered(cli("report", unfinished))


def test_resume(cli: Cli, unfinished: Path, finished: Path) -> None:
    """Nothing but the name is needed: the run knows the rest. What a kill left of files in the making goes."""
    (unfinished / ".front.json.4711.tmp").write_text("{")
    answer = answered(cli("search", "--resume", "--name", "run"))
    assert not list(unfinished.glob(".*"))
    assert "resuming runs/run: " in answer.err
    for name in ("plan.json", "front.json"):
        assert (unfinished / name).read_bytes() == (finished / name).read_bytes()


def test_resume_of_a_finished_run(cli: Cli, own_run: Path, finished: Path) -> None:
    journal = (own_run / "journal.jsonl").read_bytes()
    answered(cli("search", "--resume", "--name", "run"))
    assert (own_run / "plan.json").read_bytes() == (finished / "plan.json").read_bytes()
    assert (own_run / "journal.jsonl").read_bytes() == journal


# --- prune and evaluate ---------------------------------------------------------------------------------------


def test_prune_gives_the_checkpoint_of_the_run(
    cli: Cli, own_run: Path, tiny_model: Path, text_folder: Path, here: Path
) -> None:
    """Pruned again along the plan's path; the store is not needed."""
    shutil.rmtree(own_run / "levels")
    flags = ["--model", tiny_model, "--text", text_folder, "--out", here / "out"]
    answer = answered(cli("prune", own_run / "plan.json", *flags))
    assert f"allocator evaluate {here / 'out'}" in answer.out
    for name in ("model.safetensors", "config.json", "modeling_pruned.py", "tokenizer.json"):
        assert (here / "out" / name).read_bytes() == (own_run / "checkpoint" / name).read_bytes()


def test_prune_from_the_store_or_afresh(
    cli: Cli, own_run: Path, tiny_model: Path, text_folder: Path, here: Path
) -> None:
    """What the search saw: other weights than those along the plan's path, of the same shapes."""
    flags = ["--model", tiny_model, "--execution", "assemble", "--json"]
    plan = Plan.load(own_run / "plan.json")
    data = answered(cli("prune", own_run / "plan.json", *flags, "--out", here / "stored")).json
    assert data == {"checkpoint": str(here / "stored"), "params": plan.space.cost(plan.allocation)}
    shutil.rmtree(own_run / "levels")
    answered(cli("prune", own_run / "plan.json", *flags, "--text", text_folder, "--out", here / "afresh"))
    stored, afresh = (here / name / "model.safetensors" for name in ("stored", "afresh"))
    assert stored.read_bytes() == afresh.read_bytes()
    own, other = load_file(own_run / "checkpoint" / "model.safetensors"), load_file(stored)
    assert {name: t.shape for name, t in other.items()} == {name: t.shape for name, t in own.items()}
    assert any((other[name] != own[name]).any() for name in own)


def test_evaluate(cli: Cli, own_run: Path, tiny_model: Path, text_folder: Path) -> None:
    flags = ["--model", tiny_model, "--text", text_folder, "--tokens", 1024]
    answer = answered(cli("evaluate", own_run / "checkpoint", *flags))
    assert "perplexity" in answer.out
    data = answered(cli("evaluate", own_run / "checkpoint", *flags, "--json")).json
    plan = Plan.load(own_run / "plan.json")
    assert data["params"] == plan.space.cost(plan.allocation)
    assert data["kl"] > 0.0
    dense = answered(cli("evaluate", tiny_model, *flags, "--json")).json
    assert dense["params"] == plan.space.cost(plan.space.dense)
    assert dense["kl"] == pytest.approx(0.0, abs=1e-6)
