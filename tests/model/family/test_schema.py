import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from allocator.core.errors import UserError
from allocator.core.space import SearchSpace
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.draft import Covered, draft_family, list_coverage
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_families_folder, find_family, load_family, load_shipped_families
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.model.live.stream import StreamedWalker
from allocator.model.live.walk import BlockWalker
from allocator.model.live.write import read_tensors
from allocator.pruning.calibration.statistics import KINDS
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner, pruners_for
from allocator.testing.problems import unit_problem

OLD_FALCON = {"new_decoder_architecture": False, "num_ln_in_parallel_attn": None}
MODELS = {
    "llama": ("llama", {"num_hidden_layers": 3}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, bfloat16": ("llama", {"dtype": "bfloat16"}),
    "llama, every bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, one KV head each": ("llama", {"num_key_value_heads": 4}),
    "llama, sharded": ("llama", {"shards": True}),
    "llama, wide heads": ("llama", {"head_dim": 12}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 8}),
    "granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5}),
    "starcoder2": ("starcoder2", {}),
    "phi3": ("phi3", {"tie_word_embeddings": False}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False}),
    "falcon": ("falcon", {}),
    "falcon, old, with biases": ("falcon", {**OLD_FALCON, "num_kv_heads": 4, "multi_query": False, "bias": True}),
    "falcon, one key": ("falcon", {**OLD_FALCON, "multi_query": True}),
    "opt": ("opt", {}),
    "opt, bfloat16, sharded": ("opt", {"dtype": "bfloat16", "shards": True}),
    "opt, narrow embeddings, norms behind": ("opt", {"word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "opt, narrow embeddings, untied": ("opt", {"word_embed_proj_dim": 24, "tie_word_embeddings": False}),
    "opt, no biases": ("opt", {"enable_bias": False}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 8}),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, make_model):
    kind, overrides = MODELS[request.param]
    return make_model(kind, **overrides)


def _resolve(folder, pattern="structured", target=0.5, **settings):
    checkpoint = read_checkpoint(folder)
    layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint)
    return checkpoint, layout, build_space(layout, checkpoint, pattern, target, **settings)


