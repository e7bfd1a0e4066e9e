"""The search space of a model: its units, their ladders, and the exact costs of every level."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import floor

from allocator.core.errors import UserError
from allocator.core.space import SearchSpace, Unit
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout, unpruned_matrices
from allocator.model.family.sub_blocks import SubBlock


def build_space(
    layout: Layout,
    checkpoint: Checkpoint,
    pattern: str,
    target: float,
    ladder: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    align: int = 1,
    patterns: Sequence[str] = ("2:4", "1:4"),
    bias: bool = False,
) -> SearchSpace:
    """Build the search space of a model.

    Args:
        layout: The model's prunable parts.
        checkpoint: The model's shapes.
        pattern: ``structured``, ``unstructured`` or ``n:m``.
        target: Share to remove. Default ladders of the unstructured pattern are centred on it.
        ladder: Sparsities for all units, or for each unit by name. By default, structured ladders end at full removal.
            Channels and experts are removed in eighths, KV groups one by one, and query heads one by one from every KV
            group. Matrices have the dense level and nine levels in ``target`` ± 0.3.
        align: Widths of channels are multiples of this.
        patterns: Levels of the n:m pattern after the dense one, each as ``kept:group``. All have one group size, and
            ``kept`` decreases.
        bias: Whether partly pruned structured levels gain a bias in the output projection.

    Raises:
        UserError: The group size of the n:m pattern does not divide the width of a matrix.
    """
    shapes = checkpoint.shapes
    ladders = ladder if isinstance(ladder, Mapping) else defaultdict[str, Sequence[float] | None](lambda: ladder)
    if pattern == "structured":
        units = [
            _build_experts_unit(sub_block, checkpoint, ladders[sub_block.name])
            if sub_block.experts
            else _build_structured_unit(sub_block, checkpoint, ladders[sub_block.name], align, bias)
            for sub_block in layout.sub_blocks
        ]
    else:
        matrices = [(m, sub_block) for sub_block in layout.sub_blocks for m in sub_block.modules]
        if pattern == "n:m":
            units = [
                _build_grouped_unit(module, sub_block, shapes[f"{module}.weight"], patterns)
                for module, sub_block in matrices
            ]
        else:
            units = [
                _build_matrix_unit(module, sub_block, shapes[f"{module}.weight"], ladders[module], target)
                for module, sub_block in matrices
            ]
    total = sum(_size(shape) for shape in shapes.values())
    macs = _count_head(layout, checkpoint) + sum(
        _size(shapes[f"{module}.weight"]) for module in unpruned_matrices(layout, checkpoint, pattern)
    )
    fixed = {"params": total - sum(unit.params[0] for unit in units), "macs": macs}
    return SearchSpace(pattern, tuple(units), fixed)


def _count_head(layout: Layout, checkpoint: Checkpoint) -> int:
    """Return the size of the matrix that computes logits. It is 0 if the matrix does not run at every position."""
    if layout.kind.answers not in ("next", "tokens"):
        return 0
    head = checkpoint.shapes.get(f"{layout.tail[-1]}.weight") if layout.tail else None
    if head is None:  # tied to the embeddings
        last = next((m for m in reversed(layout.tail[:-1]) if m in layout.around), layout.sub_blocks[0].modules[-1])
        head = int(checkpoint.config["vocab_size"]), checkpoint.shapes[f"{last}.weight"][0]
    return _size(head)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _build_structured_unit(
    sub_block: SubBlock, checkpoint: Checkpoint, ladder: Sequence[float] | None, align: int, bias: bool
) -> Unit:
    shapes = checkpoint.shapes
    if ladder is None:
        steps = 8 if sub_block.kind == "channels" else sub_block.group or sub_block.total
        ladder = [step / steps for step in range(1, steps + 1)]
    unit_align = align if sub_block.kind == "channels" else sub_block.total // (sub_block.group or sub_block.total)
    counts = {sub_block.total, *(round(sub_block.total * (1.0 - s) / unit_align) * unit_align for s in ladder)}
    kept = tuple(sorted((count for count in counts if count <= sub_block.total), reverse=True))
    owned = {name: shape for name, shape in shapes.items() if sub_block.owns(name)}
    matrices = {f"{module}.weight" for module in sub_block.modules}
    biases = {f"{module}.bias" for module in sub_block.rows} & set(owned)
    per_item = sum(_size(owned[name]) // sub_block.total for name in matrices)
    per_item_bias = sum(_size(owned[name]) // sub_block.total for name in biases)
    whole = sum(_size(shape) for name, shape in owned.items() if name not in matrices | biases)
    # key and value of query heads are kept until the last level
    staying = sum(_size(shape) for name, shape in owned.items() if name not in matrices and len(shape) == 2)
    added = shapes[f"{sub_block.output}.weight"][0] if bias and f"{sub_block.output}.bias" not in owned else 0
    params = tuple(
        count and count * (per_item + per_item_bias) + whole + (added if count < sub_block.total else 0)
        for count in kept
    )
    macs = tuple(count and floor(sub_block.used * (count * per_item + staying)) for count in kept)
    return Unit(
        name=sub_block.name,
        kind=sub_block.kind,
        part=sub_block.part,
        block=sub_block.block,
        total=sub_block.total,
        kept=kept,
        params=params,
        macs=macs,
        group=sub_block.group,
    )


def _build_experts_unit(sub_block: SubBlock, checkpoint: Checkpoint, ladder: Sequence[float] | None) -> Unit:
    """Return a unit of whole experts. Each level keeps at least ``sub_block.least`` of them, or none.

    A token passes as many experts as the router picks, at every level that keeps any.
    """
    shapes, step = checkpoint.shapes, sub_block.total // (sub_block.group or sub_block.total)
    if ladder is None:
        ladder = [eighth / 8 for eighth in range(1, 9)]
    wished = {round(sub_block.total * (1.0 - share) / step) * step for share in ladder}
    kept = tuple(sorted({sub_block.total, *(count and max(count, sub_block.least) for count in wished)}, reverse=True))
    owned = sum(_size(shape) for name, shape in shapes.items() if sub_block.owns(name))
    expert = sum(_size(shapes[f"{module}.weight"]) for module in sub_block.experts[0])
    (router,) = sub_block.rows
    columns = shapes[f"{router}.weight"][1]
    picked = sub_block.used.numerator * sub_block.total // sub_block.used.denominator
    params = tuple(count * (owned // sub_block.total) for count in kept)
    macs = tuple(count and count * columns + picked * expert for count in kept)
    return Unit(
        name=sub_block.name,
        kind=sub_block.kind,
        part=sub_block.part,
        block=sub_block.block,
        total=sub_block.total,
        kept=kept,
        params=params,
        macs=macs,
        group=sub_block.group,
    )


def _build_matrix_unit(
    module: str, sub_block: SubBlock, shape: Sequence[int], ladder: Sequence[float] | None, target: float
) -> Unit:
    rows, columns = shape
    if ladder is None:
        ladder = [target + step * 0.075 for step in range(-4, 5)]
    counts = {columns, *(round(columns * (1.0 - min(1.0, s))) for s in ladder if s > 0)}
    kept = tuple(rows * count for count in sorted(counts, reverse=True))
    macs = tuple(itertools.repeat(floor(sub_block.used * rows * columns), len(kept)))
    return Unit(
        name=module,
        kind="matrix",
        part=sub_block.part,
        block=sub_block.block,
        total=rows * columns,
        kept=kept,
        params=kept,
        macs=macs,
    )


def _build_grouped_unit(module: str, sub_block: SubBlock, shape: Sequence[int], patterns: Sequence[str]) -> Unit:
    """Return a unit of the n:m pattern: every group along a row loses the same number of weights."""
    total, columns = _size(shape), shape[1]
    counts, groups = zip(*(map(int, pattern.split(":")) for pattern in patterns), strict=True)
    group = groups[0]
    if columns % group:
        raise UserError(
            f"ladder.patterns: rows of {module} hold {columns} weights, which is not a multiple of the group size "
            f"{group}. Name a size that divides every width, such as --set 'ladder.patterns=[\"1:2\"]' for even ones, "
            "or use --pattern unstructured"
        )
    kept = (total, *(total // group * count for count in counts))
    macs = tuple(itertools.repeat(floor(sub_block.used * total), len(kept)))
    return Unit(
        name=module,
        kind="matrix",
        part=sub_block.part,
        block=sub_block.block,
        total=total,
        kept=kept,
        params=kept,
        macs=macs,
        group=group,
    )
