"""Prunable sub-blocks of a model: their matrices, and the rows and columns that one item owns."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.checks import check_heads, read_num_heads
from allocator.model.family.schema import (
    EXPERT_INPUTS,
    EXPERT_OUTPUT,
    Attention,
    Channels,
    Experts,
    Family,
    KvGroups,
    Mixture,
    Part,
    split_names,
)


class Rows(NamedTuple):
    """Rows of a matrix that items own. Item i owns rows [start + i·rows, start + (i+1)·rows)."""

    module: str
    rows: int
    start: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SubBlock:
    """A prunable sub-block of one block, with concrete module names.

    It holds ``total`` items (channels, KV groups or query heads). Item i owns the rows of input modules that
    ``inputs`` states, and columns [i·width, (i+1)·width) of the output module. A fused matrix has one entry in
    ``inputs`` per part, and the entries cover all its rows. Query heads own no rows of key and value. These rows are
    kept until the last head is removed. Each run of ``group`` query heads shares a KV group, and every run loses the
    same number of heads. ``counts`` are attributes of ``parent`` that are proportional to the number of items.

    ``modules_removed`` are the modules to remove when no item is left. Usually this is one module, and the
    sub-block has its name. If a sub-block has no module of its own, the output projection and the modules that lead to
    it are removed. Then the sub-block has the name of the module that holds its matrices. If only the block holds them
    all, it has the name of the output projection.

    A whole expert owns one row of the router and its matrices in ``experts``. At least ``least`` experts stay, or none.
    ``routed`` names the module of the mixture. The mixture adds up the outputs of several sub-blocks: its experts, and
    the network that every token passes in addition, if there is one. Either all experts are one sub-block with whole
    experts as items, or each expert is a sub-block with channels as items.
    """

    name: str
    modules_removed: tuple[str, ...]
    kind: str
    part: Part
    block: int
    total: int
    inputs: tuple[Rows, ...]
    output: str
    width: int
    group: int | None = None
    counts: tuple[str, ...] = ()
    cached: str | None = None
    routed: str | None = None
    experts: tuple[tuple[str, ...], ...] = ()
    least: int = 0
    used: Fraction = Fraction(1)
    """Share of the tokens that pass the sub-block, if the router divides tokens evenly."""

    @property
    def modules(self) -> tuple[str, ...]:
        """Its matrices, the output projection last."""
        return (*self.rows, *itertools.chain(*self.experts)) if self.experts else (*self.rows, self.output)

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each input module that one item owns."""
        rows: dict[str, int] = {}
        for own in self.inputs:
            rows[own.module] = rows.get(own.module, 0) + own.rows
        return rows

    @property
    def parent(self) -> str:
        """The innermost module that holds all its matrices: that of the sub-block, or the block."""
        return _find_parent(self.modules)

    @property
    def removal(self) -> dict[str, str]:
        """The stand-in of each removed module; see :func:`~allocator.model.live.modeling_pruned.remove`."""
        if len(self.modules_removed) == 1:
            return {self.modules_removed[0]: self.part}
        inner = "attention" if self.part == "attention" else "input"
        return {module: "output" if module == self.output else inner for module in self.modules_removed}

    def owns(self, tensor: str) -> bool:
        """Whether a tensor belongs to the sub-block and is removed with it."""
        return any(tensor.startswith(f"{module}.") for module in self.modules_removed)


def resolve_sub_blocks(
    family: Family, block: str, index: int, checkpoint: Checkpoint, attention: Attention, experts: Experts
) -> tuple[list[SubBlock], list[SubBlock]]:
    """Return the sub-blocks of one block, and its mixtures of experts. Items of a mixture are whole experts."""
    sub_blocks: list[SubBlock] = []
    mixtures: list[SubBlock] = []
    for part, spec in family.units.items():
        if isinstance(spec, Mixture) and (f"{block}.{spec.router}.weight" in checkpoint.shapes or spec.dense is None):
            mixtures.append(_build_mixture(part, spec, block, index, checkpoint))
            sub_blocks += _build_mixture_parts(mixtures[-1], spec, family, block, checkpoint, experts)
        else:
            own = spec.dense if isinstance(spec, Mixture) else spec
            assert own is not None
            sub_blocks.append(_build_sub_block(part, own, family, block, index, checkpoint, attention))
    return sub_blocks, mixtures


