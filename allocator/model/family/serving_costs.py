"""Costs of serving a model: multiply-accumulates, bytes of weights and of the KV cache, and times from a table.

The costs are for one workload: a batch of prompts, and a number of tokens to generate after each. A prompt has n
tokens, and the whole context has c = n + generated. Costs per layer and kept item:

    prefill_macs  batch * n * (matrices + n * (query rows + value columns))   stock attention computes all n * n scores
    decode_macs   batch * (matrices + c * (query rows + value columns))       for the last token, which costs most
    kv_bytes      batch * c * (key rows + value rows) * bytes per number
    weight_bytes  parameters * bytes per number

The head runs only on the last token of every prompt, as in generation. Other matrices around the blocks run on every
token. The cache of a layer with a sliding window of w holds w - 1 tokens. Latent attention caches a compressed state.
It computes keys and values from this state again at every step. Removed attention still caches one number for keys and
one for values, to keep its place. A token passes as many experts as its router picks, no matter which experts stay. The
costs assume that a router uses all experts equally often. Masked weights are stored and computed like all others. So
the unstructured and n:m patterns change none of these costs.

Models that do not generate have no decode_macs and no kv_bytes. If they have logits per token, these are counted for
every token. An image counts as many tokens as the model has positions for. So does the text paired with an image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from allocator.core.errors import UserError
from allocator.core.latency import LatencyTable
from allocator.core.space import Cost, SearchSpace, Unit
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.checkpoint.kinds import Kind
from allocator.model.family.layout import Layout, read_hidden_size, retained_matrices, unpruned_matrices
from allocator.model.family.sub_blocks import SubBlock

GENERATING: tuple[Cost, ...] = ("decode_macs", "kv_bytes", "decode_ms", "latency_ms")
"""Costs that apply only to models that generate."""

_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "I8", "U8", "BOOL"), 1),
}


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests that are served at once.

    Attributes:
        batch: Number of sequences.
        prompt: Tokens of each prompt.
        generate: Tokens generated after each prompt.
    """

    batch: int
    prompt: int
    generate: int

    def __str__(self) -> str:
        return f"batch {self.batch}, {self.prompt} tokens and {self.generate} generated"

    @property
    def context(self) -> int:
        """Tokens of each sequence at the end."""
        return self.prompt + self.generate


def add_serving_costs(
    space: SearchSpace, layout: Layout, checkpoint: Checkpoint, work: Workload, table: LatencyTable | None = None
) -> SearchSpace:
    """Add the costs of serving to a space. If there is a latency table, add times too.

    Raises:
        UserError: The table is for other shapes or another workload.
    """
    if table is not None:
        check_timed(layout)
        _check(table, checkpoint, layout, work)
    works = [_fit_workload(sub_block, layout, checkpoint, work) for sub_block in layout.sub_blocks]
    serving = {
        s.name: _Serving(s, checkpoint, own, table, layout.kind)
        for s, own in zip(layout.sub_blocks, works, strict=True)
    }
    if space.pattern == "structured":
        others = [serving[unit.name].costs(unit) for unit in space.units]
        beside: dict[Cost, int] = dict.fromkeys(others[0], 0)
    else:  # masked weights are computed and stored as before
        dense = [serving[sub_block.name].dense() for sub_block in layout.sub_blocks]
        nothing = dict.fromkeys(dense[0], 0)
        by_block = {sub_block.block: own for sub_block, own in zip(layout.sub_blocks, works, strict=True)}
        others = [
            {
                cost: (value,) * unit.num_levels
                for cost, value in {**nothing, **_list_masked_costs(unit, checkpoint, by_block[unit.block])}.items()
                if cost in nothing
            }
            for unit in space.units
        ]
        beside = {cost: sum(each[cost] for each in dense) for cost in dense[0]}
    bytes_ = sum(prod(shape) * count_number_bytes(checkpoint, name) for name, shape in checkpoint.shapes.items())
    fixed: dict[Cost, int] = {**space.fixed, **beside}
    if layout.kind.generates:
        for cost in ("prefill_macs", "decode_macs"):
            fixed[cost] += work.batch * space.fixed["macs"]
        around = sum(
            prod(checkpoint.shapes[f"{module}.weight"])
            for module in unpruned_matrices(layout, checkpoint, space.pattern)
        )
        fixed["prefill_macs"] += work.batch * (work.prompt - 1) * around
    else:
        fixed["prefill_macs"] += work.batch * work.prompt * space.fixed["macs"]
    fixed["weight_bytes"] = bytes_ - sum(each["weight_bytes"][0] for each in others)
    if table is not None:
        fixed["prefill_ms"] += table.fixed.prefill_ns
        fixed["decode_ms"] += table.fixed.decode_ns
        fixed["latency_ms"] += table.fixed.prefill_ns + work.generate * table.fixed.decode_ns
    units = tuple(replace(unit, others=each) for unit, each in zip(space.units, others, strict=True))
    return replace(space, units=units, fixed=fixed)


