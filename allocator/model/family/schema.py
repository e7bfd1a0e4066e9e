"""Families of models with the same module names, as the files of ``search_spaces/`` describe them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from allocator.core.errors import UserError
from allocator.core.strict import StrictModel

Attention = Literal["kv_groups", "query_heads"]
"""The items of attention: whole KV groups, or query heads alone."""

Experts = Literal["whole", "inside"]
"""The items of a mixture of experts: whole experts with their router rows, or channels inside experts."""

EXPERT_INPUTS, EXPERT_OUTPUT = ("gate_proj", "up_proj"), "down_proj"
"""Names of the modules of one expert."""

Part = Literal["attention", "mlp"]


class _Parts(StrictModel):
    output: str
    remove: list[str] = Field(default_factory=list)
    """Modules to remove when no item is left: the output projection, and the modules that lead to it. The default is
    the
    module that holds all the matrices. If only the block holds them all, the default is the matrices themselves."""


class KvGroups(_Parts):
    """Attention. A key head and a value head are removed together with the query heads that they serve.

    Query, key and value may be one matrix. Its rows are all queries, then all keys, then all values (``by_part``), or
    queries, keys and values of one group after the other (``by_group``).
    """

    kind: Literal["kv_groups"]
    query: str
    key: str
    value: str
    fused: Literal["by_part", "by_group"] | None = None
    counts: list[str] = Field(default_factory=list)
    """Attributes that count heads, or something proportional to heads. They belong to the module that holds the
    matrices:
    ``config.x`` is an attribute of its configuration, ``self.x`` one of a module inside it."""
    norms: list[str] = Field(default_factory=list)
    """Norms of queries or keys that run over all heads at once. Removing one head would change the norm of the others.
    So
    attention is removed as a whole or not at all."""
    cache: str | None = None
    """The matrix whose outputs are cached. None if keys and values themselves are cached."""

    @model_validator(mode="after")
    def _check_fused(self) -> KvGroups:
        matrices = len({self.query, self.key, self.value})
        # a matrix of only keys and values holds them group by group
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
        return split_names(*self.inputs, self.output)


class Channels(_Parts):
    """A feed-forward network whose hidden channels are removed.

    If a matrix is named several times, it has that many runs of rows. Each run has one row per channel. An example is
    one matrix for gates and values.
    """

    kind: Literal["channels"]
    inputs: list[str] = Field(min_length=1)

    @property
    def names(self) -> list[str]:
        """Names of its matrices in a block."""
        return split_names(*self.inputs, self.output)


class Mixture(StrictModel):
    """A mixture of experts: a router and numbered experts. Each expert has a gate, an up and a down projection."""

    kind: Literal["experts"]
    router: str
    experts: str
    shared: Channels | None = None
    """The network that every token passes in addition to its experts."""
    dense: Channels | None = None
    """The network of blocks without experts."""

    @property
    def names(self) -> list[str]:
        """Names of its matrices in a block, with ``{expert}`` for the number of an expert."""
        own = [f"{self.experts}.{{expert}}.{matrix}" for matrix in (*EXPERT_INPUTS, EXPERT_OUTPUT)]
        return [self.router, *own, *(name for part in (self.shared, self.dense) if part for name in part.names)]


class Family(StrictModel):
    """One family, as a file of ``search_spaces/`` describes it."""

    schema_: Literal[1] = Field(alias="schema")
    model_types: list[str] = Field(min_length=1)
    blocks: str | list[str]
    """Names of the blocks, one pattern per tower. A prefix that only some checkpoints have may be left out."""

    units: dict[Part, Annotated[KvGroups | Channels | Mixture, Field(discriminator="kind")]]
    entry: list[str] = Field(default_factory=list)
    """Matrices between the embeddings and the first block."""
    tail: list[str] = Field(default_factory=list)
    """Modules between the blocks and the logits, the head last. Causal language models must have this list.

    A name that ends in ``?`` is optional, here and in ``entry``. Models of other kinds need no tail.
    """
    skip: list[str]
    """Modules that are not pruned. ``{block}`` is each block in turn; a name that ends in ``?`` is optional."""
    renamed: dict[str, str] = Field(default_factory=dict)
    """Parts of tensor names in the files, and what replaces them in the model."""

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
                for module in dict.fromkeys(unit.names):
                    _claim(owners, module, f"unit {part!r}")
                continue
            for module in dict.fromkeys(split_names(*unit.inputs)):
                _claim(owners, module, f"unit {part!r}")
            _claim(owners, unit.output, f"the output of unit {part!r}")
        return self

    def skipped(self, numbers: Sequence[int]) -> dict[str, str]:
        """Return the modules that ``skip`` names in blocks with these numbers, each with its line of ``skip``."""
        lines = [(line.removesuffix("?"), line) for line in self.skip]
        return {name.replace("{block}", str(number)): line for name, line in lines for number in numbers}


def _claim(owners: dict[str, str], module: str, owner: str) -> None:
    if module in owners:
        raise ValueError(f"{module} is in {owners[module]} and in {owner}, and a matrix has one place")
    owners[module] = owner


def split_names(*names: str) -> list[str]:
    """Return all names; ``a | b`` gives both."""
    return [name.strip() for each in names for name in each.split("|")]


def find_families_folder() -> Path:
    """Return the folder of the family files, in a wheel or next to an editable install."""
    inside = Path(str(resources.files("allocator") / "search_spaces"))
    return inside if inside.is_dir() else Path(str(resources.files("allocator"))).parent / "search_spaces"


class _Once(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys. PyYAML would silently take the last one."""

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
        raise UserError(
            f"family: {path}: {error.strerror}. Name a file like those in {find_families_folder()}"
        ) from None
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
    families = load_shipped_families()
    if model_type not in families:
        raise UserError(
            f"model: no family file serves the model type {model_type!r}; known: {', '.join(sorted(families))}. "
            "Draft one with 'allocator inspect MODEL --suggest', and name it with --set family=FILE"
        )
    return families[model_type]


def load_shipped_families() -> Mapping[str, Family]:
    """Read the shipped families, by model type. A process reads them once.

    Raises:
        UserError: Two families serve the same model type.
    """
    return _load_families(find_families_folder())


@cache
def _load_families(folder: Path) -> Mapping[str, Family]:
    homes: dict[str, Path] = {}
    served: dict[str, Family] = {}
    for path in sorted(folder.glob("*.yaml")):
        family = load_family(path)
        for model_type in family.model_types:
            if (other := homes.setdefault(model_type, path)) != path:
                raise UserError(
                    f"family: {other} and {path} both serve the model type {model_type!r}. Take it out of one of them"
                )
            served[model_type] = family
    return served