def _build_mixture_parts(
    mixture: SubBlock, spec: Mixture, family: Family, block: str, checkpoint: Checkpoint, experts: Experts
) -> list[SubBlock]:
    """Return the sub-blocks of a mixture: the experts, together or one by one, and the network for all tokens."""
    around = _find_parent(mixture.modules_removed)
    own = (
        [mixture]
        if experts == "whole"
        else [_build_expert(mixture, number, checkpoint) for number in range(mixture.total)]
    )
    if spec.shared is not None and any(f"{block}.{name}.weight" in checkpoint.shapes for name in spec.shared.names):
        own.append(_build_sub_block(mixture.part, spec.shared, family, block, mixture.block, checkpoint, "kv_groups"))
    return [replace(sub_block, routed=around) for sub_block in own]


def _build_mixture(part: Part, spec: Mixture, block: str, index: int, checkpoint: Checkpoint) -> SubBlock:
    """Return a mixture as one sub-block with whole experts as items."""
    router, name = f"{block}.{spec.router}", f"{block}.{spec.experts}"
    for module in (router, f"{name}.0.{EXPERT_OUTPUT}"):
        if f"{module}.weight" not in checkpoint.shapes:
            near = ", ".join(sorted(n for n in checkpoint.shapes if n.startswith(f"{block}."))[:12])
            raise UserError(
                f"family: unit {part!r} looks for {module}, which {checkpoint.architecture} lacks. It has {near}. "
                "Experts are looked for one by one: save a model that stacks them with transformers' save_pretrained, "
                "and say under 'renamed' what the files call their gate_proj, up_proj and down_proj"
            )
    total = checkpoint.shapes[f"{router}.weight"][0]
    experts = tuple(
        tuple(f"{name}.{number}.{matrix}" for matrix in (*EXPERT_INPUTS, EXPERT_OUTPUT)) for number in range(total)
    )
    shapes = {tuple(checkpoint.shapes.get(f"{module}.weight", ()) for module in expert) for expert in experts}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in next(iter(shapes))):
        raise UserError(f"family: {router} has {total} rows, and there are not as many experts of one shape in {name}")
    groups, least = _read_routing(checkpoint, total)
    return SubBlock(
        name=name,
        modules_removed=(router, name),
        kind="experts",
        part=part,
        block=index,
        total=total,
        inputs=(Rows(router, 1),),
        output=name,
        width=1,
        group=total // groups if groups > 1 else None,
        experts=experts,
        least=least,
        used=Fraction(int(checkpoint.config["num_experts_per_tok"]), total),
    )


