"""The search space of a model: what each unit may lose, and what every level of it costs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import floor

from allocator.core.errors import UserError
from allocator.core.space import SearchSpace, Unit
from allocator.model.checkpoint.headers import ModelFiles
from allocator.model.family.layout import Layout, whole
from allocator.model.family.sub_blocks import Site


def build_space(
    layout: Layout,
    files: ModelFiles,
    pattern: str,
    target: float,
    ladder: Sequence[float] | Mapping[str, Sequence[float]] | None = None,
    align: int = 1,
    patterns: Sequence[str] = ("2:4", "1:4"),
    bias: bool = False,
) -> SearchSpace:
    """Return the search space of a model.

    Args:
        layout: Where the model's units are.
        files: The model's shapes.
        pattern: ``structured``, ``unstructured`` or ``n:m``.
        target: Share to remove; ladders of the unstructured pattern are centred on it.
        ladder: Sparsities of every unit, or of each by name, in place of the default. Default: channels in eighths,
            KV groups one by one, query heads one by one from every KV group, all down to nothing; matrices nine
            levels of ``target`` ± 0.3 beside the dense one.
        align: Widths of channels are multiples of this.
        patterns: Levels of the n:m pattern beside dense, each ``kept:group``; groups of one size, ever fewer kept.
        bias: Whether structured levels between dense and nothing have a bias in the output projection.

    Raises:
        UserError: The width of a matrix does not divide into groups.
    """
    shapes = files.shapes
    ladders = ladder if isinstance(ladder, Mapping) else defaultdict[str, Sequence[float] | None](lambda: ladder)
    if pattern == "structured":
        units = [
            _experts_unit(site, files, ladders[site.name])
            if site.experts
            else _structured_unit(site, files, ladders[site.name], align, bias)
            for site in layout.sites
        ]
    else:
        matrices = [(m, site) for site in layout.sites for m in site.modules]
        if pattern == "n:m":
            units = [_grouped_unit(module, site, shapes[f"{module}.weight"], patterns) for module, site in matrices]
        else:
            units = [
                _matrix_unit(module, site, shapes[f"{module}.weight"], ladders[module], target)
                for module, site in matrices
            ]
    total = sum(_size(shape) for shape in shapes.values())
    macs = _head_size(layout, files) + sum(
        _size(shapes[f"{module}.weight"]) for module in whole(layout, files, pattern)
    )
    fixed = {"params": total - sum(unit.params[0] for unit in units), "macs": macs}
    return SearchSpace(pattern, tuple(units), fixed)


def _head_size(layout: Layout, files: ModelFiles) -> int:
    """Return the size of the matrix that gives logits of every position; what runs once for an example counts as 0."""
    if layout.kind.answers not in ("next", "tokens"):
        return 0
    head = files.shapes.get(f"{layout.tail[-1]}.weight") if layout.tail else None
    if head is None:  # tied to the embeddings
        last = next((m for m in reversed(layout.tail[:-1]) if m in layout.around), layout.sites[0].modules[-1])
        head = int(files.config["vocab_size"]), files.shapes[f"{last}.weight"][0]
    return _size(head)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _structured_unit(site: Site, files: ModelFiles, ladder: Sequence[float] | None, align: int, bias: bool) -> Unit:
    shapes = files.shapes
    if ladder is None:
        steps = 8 if site.kind == "channels" else site.group or site.total
        ladder = [step / steps for step in range(1, steps + 1)]
    unit_align = align if site.kind == "channels" else site.total // (site.group or site.total)
    counts = {site.total, *(round(site.total * (1.0 - s) / unit_align) * unit_align for s in ladder)}
    kept = tuple(sorted((count for count in counts if count <= site.total), reverse=True))
    owned = {name: shape for name, shape in shapes.items() if site.owns(name)}
    matrices = {f"{module}.weight" for module in site.modules}
    biases = {f"{module}.bias" for module in site.rows} & set(owned)
    per_item = sum(_size(owned[name]) // site.total for name in matrices)
    per_item_bias = sum(_size(owned[name]) // site.total for name in biases)
    whole = sum(_size(shape) for name, shape in owned.items() if name not in matrices | biases)
    # key and value of query heads: they stay until the last level
    staying = sum(_size(shape) for name, shape in owned.items() if name not in matrices and len(shape) == 2)
    added = shapes[f"{site.output}.weight"][0] if bias and f"{site.output}.bias" not in owned else 0
    params = tuple(
        count and count * (per_item + per_item_bias) + whole + (added if count < site.total else 0) for count in kept
    )
    macs = tuple(count and floor(site.used * (count * per_item + staying)) for count in kept)
    return Unit(site.name, site.kind, site.part, site.block, site.total, kept, params, macs, site.group)


def _experts_unit(site: Site, files: ModelFiles, ladder: Sequence[float] | None) -> Unit:
    """Return whole experts: as many as the router picks stay, or none does. A token passes as many as before."""
    shapes, step = files.shapes, site.total // (site.group or site.total)
    if ladder is None:
        ladder = [eighth / 8 for eighth in range(1, 9)]
    wished = {round(site.total * (1.0 - share) / step) * step for share in ladder}
    kept = tuple(sorted({site.total, *(count and max(count, site.least) for count in wished)}, reverse=True))
    owned = sum(_size(shape) for name, shape in shapes.items() if site.owns(name))
    expert = sum(_size(shapes[f"{module}.weight"]) for module in site.experts[0])
    (router,) = site.rows
    columns = shapes[f"{router}.weight"][1]
    picked = site.used.numerator * site.total // site.used.denominator
    params = tuple(count * (owned // site.total) for count in kept)
    macs = tuple(count and count * columns + picked * expert for count in kept)
    return Unit(site.name, site.kind, site.part, site.block, site.total, kept, params, macs, site.group)


def _matrix_unit(module: str, site: Site, shape: Sequence[int], ladder: Sequence[float] | None, target: float) -> Unit:
    rows, columns = shape
    if ladder is None:
        ladder = [target + step * 0.075 for step in range(-4, 5)]
    counts = {columns, *(round(columns * (1.0 - min(1.0, s))) for s in ladder if s > 0)}
    kept = tuple(rows * count for count in sorted(counts, reverse=True))
    macs = tuple(itertools.repeat(floor(site.used * rows * columns), len(kept)))
    return Unit(module, "matrix", site.part, site.block, rows * columns, kept, kept, macs)


def _grouped_unit(module: str, site: Site, shape: Sequence[int], patterns: Sequence[str]) -> Unit:
    """Return a matrix of which every group along a row loses the same number of weights."""
    total, columns = _size(shape), shape[1]
    counts, groups = zip(*(map(int, pattern.split(":")) for pattern in patterns), strict=True)
    group = groups[0]
    if columns % group:
        raise UserError(
            f"ladder.patterns: rows of {module} hold {columns} weights, which groups of {group} do not divide. "
            "Name a size that divides every width, such as --set 'ladder.patterns=[\"1:2\"]' for even ones, "
            "or use --pattern unstructured"
        )
    kept = (total, *(total // group * count for count in counts))
    macs = tuple(itertools.repeat(floor(site.used * total), len(kept)))
    return Unit(module, "matrix", site.part, site.block, total, kept, kept, macs, group)
