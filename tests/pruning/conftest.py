"""A tiny model resolved and pruned at every level, once per session."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from allocator.core.space import SearchSpace
from allocator.model.checkpoint.headers import Checkpoint, read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import Layout, resolve_layout
from allocator.model.family.schema import Attention, Experts
from allocator.model.family.space import build_space
from allocator.model.live.load import load_model
from allocator.model.live.walk import BlockWalker
from allocator.model.open import open_model
from allocator.pruning.calibration.build import prune_on_dense_inputs
from allocator.pruning.calibration.problem import Calibration
from allocator.pruning.pruners.protocol import LocalPruner, PrunerSpec
from allocator.pruning.pruners.registry import make_pruner


@dataclass(frozen=True)
class Case:
    """A model, its space, and its levels from dense inputs."""

    checkpoint: Checkpoint
    layout: Layout
    space: SearchSpace
    pruner: LocalPruner
    tokens: torch.Tensor
    compact: dict[str, Any]

    def walker(self) -> BlockWalker:
        """Return a freshly loaded dense model."""
        return BlockWalker(load_model(self.checkpoint), self.layout)

    def calibration(self, checkpoint: Checkpoint | None = None) -> Calibration:
        """Return a freshly loaded dense model with the calibration text."""
        checkpoint = checkpoint or self.checkpoint
        return Calibration(
            walker=self.walker(),
            checkpoint=checkpoint,
            layout=self.layout,
            space=self.space,
            pruner=self.pruner,
            examples=Examples.from_ids(self.tokens),
        )


def _tokens(seed: int, sequences: int, length: int) -> torch.Tensor:
    return torch.randint(0, 128, (sequences, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def tokens():
    """Makes random token ids: ``tokens(seed, sequences, length)``."""
    return _tokens


@pytest.fixture(scope="session")
def make_case():
    """Resolves and prunes a model folder: ``make_case(folder, "structured", "obs")``."""

    def make(
        folder: Path,
        pattern: str,
        name: str,
        attention: Attention = "kv_groups",
        bias: bool = False,
        experts: Experts = "inside",
    ) -> Case:
        checkpoint, family = open_model(folder)
        layout = resolve_layout(family, checkpoint, attention, experts)
        space = build_space(layout, checkpoint, pattern, 0.5, bias=bias)
        whole = "reconstruction" if experts == "whole" else None
        pruner, tokens = make_pruner(PrunerSpec(name=name, bias=bias, experts=whole), pattern), _tokens(1, 9, 32)
        walker = BlockWalker(load_model(checkpoint), layout)
        compact = dict(
            prune_on_dense_inputs(
                Calibration(
                    walker=walker,
                    checkpoint=checkpoint,
                    layout=layout,
                    space=space,
                    pruner=pruner,
                    examples=Examples.from_ids(tokens),
                )
            )
        )
        return Case(checkpoint, layout, space, pruner, tokens, compact)

    return make


@pytest.fixture(scope="session")
def structured(make_case, tiny_model) -> Case:
    return make_case(tiny_model, "structured", "obs")


@pytest.fixture(scope="session")
def structured_qwen2(make_case, tiny_qwen2) -> Case:
    return make_case(tiny_qwen2, "structured", "obs")


@pytest.fixture(scope="session")
def structured_bf16(make_case, tiny_model_bf16) -> Case:
    return make_case(tiny_model_bf16, "structured", "obs")


@pytest.fixture(scope="session")
def structured_opt(make_case, make_model) -> Case:
    """Its feed-forward network is no module of its own, and works on all tokens of a batch at once."""
    return make_case(make_model("opt"), "structured", "obs")


@pytest.fixture(scope="session")
def unstructured_opt(make_case, make_model) -> Case:
    return make_case(make_model("opt"), "unstructured", "sparsegpt")


@pytest.fixture(scope="session")
def unstructured(make_case, tiny_model) -> Case:
    return make_case(tiny_model, "unstructured", "wanda")


@pytest.fixture(scope="session")
def sparsegpt(make_case, tiny_model_bf16) -> Case:
    return make_case(tiny_model_bf16, "unstructured", "sparsegpt")


@pytest.fixture(scope="session")
def n_m(make_case, tiny_model) -> Case:
    return make_case(tiny_model, "n:m", "sparsegpt")


@pytest.fixture(scope="session")
def broken_weight(tiny_model, tmp_path_factory) -> Checkpoint:
    """The tiny model with one weight that is not a number."""
    folder = tmp_path_factory.mktemp("broken") / "model"
    shutil.copytree(tiny_model, folder)
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        name = "model.layers.1.mlp.down_proj.weight"
        if name in tensors:
            tensors[name][0, 0] = float("nan")
            save_file(tensors, path, metadata={"format": "pt"})
    return read_checkpoint(folder)
