"""Families of model names: which modules of a model form units, and how their rows and columns belong together."""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from allocator.core.errors import UserError, did_you_mean
from allocator.core.space import SearchSpace, Unit
from allocator.model.checks import check_biases, check_depth, check_heads, check_skipped, check_vectors, num_heads
from allocator.model.headers import ModelFiles

Attention = Literal["kv_groups", "query_heads"]
"""What attention loses: KV groups with the query heads they serve, or query heads alone."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class KvGroups(_Strict):
    """Attention whose key/value heads are removed together with the query heads they serve.

    Query, key and value may be one matrix. Its rows are all queries, then all keys, then all values (``by_part``), or
    queries, keys and values of one group after the other (``by_group``).
    """

    kind: Literal["kv_groups"]
    query: str
    key: str
    value: str
    output: str
    fused: Literal["by_part", "by_group"] | None = None
    counts: list[str] = []
    """Attributes of the module that count heads, or what is proportional to heads; ``config.x`` is one of its own."""

    @model_validator(mode="after")
    def _check_fused(self) -> KvGroups:
        matrices = len({self.query, self.key, self.value})
        if matrices != (3 if self.fused is None else 1):
            raise ValueError(f"query, key and value name {matrices} matrices, and fused is {self.fused or 'not set'}")
        return self

    @property
    def inputs(self) -> list[str]:
        """Modules whose rows belong to groups."""
        return [self.query, self.key, self.value]


class Channels(_Strict):
    """A feed-forward network whose hidden channels are removed.

    A matrix that is named several times has that many runs of rows, each with one row for each channel, as where gates
    and values are one matrix.
    """

    kind: Literal["channels"]
    inputs: list[str] = Field(min_length=1)
    output: str


class Family(_Strict):
    """One naming family, as a file of ``search_spaces/`` describes it."""

    schema_: Literal[1] = Field(alias="schema")
    model_types: list[str] = Field(min_length=1)
    blocks: str = Field(pattern=r"\{block\}")
    units: dict[Literal["attention", "mlp"], Annotated[KvGroups | Channels, Field(discriminator="kind")]]
    tail: list[str] = Field(min_length=1)
    skip: list[str]
    """Modules that stay as they are; ``{block}`` in a name is each block in turn."""

    @model_validator(mode="after")
    def _check_once(self) -> Family:
        owners: dict[str, str] = {}
        for part, unit in self.units.items():
            for module in dict.fromkeys(unit.inputs):
                _own(owners, module, f"unit {part!r}")
            _own(owners, unit.output, f"the output of unit {part!r}")
        return self

    def skipped(self, numbers: Sequence[int]) -> dict[str, str]:
        """Return, for every module that ``skip`` names in a model whose blocks have these numbers, the line of it."""
        return {line.replace("{block}", str(number)): line for line in self.skip for number in numbers}


def _own(owners: dict[str, str], module: str, owner: str) -> None:
    if module in owners:
        raise ValueError(f"{module} is in {owners[module]} and in {owner}, and a matrix has one place")
    owners[module] = owner


class Rows(NamedTuple):
    """Rows of a matrix that items own: item i has [start + i·rows, start + (i+1)·rows)."""

    module: str
    rows: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class Site:
    """A prunable sub-block of one block, with concrete module names.

    It holds ``total`` items (channels, KV groups or query heads). Item i owns rows of the input modules, as ``inputs``
    says, and columns [i·width, (i+1)·width) of the output module. A matrix in which several parts are fused has as
    many entries in ``inputs``, which cover it from the first row to the last. Query heads own no rows of key and value,
    which stay as long as any head does, and each run of ``group`` of them, which share a KV group, loses the same
    number. ``counts`` are attributes of the sub-block that are proportional to items.
    """

    name: str
    kind: str
    part: str
    block: int
    total: int
    inputs: tuple[Rows, ...]
    output: str
    width: int
    group: int | None = None
    counts: tuple[str, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Its matrices, the output projection last."""
        return (*self.rows, self.output)

    @property
    def rows(self) -> dict[str, int]:
        """Rows of each input module that one item owns."""
        rows: dict[str, int] = {}
        for own in self.inputs:
            rows[own.module] = rows.get(own.module, 0) + own.rows
        return rows


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in one model.

    Attributes:
        blocks: Module names of the blocks, in order.
        tail: Modules from the last block's output to the logits; the last is the head, as the checkpoint names it.
        sites: Prunable sub-blocks, in model order.
    """

    blocks: tuple[str, ...]
    tail: tuple[str, ...]
    sites: tuple[Site, ...]


def families_folder() -> Path:
    """Return the folder of the family files, in a wheel or beside an editable install."""
    inside = Path(str(resources.files("allocator") / "search_spaces"))
    return inside if inside.is_dir() else Path(str(resources.files("allocator"))).parent / "search_spaces"


class _Once(yaml.SafeLoader):
    """YAML in which no key is there twice: the last one would count, without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_family(path: Path) -> Family:
    """Read one family file.

    Raises:
        UserError: The file is missing, not YAML, or has a missing or unknown key.
    """
    try:
        return Family.model_validate(_Once(path.read_text(encoding="utf-8")).get_single_data())
    except OSError as error:
        raise UserError(f"family: {path}: {error.strerror}. Name a file like those in {families_folder()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"family: {path}: not YAML: {reason}. Compare with llama.yaml") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"family: {path}: {where or 'file'}: {first['msg']}. Compare with llama.yaml") from None


def find_family(model_type: str, file: Path | None = None) -> Family:
    """Return the family of a model type, from ``file`` or from those shipped.

    Raises:
        UserError: No family names the model type.
    """
    if file is not None:
        family = load_family(file)
        if model_type not in family.model_types:
            raise UserError(f"family: {file}: serves {family.model_types}, and the model is of type {model_type!r}")
        return family
    families = served_types()
    if model_type not in families:
        raise UserError(
            f"model: no family file serves the model type {model_type!r}; known: {', '.join(sorted(families))}. "
            "Draft one with 'allocator inspect MODEL --suggest', and name it with --set family=FILE"
        )
    return families[model_type]


def served_types() -> dict[str, Family]:
    """Return the families that are shipped, by the model types that they serve.

    Raises:
        UserError: Two of them serve the same.
    """
    homes: dict[str, Path] = {}
    served: dict[str, Family] = {}
    for path in sorted(families_folder().glob("*.yaml")):
        family = load_family(path)
        for model_type in family.model_types:
            if (other := homes.setdefault(model_type, path)) != path:
                raise UserError(
                    f"family: {other} and {path} both serve the model type {model_type!r}. Take it out of one of them"
                )
            served[model_type] = family
    return served


def resolve_layout(family: Family, files: ModelFiles, attention: Attention = "kv_groups") -> Layout:
    """Find the family's modules in a model, and check that they cover every weight matrix.

    Args:
        family: The names.
        files: The model.
        attention: What attention loses.

    Raises:
        UserError: A named module is missing, a matrix is covered by no unit and no ``skip`` line or by two, blocks are
            missing, shapes do not divide into items, each KV group has but one query head to lose, or what lies beside
            the matrices of a unit has the width that they lose.
    """
    shapes = files.shapes
    numbers = block_numbers(files, family.blocks)
    check_depth(family.blocks, numbers, files)
    blocks = tuple(family.blocks.format(block=number) for number in numbers)
    sites = tuple(
        _site(part, parts, block, index, files, attention)
        for index, block in enumerate(blocks)
        for part, parts in family.units.items()
    )
    tied = {family.tail[-1]} if files.config.get("tie_word_embeddings") else set()
    for module in {*family.tail} - tied:
        if f"{module}.weight" not in shapes:
            raise UserError(
                f"family: tail names {module}, which {files.architecture} lacks{did_you_mean(module, _outside(files))}"
            )
    units = family.units.values()
    owned = {f"{b}.{name}" for b in blocks for unit in units for name in (*unit.inputs, unit.output)}
    skipped = family.skipped(numbers)
    check_skipped(skipped, family.tail, owned, files)
    check_biases(owned, files)
    for site in (site for site in sites if site.total > 1):  # one item goes as a whole, with all that lies beside it
        check_vectors(site.name, _lengths(site, files), site.rows, site.output, skipped, files)
    return Layout(blocks, tuple(family.tail), sites)


def staying(site: Site, files: ModelFiles) -> list[str]:
    """Return matrices that stay as long as any item of a sub-block does: key and value beside query heads."""
    inside = (
        n.removesuffix(".weight") for n, s in files.shapes.items() if n.startswith(f"{site.name}.") and len(s) == 2
    )
    return sorted(module for module in inside if module not in site.modules)


def block_numbers(files: ModelFiles, blocks: str) -> list[int]:
    """Return the numbers of a model's blocks, in order."""
    pattern = re.compile(re.escape(blocks).replace(r"\{block\}", r"(\d+)") + r"\.")
    return sorted({int(match[1]) for name in files.shapes if (match := pattern.match(name))})


def _outside(files: ModelFiles) -> list[str]:
    """Return modules that lie in no numbered block."""
    return [name.removesuffix(".weight") for name in files.shapes if not re.search(r"\.\d+\.", name)]


def _site(
    part: str, parts: KvGroups | Channels, block: str, index: int, files: ModelFiles, attention: Attention
) -> Site:
    inputs, output = [f"{block}.{name}" for name in parts.inputs], f"{block}.{parts.output}"
    for module in (*inputs, output):
        if f"{module}.weight" not in files.shapes:
            near = ", ".join(sorted(n for n in files.shapes if n.startswith(f"{block}."))[:12])
            raise UserError(f"family: unit {part!r} names {module}, which {files.architecture} lacks. It has {near}")
    columns = files.shapes[f"{output}.weight"][1]
    rows = {module: files.shapes[f"{module}.weight"][0] for module in inputs}
    if isinstance(parts, KvGroups):
        check_heads(inputs, output, parts.fused is not None, files)
    total = columns if isinstance(parts, Channels) else _num_groups(parts, files, rows[inputs[0]], columns)
    name = os.path.commonpath([module.replace(".", "/") for module in (*inputs, output)]).replace("/", ".")
    if name in (block, ""):
        raise UserError(f"family: the modules of unit {part!r} share no sub-block of {block}, so it cannot be removed")
    runs = {module: inputs.count(module) if isinstance(parts, Channels) else 1 for module in inputs}
    for module, size in {**rows, output: columns}.items():
        if size % (total * runs.get(module, 1)):
            raise UserError(f"family: {module} has {size} rows or columns, which {total} {parts.kind} do not divide")
    site = Site(
        name=name,
        kind=parts.kind,
        part=part,
        block=index,
        total=total,
        inputs=_rows(parts, inputs, rows, total, columns // total),
        output=output,
        width=columns // total,
        counts=tuple(parts.counts) if isinstance(parts, KvGroups) else (),
    )
    return _heads(site, parts, files) if isinstance(parts, KvGroups) and attention == "query_heads" else site


def _rows(
    parts: KvGroups | Channels, inputs: Sequence[str], rows: Mapping[str, int], total: int, width: int
) -> tuple[Rows, ...]:
    """Return the rows of input modules that items own; an item of attention has as many queries as ``width``."""
    if isinstance(parts, Channels):
        run = {module: rows[module] // inputs.count(module) for module in inputs}
        before = [inputs[:place].count(module) for place, module in enumerate(inputs)]
        return tuple(
            Rows(module, run[module] // total, run[module] * number)
            for module, number in zip(inputs, before, strict=True)
        )
    if parts.fused is None:
        return tuple(Rows(module, rows[module] // total) for module in inputs)
    module = inputs[0]
    each = rows[module] // total
    if parts.fused == "by_group":
        return (Rows(module, each),)
    rest = (each - width) // 2
    return Rows(module, width), Rows(module, rest, total * width), Rows(module, rest, total * (width + rest))


def _heads(site: Site, parts: KvGroups, files: ModelFiles) -> Site:
    """Return the same attention with query heads for items."""
    if parts.fused is not None:
        raise UserError(
            f"ladder.attention: queries, keys and values of {files.architecture} are one matrix, so query heads cannot "
            "go alone. Use --set ladder.attention=kv_groups"
        )
    heads = num_heads(files)
    if heads == site.total:
        raise UserError(
            f"ladder.attention: {files.architecture} has one query head per KV group, so query heads cannot go alone. "
            "Use --set ladder.attention=kv_groups"
        )
    group, odd = divmod(heads, site.total)
    query, rows, _ = site.inputs[parts.inputs.index(parts.query)]
    if odd or rows % group or site.width % group:
        raise UserError(
            f"family: {query} and {site.output} have {rows} rows and {site.width} columns per KV group, "
            f"which {heads} query heads in {site.total} KV groups do not divide"
        )
    return replace(
        site,
        kind="query_heads",
        total=heads,
        inputs=(Rows(query, rows // group),),
        width=site.width // group,
        group=group,
    )


def _lengths(site: Site, files: ModelFiles) -> set[int]:
    """Return the lengths of what a sub-block loses a part of; the width of a head is none, whatever it equals."""
    lengths = {site.width * site.total, *(own.rows * site.total for own in site.inputs)}
    if site.kind == "channels":
        return lengths
    heads = num_heads(files)
    return {*lengths, site.total, heads} - {site.width * site.total // heads}


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
        units = [_structured_unit(site, files, ladders[site.name], align, bias) for site in layout.sites]
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
    tied = (int(files.config["vocab_size"]), shapes[f"{layout.sites[0].output}.weight"][0])
    head = shapes.get(f"{layout.tail[-1]}.weight", tied)
    fixed = {"params": total - sum(unit.params[0] for unit in units), "macs": _size(head)}
    return SearchSpace(pattern, tuple(units), fixed)


def _size(shape: Sequence[int]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _num_groups(parts: KvGroups, files: ModelFiles, rows: int, columns: int) -> int:
    """Return the KV groups of attention, from the rows of its first input and the columns of its output projection."""
    if parts.fused is not None:
        return (rows - columns) * num_heads(files) // (2 * columns)
    # models from before grouped queries name query heads alone
    return int(files.config.get("num_key_value_heads") or num_heads(files))


def _structured_unit(site: Site, files: ModelFiles, ladder: Sequence[float] | None, align: int, bias: bool) -> Unit:
    shapes = files.shapes
    if ladder is None:
        steps = 8 if site.kind == "channels" else site.group or site.total
        ladder = [step / steps for step in range(1, steps + 1)]
    unit_align = align if site.kind == "channels" else site.total // (site.group or site.total)
    counts = {site.total, *(round(site.total * (1.0 - s) / unit_align) * unit_align for s in ladder)}
    kept = tuple(sorted((count for count in counts if count <= site.total), reverse=True))
    owned = {name: shape for name, shape in shapes.items() if name.startswith(f"{site.name}.")}
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
    macs = tuple(count and count * per_item + staying for count in kept)
    return Unit(site.name, site.kind, site.part, site.block, site.total, kept, params, macs, site.group)


def _matrix_unit(module: str, site: Site, shape: Sequence[int], ladder: Sequence[float] | None, target: float) -> Unit:
    rows, columns = shape
    if ladder is None:
        ladder = [target + step * 0.075 for step in range(-4, 5)]
    counts = {columns, *(round(columns * (1.0 - min(1.0, s))) for s in ladder if s > 0)}
    kept = tuple(rows * count for count in sorted(counts, reverse=True))
    macs = tuple(itertools.repeat(rows * columns, len(kept)))
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
    macs = tuple(itertools.repeat(total, len(kept)))
    return Unit(module, "matrix", site.part, site.block, total, kept, kept, macs, group)
