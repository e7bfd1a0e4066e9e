import json

import pytest
import torch

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.live.load import load_model
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import PRUNERS, make_pruner


def _save(case, allocation, out):
    return save_pruned(allocation, case.checkpoint, case.layout, case.space, case.compact.__getitem__, out)


@pytest.mark.parametrize("name", ["structured", "structured_bf16", "unstructured", "n_m"])
def test_nothing_removed_gives_the_dense_checkpoint(request, name, tmp_path):
    case = request.getfixturevalue(name)
    _save(case, case.space.dense, tmp_path / "out")
    checkpoint = read_checkpoint(tmp_path / "out")
    assert checkpoint.config == case.checkpoint.config
    assert (checkpoint.shapes, checkpoint.dtypes) == (case.checkpoint.shapes, case.checkpoint.dtypes)
    dense, saved = load_model(read_checkpoint(case.checkpoint.folder)), load_model(read_checkpoint(tmp_path / "out"))
    for (key, a), (_, b) in zip(dense.state_dict().items(), saved.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        case.checkpoint.folder / "tokenizer.json"
    ).read_bytes()


def test_stored_data_types_are_kept(structured_bf16, tmp_path):
    case = structured_bf16
    _save(case, tuple(1 for _ in case.space.units), tmp_path / "out")
    assert set(read_checkpoint(tmp_path / "out").dtypes.values()) == {"BF16"}


def test_equal_plans_give_equal_bytes(structured, tmp_path):
    case = structured
    for name in ("a", "b"):
        _save(case, tuple(1 for _ in case.space.units), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / path.name).read_bytes() == path.read_bytes()


def test_the_configuration_lists_what_is_smaller_and_what_is_gone(structured, tmp_path):
    case = structured
    _save(case, (2, 8, 1, 0, 0, 3), tmp_path / "out")
    pruned = json.loads((tmp_path / "out" / "config.json").read_text())["pruned"]
    assert pruned["removed"] == {"model.layers.0.self_attn": "attention", "model.layers.0.mlp": "mlp"}
    assert pruned["shapes"]["model.layers.1.self_attn.q_proj"] == [16, 32]
    assert pruned["shapes"]["model.layers.2.mlp.down_proj"] == [32, 30]
    assert {name.split(".")[2] for name in pruned["shapes"]} == {"1", "2"}


def test_a_sharded_model_stays_sharded(make_case, make_model, tmp_path, tokens):
    case = make_case(make_model(shards=True, seed=2), "structured", "obs")
    _save(case, (2, 4, 1, 8), tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(read_checkpoint(tmp_path / "out").shapes)
    assert torch.isfinite(load_model(read_checkpoint(tmp_path / "out"))(tokens(0, 1, 8)).logits).all()


def test_an_existing_folder_is_never_written_to(structured, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        _save(structured, structured.space.dense, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_failure_leaves_no_folder(structured, tmp_path):
    def broken(unit):
        raise RuntimeError("killed")

    case = structured
    with pytest.raises(RuntimeError, match="killed"):
        save_pruned(
            case.space.sparsest[:1] + (4,) * 5, case.checkpoint, case.layout, case.space, broken, tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_does_not_hold_what_the_plan_says_is_refused(unstructured, tmp_path):
    case = unstructured
    wrong = {name: {"removed_at": torch.zeros_like(c["removed_at"])} for name, c in case.compact.items()}
    with pytest.raises(UserError, match="and the plan says"):
        save_pruned((3,) * 21, case.checkpoint, case.layout, case.space, wrong.__getitem__, tmp_path / "out")


def test_weights_that_were_zero_before_do_not_upset_the_count(make_case, make_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = make_model(seed=3)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][:, ::2] = 0.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    case = make_case(folder, "unstructured", "wanda")
    allocation = (2,) * 14
    counted = _save(case, allocation, tmp_path / "out")
    assert counted <= case.space.cost(allocation)


def test_values_that_were_updated_to_zero_do_not_upset_the_count(n_m, tmp_path):
    case = n_m
    name = case.space.units[0].name
    values = case.compact[name]["values.1"].clone()
    values[:7] = 0.0
    compact = {**case.compact, name: {**case.compact[name], "values.1": values}}
    allocation = (1,) * len(case.space.units)
    counted = save_pruned(allocation, case.checkpoint, case.layout, case.space, compact.__getitem__, tmp_path / "out")
    assert counted == case.space.cost(allocation) - 7


def test_pruners_are_found_by_name_and_pattern():
    for name, pruner in PRUNERS.items():
        for pattern in pruner.patterns:
            assert make_pruner(PrunerSpec(name=name), pattern).name == name
    with pytest.raises(UserError, match="'wanda' does not serve structured pruning; these do: obs"):
        make_pruner(PrunerSpec(name="wanda"), "structured")
