"""The layout of one model: its blocks, their prunable sub-blocks, and the modules that follow the blocks."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from allocator.core.errors import UserError, did_you_mean
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.checkpoint.kinds import CAUSAL, Kind
from allocator.model.family.checks import check_biases, check_depth, check_skipped, check_vectors
from allocator.model.family.schema import Attention, Experts, Family
from allocator.model.family.sub_blocks import SubBlock, list_removed_lengths, resolve_sub_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The prunable parts of one model, by module name.

    Attributes:
        blocks: Module names of the blocks, in order.
        tail: Modules between the last block and the logits. The last one is the head, as the checkpoint names it.
        sub_blocks: Prunable sub-blocks, in model order.
        around: Unpruned matrices outside the sub-blocks. Every token passes through them. They lie before, inside and
            after the blocks.
        kind: The kind of the model.
        towers: Number of blocks of each tower, in order. Empty if all blocks are one chain.
        mixtures: Mixtures of experts. Their items are whole experts, even if channels inside experts are pruned.
    """

    blocks: tuple[str, ...]
    tail: tuple[str, ...]
    sub_blocks: tuple[SubBlock, ...]
    around: tuple[str, ...] = ()
    kind: Kind = CAUSAL
    towers: tuple[int, ...] = ()
    mixtures: tuple[SubBlock, ...] = ()


