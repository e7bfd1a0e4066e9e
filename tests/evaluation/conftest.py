"""Engines on tiny models, with their level stores."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from stores import create_store

from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec
from allocator.model.checkpoint.headers import read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.schema import find_family
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.model.live.walk import BlockWalker
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.pruners.protocol import PrunerSpec
from allocator.pruning.pruners.registry import make_pruner

LENGTH = 32


def _token_ids(seed: int, sequences: int) -> Examples:
    return Examples.from_ids(np.random.default_rng(seed).integers(0, 128, size=(sequences, LENGTH)))


@pytest.fixture(scope="session")
def splits() -> dict[str, Examples]:
    """Random token ids by split, 32 to a sequence."""
    counts = {"calibration": 9, "search": 11, "selection": 6, "test": 7}
    return {split: _token_ids(seed, count) for seed, (split, count) in enumerate(counts.items())}


@pytest.fixture(scope="session")
def make_spec(tmp_path_factory, splits):
    """Prunes a model folder into a store and returns what an engine is made from."""

    def make(folder, pattern="structured", attention="kv_groups", bias=False) -> EngineSpec:
        checkpoint = read_checkpoint(folder)
        layout = resolve_layout(find_family(checkpoint.config["model_type"]), checkpoint, attention)
        space = build_space(layout, checkpoint, pattern, 0.5, bias=bias)
        pruner = make_pruner(PrunerSpec(bias=bias), pattern)
        walker = BlockWalker(load_model(checkpoint), layout)
        levels = prune_on_dense_inputs(
            Calibration(
                walker=walker,
                checkpoint=checkpoint,
                layout=layout,
                space=space,
                pruner=pruner,
                examples=splits["calibration"].to_tensors(),
            )
        )
        store = create_store(tmp_path_factory.mktemp("store") / "levels", {}, levels)
        return EngineSpec(checkpoint=checkpoint, layout=layout, space=space, store=store, pruner=pruner)

    return make


@pytest.fixture(scope="session")
def structured(make_spec, tiny_model) -> EngineSpec:
    return make_spec(tiny_model)


@pytest.fixture(scope="session")
def unstructured(make_spec, tiny_qwen2) -> EngineSpec:
    return make_spec(tiny_qwen2, "unstructured")


@pytest.fixture(params=["structured", "unstructured", "structured in bfloat16"])
def spec(request) -> EngineSpec:
    own = request.getfixturevalue(request.param.split()[0])
    return dataclasses.replace(own, dtype="bfloat16") if "bfloat16" in request.param else own


@pytest.fixture
def engine(spec, splits) -> Engine:
    return Engine(spec, splits)
