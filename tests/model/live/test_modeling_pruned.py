"""Sub-blocks that shrink or go in models of any layout, against dense models in float64 with zeros in their place."""

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors import safe_open

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint, read_checkpoint
from allocator.model.family.draft import draft_family
from allocator.model.family.layout import Layout, resolve_layout
from allocator.model.family.schema import find_family, load_family, load_shipped_families
from allocator.model.family.space import build_space
from allocator.model.live.load import build_shaped_model, load_model
from allocator.model.live.modeling_pruned import counted, recount, remove
from allocator.model.live.write import read_tensors
from allocator.model.open import open_model
from allocator.pruning.calibration.statistics import KINDS
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner
from allocator.testing.problems import unit_problem

BERT = {
    "attention": {
        "kind": "kv_groups",
        **{part: f"attention.self.{part}" for part in ("query", "key", "value")},
        "output": "attention.output.dense",
        "remove": ["attention.self", "attention.output.dense"],
        "counts": ["self.num_attention_heads", "self.all_head_size"],
    },
    "mlp": {"kind": "channels", "inputs": ["intermediate.dense"], "output": "output.dense"},
}
VIT = {
    "attention": {
        "kind": "kv_groups",
        **{part: f"attention.{part[0]}_proj" for part in ("query", "key", "value")},
        "output": "attention.o_proj",
        "counts": ["num_attention_heads"],
    },
    "mlp": {"kind": "channels", "inputs": ["mlp.fc1"], "output": "mlp.fc2"},
}
EMBEDDINGS = ["word_embeddings", "position_embeddings", "token_type_embeddings"]
PATCHES = ["embeddings.cls_token", "embeddings.position_embeddings", "embeddings.patch_embeddings.projection"]
ENCODERS = {
    "bert": ("encoder.layer.{block}", BERT, "pooler.dense", [f"embeddings.{name}" for name in EMBEDDINGS]),
    "roberta": ("encoder.layer.{block}", BERT, "pooler.dense", [f"embeddings.{name}" for name in EMBEDDINGS]),
    "vit": ("layers.{block}", VIT, "pooler.dense", PATCHES),
}
"""By model type: names of the blocks, units, and matrices that stay."""

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def _family(path, kind, blocks, units, head, skip):
    names = {
        "schema": 1,
        "model_types": [kind],
        "blocks": blocks,
        "units": units,
        "tail": [head],
        "skip": [*skip, head],
    }
    path.write_text(yaml.safe_dump(names))
    return load_family(path)


