"""Tiny models, tiny text, synthetic search spaces and a Ray cluster, made once per session."""

from __future__ import annotations

import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_worker_niceness", "0")  # or workers starve beside the other processes of the tests

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st

from allocator.core.space import SearchSpace
from allocator.testing import spaces as synthetic

settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("tests")

LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 12,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
SHAPES = {
    "gpt2": {"n_embd": 32, "n_inner": 48, "n_layer": 2, "n_head": 4, "n_positions": 1024},
    "falcon": {
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
        "ffn_hidden_size": 48,
        "num_ln_in_parallel_attn": 2,
    },
    "bert": {"is_decoder": True},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "mlp_only_layers": [0],
    },
    "qwen3_moe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24},
    "glm4_moe": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT | {"num_experts_per_tok": 3, "n_group": 2, "topk_group": 1},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2, "dropout": 0.0},
}
"""What makes a model of some families tiny where they have names of their own for it."""

VOCABULARY = 128
NUM_FILES = 240
WORDS = (
    "tensor block level unit cost share layer token model prune search plan front budget ladder seed head value "
    "return import while under above never often paper river green small quick every other after before begin"
).split()


def _document(rng: np.random.Generator) -> str:
    def name() -> str:
        return "_".join(rng.choice(WORDS, size=2))

    lines = [f"# {' '.join(rng.choice(WORDS, size=12)).capitalize()}."]
    for _ in range(10):
        lines += [
            f"def {name()}({name()}, {name()}={rng.integers(100)}):",
            f'    """{" ".join(rng.choice(WORDS, size=8)).capitalize()}."""',
            f"    return {name()} + [{rng.integers(1000)}] * {rng.integers(10)}",
            "",
        ]
    return "\n".join(lines) + "\n"


LONGEST = (
    "test_end_to_end.py",
    "pool/test_jobs.py",
    "pool/test_dispatch.py",
    "test_families.py",
    "run/test_rounds.py",
    "test_examples.py",
    "model/family/test_schema.py",
    "pool/test_nodes.py",
    "pool/test_actor_pool.py",
    "cli/test_fronts.py",
    "test_other_models.py",
    "cli/test_commands.py",
    "searchers/test_fronts.py",
    "interop/test_contract.py",
    "evaluation/test_expansion.py",
    "searchers/test_contract.py",
    "interop/targets/test_hf_padded.py",
    "testing/test_suites.py",
)
"""Files that take the longest. They come first, so that no process waits for another at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put what takes longest first."""
    root = Path(__file__).parent
    places = {root / name: place for place, name in enumerate(LONGEST)}
    assert all(path.is_file() for path in places), "a file has moved"
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def make_space() -> Callable[..., SearchSpace]:
    """Makes a space from the parameters of each unit's levels; units are attention and mlp in turn."""
    return synthetic.make_space


@pytest.fixture(scope="session")
def space() -> SearchSpace:
    """Six units in three blocks, with ladders of unequal lengths and steps."""
    return synthetic.make_six_units()


@pytest.fixture(scope="session")
def spaces() -> st.SearchStrategy[SearchSpace]:
    """Strategy of spaces: one to six units, one to five levels, steps of any size."""
    return synthetic.draw_spaces()


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small text files; every split holds more than 4,096 tokens."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        (folder / f"document{number:03}.txt").write_text(_document(rng), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(text_folder: Path) -> Any:
    """A byte-level tokenizer trained on the text folder, with an end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|end|>"],
        initial_alphabet=[*map(chr, range(33, 127)), *"ĊĉĠ"],
        show_progress=False,
    )
    texts = (path.read_text(encoding="utf-8") for path in sorted(text_folder.iterdir())[:40])
    raw.train_from_iterator(texts, trainer)
    assert raw.get_vocab_size() <= VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """Saves a tiny random model with its tokenizer: ``make_model("qwen2", dtype="bfloat16", num_hidden_layers=3)``."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def make(
        kind: str = "llama", *, dtype: str = "float32", seed: int = 0, shards: bool = False, **overrides: Any
    ) -> Path:
        shape = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "initializer_range": 0.2,
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": None,
        }
        if kind in SHAPES:
            known = vars(transformers.AutoConfig.for_model(kind))
            shape = {key: value for key, value in (shape | SHAPES[kind]).items() if key in known}
        config = transformers.AutoConfig.for_model(kind, **{**shape, **overrides})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = transformers.AutoModelForCausalLM.from_config(config)
            for name, parameter in model.named_parameters():
                if name.endswith(".bias") or "norm" in name:
                    parameter.data += 0.2 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp(f"tiny-{kind}-")
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="20KB" if shards else "1GB")
        tokenizer.save_pretrained(folder)
        return folder

    return make