def describe_shape(sub_block: SubBlock, checkpoint: Checkpoint) -> str:
    """Describe what decides the time of a sub-block: its kind, its items, and the rows that one item owns.

    For example ``channels of 704: 1+1 in, 1 out, hidden 192``.
    """
    rows = "+".join(str(own.rows) for own in sub_block.inputs)
    staying = "".join(f", {rows} rows stay" for rows in [_count_retained_rows(sub_block, checkpoint)] if rows)
    window = _find_window(checkpoint.config, sub_block.block) if sub_block.part == "attention" else None
    seen = "" if window is None else f", window {window}"
    hidden = checkpoint.shapes[f"{sub_block.modules[-1]}.weight"][0]
    if sub_block.experts:
        channels = checkpoint.shapes[f"{sub_block.modules[-1]}.weight"][1]
        picked = sub_block.used * sub_block.total
        return f"{sub_block.kind} of {sub_block.total}, {picked} picked: {channels} channels, hidden {hidden}"
    return f"{sub_block.kind} of {sub_block.total}: {rows} in, {sub_block.width} out, hidden {hidden}{staying}{seen}"


def check_timed(layout: Layout) -> None:
    """Check that the time of every sub-block can be measured on its own.

    Raises:
        UserError: Single experts are sub-blocks. Their time depends on the tokens that reach them.
    """
    if {mixture.name for mixture in layout.mixtures} - {sub_block.name for sub_block in layout.sub_blocks}:
        raise UserError(
            "workload.latency: how long an expert takes depends on which tokens reach it, and no table has that. "
            "Use --set ladder.experts=whole, or a bound on params, macs or weight_bytes"
        )


class _Serving:
    """The costs of serving one sub-block."""

    def __init__(
        self, sub_block: SubBlock, checkpoint: Checkpoint, work: Workload, table: LatencyTable | None, kind: Kind
    ) -> None:
        self._sub_block, self._checkpoint, self._work, self._table, self._kind = (
            sub_block,
            checkpoint,
            work,
            table,
            kind,
        )
        self._bytes = count_number_bytes(checkpoint, f"{sub_block.modules[-1]}.weight")

    def costs(self, unit: Unit) -> dict[Cost, tuple[int, ...]]:
        """Return the costs of every level."""
        sub_block, work = self._sub_block, self._work
        scores = self._score_macs
        prefill = work.batch * work.prompt * work.prompt * scores
        seen = self._seen(work.context)
        decode = work.batch * (seen * scores + (seen - 1) * self._expanded_macs)
        levels = range(unit.num_levels)
        found: dict[Cost, tuple[int, ...]] = {
            "prefill_macs": tuple(work.batch * work.prompt * unit.macs[lv] + prefill * unit.kept[lv] for lv in levels),
            "decode_macs": tuple(work.batch * unit.macs[lv] + decode * unit.kept[lv] for lv in levels),
            "weight_bytes": tuple(count * self._item_bytes for count in unit.kept)
            if sub_block.experts
            else tuple(self._bytes * count for count in unit.params),
            "kv_bytes": tuple(self._kv_bytes(count) for count in unit.kept),
        }
        if not self._kind.generates:
            return {cost: ladder for cost, ladder in found.items() if cost not in GENERATING}
        if self._table is not None:
            first, next_ = self._table.ladder(describe_shape(sub_block, self._checkpoint), unit.kept)
            whole = tuple(a + work.generate * b for a, b in zip(first, next_, strict=True))
            found |= {"prefill_ms": first, "decode_ms": next_, "latency_ms": whole}
        return found

    def dense(self) -> dict[Cost, int]:
        """Return the costs of the dense sub-block outside its matrices: scores, cache and time."""
        sub_block, work = self._sub_block, self._work
        macs = work.batch * sub_block.total * self._score_macs
        seen = self._seen(work.context)
        expanded = work.batch * sub_block.total * (seen - 1) * self._expanded_macs
        found = {
            "prefill_macs": macs * work.prompt * work.prompt,
            "decode_macs": macs * seen + expanded,
            "weight_bytes": 0,
            "kv_bytes": self._kv_bytes(sub_block.total),
        }
        if not self._kind.generates:
            return {cost: value for cost, value in found.items() if cost not in GENERATING}
        if self._table is not None:
            ((first,), (next_,)) = self._table.ladder(describe_shape(sub_block, self._checkpoint), (sub_block.total,))
            found |= {"prefill_ms": first, "decode_ms": next_, "latency_ms": first + work.generate * next_}
        return found

    @property
    def _score_macs(self) -> int:
        """Multiply-accumulates of scores and of weighted sums of values, per item, query position and key position."""
        if self._sub_block.part != "attention":
            return 0
        # queries are as wide as values, except in latent attention
        queries = self._sub_block.inputs[0].rows if self._sub_block.cached else self._sub_block.width
        return queries + self._sub_block.width

    @property
    def _item_bytes(self) -> int:
        """Bytes of one whole expert. Its router row may have another data type than its matrices."""
        shapes = self._checkpoint.shapes
        owned = (name for name in shapes if self._sub_block.owns(name))
        return (
            sum(prod(shapes[name]) * count_number_bytes(self._checkpoint, name) for name in owned)
            // self._sub_block.total
        )

    @property
    def _expanded_macs(self) -> int:
        """Multiply-accumulates per item to compute key and value of one token from its cached state."""
        if self._sub_block.cached is None:
            return 0
        shapes = self._checkpoint.shapes
        return sum(own.rows * shapes[f"{own.module}.weight"][1] for own in self._sub_block.inputs[1:])

    def _kv_bytes(self, kept: int) -> int:
        sub_block, work = self._sub_block, self._work
        if sub_block.part != "attention":
            return 0
        rows = (sum(sub_block.rows.values()) - sub_block.width) * kept or _count_retained_rows(
            sub_block, self._checkpoint
        )
        if sub_block.cached is not None:
            rows = self._checkpoint.shapes[f"{sub_block.cached}.weight"][0]
        rows = rows if kept else 2  # removed attention keeps its place with one key and one value number
        return work.batch * self._held(work.context) * self._bytes * rows

    def _held(self, context: int) -> int:
        window = _find_window(self._checkpoint.config, self._sub_block.block)
        return context if window is None else min(context, window - 1)

    def _seen(self, context: int) -> int:
        """Number of keys that the last token of a context attends to, including its own."""
        return min(context, self._held(context) + 1)