def _noisy(model):
    """Give every bias and norm values that matter."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.double().eval()


@dataclass(frozen=True)
class Encoder:
    """A tiny model without a head."""

    kind: str
    model: Any
    checkpoint: Checkpoint
    layout: Layout


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request, tmp_path_factory):
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    config = transformers.AutoConfig.for_model(
        kind, **SHAPE, **({"image_size": 16, "patch_size": 4} if kind == "vit" else {"vocab_size": 50})
    )
    model = _noisy(transformers.AutoModel.from_config(config))
    config.save_pretrained(folder)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    said = {**json.loads((folder / "config.json").read_text()), "architectures": [type(model).__name__]}
    checkpoint = Checkpoint(
        folder=folder,
        config=said,
        shapes=shapes,
        shards=dict.fromkeys(shapes, ""),
        dtypes=dict.fromkeys(shapes, "F64"),
    )
    layout = resolve_layout(_family(folder / "family.yaml", kind, *ENCODERS[kind]), checkpoint)
    return Encoder(kind, model, checkpoint, layout)


def _entering(kind):
    generator = torch.Generator().manual_seed(0)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64)}
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(3, 50, (2, 9), generator=generator), "attention_mask": mask}


def _kept(sub_block, count):
    return sorted(torch.randperm(sub_block.total, generator=torch.Generator().manual_seed(count)).tolist()[:count])


def _columns(items, width):
    return [item * width + place for item in items for place in range(width)]


@pytest.mark.parametrize("counts", [(3, 40), (1, 0), (0, 17), (0, 0), (4, 48)])
@torch.inference_mode()
def test_a_compact_module_computes_what_the_masked_one_does(encoder, counts):
    """Of attention so many heads are kept, and of the feed-forward network so many channels, in the first block."""
    model, checkpoint, layout = encoder.model, encoder.checkpoint, encoder.layout
    kept = {
        sub_block.name: _kept(sub_block, count) for sub_block, count in zip(layout.sub_blocks[:2], counts, strict=True)
    }
    compact = build_shaped_model(checkpoint, layout, {name: len(items) for name, items in kept.items()}, torch.float64)
    dense = model.state_dict()
    masked, cut = dict(dense), dict(dense)
    for sub_block in layout.sub_blocks[:2]:
        items, key = kept[sub_block.name], f"{sub_block.output}.weight"
        columns = _columns(items, sub_block.width)
        gone = sorted({*range(sub_block.total * sub_block.width)} - {*columns})
        masked[key] = dense[key].index_fill(1, torch.tensor(gone, dtype=torch.long), 0.0)
        cut[key] = dense[key][:, columns]
        for module, rows in sub_block.rows.items():
            for name in (f"{module}.weight", f"{module}.bias"):
                cut[name] = dense[name][_columns(items, rows)]
        if not items:
            masked[f"{sub_block.output}.bias"] = torch.zeros_like(dense[f"{sub_block.output}.bias"])
            cut = {name: tensor for name, tensor in cut.items() if not sub_block.owns(name)}
    compact.load_state_dict(cut)  # all of it, and nothing else
    found = compact(**_entering(encoder.kind)).last_hidden_state
    try:
        model.load_state_dict(masked)
        expected = model(**_entering(encoder.kind)).last_hidden_state
    finally:
        model.load_state_dict(dense)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("counts", [(4, 48), (2, 30), (0, 0)])
def test_costs_are_what_the_compact_module_holds(encoder, counts):
    """Norms and residuals of a sub-block that goes stay, and count."""
    checkpoint, layout, wanted = (
        encoder.checkpoint,
        encoder.layout,
        dict(zip(("attention", "mlp"), counts, strict=True)),
    )
    space = build_space(layout, checkpoint, "structured", 0.5)
    allocation = tuple(unit.kept.index(wanted[unit.part]) for unit in space.units)
    kept = {unit.name: wanted[unit.part] for unit in space.units}
    model = build_shaped_model(checkpoint, layout, kept, torch.float64)
    assert space.cost(allocation) == sum(parameter.numel() for parameter in model.parameters())
    for sub_block in layout.sub_blocks:
        if wanted[sub_block.part] == 0:
            assert not any(sub_block.owns(name) for name, _ in model.named_parameters())


def test_units_have_addresses_in_the_model(encoder):
    names = [sub_block.name for sub_block in encoder.layout.sub_blocks]
    assert len({*names}) == len(names) == 4
    for sub_block in encoder.layout.sub_blocks:
        encoder.model.get_submodule(sub_block.name)
        encoder.model.get_submodule(sub_block.parent)
        for root, part in sub_block.removal.items():
            assert (part == "output") == (root == sub_block.output and len(sub_block.modules_removed) > 1)


@pytest.mark.parametrize("encoder", ["vit"], indirect=True)
def test_what_vit_consists_of(encoder):
    assert [sub_block.modules_removed for sub_block in encoder.layout.sub_blocks[:2]] == [
        ("layers.0.attention",),
        ("layers.0.mlp",),
    ]


@pytest.mark.parametrize("encoder", ["bert", "roberta"], indirect=True)
def test_what_bert_consists_of(encoder):
    attention, mlp = encoder.layout.sub_blocks[:2]
    block = "encoder.layer.0"
    assert (attention.name, attention.parent) == (f"{block}.attention", f"{block}.attention")
    assert attention.removal == {f"{block}.attention.self": "attention", f"{block}.attention.output.dense": "output"}
    assert (mlp.name, mlp.parent) == (f"{block}.output.dense", block)
    assert mlp.removal == {f"{block}.intermediate.dense": "input", f"{block}.output.dense": "output"}
    assert attention.owns(f"{block}.attention.self.key.bias")
    assert not any(sub_block.owns(f"{block}.attention.output.LayerNorm.weight") for sub_block in (attention, mlp))


def test_counts_follow_inside_the_sub_block(encoder):
    sub_block = encoder.layout.sub_blocks[0]
    model = build_shaped_model(encoder.checkpoint, encoder.layout, {sub_block.name: 3}, torch.float64)
    holder = model.get_submodule(sub_block.parent)
    assert (holder if encoder.kind == "vit" else holder.self).num_attention_heads == 3
    if encoder.kind != "vit":
        assert holder.self.all_head_size == 24


def test_a_configuration_that_is_counted_becomes_the_modules_own():
    model = transformers.BertModel(transformers.BertConfig(**SHAPE, vocab_size=50))
    attention = model.encoder.layer[0].attention
    dense = counted(attention, ["self.config.num_attention_heads", "self.config.hidden_size", "self.all_head_size"])
    recount(attention, dense, 3, 4)
    assert (attention.self.config.num_attention_heads, attention.self.config.hidden_size) == (3, 24)
    assert (model.config.num_attention_heads, attention.self.all_head_size) == (4, 24)


@pytest.mark.parametrize("encoder", ["bert", "roberta"], indirect=True)
@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (
            "attention",
            {"remove": []},
            r"attention\.output\.LayerNorm\.weight .*name under 'remove' what goes without it",
        ),
        (
            "attention",
            {"remove": ["attention.self"]},
            r"cannot be removed by taking out .*self, because of .*attention\.output\.dense\.",
        ),
        (
            "attention",
            {"remove": ["attention.self", "attention.output"]},
            r"because of .*attention\.output\.dense\. Name",
        ),
        ("attention", {"remove": ["attention.slef", "attention.output.dense"]}, r"because of .*attention\.slef\."),
        (
            "mlp",
            {"remove": ["intermediate"]},
            r"unit 'mlp' .* cannot be removed by taking out .*intermediate, because of .*output\.dense",
        ),
    ],
)
def test_what_cannot_be_removed_is_named(encoder, tmp_path, part, changes, message):
    blocks, units, head, skip = ENCODERS[encoder.kind]
    units = {**units, part: {**units[part], **changes}}
    family = _family(tmp_path / "family.yaml", encoder.kind, blocks, units, head, skip)
    with pytest.raises(UserError, match=message):
        resolve_layout(family, encoder.checkpoint)


# --- decoders --------------------------------------------------------------------------------------------------


def _cached(model, probe):
    """Return logits token by token, from the fifth on."""
    first = model(probe[:, :5], use_cache=True)
    steps, cache = [first.logits], first.past_key_values
    for position in range(5, probe.shape[1]):
        steps.append(model(probe[:, position : position + 1], past_key_values=cache, use_cache=True).logits)
    return torch.cat(steps, 1)


@pytest.mark.parametrize("kind", [kind for kind, family in load_shipped_families().items() if family.tail])
@torch.inference_mode()
def test_the_cache_has_its_length_without_the_first_attention(make_model, kind):
    checkpoint, family = open_model(make_model(kind))
    model, probe = load_model(checkpoint), torch.arange(24).view(2, 12)
    dense = model(probe, use_cache=False).logits
    for root, part in resolve_layout(family, checkpoint).sub_blocks[0].removal.items():
        remove(model, root, part)
    whole = model(probe, use_cache=False).logits
    assert not torch.allclose(whole, dense, atol=1e-3)
    torch.testing.assert_close(_cached(model, probe), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern", ["structured", "unstructured"])
def test_a_decoder_in_the_layout_of_bert_is_switched_saved_and_reloaded(make_model, tmp_path, pattern):
    folder = make_model("bert")
    checkpoint = read_checkpoint(folder)
    skip = [f"bert.embeddings.{name}" for name in EMBEDDINGS] + ["cls.predictions.transform.dense"]
    family = _family(
        tmp_path / "family.yaml", "bert", "bert.encoder.layer.{block}", BERT, "cls.predictions.decoder", skip
    )
    layout = resolve_layout(family, checkpoint)
    space = build_space(layout, checkpoint, pattern, 0.5)
    pruner = make_pruner(PrunerSpec(name="obs" if pattern == "structured" else "magnitude"), pattern)
    sub_blocks, compact = {sub_block.name: sub_block for sub_block in layout.sub_blocks}, {}
    for unit in space.units:
        sub_block = sub_blocks.get(unit.name) if pattern == "structured" else None
        module, width = (unit.name, 1) if sub_block is None else (sub_block.output, sub_block.width)
        weight = read_tensors(checkpoint, [f"{module}.weight"])[f"{module}.weight"]
        statistics = KINDS[pruner.need](weight.shape[1], weight.device)
        statistics.add(torch.randn(200, weight.shape[1], generator=torch.Generator().manual_seed(0)))
        compact[unit.name] = unit_problem(unit, weight, statistics, width=width).solve(pruner)
    live, probe = load_model(checkpoint), torch.arange(24).view(2, 12)
    dense = live(probe, use_cache=False).logits
    board = LevelSwitch(live, layout, Assembler(checkpoint, layout, space, compact.__getitem__, live))
    for number, allocation in enumerate([space.sparsest, (1,) * len(space.units), (0, 3) * (len(space.units) // 2)]):
        for unit, level in zip(space.units, allocation, strict=True):
            board.set(unit.name, level)
        out = tmp_path / str(number)
        assert save_pruned(allocation, checkpoint, layout, space, compact.__getitem__, out) <= space.cost(allocation)
        with safe_open(out / "model.safetensors", "pt") as file:
            held = sum(file.get_tensor(name).numel() for name in file.keys())
        assert pattern != "structured" or held == space.cost(allocation)
        stock = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True, dtype=torch.float32)
        whole = stock.eval()(probe, use_cache=False).logits
        torch.testing.assert_close(whole, live(probe, use_cache=False).logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(_cached(stock, probe), whole, rtol=1e-4, atol=1e-4)
    for unit in space.units:
        board.set(unit.name, 0)
    assert torch.equal(live(probe, use_cache=False).logits, dense)


def test_the_feed_forward_network_of_opt_passes_its_input_on(make_model):
    checkpoint = read_checkpoint(make_model("opt"))
    layout = resolve_layout(find_family("opt"), checkpoint)
    attention, mlp = layout.sub_blocks[:2]
    assert attention.modules_removed == (attention.name,) == ("model.decoder.layers.0.self_attn",)
    assert mlp.name == mlp.output == "model.decoder.layers.0.fc2"
    assert mlp.removal == {"model.decoder.layers.0.fc1": "input", "model.decoder.layers.0.fc2": "output"}


# --- norms over all heads --------------------------------------------------------------------------------------


def test_with_norms_over_all_heads_attention_goes_as_a_whole(make_model):
    checkpoint = read_checkpoint(make_model("olmo2"))
    layout = resolve_layout(find_family("olmo2"), checkpoint)
    attention = build_space(layout, checkpoint, "structured", 0.5).units[0]
    assert (attention.kind, attention.total, attention.kept) == ("kv_groups", 1, (1, 0))
    with pytest.raises(UserError, match=r"Olmo2ForCausalLM has norms over all heads.*attention=kv_groups"):
        resolve_layout(find_family("olmo2"), checkpoint, "query_heads")


def test_norms_over_all_heads_must_be_named(make_model):
    checkpoint, family = read_checkpoint(make_model("olmo2")), find_family("olmo2")
    unit = family.units["attention"]
    units = {**family.units, "attention": unit.model_copy(update={"norms": []})}
    with pytest.raises(UserError, match=r"self_attn\.k_norm\.weight .*as long as all heads.*under 'norms'"):
        resolve_layout(family.model_copy(update={"units": units}), checkpoint)
    units = {**family.units, "attention": unit.model_copy(update={"norms": ["self_attn.qk_norm"]})}
    with pytest.raises(UserError, match=r"norms of unit 'attention' names .*qk_norm\.weight, which Olmo2"):
        resolve_layout(family.model_copy(update={"units": units}), checkpoint)


# --- what lies around the blocks -------------------------------------------------------------------------------


def test_narrow_embeddings_have_projections_that_count(make_model):
    checkpoint = read_checkpoint(make_model("opt", word_embed_proj_dim=24))
    layout = resolve_layout(find_family("opt"), checkpoint)
    assert layout.tail == ("model.decoder.final_layer_norm", "model.decoder.project_out", "lm_head")
    assert layout.around == ("model.decoder.project_in", "model.decoder.project_out")
    assert build_space(layout, checkpoint, "structured", 0.5).fixed["macs"] == 128 * 24 + 2 * 24 * 32
    text = draft_family(checkpoint)
    assert "entry: [model.decoder.project_in]" in text
    assert "tail: [model.decoder.final_layer_norm, model.decoder.project_out, lm_head]" in text


def test_an_entry_that_the_model_lacks_is_named(make_model):
    checkpoint = read_checkpoint(make_model("opt"))
    family = find_family("opt").model_copy(update={"entry": ["model.decoder.project_in"]})
    with pytest.raises(UserError, match=r"entry names model\.decoder\.project_in, which OPTForCausalLM lacks"):
        resolve_layout(family, checkpoint)
