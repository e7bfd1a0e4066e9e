"""Families of model names: which modules of a model form units, and how their rows and columns belong together."""

from __future__ import annotations

import itertools
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib import resources
from math import floor
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from allocator.core.errors import UserError, did_you_mean
from allocator.core.space import SearchSpace, Unit
from allocator.model.checks import check_biases, check_depth, check_heads, check_skipped, check_vectors, num_heads
from allocator.model.headers import ModelFiles, read_model_files
from allocator.model.kinds import CAUSAL, Kind

Attention = Literal["kv_groups", "query_heads"]
"""What attention loses: KV groups with the query heads they serve, or query heads alone."""

Experts = Literal["whole", "inside"]
"""What a mixture of experts loses: whole experts with their rows of the router, or channels inside of experts."""

_EXPERT_INPUTS, _EXPERT_OUTPUT = ("gate_proj", "up_proj"), "down_proj"
"""What the parts of an expert are called where each has a module of its own, as here."""


Part = Literal["attention", "mlp"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _Parts(_Strict):
    output: str
    remove: list[str] = []
    """Modules that go when nothing is left, where they are not all of the module that the matrices share: what leads to
    the output projection, and that. By default, matrices that share but the block go by themselves."""


class KvGroups(_Parts):
    """Attention whose key/value heads are removed together with the query heads they serve.

    Query, key and value may be one matrix. Its rows are all queries, then all keys, then all values (``by_part``), or
    queries, keys and values of one group after the other (``by_group``).
    """

    kind: Literal["kv_groups"]
    query: str
    key: str
    value: str
    fused: Literal["by_part", "by_group"] | None = None
    counts: list[str] = []
    """Attributes of the module that the matrices share, which count heads or what is proportional to heads:
    ``config.x`` is one of its configuration, ``self.x`` one of a module inside it."""
    norms: list[str] = []
    """Norms over all heads at once, of queries or keys. Without some heads the others would be divided by something
    else, so attention goes as a whole or not at all."""
    cache: str | None = None
    """The matrix whose outputs are cached, where keys and values themselves are not."""

    @model_validator(mode="after")
    def _check_fused(self) -> KvGroups:
        matrices = len({self.query, self.key, self.value})
        # one that holds key and value alone has those of each group in turn
        if matrices not in ((2, 3) if self.fused is None else (1,)):
            raise ValueError(f"query, key and value name {matrices} matrices, and fused is {self.fused or 'not set'}")
        return self

    @property
    def inputs(self) -> list[str]:
        """Modules whose rows belong to groups."""
        parts = [self.query, self.key, self.value]
        return parts if self.fused else list(dict.fromkeys(parts))

    @property
    def names(self) -> list[str]:
        """Names of its matrices in a block."""
        return _each(*self.inputs, self.output)


class Channels(_Parts):
    """A feed-forward network whose hidden channels are removed.

    A matrix that is named several times has that many runs of rows, each with one row for each channel, as where gates
    and values are one matrix.
    """

    kind: Literal["channels"]
    inputs: list[str] = Field(min_length=1)

    @property
    def names(self) -> list[str]:
        """Names of its matrices in a block."""
        return _each(*self.inputs, self.output)


class Mixture(_Strict):
    """A mixture of experts: a router, and experts by number, each with a gate, an up and a down projection."""

    kind: Literal["experts"]
    router: str
    experts: str
    shared: Channels | None = None
    """What every token passes beside its experts, where a model has that."""
    dense: Channels | None = None
    """What blocks without experts have in their place."""

    @property
    def names(self) -> list[str]:
        """Names of its matrices in a block, with ``{expert}`` for the number of an expert."""
        own = [f"{self.experts}.{{expert}}.{matrix}" for matrix in (*_EXPERT_INPUTS, _EXPERT_OUTPUT)]
        return [self.router, *own, *(name for part in (self.shared, self.dense) if part for name in part.names)]


class Family(_Strict):
    """One naming family, as a file of ``search_spaces/`` describes it."""

    schema_: Literal[1] = Field(alias="schema")
    model_types: list[str] = Field(min_length=1)
    blocks: str | list[str]
    """Names of the blocks, or of those of each tower; what a checkpoint's names have in front may be left out."""

    units: dict[Part, Annotated[KvGroups | Channels | Mixture, Field(discriminator="kind")]]
    entry: list[str] = []
    """Matrices between the embeddings and the first block, which work for every token as those of the tail do."""
    tail: list[str] = []
    """From the blocks to the logits, the head last. What ends in ``?`` is not in every model, here and in ``entry``.

    Causal language models have one. Others are asked themselves what follows.
    """
    skip: list[str]
    """Modules that stay as they are; ``{block}`` is each block in turn, and what ends in ``?`` not in every model."""
    renamed: dict[str, str] = {}
    """Parts of names in the files that the model calls otherwise."""

    @field_validator("blocks")
    @classmethod
    def _numbered(cls, value: str | list[str]) -> str | list[str]:
        chains = [value] if isinstance(value, str) else value
        if not chains or not all("{block}" in chain for chain in chains):
            raise ValueError(f"expected {{block}} for the number of the block, found {value!r}")
        return value

    @property
    def chains(self) -> list[str]:
        """Names of the blocks, one for each tower."""
        return [self.blocks] if isinstance(self.blocks, str) else self.blocks

    @model_validator(mode="after")
    def _check_once(self) -> Family:
        owners: dict[str, str] = {}
        for part, unit in self.units.items():
            if isinstance(unit, Mixture):
                for module in unit.names:
                    _own(owners, module, f"unit {part!r}")
                continue
            for module in dict.fromkeys(_each(*unit.inputs)):
                _own(owners, module, f"unit {part!r}")
            _own(owners, unit.output, f"the output of unit {part!r}")
        return self

    def skipped(self, numbers: Sequence[int]) -> dict[str, str]:
        """Return, for every module that ``skip`` names in a model whose blocks have these numbers, the line of it."""
        lines = [(line.removesuffix("?"), line) for line in self.skip]
        return {name.replace("{block}", str(number)): line for name, line in lines for number in numbers}


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
    number. ``counts`` are attributes of its ``home`` that are proportional to items.

    It consists of its ``roots``: usually one module, whose name it has. Where it has no module of its own, they are
    what leads to the output projection, and that; it has then the name of the module that its matrices share, or of
    the output projection where they share but the block.

    Whole experts own a row each of a router beside them, and every matrix in ``experts``; ``least`` of them stay, or
    none does. What is ``routed`` is one of several sub-blocks of a module, which adds their sum: experts, channels
    inside of one, and what all tokens pass beside them.
    """

    name: str
    roots: tuple[str, ...]
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
    """Share of the tokens that pass it, where a router divides them evenly."""

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
    def home(self) -> str:
        """The module that its matrices share: the sub-block, or the block."""
        return _shared(self.modules)

    @property
    def removal(self) -> dict[str, str]:
        """What takes the place of each of its roots when it goes; see :func:`~.modeling_pruned.remove`."""
        if len(self.roots) == 1:
            return {self.roots[0]: self.part}
        inner = "attention" if self.part == "attention" else "input"
        return {root: "output" if root == self.output else inner for root in self.roots}

    def owns(self, tensor: str) -> bool:
        """Whether a tensor is one of its own, and goes with it."""
        return any(tensor.startswith(f"{root}.") for root in self.roots)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in one model.

    Attributes:
        blocks: Module names of the blocks, in order.
        tail: Modules from the last block's output to the logits; the last is the head, as the checkpoint names it.
        sites: Prunable sub-blocks, in model order.
        around: Matrices before and behind the blocks that work for every token.
        kind: What kind of model it is.
        towers: How many blocks, of those in order, each tower has; empty where all are one chain.
        mixtures: Mixtures of experts with whole experts for items, whether that is what they lose or not.
    """

    blocks: tuple[str, ...]
    tail: tuple[str, ...]
    sites: tuple[Site, ...]
    around: tuple[str, ...] = ()
    kind: Kind = CAUSAL
    towers: tuple[int, ...] = ()
    mixtures: tuple[Site, ...] = ()


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


def open_model(folder: Path, file: Path | None = None) -> tuple[ModelFiles, Family]:
    """Return a model with the names that transformers has for its modules, and its family.

    Args:
        folder: The model.
        file: The family's file; None for one of those shipped.

    Raises:
        UserError: See :func:`~allocator.model.headers.read_model_files` and :func:`find_family`.
    """
    files = read_model_files(folder)
    family = find_family(str(files.config.get("model_type")), file)
    return files.renamed(family.renamed), family


def resolve_layout(
    family: Family, files: ModelFiles, attention: Attention = "kv_groups", experts: Experts = "whole"
) -> Layout:
    """Find the family's modules in a model, and check that they cover every weight matrix.

    Args:
        family: The names.
        files: The model.
        attention: What attention loses.
        experts: What a mixture of experts loses.

    Raises:
        UserError: A named module is missing, a matrix is covered by no unit and no ``skip`` line or by two, blocks are
            missing, shapes do not divide into items, each KV group has but one query head to lose, or what lies beside
            the matrices of a unit has the width that they lose.
    """
    shapes, family, kind = files.shapes, named_as_in(files, family), files.kind
    numbers = [block_numbers(files, chain) for chain in family.chains]
    blocks: list[str] = []
    sites: list[Site] = []
    mixtures: list[Site] = []
    towers: dict[str, ModelFiles] = {}
    for chain, own in zip(family.chains, numbers, strict=True):
        check_depth(chain, own, files)
        tower = tower_files(files, chain)
        for number in own:
            blocks.append(chain.format(block=number))
            found, mixed = _sites(family, blocks[-1], len(blocks) - 1, tower, attention, experts)
            sites += found
            mixtures += mixed
            towers |= {site.name: tower for site in found}
    if kind.generates and not family.tail:
        raise UserError(f"family: {files.architecture} is a causal language model. Name in 'tail' what follows blocks")
    tied = {family.tail[-1]} if kind.generates and files.config.get("tie_word_embeddings") else set()
    entry, tail = (_there(names if kind.generates else (), shapes) for names in (family.entry, family.tail))
    for key, module in (*(("entry", module) for module in entry), *(("tail", module) for module in tail)):
        if f"{module}.weight" not in shapes and module not in tied:
            raise UserError(
                f"family: {key} names {module}, which {files.architecture} lacks{did_you_mean(module, _outside(files))}"
            )
    around = tuple(module for module in (*entry, *tail[:-1]) if len(shapes[f"{module}.weight"]) == 2)
    owned = {module for site in sites for module in site.modules}
    owned |= {f"{block}.{name}" for block in blocks for unit in family.units.values() for name in unit.names}
    skipped = family.skipped(sorted({*itertools.chain(*numbers)}))
    check_skipped({**skipped, **dict.fromkeys({*around} - owned, "tail")}, family.tail, owned, files)
    check_biases(owned, files)
    # what has one item goes as a whole, with all that lies beside it; of routers every vector is one of experts
    for site in (site for site in sites if site.total > 1 and not site.experts):
        inside = {name: shape for name, shape in shapes.items() if site.owns(name)}
        check_vectors(site.name, _lengths(site, towers[site.name]), site.rows, site.output, skipped, inside, files)
    extents = tuple(map(len, numbers)) if len(numbers) > 1 else ()
    return Layout(tuple(blocks), tail, tuple(sites), around, kind, extents, tuple(mixtures))


def _sites(
    family: Family, block: str, index: int, files: ModelFiles, attention: Attention, experts: Experts
) -> tuple[list[Site], list[Site]]:
    """Return the sub-blocks of one block, and its mixtures of experts with whole experts for items."""
    sites: list[Site] = []
    mixtures: list[Site] = []
    for part, parts in family.units.items():
        if isinstance(parts, Mixture) and (f"{block}.{parts.router}.weight" in files.shapes or parts.dense is None):
            mixtures.append(_mixture(part, parts, block, index, files))
            sites += _parts_of(mixtures[-1], parts, family, block, files, experts)
        else:
            own = parts.dense if isinstance(parts, Mixture) else parts
            assert own is not None
            sites.append(_site(part, own, family, block, index, files, attention))
    return sites, mixtures


def _there(modules: Sequence[str], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, ...]:
    """Return names of modules without those that a model may lack, and does."""
    names = [(module, module.removesuffix("?")) for module in modules]
    return tuple(name for module, name in names if module == name or f"{name}.weight" in shapes)


def named_as_in(files: ModelFiles, family: Family) -> Family:
    """Return a family with the names of a model that is more, or less, than the one its file was written for.

    A model with a head has its base under a name of its own: what is ``encoder.layer.0`` in one is
    ``bert.encoder.layer.0`` in the other. Names that lie outside of the base stay.
    """
    first = family.chains[0]
    if files.kind.generates or block_numbers(files, first):
        return family
    before, _, rest = first.partition(".")
    if block_numbers(files, rest):  # the base of a model that the file was written for
        chains = [chain.removeprefix(f"{before}.") for chain in family.chains]
        return family.model_copy(
            update={"blocks": chains, "skip": [name.removeprefix(f"{before}.") for name in family.skip]}
        )
    for base in dict.fromkeys(name.partition(".")[0] for name in files.shapes):
        if block_numbers(files, f"{base}.{first}"):
            chains = [f"{base}.{chain}" for chain in family.chains]
            return family.model_copy(
                update={"blocks": chains, "skip": [*family.skip, *(f"{base}.{name}" for name in family.skip)]}
            )
    return family


def tower_files(files: ModelFiles, chain: str) -> ModelFiles:
    """Return a model's files with the configuration, defaults and all, of the tower that a chain of blocks is in."""
    settings = files.settings or files.config
    own = settings.get(f"{chain.partition('.')[0].removesuffix('_model')}_config")
    return replace(files, config={**settings, **own} if isinstance(own, dict) else settings)


def staying(site: Site, files: ModelFiles) -> list[str]:
    """Return matrices that stay as long as any item of a sub-block does: key and value beside query heads."""
    inside = (n.removesuffix(".weight") for n, s in files.shapes.items() if site.owns(n) and len(s) == 2)
    return sorted(module for module in inside if module not in site.modules)


def block_numbers(files: ModelFiles, blocks: str) -> list[int]:
    """Return the numbers of a model's blocks, in order."""
    pattern = re.compile(re.escape(blocks).replace(r"\{block\}", r"(\d+)") + r"\.")
    return sorted({int(match[1]) for name in files.shapes if (match := pattern.match(name))})


def _outside(files: ModelFiles) -> list[str]:
    """Return modules that lie in no numbered block."""
    return [name.removesuffix(".weight") for name in files.shapes if not re.search(r"\.\d+\.", name)]


def _parts_of(
    mixture: Site, parts: Mixture, family: Family, block: str, files: ModelFiles, experts: Experts
) -> list[Site]:
    """Return the sub-blocks of a mixture: whole experts or each of them, and what all tokens pass."""
    around = _shared(mixture.roots)
    own = [mixture] if experts == "whole" else [_inside(mixture, number, files) for number in range(mixture.total)]
    if parts.shared is not None and any(f"{block}.{name}.weight" in files.shapes for name in parts.shared.names):
        own.append(_site(mixture.part, parts.shared, family, block, mixture.block, files, "kv_groups"))
    return [replace(site, routed=around) for site in own]


def _mixture(part: Part, parts: Mixture, block: str, index: int, files: ModelFiles) -> Site:
    """Return whole experts as items."""
    router, name = f"{block}.{parts.router}", f"{block}.{parts.experts}"
    for module in (router, f"{name}.0.{_EXPERT_OUTPUT}"):
        if f"{module}.weight" not in files.shapes:
            near = ", ".join(sorted(n for n in files.shapes if n.startswith(f"{block}."))[:12])
            raise UserError(
                f"family: unit {part!r} looks for {module}, which {files.architecture} lacks. It has {near}. "
                "Experts are looked for one by one: save a model that stacks them with transformers' save_pretrained, "
                "and say under 'renamed' what the files call their gate_proj, up_proj and down_proj"
            )
    total = files.shapes[f"{router}.weight"][0]
    experts = tuple(
        tuple(f"{name}.{number}.{matrix}" for matrix in (*_EXPERT_INPUTS, _EXPERT_OUTPUT)) for number in range(total)
    )
    shapes = {tuple(files.shapes.get(f"{module}.weight", ()) for module in expert) for expert in experts}
    if len(shapes) > 1 or any(len(shape) != 2 for shape in next(iter(shapes))):
        raise UserError(f"family: {router} has {total} rows, and there are not as many experts of one shape in {name}")
    groups, least = _routing(files, total)
    return Site(
        name=name,
        roots=(name, router),
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
        used=Fraction(int(files.config["num_experts_per_tok"]), total),
    )


def _routing(files: ModelFiles, total: int) -> tuple[int, int]:
    """Return in how many groups a router sees its experts, and how many must stay for it to pick what it picks."""
    picked = int(files.config["num_experts_per_tok"])
    groups = int(files.config.get("n_group") or 1)
    if total % groups:
        raise UserError(f"family: {total} experts of {files.architecture} do not divide into {groups} groups (n_group)")
    # a group is judged by its two best
    each = -(-picked // int(files.config.get("topk_group") or 1))
    return groups, groups * max(each, 2) if files.config.get("n_group") else picked


def _inside(mixture: Site, number: int, files: ModelFiles) -> Site:
    """Return one expert with channels as items."""
    *inputs, output = mixture.experts[number]
    return Site(
        name=f"{mixture.name}.{number}",
        roots=(f"{mixture.name}.{number}",),
        kind="channels",
        part=mixture.part,
        block=mixture.block,
        total=files.shapes[f"{output}.weight"][1],
        inputs=tuple(Rows(module, 1) for module in inputs),
        output=output,
        width=1,
        used=mixture.used,
    )


def _shared(modules: Iterable[str]) -> str:
    """Return the innermost module that holds all of some modules."""
    return os.path.commonpath([module.replace(".", "/") for module in modules]).replace("/", ".")


def _site(
    part: Part,
    parts: KvGroups | Channels,
    family: Family,
    block: str,
    index: int,
    files: ModelFiles,
    attention: Attention,
) -> Site:
    inputs, output = [_either(block, names, files) for names in parts.inputs], f"{block}.{parts.output}"
    for module in (*inputs, output):
        if f"{module}.weight" not in files.shapes:
            near = ", ".join(sorted(n for n in files.shapes if n.startswith(f"{block}."))[:12])
            raise UserError(f"family: unit {part!r} names {module}, which {files.architecture} lacks. It has {near}")
    columns = files.shapes[f"{output}.weight"][1]
    rows = {module: files.shapes[f"{module}.weight"][0] for module in inputs}
    if isinstance(parts, KvGroups) and (parts.fused is not None or len(inputs) == 3):
        check_heads(inputs, output, parts.fused is not None, files)
    total = columns if isinstance(parts, Channels) else _num_groups(parts, files, rows[inputs[0]], columns)
    home = _shared([*inputs, output])
    others = [f"{block}.{m}" for other, its in family.units.items() if other != part for m in its.names]
    alone = home != block and not any(module.startswith(f"{home}.") for module in others)
    runs = {module: inputs.count(module) if isinstance(parts, Channels) else 1 for module in inputs}
    for module, size in {**rows, output: columns}.items():
        if size % (total * runs.get(module, 1)):
            raise UserError(f"family: {module} has {size} rows or columns, which {total} {parts.kind} do not divide")
    site = Site(
        name=home if alone else output,
        roots=_roots(part, parts, block, home if alone else None, files),
        kind=parts.kind,
        part=part,
        block=index,
        total=total,
        inputs=_rows(parts, inputs, rows, total, columns // total),
        output=output,
        width=columns // total,
        counts=tuple(parts.counts) if isinstance(parts, KvGroups) else (),
        cached=f"{block}.{parts.cache}" if isinstance(parts, KvGroups) and parts.cache else None,
    )
    if isinstance(parts, Channels):
        return site
    _check_norms(site, parts, block, files)
    return _heads(site, parts, files) if attention == "query_heads" else site


def _roots(part: Part, parts: KvGroups | Channels, block: str, home: str | None, files: ModelFiles) -> tuple[str, ...]:
    """Return the modules that a sub-block consists of, in the order of the forward pass; ``home`` is one of its own."""
    inputs, output = [_either(block, names, files) for names in parts.inputs], f"{block}.{parts.output}"
    roots = [f"{block}.{name}" for name in parts.remove]
    if not roots and home is not None:
        return (home,)
    if not roots:
        leading = [_shared(inputs)] if part == "attention" else [*dict.fromkeys(inputs)]
        roots = [*leading, output]
    held = {root: [m for m in (*inputs, output) if f"{m}.".startswith(f"{root}.")] for root in roots}
    wrong = [root for root, modules in held.items() if not modules]
    wrong += sorted({*inputs, output} - {module for modules in held.values() for module in modules})
    if len(roots) > 1 and output not in roots:
        wrong.append(output)
    # attention returns more than a matrix does, and keeps its place in the cache
    if part == "attention":
        wrong += [root for root in roots if root in (block, *inputs)]
    if wrong:
        raise UserError(
            f"family: unit {part!r} of {files.architecture} cannot be removed as {', '.join(roots)}, for {wrong[0]}. "
            "Name under 'remove' the modules that go with it: of attention the one that holds queries, keys and "
            "values, and the output projection itself where it lies beside what stays"
        )
    return tuple(roots)


def _check_norms(site: Site, parts: KvGroups, block: str, files: ModelFiles) -> None:
    """Raise where a norm over all heads is not named as one, or what is named is none."""
    named = {f"{block}.{norm}.weight" for norm in parts.norms}
    if missing := sorted(named - files.shapes.keys()):
        raise UserError(f"family: norms of unit {site.part!r} names {missing[0]}, which {files.architecture} lacks")
    widths = {(own.rows * site.total,) for own in site.inputs}
    odd = sorted(
        name
        for name, shape in files.shapes.items()
        if site.total > 1 and site.owns(name) and name.endswith(".weight") and shape in widths
    )
    if odd:
        raise UserError(
            f"family: {odd[0]} of {files.architecture} is as long as all heads together. If it norms queries or keys, "
            f"name it in unit {site.part!r} under 'norms': attention then goes as a whole or not at all. If it lies "
            "behind the output projection, name under 'remove' what goes without it"
        )


def _each(*names: str) -> list[str]:
    """Return every name, of ``a | b`` both."""
    return [name.strip() for each in names for name in each.split("|")]


def _either(block: str, names: str, files: ModelFiles) -> str:
    """Return the module of a block that has one of the names ``a | b``; the first, if there is none."""
    modules = [f"{block}.{name}" for name in _each(names)]
    return next((module for module in modules if f"{module}.weight" in files.shapes), modules[0])


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
    if parts.norms:
        raise UserError(
            f"ladder.attention: {files.architecture} has norms over all heads, so that query heads cannot go alone. "
            "Use --set ladder.attention=kv_groups, which takes the whole attention"
        )
    heads = num_heads(files)
    if heads == site.total:
        raise UserError(
            f"ladder.attention: {files.architecture} has one query head per KV group, so query heads cannot go alone. "
            "Use --set ladder.attention=kv_groups"
        )
    group, odd = divmod(heads, site.total)
    query, rows, _ = site.inputs[0]
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
    macs = _head_size(layout, files) + sum(_size(shapes[f"{module}.weight"]) for module in layout.around)
    fixed = {"params": total - sum(unit.params[0] for unit in units), "macs": macs}
    return SearchSpace(pattern, tuple(units), fixed)


def hidden_size(layout: Layout, files: ModelFiles) -> int:
    """Return the width of what blocks pass on."""
    return files.shapes[f"{layout.sites[0].modules[-1]}.weight"][0]


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


def _num_groups(parts: KvGroups, files: ModelFiles, rows: int, columns: int) -> int:
    """Return the KV groups of attention, from the rows of its first input and the columns of its output projection.

    Those that cannot go one without the other count as one.
    """
    if parts.norms:
        return 1
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