def _fit_workload(sub_block: SubBlock, layout: Layout, checkpoint: Checkpoint, work: Workload) -> Workload:
    """Return the workload of a sub-block. An image, or its text, has as many tokens as its tower has positions."""
    if layout.kind.reads == "text":
        return work
    tower = layout.blocks[sub_block.block].partition(".")[0] if layout.towers else ""
    positions = [
        shape[-2]
        for name, shape in checkpoint.shapes.items()
        if "position_embedding" in name and name.startswith(tower)
    ]
    return replace(work, prompt=positions[0] if positions else work.prompt)


def _list_masked_costs(unit: Unit, checkpoint: Checkpoint, work: Workload) -> dict[Cost, int]:
    """Return the costs of a masked matrix, which are the same at every level."""
    return {
        "prefill_macs": work.batch * work.prompt * unit.macs[0],
        "decode_macs": work.batch * unit.macs[0],
        "weight_bytes": unit.total * count_number_bytes(checkpoint, f"{unit.name}.weight"),
    }


def _check(table: LatencyTable, checkpoint: Checkpoint, layout: Layout, work: Workload) -> None:
    """Check that a table was made for this workload, and for a model of this size."""
    settings = table.settings
    measured = Workload(settings.batch, settings.prompt, settings.generate)
    if measured != work:
        raise UserError(
            f"workload.latency: the table is for {measured}, and the run asks for {work}. Make one for this workload "
            "with 'allocator latency', or set workload.batch, workload.prompt and workload.generate as in the table"
        )
    if table.model != (own := describe_size(checkpoint, layout)):
        raise UserError(
            f"workload.latency: the table is for a model of {table.model}, and this one has {own}. "
            "Make one of this model with 'allocator latency'"
        )


def describe_size(checkpoint: Checkpoint, layout: Layout) -> dict[str, int]:
    """Describe the sizes that decide the time outside sub-blocks."""
    return {
        "hidden": read_hidden_size(layout, checkpoint),
        "vocabulary": int(checkpoint.config["vocab_size"]),
        "blocks": len(layout.blocks),
    }


def count_number_bytes(checkpoint: Checkpoint, name: str) -> int:
    """Return the bytes of one number of a tensor."""
    kind = checkpoint.dtypes[name]
    if kind not in _BYTES:
        raise UserError(
            f"model: {checkpoint.folder}: {name} is of type {kind}, whose size is not known. Convert it to BF16"
        )
    return _BYTES[kind]


def _count_retained_rows(sub_block: SubBlock, checkpoint: Checkpoint) -> int:
    """Count the rows of matrices that are kept until the last item is removed."""
    return sum(checkpoint.shapes[f"{module}.weight"][0] for module in retained_matrices(sub_block, checkpoint))


def _find_window(config: Mapping[str, Any], block: int) -> int | None:
    """Return the number of tokens that a layer attends to; None if it attends to all."""
    window = config.get("sliding_window")
    if window is None or config.get("use_sliding_window") is False:
        return None
    kinds = config.get("layer_types")
    if kinds is not None:
        return int(window) if kinds[block] == "sliding_attention" else None
    return int(window) if block >= int(config.get("max_window_layers") or 0) else None
