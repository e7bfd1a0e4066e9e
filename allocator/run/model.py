"""The dense model of a run: its checkpoint, the layout of its units, and the search space with every cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from allocator.core.errors import UserError
from allocator.core.files import fingerprint
from allocator.core.latency import LatencyTable
from allocator.core.space import SearchSpace
from allocator.model.checkpoint.headers import Checkpoint, locate
from allocator.model.data.examples import Examples
from allocator.model.data.read import read_tokens
from allocator.model.data.text import LIBRARY
from allocator.model.data.windows import Coverage, describe_coverage
from allocator.model.family.layout import Layout, resolve_layout
from allocator.model.family.serving_costs import Workload, add_serving_costs
from allocator.model.family.space import build_space
from allocator.model.open import open_model
from allocator.run.config.run import RunConfig

_OFFSET = ("roberta", "xlm-roberta", "camembert")
"""Model types whose positions begin after that of padding."""


def read_model(config: RunConfig) -> tuple[Checkpoint, Layout, SearchSpace]:
    """Read a model's headers and build its search space. No weight is loaded.

    Raises:
        UserError: The model, its family or a setting of the ladders cannot be used.
    """
    if config.target is not None and not 0.0 < config.target < 1.0:
        raise UserError(f"target: expected a share in (0, 1), found {config.target}. 0.5 removes half of the units")
    checkpoint, family = open_model(locate(config.model), config.family)
    _check_ladders(config)
    ladder, structured = config.ladder, config.pattern == "structured"
    layout = resolve_layout(family, checkpoint, ladder.attention, ladder.experts if structured else "inside")
    build = partial(
        build_space,
        layout,
        checkpoint,
        config.pattern,
        ladder=ladder.sparsities,
        align=ladder.align,
        patterns=ladder.patterns,
        bias=config.pruner.bias,
    )
    space = build(target=0.5 if config.target is None else config.target)
    if config.target is None:  # ladders are centred on the share that a bound on parameters comes to
        limits = [bound.limit(space) for bound in config.bounds if bound.name == "params"]
        share = min([1 - (limit - space.fixed["params"]) / space.unit_params for limit in limits], default=0.5)
        space = build(target=min(max(share, 0.0), 1.0))
    return checkpoint, layout, with_serving_costs(config, checkpoint, layout, space)


def with_serving_costs(config: RunConfig, checkpoint: Checkpoint, layout: Layout, space: SearchSpace) -> SearchSpace:
    """Return a space with the costs of serving the configured workload."""
    work = config.workload
    table = None if work.latency is None else LatencyTable.load(work.latency)
    return add_serving_costs(space, layout, checkpoint, Workload(work.batch, work.prompt, work.generate), table)


def fingerprint_ladders(space: SearchSpace) -> str:
    """Return the hash of all that pruned weights depend on: the units and what each level keeps, but no other cost."""
    return fingerprint([space.pattern, *([u.name, u.kind, u.total, u.kept, u.params, u.group] for u in space.units)])


def check_length(checkpoint: Checkpoint, length: int, key: str) -> None:
    """Check that a model reads sequences of a length.

    Raises:
        UserError: They are too long. ``key`` names the setting.
    """
    settings = checkpoint.settings or checkpoint.config
    longest = settings.get("max_position_embeddings") if checkpoint.kind.reads == "text" else None
    if longest is not None and str(checkpoint.config.get("model_type")) in _OFFSET:
        longest -= int(settings["pad_token_id"]) + 1
    if longest is not None and length > longest:
        raise UserError(f"{key}: the model reads at most {longest} tokens, found {length}")


def read_texts(
    texts: Mapping[str, Path | None], checkpoint: Checkpoint, wanted: dict[str, int], length: int
) -> dict[str, Examples]:
    """Read several texts by name. Every split takes sequences of each in turn.

    Raises:
        UserError: A split holds too few tokens.
    """
    count = len(texts)
    if count == 1:
        return read_tokens(next(iter(texts.values())), checkpoint, wanted, length)
    packed = {split: np.empty((tokens // length, length), dtype=np.int64) for split, tokens in wanted.items()}
    coverage: dict[str, dict[str, Coverage]] = {split: {} for split in wanted}
    for index, (name, text) in enumerate(texts.items()):
        shares = {split: len(rows[index::count]) * length for split, rows in packed.items()}
        try:
            read = read_tokens(text or Path(LIBRARY), checkpoint, shares, length)
        except UserError as error:
            raise UserError(f"domains.{name}: {error}") from None
        for split, rows in packed.items():
            rows[index::count] = read[split].inputs["input_ids"]
            coverage[split][name] = read[split].coverage[""]
    return {split: replace(Examples.from_ids(rows), coverage=coverage[split]) for split, rows in packed.items()}


def describe_texts(tokens: Mapping[str, Examples]) -> list[str]:
    """Say how much of every text the splits hold; see :func:`~allocator.model.data.windows.describe_coverage`."""
    names = dict.fromkeys(name for examples in tokens.values() for name in examples.coverage)
    return [
        line
        for name in names
        for line in describe_coverage({split: examples.coverage[name] for split, examples in tokens.items()}, name)
    ]


def _check_ladders(config: RunConfig) -> None:
    """Raise if settings of the ladders and the pattern exclude each other."""
    ladder, patterns = config.ladder, ", ".join(config.ladder.patterns)
    if config.pattern == "n:m" and ladder.sparsities is not None:
        raise UserError(
            f"ladder.sparsities: the levels of n:m are those of ladder.patterns, {patterns}. "
            "Leave ladder.sparsities out, or use --pattern unstructured"
        )
    if config.pattern == "n:m" and config.search.rounds > 1:
        raise UserError(
            f"search.rounds: every round halves the steps of ladders, and those of n:m are the patterns "
            f"{patterns}. Leave search.rounds out, or use --pattern unstructured"
        )
    if ladder.attention == "query_heads" and config.pattern != "structured":
        raise UserError(
            f"ladder.attention: query_heads serves structured pruning, and the pattern is {config.pattern}. "
            "Leave it out"
        )
