"""Commands on models that do not generate: what fits them is chosen, and what makes no sense is refused before work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Python

import allocator
from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.run.config.load import load_config
from allocator.run.prepare import prepare_job

SETTINGS = (
    "tokens.sequence_length=64 tokens.calibration=512 tokens.selection=64 tokens.test=128 search.rounds=1 "
    "search.method=evolution search.evolution.generations=1 search.evolution.offspring=2 "
    "search.evolution.tokens=[64] search.evolution.survivors=[1]"
).split()


def _job(model: Path, text: Path, *settings: str, **flags: object):
    return prepare_job(load_config(None, {"model": str(model), "text": str(text), **flags}, [*SETTINGS, *settings]))


def test_the_loss_fits_the_model(make_other: Callable[..., Path], text_folder: Path, pixels: Path) -> None:
    found = {}
    for architecture, text in (("BertModel", text_folder), ("BertForMaskedLM", text_folder), ("CLIPModel", pixels)):
        found[architecture] = _job(make_other(architecture), text).config.loss
    assert found == {"BertModel": "hidden", "BertForMaskedLM": "kl", "CLIPModel": "hidden"}


@pytest.mark.parametrize(
    ("architecture", "settings", "flags", "message"),
    [
        ("BertModel", ["loss=kl"], {}, "loss: BertModel cannot be measured by kl. Use hidden"),
        ("BertForMaskedLM", ["loss=nll"], {}, "cannot be measured by nll. Use kl or topk_kl or hidden"),
        ("BertModel", [], {"constraints": ["kv_bytes <= 0.5x"]}, "kv_bytes: this model does not generate"),
        ("BertModel", [], {"constraints": ["latency_ms <= 3"]}, "latency_ms"),
        ("BertModel", ["search.method=nsga2"], {"objectives": ["nll", "params"]}, "objectives: nll needs a model"),
        (
            "BertModel",
            ["search.evolution.training=[64]", "training.batch_sequences=1"],
            {},
            "only causal language models are trained, and",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_other: Callable[..., Path],
    text_folder: Path,
    architecture: str,
    settings: list[str],
    flags: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        _job(make_other(architecture), text_folder, *settings, **flags)


@pytest.mark.parametrize(("architecture", "longest"), [("BertModel", 63), ("RobertaForMaskedLM", 62)])
def test_text_fits_the_positions(make_other: Callable[..., Path], text_folder: Path, architecture, longest) -> None:
    """RoBERTa numbers positions from the one after padding, which is 0 here."""
    with pytest.raises(UserError, match=f"reads at most {longest} tokens, found 64"):
        _job(make_other(architecture, max_position_embeddings=63), text_folder)


def test_the_likelihood_of_labels_needs_labels(make_other: Callable[..., Path], text_folder: Path) -> None:
    model = make_other("BertForSequenceClassification", num_labels=3)
    with pytest.raises(UserError, match="loss: nll needs labels, and the examples have none"):
        _job(model, text_folder, "loss=nll")


def test_towers_have_one_budget_and_costs_of_their_own_positions(make_other: Callable[..., Path]) -> None:
    model = make_other("CLIPModel")
    space, _ = allocator.inspect(model)
    towers = {unit.name.partition(".")[0] for unit in space.units}
    assert towers == {"text_model", "vision_model"}
    assert [unit.block for unit in space.units] == [0, 0, 1, 1, 2, 2, 3, 3]
    shapes = read_checkpoint(model).shapes
    positions = {"text_model": 12, "vision_model": 5}  # four patches and a class
    for unit in space.units:
        tokens = positions[unit.name.partition(".")[0]]
        matrices = sum(
            shape[0] * shape[1] for name, shape in shapes.items() if name.startswith(unit.name) and len(shape) == 2
        )
        scores = 2 * tokens * shapes[f"{unit.name}.q_proj.weight"][0] if unit.part == "attention" else 0
        assert unit.others["prefill_macs"][0] == tokens * (matrices + scores)
    assert space.fixed["prefill_macs"] == 0


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize(
    "architecture", ["ViTForImageClassification", pytest.param("CLIPModel", marks=pytest.mark.slow)]
)
def test_workers_measure_other_examples_as_one_process_does(
    make_other: Callable[..., Path], pixels: Path, tmp_path: Path, architecture: str
) -> None:
    model = make_other(architecture, **({"num_labels": 5} if "Classification" in architecture else {}))
    plans = []
    for workers in (0, 1):
        result = allocator.search(
            model, target=0.4, workers=workers, name=f"run{workers}", runs_dir=tmp_path, text=pixels, settings=SETTINGS
        )
        plans.append((result.folder / "plan.json").read_bytes())
    assert plans[0] == plans[1]
    out = tmp_path / "hf"
    allocator.export(tmp_path / "run0", "hf", out, model=model)
    verification = Python(["verify.py", tmp_path / "run0" / "checkpoint"], out)
    said = "".join(verification.communicate())
    assert verification.returncode == 0, said
    with pytest.raises(UserError, match="takes plans of causal language models, and this one is of"):
        allocator.export(tmp_path / "run0", "torch-pruning", tmp_path / "other", model=model)
    page = (tmp_path / "run0" / "report.html").read_text(encoding="utf-8")
    assert "perplexity" not in page
    assert ("accuracy" in page) == ("Classification" in architecture)


def test_compare_and_a_plan_alone(make_other: Callable[..., Path], pixels: Path, tmp_path: Path) -> None:
    model = make_other("ViTModel")
    found = allocator.compare(
        model, target=0.5, rules=["uniform"], workers=0, name="c", runs_dir=tmp_path, text=pixels, settings=SETTINGS
    )
    assert found.measured["dense"]["hidden"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(UserError, match="ecoflap needs the likelihood of text"):
        allocator.compare(
            model,
            target=0.5,
            rules=["ecoflap"],
            pattern="unstructured",
            workers=0,
            name="d",
            runs_dir=tmp_path,
            text=pixels,
            settings=SETTINGS,
        )
    result = allocator.search(
        model, target=0.4, workers=0, name="run", runs_dir=tmp_path, text=pixels, settings=SETTINGS
    )
    folder = tmp_path / "again"
    allocator.prune(result.plan, folder, model=model, text=pixels)
    assert (folder / "model.safetensors").read_bytes() == (result.checkpoint / "model.safetensors").read_bytes()


def test_a_configuration_with_few_keys_is_read_with_defaults(make_other: Callable[..., Path], tmp_path: Path) -> None:
    """As those of SigLIP on the hub, whose towers name little more than what differs from the defaults."""
    shutil.copytree(make_other("CLIPModel"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] = {k: v for k, v in config["text_config"].items() if k != "attention_dropout"}
    del config["vision_config"]["num_channels"]
    path.write_text(json.dumps(config))
    settings = read_checkpoint(tmp_path / "model").settings
    assert settings["vision_config"]["num_channels"] == 3
