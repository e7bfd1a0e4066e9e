"""A tiny model with random weights, its engine specification, and executed plans for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allocator.core.budget import Budget
from allocator.core.plan import Plan
from allocator.core.protocols import Request
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.spec import EngineSpec
from allocator.interop.contract import Source
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.space import build_space
from allocator.model.open import open_model
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.levels.store import LevelStore, StoreBuilder
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner

VOCABULARY = 128
LENGTH = 32
"""Tokens of one sequence."""

SEQUENCES = {"calibration": 9, "search": 8, "selection": 4, "test": 4}
"""Sequences of each split."""


def save_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Save a Llama of two blocks with random weights, and return its folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCABULARY,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Bench:
    """What an evaluator is made from.

    Attributes:
        spec: A tiny model with its level store.
        tokens: Random tokens by split.
    """

    spec: EngineSpec
    tokens: Mapping[str, Examples]

    @property
    def space(self) -> SearchSpace:
        """The model's search space."""
        return self.spec.space

    @property
    def store(self) -> LevelStore:
        """The levels of all units."""
        assert self.spec.store is not None
        return self.spec.store

    def draw(self, seed: int) -> Allocation:
        """Return a random allocation."""
        rng = np.random.default_rng(seed)
        return tuple(int(rng.integers(unit.num_levels)) for unit in self.space.units)

    def list_requests(self) -> list[Request]:
        """Return requests for random allocations at two fidelities of two splits, and for the dense model."""
        places = (("search", 64), ("search", 256), ("selection", 128))
        drawn = [(3 * number + member, place) for number, place in enumerate(places) for member in range(3)]
        requests = [Request(allocation=self.draw(seed), tokens=tokens, split=split) for seed, (split, tokens) in drawn]
        return [*requests, Request(allocation=self.space.dense, tokens=256)]


def make_bench(folder: Path, pattern: str = "structured") -> Bench:
    """Save a tiny model in a folder, prune all its levels, and return what an evaluator is made from."""
    checkpoint, family = open_model(save_tiny_model(folder / "model"))
    layout = resolve_layout(family, checkpoint)
    space = build_space(layout, checkpoint, pattern, 0.5)
    tokens = {
        split: Examples.from_ids(np.random.default_rng(seed).integers(1, VOCABULARY, size=(count, LENGTH)))
        for seed, (split, count) in enumerate(SEQUENCES.items())
    }
    pruner = make_pruner(PrunerSpec(), pattern)
    spec = EngineSpec(checkpoint=checkpoint, layout=layout, space=space, pruner=pruner)
    builder = StoreBuilder(folder / "levels", {})
    store = builder.finish(builder.fill(prune_on_dense_inputs(spec.calibration(tokens["calibration"]))))
    return Bench(EngineSpec(checkpoint=checkpoint, layout=layout, space=space, store=store, pruner=pruner), tokens)


def make_source(folder: Path, pattern: str) -> Source:
    """Save a tiny model, a plan of it that has every level, and its checkpoint; return what exports are made from."""
    bench = make_bench(folder, pattern)
    spec, space = bench.spec, bench.space
    allocation = tuple(number % unit.num_levels for number, unit in enumerate(space.units))
    checkpoint = spec.checkpoint
    identity = {"id": "tiny", "architecture": checkpoint.architecture, "fingerprint": checkpoint.fingerprint}
    pruner = spec.pruner
    assert pruner is not None
    plan = Plan(
        model=identity,
        space=space,
        allocation=allocation,
        budget=Budget(params=space.cost(allocation)),
        pruner={"name": pruner.name, **pruner.settings()},
        measured={},
        provenance={"run": checkpoint.fingerprint, "searcher": "by hand", "seed": 0, "versions": {}},
    )
    plan.save(folder / "plan.json")
    save_pruned(allocation, checkpoint, spec.layout, space, bench.store, folder / "checkpoint")
    return Source(plan=plan, checkpoint=checkpoint, layout=spec.layout, executed=folder / "checkpoint")