def apply_family_names(family: Family, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose tensors have the names that a family file uses.

    A causal language model may have been saved from its base class. Then its tensor names lack the first part.
    """
    checkpoint = checkpoint.with_renamed_parts(family.renamed)
    base, _, rest = family.chains[0].partition(".")
    if (
        not checkpoint.kind.generates
        or find_block_numbers(checkpoint, family.chains[0])
        or not find_block_numbers(checkpoint, rest)
    ):
        return checkpoint
    return checkpoint.with_names(
        {name: f"{base}.{name}" for name in checkpoint.shapes if not name.startswith(f"{family.tail[-1]}.")}
    )


def resolve_layout(
    family: Family, checkpoint: Checkpoint, attention: Attention = "kv_groups", experts: Experts = "whole"
) -> Layout:
    """Find the family's modules in a model, and check that they cover every weight matrix.

    Args:
        family: The family file of the model.
        checkpoint: The model.
        attention: Which items attention loses.
        experts: Which items a mixture of experts loses.

    Raises:
        UserError: One of these holds:

            - a named module or a block is missing
            - a matrix is covered by no unit and no ``skip`` line, or by more than one
            - shapes do not divide into items
            - query heads are the items, but each KV group has only one
            - a vector in a sub-block has a length that pruning reduces, and the family file does not name the vector
    """
    shapes, family, kind = checkpoint.shapes, adapt_family(checkpoint, family), checkpoint.kind
    numbers = [find_block_numbers(checkpoint, chain) for chain in family.chains]
    blocks: list[str] = []
    sub_blocks: list[SubBlock] = []
    mixtures: list[SubBlock] = []
    towers: dict[str, Checkpoint] = {}
    for chain, own in zip(family.chains, numbers, strict=True):
        check_depth(chain, own, checkpoint)
        tower = select_tower(checkpoint, chain)
        for number in own:
            blocks.append(chain.format(block=number))
            found, mixed = resolve_sub_blocks(family, blocks[-1], len(blocks) - 1, tower, attention, experts)
            sub_blocks += found
            mixtures += mixed
            towers |= {sub_block.name: tower for sub_block in found}
    if kind.generates and not family.tail:
        raise UserError(
            f"family: {checkpoint.architecture} is a causal language model. Name the modules after the blocks in 'tail'"
        )
    # old configurations leave out keys that have the default value of their class
    absent = kind.generates and f"{family.tail[-1]}.weight" not in shapes
    tied = {family.tail[-1]} if absent and checkpoint.config.get("tie_word_embeddings", True) else set()
    entry, tail = (_drop_absent(names if kind.generates else (), shapes) for names in (family.entry, family.tail))
    for key, module in (*(("entry", module) for module in entry), *(("tail", module) for module in tail)):
        if f"{module}.weight" not in shapes and module not in tied:
            raise UserError(
                f"family: {key} names {module}, which {checkpoint.architecture} "
                f"lacks{did_you_mean(module, _list_outside(checkpoint))}"
            )
    around = tuple(module for module in (*entry, *tail[:-1]) if len(shapes[f"{module}.weight"]) == 2)
    owned = {module for sub_block in sub_blocks for module in sub_block.modules}
    owned |= {f"{block}.{name}" for block in blocks for unit in family.units.values() for name in unit.names}
    skipped = family.skipped(sorted({*itertools.chain(*numbers)}))
    check_skipped({**skipped, **dict.fromkeys({*around} - owned, "tail")}, family.tail, owned, checkpoint)
    check_biases(owned, checkpoint)
    # No check is needed for a sub-block with one item, because it is removed as a whole. None is needed for a router
    # either, because each of its vectors has one value per expert.
    for sub_block in (sub_block for sub_block in sub_blocks if sub_block.total > 1 and not sub_block.experts):
        inside = {name: shape for name, shape in shapes.items() if sub_block.owns(name)}
        check_vectors(
            sub_block.name,
            list_removed_lengths(sub_block, towers[sub_block.name]),
            sub_block.rows,
            sub_block.output,
            skipped,
            inside,
            checkpoint,
        )
    pruned = {module for sub_block in sub_blocks for module in sub_block.modules}
    stems = tuple(f"{block}." for block in blocks)
    matrices = [name for name, shape in shapes.items() if name.startswith(stems) and len(shape) == 2]
    beside = [
        name.removesuffix(".weight") for name in matrices if not any(sub_block.owns(name) for sub_block in sub_blocks)
    ]
    around += tuple(module for module in beside if module not in pruned)
    extents = tuple(map(len, numbers)) if len(numbers) > 1 else ()
    return Layout(
        blocks=tuple(blocks),
        tail=tail,
        sub_blocks=tuple(sub_blocks),
        around=around,
        kind=kind,
        towers=extents,
        mixtures=tuple(mixtures),
    )


def _drop_absent(modules: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Drop optional modules (marked with ``?``) that the model lacks."""
    names = [(module, module.removesuffix("?")) for module in modules]
    return tuple(name for module, name in names if module == name or f"{name}.weight" in shapes)


def adapt_family(checkpoint: Checkpoint, family: Family) -> Family:
    """Adapt the names of a family to a model with a head, or to a base model without one.

    A model with a head puts its base under a prefix: ``encoder.layer.0`` becomes ``bert.encoder.layer.0``.
    Names outside the base do not change.
    """
    first = family.chains[0]
    if checkpoint.kind.generates or find_block_numbers(checkpoint, first):
        return family
    before, _, rest = first.partition(".")
    if find_block_numbers(checkpoint, rest):  # a base model: its names lack the file's prefix
        chains = [chain.removeprefix(f"{before}.") for chain in family.chains]
        return family.model_copy(
            update={"blocks": chains, "skip": [name.removeprefix(f"{before}.") for name in family.skip]}
        )
    for base in dict.fromkeys(name.partition(".")[0] for name in checkpoint.shapes):
        if find_block_numbers(checkpoint, f"{base}.{first}"):
            chains = [f"{base}.{chain}" for chain in family.chains]
            return family.model_copy(
                update={"blocks": chains, "skip": [*family.skip, *(f"{base}.{name}" for name in family.skip)]}
            )
    return family


def select_tower(checkpoint: Checkpoint, chain: str) -> Checkpoint:
    """Return a checkpoint with the full configuration of the tower that contains a chain of blocks."""
    settings = checkpoint.settings or checkpoint.config
    own = settings.get(f"{chain.partition('.')[0].removesuffix('_model')}_config")
    return replace(checkpoint, config={**settings, **own} if isinstance(own, dict) else settings)


def retained_matrices(sub_block: SubBlock, checkpoint: Checkpoint) -> list[str]:
    """Return the matrices of a sub-block that stay until its last item is removed.

    If the items are query heads, these are the key and value matrices.
    """
    inside = (n.removesuffix(".weight") for n, s in checkpoint.shapes.items() if sub_block.owns(n) and len(s) == 2)
    return sorted(module for module in inside if module not in sub_block.modules)


def unpruned_matrices(layout: Layout, checkpoint: Checkpoint, pattern: str) -> tuple[str, ...]:
    """Return the matrices that process every token and are in no unit. Mask patterns add the retained matrices."""
    if pattern == "structured":
        return layout.around
    return (
        *layout.around,
        *(module for sub_block in layout.sub_blocks for module in retained_matrices(sub_block, checkpoint)),
    )


def find_block_numbers(checkpoint: Checkpoint, blocks: str) -> list[int]:
    """Return the numbers of a model's blocks, in order."""
    pattern = re.compile(re.escape(blocks).replace(r"\{block\}", r"(\d+)") + r"\.")
    return sorted({int(match[1]) for name in checkpoint.shapes if (match := pattern.match(name))})


def read_hidden_size(layout: Layout, checkpoint: Checkpoint) -> int:
    """Return the hidden size: the width of the state between blocks."""
    return checkpoint.shapes[f"{layout.sub_blocks[0].modules[-1]}.weight"][0]


def _list_outside(checkpoint: Checkpoint) -> list[str]:
    """Return modules that lie in no numbered block."""
    return [name.removesuffix(".weight") for name in checkpoint.shapes if not re.search(r"\.\d+\.", name)]