def _levels(checkpoint, layout, space, pruner):
    """Prune from made-up statistics, for only shapes and counts matter here."""
    outputs = {sub_block.name: (sub_block.output, sub_block.width) for sub_block in layout.sub_blocks}
    compact = {}
    for unit in space.units:
        module, width = outputs.get(unit.name, (unit.name, 1)) if space.pattern == "structured" else (unit.name, 1)
        weight = read_tensors(checkpoint, [f"{module}.weight"])[f"{module}.weight"]
        statistics = KINDS[pruner.need](weight.shape[1], weight.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            statistics.add(torch.randn(200, weight.shape[1]))
        compact[unit.name] = unit_problem(unit, weight, statistics, width=width).solve(pruner)
    return compact


def _allocations(space, seed=0, count=4):
    rng = np.random.default_rng(seed)
    return [
        space.dense,
        space.sparsest,
        *(tuple(int(rng.integers(unit.num_levels)) for unit in space.units) for _ in range(count)),
    ]


def _saved(folder):
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            yield from ((name, file.get_tensor(name)) for name in file.keys())


def test_structured_costs_are_what_torch_counts(model, tmp_path):
    checkpoint, layout, space = _resolve(model)
    compact = _levels(checkpoint, layout, space, make_pruner(PrunerSpec(name="obs"), "structured"))
    for number, allocation in enumerate(_allocations(space)):
        out = tmp_path / str(number)
        assert save_pruned(allocation, checkpoint, layout, space, compact.__getitem__, out) == space.cost(allocation)
        assert sum(tensor.numel() for _, tensor in _saved(out)) == space.cost(allocation)
        loaded = load_model(read_checkpoint(out))
        assert sum(parameter.numel() for parameter in loaded.parameters()) == space.cost(allocation)
        linears = [module for module in loaded.modules() if isinstance(module, nn.Linear)]
        assert sum(module.weight.numel() for module in linears) == space.cost(allocation, "macs")


def test_unstructured_costs_are_the_nonzeros_on_disk(model, tmp_path):
    checkpoint, layout, space = _resolve(model, "unstructured", 0.6)
    compact = _levels(checkpoint, layout, space, make_pruner(PrunerSpec(name="magnitude"), "unstructured"))
    matrices = {f"{unit.name}.weight" for unit in space.units}
    for number, allocation in enumerate(_allocations(space)):
        out = tmp_path / str(number)
        assert save_pruned(allocation, checkpoint, layout, space, compact.__getitem__, out) == space.cost(allocation)
        counted = sum(int(t.count_nonzero()) if name in matrices else t.numel() for name, t in _saved(out))
        assert counted == space.cost(allocation)
        assert space.cost(allocation, "macs") == space.cost(space.dense, "macs")


@pytest.mark.parametrize("pattern", ["structured", "unstructured", pytest.param("n:m", marks=pytest.mark.slow)])
def test_what_is_switched_in_is_what_is_saved(model, tmp_path, pattern):
    """In place, in the checkpoint, and for structured units in dense shapes: the same logits."""
    checkpoint, layout, space = _resolve(model, pattern)
    compact = _levels(checkpoint, layout, space, make_pruner(PrunerSpec(), pattern))
    live = load_model(checkpoint)
    switchboard = LevelSwitch(live, layout, Assembler(checkpoint, layout, space, compact.__getitem__, live))
    tokens = torch.arange(24).view(2, 12)
    for number, allocation in enumerate(_allocations(space)):
        found = []
        for wide in (True, False):
            for unit, level in zip(space.units, allocation, strict=True):
                switchboard.set(unit.name, level, wide)
            found.append(live(tokens).logits)
        save_pruned(allocation, checkpoint, layout, space, compact.__getitem__, tmp_path / str(number))
        saved = load_model(read_checkpoint(tmp_path / str(number)))(tokens).logits
        torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(saved, found[1], rtol=0, atol=1e-6)


def test_a_walk_is_the_model(model):
    checkpoint, layout, _ = _resolve(model)
    live = load_model(checkpoint)
    tokens = torch.arange(48).view(2, 24)
    expected = live(tokens).logits
    for walker in (BlockWalker(live, layout), StreamedWalker(checkpoint, layout)):
        hidden = walker.embed(Examples.from_ids(tokens))
        for index in range(len(layout.blocks)):
            with walker.loaded(index):
                hidden = walker.run(index, hidden)
        torch.testing.assert_close(walker.logits(hidden), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(walker.logits(hidden[0]), expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", pruners_for("n:m"))
def test_costs_of_n_m_are_the_nonzeros_on_disk(tiny_model_bf16, tmp_path, name):
    checkpoint, layout, space = _resolve(tiny_model_bf16, "n:m", patterns=["3:4", "2:4", "0:4"])
    compact = _levels(checkpoint, layout, space, make_pruner(PrunerSpec(name=name), "n:m"))
    for number, allocation in enumerate(_allocations(space)):
        out = tmp_path / str(number)
        assert save_pruned(allocation, checkpoint, layout, space, compact.__getitem__, out) == space.cost(allocation)
        saved = dict(_saved(out))
        for unit, level in zip(space.units, allocation, strict=True):
            kept = (saved[f"{unit.name}.weight"] != 0).view(-1, 4).sum(1)
            assert (kept == (4, 3, 2, 0)[level]).all()
        assert space.cost(allocation, "macs") == space.cost(space.dense, "macs")


def test_dense_cost_is_the_whole_model_with_tied_tensors_once(model):
    _, _, space = _resolve(model)
    loaded = load_model(read_checkpoint(model))
    assert space.cost(space.dense) == sum(parameter.numel() for parameter in loaded.parameters())


def test_default_ladders(tiny_model):
    _, _, space = _resolve(tiny_model)
    assert [unit.name for unit in space.units[:2]] == ["model.layers.0.self_attn", "model.layers.0.mlp"]
    attention, mlp = space.units[:2]
    assert (attention.kind, attention.part, attention.kept) == ("kv_groups", "attention", (2, 1, 0))
    assert (mlp.kind, mlp.part, mlp.kept) == ("channels", "mlp", (48, 42, 36, 30, 24, 18, 12, 6, 0))
    assert [unit.block for unit in space.units] == [0, 0, 1, 1, 2, 2]
    assert all(unit.params[-1] == 0 for unit in space.units)

    _, _, space = _resolve(tiny_model, "unstructured", 0.5)
    assert len(space.units) == 3 * 7
    assert [round(u, 3) for u in map(space.units[0].sparsity, range(space.units[0].num_levels))] == [
        0.0,
        *[round(round(32 * s) / 32, 3) for s in (0.2, 0.275, 0.35, 0.425, 0.5, 0.575, 0.65, 0.725, 0.8)],
    ]


def test_ladders_as_asked_for(tiny_model):
    _, _, space = _resolve(tiny_model, ladder=[0.25, 0.6, 1.0], align=16)
    assert space.units[0].kept == (2, 1, 0)
    assert space.units[1].kept == (48, 32, 16, 0)


def test_ladders_of_n_m(tiny_model):
    _, _, space = _resolve(tiny_model, "n:m")
    assert (space.pattern, len(space.units)) == ("n:m", 3 * 7)
    assert {unit.group for unit in space.units} == {4}
    assert {unit.sparsity(level) for unit in space.units for level in range(unit.num_levels)} == {0.0, 0.5, 0.75}
    assert all(unit.params == unit.kept and set(unit.macs) == {unit.total} for unit in space.units)
    assert SearchSpace.from_json(space.to_json()) == space

    _, _, space = _resolve(tiny_model, "n:m", patterns=["5:8", "0:8"])
    assert {unit.group for unit in space.units} == {8}
    assert space.units[0].kept == (1024, 640, 0)


def test_widths_that_groups_do_not_divide(tiny_model):
    name = r"model\.layers\.0\.self_attn\.q_proj"
    with pytest.raises(
        UserError,
        match=rf"rows of {name} hold 32 weights, which is not a multiple of the group size 3.*ladder\.patterns=",
    ):
        _resolve(tiny_model, "n:m", patterns=["1:3"])


def test_layout(tiny_qwen2):
    _, layout, _ = _resolve(tiny_qwen2)
    assert layout.blocks == ("model.layers.0", "model.layers.1")
    assert layout.tail == ("model.norm", "lm_head")
    attention, mlp = layout.sub_blocks[2:]
    assert attention.name == "model.layers.1.self_attn"
    assert attention.inputs == tuple(
        (f"{attention.name}.{p}_proj", rows, 0) for p, rows in (("q", 16), ("k", 8), ("v", 8))
    )
    assert (attention.output, attention.width, attention.total) == (f"{attention.name}.o_proj", 16, 2)
    assert (mlp.output, mlp.width, mlp.total) == ("model.layers.1.mlp.down_proj", 1, 48)


def test_blocks_are_in_order_beyond_ten(make_model):
    _, layout, _ = _resolve(make_model(num_hidden_layers=11))
    assert layout.blocks == tuple(f"model.layers.{number}" for number in range(11))


@pytest.fixture
def family_with(tmp_path):
    """Writes the Llama family with some keys changed."""

    def write(**changes):
        data = yaml.safe_load((find_families_folder() / "llama.yaml").read_text())
        path = tmp_path / "family.yaml"
        path.write_text(yaml.safe_dump({**data, **changes}))
        return path

    return write


def test_an_uncovered_matrix_is_named(tiny_model, family_with):
    family = find_family("llama", family_with(skip=["lm_head"]))
    with pytest.raises(
        UserError, match=r"matrix model\.embed_tokens \[128, 32\].*Name the matrix in a unit, or list it"
    ):
        resolve_layout(family, read_checkpoint(tiny_model))


def test_a_matrix_that_no_unit_holds_is_named(tiny_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    extra = {"model.layers.1.mlp.experts": torch.zeros(2, 3, 4)}
    save_file({**load_file(folder / "model.safetensors"), **extra}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"matrix model\.layers\.1\.mlp\.experts \[2, 3, 4\]"):
        resolve_layout(find_family("llama"), read_checkpoint(folder))


def test_a_missing_module_is_named_with_what_there_is(tiny_model, family_with):
    units = {"mlp": {"kind": "channels", "inputs": ["mlp.gate_up_proj"], "output": "mlp.down_proj"}}
    family = find_family("llama", family_with(units=units))
    with pytest.raises(UserError, match=r"names model\.layers\.0\.mlp\.gate_up_proj.*lacks.*mlp\.gate_proj\.weight"):
        resolve_layout(family, read_checkpoint(tiny_model))


def test_blocks_that_match_nothing_are_named(tiny_model, family_with):
    family = find_family("llama", family_with(blocks="transformer.h.{block}"))
    with pytest.raises(UserError, match=r"transformer\.h\.\{block\}.*matches no module"):
        resolve_layout(family, read_checkpoint(tiny_model))


def test_items_must_divide_rows(tiny_model, tmp_path):
    checkpoint = read_checkpoint(tiny_model)
    checkpoint = replace(checkpoint, config={**checkpoint.config, "num_key_value_heads": 3})
    with pytest.raises(UserError, match="which 3 kv_groups do not divide"):
        resolve_layout(find_family("llama"), checkpoint)


def test_unknown_model_types_are_named_with_those_known():
    with pytest.raises(
        UserError, match=r"no family file serves the model type 'mamba'; known: .*deepseek_v2, .*llama, mistral"
    ):
        find_family("mamba")


def test_a_family_of_another_model_type_is_refused(family_with):
    with pytest.raises(UserError, match=r"serves .*'mistral'.* and the model is of type 'llama'"):
        find_family("llama", family_with(model_types=["mistral"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"blockz": "x"}, "blockz: Extra inputs"),
        ({"schema": 2}, "schema: "),
        ({"blocks": "layers"}, "blocks: "),
        ({"units": {"attention": {"kind": "heads"}}}, r"units\.attention: "),
        ({"units": {"mlp": {"kind": "channels", "inputs": [], "output": "o"}}}, r"units\.mlp\.channels\.inputs: "),
        ({"skip": None}, "skip: "),
    ],
)
def test_a_family_file_with_a_wrong_key_names_it(family_with, changes, message):
    with pytest.raises(UserError, match=f"family: .*family.yaml: {message}"):
        load_family(family_with(**changes))


@pytest.mark.parametrize(("content", "message"), [("a: [", "not YAML"), ("", "file: "), ("- 1", "file: ")])
def test_a_file_that_is_no_family_is_refused(tmp_path, content, message):
    path = tmp_path / "family.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_family(path)


def test_a_missing_family_file_is_named(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load_family(tmp_path / "family.yaml")


def test_models_from_before_grouped_queries_have_one_group_per_head(make_model):
    checkpoint = read_checkpoint(make_model("llama", num_key_value_heads=4))
    config = {key: value for key, value in checkpoint.config.items() if key != "num_key_value_heads"}
    old = replace(checkpoint, config=config)
    layout = resolve_layout(find_family("llama"), old)
    assert {sub_block.total for sub_block in layout.sub_blocks if sub_block.kind == "kv_groups"} == {4}


def test_a_tail_that_the_model_lacks_is_named(make_model):
    checkpoint = read_checkpoint(make_model("llama"))
    family = find_family("llama").model_copy(update={"tail": ["model.nrom", "lm_head"]})
    with pytest.raises(UserError, match=r"tail names model\.nrom, .*did you mean 'model\.norm'"):
        resolve_layout(family, checkpoint)


DRAFTED = {"gpt_neox": ("by_part", "by_group"), "falcon": ("by_part", "by_group")}


OF_THEIR_OWN = ("mixtral", "deepseek_v2", "deepseek_v3")
"""Names that no draft understands: it says so, or a person sees it."""

DECODERS = [kind for kind, family in load_shipped_families().items() if family.tail]


@pytest.mark.parametrize("kind", [kind for kind in DECODERS if kind not in OF_THEIR_OWN])
def test_a_draft_finds_what_the_shipped_file_says(make_model, tmp_path, kind):
    """All but what shapes do not tell: how rows of a fused matrix lie, and which attributes count heads."""
    model = make_model(kind, **({"tie_word_embeddings": False} if kind in ("phi3", "gpt_neox") else {}))
    checkpoint = read_checkpoint(model)
    path = tmp_path / "family.yaml"
    path.write_text(draft_family(checkpoint).replace(*DRAFTED.get(kind, ("", ""))))
    drafted, shipped = load_family(path), find_family(kind)
    tail = list(resolve_layout(shipped, checkpoint).tail)
    skip = {name.removesuffix("?") for name in shipped.skip if not name.endswith("?") or kind == "qwen2_moe"}
    assert (drafted.blocks, drafted.tail, set(drafted.skip)) == (shipped.blocks, tail, skip)
    for part, unit in shipped.units.items():
        if part == "mlp" and kind == "qwen3_moe":
            unit = unit.model_copy(update={"shared": None})  # which its file has for Qwen 2
        assert drafted.units[part] == (unit.model_copy(update={"counts": []}) if part == "attention" else unit)
    assert resolve_layout(drafted, checkpoint).blocks == resolve_layout(shipped, checkpoint).blocks


@pytest.mark.parametrize("kind", OF_THEIR_OWN)
def test_a_draft_finds_experts_and_their_router(make_model, kind):
    text = draft_family(read_checkpoint(make_model(kind)))
    around = "block_sparse_moe" if kind == "mixtral" else "mlp"
    assert f"    router: {around}.gate\n    experts: {around}.experts\n" in text
    assert ("each has w1, w2, w3. Say at the end of the file which are down_proj, gate_proj, up_proj:" in text) == (
        kind == "mixtral"
    )
    assert ("shared: {kind: channels, inputs: [mlp.shared_experts.gate_proj" in text) == (kind != "mixtral")


def test_what_covers_each_matrix(tiny_model, family_with):
    checkpoint = read_checkpoint(tiny_model)
    found = {
        each.module: each for each in list_coverage(checkpoint, find_family("llama", family_with(skip=["lm_head"])))
    }
    assert found["model.embed_tokens"] == Covered("model.embed_tokens", (128, 32), 1, None)
    assert found["model.layers.{block}.mlp.down_proj"] == Covered(
        "model.layers.{block}.mlp.down_proj", (32, 48), 3, "mlp"
    )
    assert {each.by for each in found.values()} == {"attention", "mlp", None}
    assert {each.module for each in list_coverage(checkpoint, None)} == found.keys()


def test_a_family_that_leaves_out_what_follows_the_blocks_is_refused(tiny_model):
    checkpoint = read_checkpoint(tiny_model)
    layout = resolve_layout(find_family("llama").model_copy(update={"tail": ["lm_head"]}), checkpoint)
    with pytest.raises(
        UserError, match=r"the tail \('lm_head',\) do not compute what LlamaForCausalLM does. Name in 'tail'"
    ):
        BlockWalker(load_model(checkpoint), layout).check(Examples.from_ids(torch.arange(16)[None]))