TEXT_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 72,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
IMAGE_TOWER = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 16,
    "patch_size": 8,
}
OTHER_SHAPES = {
    "distilbert": {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "dinov2": {**{k: v for k, v in IMAGE_TOWER.items() if k != "intermediate_size"}, "mlp_ratio": 2},
    "electra": {**TEXT_TOWER, "embedding_size": 24},
}


def _other_shape(kind: str) -> dict[str, Any]:
    """Return what makes a model tiny that does not generate."""
    if kind in OTHER_SHAPES:
        return OTHER_SHAPES[kind]
    if kind in ("clip", "siglip"):
        text = {**TEXT_TOWER, "max_position_embeddings": 12}
        own = {"projection_dim": 20} if kind == "clip" else {}
        vision = IMAGE_TOWER if kind == "clip" else {**IMAGE_TOWER, "hidden_size": 32, "num_attention_heads": 4}
        return {"text_config": text, "vision_config": vision, **own}
    return IMAGE_TOWER if "vi" in kind or "deit" in kind else TEXT_TOWER


@pytest.fixture(scope="session")
def make_other(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[..., Path]:
    """Saves a tiny random model that does not generate: ``make_other("BertForMaskedLM", num_hidden_layers=3)``."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()

    def make(architecture: str, *, dtype: str = "float32", seed: int = 0, **overrides: Any) -> Path:
        own = getattr(transformers, architecture)
        config = own.config_class(**{**_other_shape(own.config_class.model_type), **overrides})
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            model = own(config)
            for parameter in model.parameters():
                noise = 0.2 * torch.randn_like(parameter)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        folder = tmp_path_factory.mktemp(f"tiny-{architecture}-")
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz file of 400 tiny images with a text and a label each."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("pixels") / "pixels.npz"
    np.savez(
        path,
        pixel_values=rng.normal(size=(400, 3, 16, 16)).astype(np.float32),
        input_ids=rng.integers(0, VOCABULARY, (400, 12)),
        labels=rng.integers(0, 5, 400),
    )
    return path


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl file of 400 texts with labels, of which every fifth is short."""
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("labelled") / "labelled.jsonl"
    texts = (" ".join(rng.choice(WORDS, size=4 if number % 5 == 0 else 90)) for number in range(400))
    lines = [json.dumps({"text": text, "label": number % 3}) for number, text in enumerate(texts)]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_model(make_model: Callable[..., Path]) -> Path:
    """A Llama of three blocks in float32, tied embeddings. Read only: copy it before changing it."""
    return make_model("llama", num_hidden_layers=3)


@pytest.fixture(scope="session")
def tiny_model_bf16(make_model: Callable[..., Path]) -> Path:
    """The Llama in bfloat16. Read only."""
    return make_model("llama", num_hidden_layers=3, dtype="bfloat16")


@pytest.fixture(scope="session")
def tiny_qwen2(make_model: Callable[..., Path]) -> Path:
    """A Qwen2 of two blocks, with biases on q, k and v and an untied head. Read only."""
    return make_model("qwen2", tie_word_embeddings=False)


@pytest.fixture(scope="session")
def tiny_qwen3(make_model: Callable[..., Path]) -> Path:
    """A Qwen3 of two blocks, with norms of queries and keys. Read only."""
    return make_model("qwen3")


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """One local Ray cluster of two CPUs for all tests of this process; none of its processes outlives it."""
    import psutil
    import ray

    others = psutil.Process().children()
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    started = [process for process in psutil.Process().children() if process not in others]
    yield
    own = [*started, *(child for process in started for child in process.children(recursive=True))]
    ray.shutdown()
    _, left = psutil.wait_procs(own, timeout=60)
    assert not left