def _read_routing(checkpoint: Checkpoint, total: int) -> tuple[int, int]:
    """Return the router's number of groups of experts, and the smallest number of experts that must stay."""
    picked = int(checkpoint.config["num_experts_per_tok"])
    groups = int(checkpoint.config.get("n_group") or 1)
    if total % groups:
        raise UserError(
            f"family: {total} experts of {checkpoint.architecture} do not divide into {groups} groups (n_group)"
        )
    # the router scores a group by its two best experts
    each = -(-picked // int(checkpoint.config.get("topk_group") or 1))
    return groups, groups * max(each, 2) if checkpoint.config.get("n_group") else picked


def _build_expert(mixture: SubBlock, number: int, checkpoint: Checkpoint) -> SubBlock:
    """Return one expert with channels as items."""
    *inputs, output = mixture.experts[number]
    return SubBlock(
        name=f"{mixture.name}.{number}",
        modules_removed=(f"{mixture.name}.{number}",),
        kind="channels",
        part=mixture.part,
        block=mixture.block,
        total=checkpoint.shapes[f"{output}.weight"][1],
        inputs=tuple(Rows(module, 1) for module in inputs),
        output=output,
        width=1,
        used=mixture.used,
    )


def _find_parent(modules: Iterable[str]) -> str:
    """Return the innermost module that holds all given modules."""
    return os.path.commonpath([module.replace(".", "/") for module in modules]).replace("/", ".")


def _build_sub_block(
    part: Part,
    spec: KvGroups | Channels,
    family: Family,
    block: str,
    index: int,
    checkpoint: Checkpoint,
    attention: Attention,
) -> SubBlock:
    inputs, output = [_choose_module(block, names, checkpoint) for names in spec.inputs], f"{block}.{spec.output}"
    for module in (*inputs, output):
        if f"{module}.weight" not in checkpoint.shapes:
            near = ", ".join(sorted(n for n in checkpoint.shapes if n.startswith(f"{block}."))[:12])
            raise UserError(
                f"family: unit {part!r} names {module}, which {checkpoint.architecture} lacks. It has {near}"
            )
    columns = checkpoint.shapes[f"{output}.weight"][1]
    rows = {module: checkpoint.shapes[f"{module}.weight"][0] for module in inputs}
    if isinstance(spec, KvGroups) and (spec.fused is not None or len(inputs) == 3):
        check_heads(inputs, output, spec.fused is not None, checkpoint)
    total = columns if isinstance(spec, Channels) else _count_groups(spec, checkpoint, rows[inputs[0]], columns)
    parent = _find_parent([*inputs, output])
    others = [f"{block}.{m}" for other, its in family.units.items() if other != part for m in its.names]
    alone = parent != block and not any(module.startswith(f"{parent}.") for module in others)
    runs = {module: inputs.count(module) if isinstance(spec, Channels) else 1 for module in inputs}
    for module, size in {**rows, output: columns}.items():
        if size % (total * runs.get(module, 1)):
            raise UserError(f"family: {size} rows or columns of {module} do not divide into {total} {spec.kind}")
    sub_block = SubBlock(
        name=parent if alone else output,
        modules_removed=_list_modules_removed(part, spec, block, parent if alone else None, checkpoint),
        kind=spec.kind,
        part=part,
        block=index,
        total=total,
        inputs=_assign_rows(spec, inputs, rows, total, columns // total),
        output=output,
        width=columns // total,
        counts=tuple(spec.counts) if isinstance(spec, KvGroups) else (),
        cached=f"{block}.{spec.cache}" if isinstance(spec, KvGroups) and spec.cache else None,
    )
    if isinstance(spec, Channels):
        return sub_block
    _check_norms(sub_block, spec, block, checkpoint)
    return _with_query_heads(sub_block, spec, checkpoint) if attention == "query_heads" else sub_block


def _list_modules_removed(
    part: Part, spec: KvGroups | Channels, block: str, parent: str | None, checkpoint: Checkpoint
) -> tuple[str, ...]:
    """Return the modules to remove with a sub-block, in forward order. ``parent`` is its own module, if it has one."""
    inputs, output = [_choose_module(block, names, checkpoint) for names in spec.inputs], f"{block}.{spec.output}"
    modules_removed = [f"{block}.{name}" for name in spec.remove]
    if not modules_removed and parent is not None:
        return (parent,)
    if not modules_removed:
        leading = [_find_parent(inputs)] if part == "attention" else [*dict.fromkeys(inputs)]
        modules_removed = [*leading, output]
    held = {removed: [m for m in (*inputs, output) if f"{m}.".startswith(f"{removed}.")] for removed in modules_removed}
    wrong = [removed for removed, modules in held.items() if not modules]
    wrong += sorted({*inputs, output} - {module for modules in held.values() for module in modules})
    if len(modules_removed) > 1 and output not in modules_removed:
        wrong.append(output)
    # removed attention needs a module that returns as attention does and keeps its place in the cache
    if part == "attention":
        wrong += [module for module in modules_removed if module in (block, *inputs)]
    if wrong:
        raise UserError(
            f"family: unit {part!r} of {checkpoint.architecture} cannot be removed by taking out "
            f"{', '.join(modules_removed)}, because of {wrong[0]}. Name under 'remove' the modules that are removed "
            "with the unit: for attention, the module that holds queries, keys and values, and the output projection "
            "itself if it lies beside modules that stay"
        )
    return tuple(modules_removed)


def _check_norms(sub_block: SubBlock, spec: KvGroups, block: str, checkpoint: Checkpoint) -> None:
    """Raise if a norm over all heads is not listed under ``norms``, or a listed one does not exist."""
    named = {f"{block}.{norm}.weight" for norm in spec.norms}
    if missing := sorted(named - checkpoint.shapes.keys()):
        raise UserError(
            f"family: norms of unit {sub_block.part!r} names {missing[0]}, which {checkpoint.architecture} lacks"
        )
    widths = {(own.rows * sub_block.total,) for own in sub_block.inputs}
    odd = sorted(
        name
        for name, shape in checkpoint.shapes.items()
        if sub_block.total > 1 and sub_block.owns(name) and name.endswith(".weight") and shape in widths
    )
    if odd:
        raise UserError(
            f"family: {odd[0]} of {checkpoint.architecture} is as long as all heads together. If it norms queries or "
            f"keys, name it in unit {sub_block.part!r} under 'norms': attention then goes as a whole or not at all. "
            "If it lies behind the output projection, name under 'remove' what goes without it"
        )


def _choose_module(block: str, names: str, checkpoint: Checkpoint) -> str:
    """Return the first module of the names ``a | b`` that a block has; if it has none, the first name."""
    modules = [f"{block}.{name}" for name in split_names(names)]
    return next((module for module in modules if f"{module}.weight" in checkpoint.shapes), modules[0])


def _assign_rows(
    spec: KvGroups | Channels, inputs: Sequence[str], rows: Mapping[str, int], total: int, width: int
) -> tuple[Rows, ...]:
    """Return the rows of input modules that items own. An item of fused attention owns ``width`` query rows."""
    if isinstance(spec, Channels):
        run = {module: rows[module] // inputs.count(module) for module in inputs}
        before = [inputs[:place].count(module) for place, module in enumerate(inputs)]
        return tuple(
            Rows(module, run[module] // total, run[module] * number)
            for module, number in zip(inputs, before, strict=True)
        )
    if spec.fused is None:
        return tuple(Rows(module, rows[module] // total) for module in inputs)
    module = inputs[0]
    each = rows[module] // total
    if spec.fused == "by_group":
        return (Rows(module, each),)
    rest = (each - width) // 2
    return Rows(module, width), Rows(module, rest, total * width), Rows(module, rest, total * (width + rest))


def _with_query_heads(sub_block: SubBlock, spec: KvGroups, checkpoint: Checkpoint) -> SubBlock:
    """Return the same attention with query heads as items."""
    if spec.fused is not None:
        raise UserError(
            f"ladder.attention: queries, keys and values of {checkpoint.architecture} are one matrix, so query heads "
            "cannot be removed alone. Use --set ladder.attention=kv_groups"
        )
    if spec.norms:
        raise UserError(
            f"ladder.attention: {checkpoint.architecture} has norms over all heads, so query heads cannot be "
            "removed alone. Use --set ladder.attention=kv_groups, which removes attention as a whole"
        )
    heads = read_num_heads(checkpoint)
    if heads == sub_block.total:
        raise UserError(
            f"ladder.attention: {checkpoint.architecture} has one query head per KV group, so query heads cannot be "
            "removed alone. Use --set ladder.attention=kv_groups"
        )
    group, odd = divmod(heads, sub_block.total)
    query, rows, _ = sub_block.inputs[0]
    if odd or rows % group or sub_block.width % group:
        raise UserError(
            f"family: {heads} query heads in {sub_block.total} KV groups do not divide the {rows} rows of {query} and "
            f"the {sub_block.width} columns of {sub_block.output} that each group has"
        )
    return replace(
        sub_block,
        kind="query_heads",
        total=heads,
        inputs=(Rows(query, rows // group),),
        width=sub_block.width // group,
        group=group,
    )


def _count_groups(spec: KvGroups, checkpoint: Checkpoint, rows: int, columns: int) -> int:
    """Count KV groups, from the rows of the first input and the columns of the output projection.

    Groups that cannot be removed separately count as one.
    """
    if spec.norms:
        return 1
    if spec.fused is not None:
        return (rows - columns) * read_num_heads(checkpoint) // (2 * columns)
    # configurations older than grouped queries state only the number of query heads
    return int(checkpoint.config.get("num_key_value_heads") or read_num_heads(checkpoint))


def list_removed_lengths(sub_block: SubBlock, checkpoint: Checkpoint) -> set[int]:
    """Return the lengths of vectors that lose entries with a sub-block. The width of a head is left out."""
    lengths = {sub_block.width * sub_block.total, *(own.rows * sub_block.total for own in sub_block.inputs)}
    if sub_block.kind == "channels":
        return lengths
    heads = read_num_heads(checkpoint)
    return {*lengths, sub_block.total, heads} - {sub_block.width * sub_block.total // heads}
