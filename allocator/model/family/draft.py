"""Help for writing a family file: list what covers each matrix, and draft a file from names and shapes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.checks import find_numbered_modules
from allocator.model.family.layout import adapt_family
from allocator.model.family.schema import EXPERT_INPUTS, EXPERT_OUTPUT, Family

_OUTPUT = re.compile(r"(^|[._])(o|out|dense|wo|w2|c_proj|down|fc2|fc_out|dense_4h_to_h)(_proj)?$")
_PARTS = {"query": r"(^|_)(q|query)", "key": r"(^|_)(k|key)", "value": r"(^|_)(v|value)"}


@dataclass(frozen=True, slots=True)
class Covered:
    """Matrices of the same name in all blocks, or one matrix outside the blocks.

    Attributes:
        module: The name, with ``{block}`` in place of a block's number and ``{expert}`` in place of an expert's number.
        shape: [outputs, inputs], as in linear layers.
        count: The number of matrices of that name and shape.
        by: What covers it: the name of a unit, ``skip``, ``entry`` or ``tail``. None if nothing covers it.
    """

    module: str
    shape: tuple[int, ...]
    count: int
    by: str | None


def list_coverage(checkpoint: Checkpoint, family: Family | None) -> list[Covered]:
    """Return all matrices of a model, each with what covers it in the family. Without a family, nothing covers them."""
    prefixes = [_find_prefix(checkpoint)]
    owners: dict[str, str] = {}
    if family is not None:
        family = adapt_family(checkpoint, family)
        prefixes = family.chains
        owners = {module.removesuffix("?"): "entry" for module in family.entry}
        owners |= {module.removesuffix("?"): "tail" for module in family.tail}
        owners |= {module.removesuffix("?"): "skip" for module in family.skip}
        for prefix, (part, unit) in itertools.product(prefixes, family.units.items()):
            owners |= {f"{prefix}.{module}": part for module in unit.names}
    counts: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, shape in checkpoint.shapes.items():
        if len(shape) >= 2:
            key = _generalise(name.removesuffix(".weight"), prefixes), shape
            counts[key] = counts.get(key, 0) + 1
    return [Covered(name, shape, count, owners.get(name)) for (name, shape), count in sorted(counts.items())]


def draft_family(checkpoint: Checkpoint) -> str:
    """Draft a family file from the names and shapes of a model, with comments at uncertain guesses.

    Raises:
        UserError: No tensor name contains a number, so no blocks can be found.
    """
    prefix = _find_prefix(checkpoint)
    inside = {
        _generalise(name.removesuffix(".weight"), [prefix]).removeprefix(f"{prefix}."): shape
        for name, shape in checkpoint.shapes.items()
        if name.startswith(prefix.split("{")[0]) and name.endswith(".weight")
    }
    own = {name: shape for name, shape in inside.items() if len(shape) == 2}
    vectors = {name: shape for name, shape in inside.items() if len(shape) == 1}
    outside = [name for name in checkpoint.shapes if not name.startswith(prefix.split("{")[0])]
    matrices = [name.removesuffix(".weight") for name in outside if len(checkpoint.shapes[name]) == 2]
    norms = [
        name.removesuffix(".weight") for name in outside if len(checkpoint.shapes[name]) == 1 and ".weight" in name
    ]
    head = next((name for name in matrices if re.search(r"(head|embed_out)$", name)), "lm_head")
    entry, leaving = ([name for name in matrices if re.search(rf"proj(ect)?_{way}$", name)] for way in ("in", "out"))
    lines = [
        f"# Drafted from the names and shapes of a {checkpoint.architecture}: check every line.",
        "schema: 1",
        f"model_types: [{checkpoint.config.get('model_type')}]",
        f'blocks: "{prefix}"',
        "units:",
    ]
    if experts := next((name.partition(".{expert}.")[0] for name in own if ".{expert}." in name), None):
        around = f"{experts.rpartition('.')[0]}."
        mixture = {name: shape for name, shape in own.items() if name.startswith(around)}
        lines += _draft_mixture(experts, mixture)
        own = {name: shape for name, shape in own.items() if name not in mixture}
        named = set(re.findall(r"[\w.]+", "\n".join(lines)))
        matrices += [f"{prefix}.{name}" for name in mixture if name not in named and not name.startswith(experts)]
    folders = dict.fromkeys(name.rpartition(".")[0] for name in own)
    for folder in sorted(folders, key=lambda folder: "att" not in folder):  # in the order of the forward pass
        its, beside = ({n: s for n, s in of.items() if n.rpartition(".")[0] == folder} for of in (own, vectors))
        lines += _draft_unit(folder, its, beside)
    if not checkpoint.kind.generates:
        return "\n".join([*lines, f"skip: [{', '.join(dict.fromkeys(matrices))}]"]) + "\n"
    lines += [f"entry: [{', '.join(entry)}]  # between the embeddings and the blocks"] if entry else []
    staying = [name for name in dict.fromkeys([*matrices, head]) if name not in (*entry, *leaving)]
    lines += [
        f"tail: [{', '.join([*norms[-1:], *leaving, head])}]  # what follows the blocks; the head last",
        f"skip: [{', '.join(map(_quote, staying))}]",
    ]
    return "\n".join(lines) + "\n"


def _draft_mixture(experts: str, own: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield the lines of a mixture of experts, from the matrices of the module that holds them."""
    around, parts = experts.rpartition(".")[0], [n.rpartition(".")[2] for n in own if n.startswith(f"{experts}.")]
    beside = [name for name in own if not name.startswith(f"{experts}.")]
    router = next((name for name in beside if re.search(r"\.(gate|router)$", name)), f"{around}.gate")
    yield "  mlp:"
    yield "    kind: experts"
    yield f"    router: {router}"
    yield f"    experts: {experts}"
    if missing := {*EXPERT_INPUTS, EXPERT_OUTPUT} - {*parts}:
        yield f"    # each has {', '.join(parts)}. Say at the end of the file which are {', '.join(sorted(missing))}:"
        yield "    # renamed: {w1: gate_proj, w3: up_proj, w2: down_proj}"
    for output in (name for name in beside if _OUTPUT.search(name)):
        folder = output.rpartition(".")[0]
        inputs = ", ".join(n for n in beside if n.rpartition(".")[0] == folder and own[n][0] == own[output][1])
        key = "dense" if folder == around else "shared"
        yield f"    {key}: {{kind: channels, inputs: [{inputs}], output: {output}}}"


def _draft_unit(
    folder: str, own: Mapping[str, tuple[int, ...]], vectors: Mapping[str, tuple[int, ...]]
) -> Iterator[str]:
    """Yield the lines of one sub-block, from its matrices and its norms."""
    output = next((name for name in own if _OUTPUT.search(name)), list(own)[-1])
    inputs = [name for name in own if name != output]
    if not inputs:
        yield f"  # {output} {list(own[output])}: no inputs found. Add them for a unit, or list it under skip"
    elif "att" in folder:
        found = [next((n for n in inputs if re.search(p, n.rpartition(".")[2])), inputs[0]) for p in _PARTS.values()]
        fused = len(set(found)) == 1
        yield "  attention:"
        yield "    kind: kv_groups"
        yield from (f"    {part}: {name}" for part, name in zip(_PARTS, found, strict=True))
        if fused:
            yield "    fused: by_part  # rows hold all queries, all keys, all values. by_group: each group in turn"
        yield f"    output: {output}"
        yield "    # counts: [num_heads]  # attributes of the module that count heads, if there are any"
        queries, keys, _ = (own[name][:1] for name in found)
        if not fused and queries in vectors.values():
            norms = sorted(
                (name for name, shape in vectors.items() if shape in (queries, keys)),
                key=lambda name: not re.search(_PARTS["query"], name.rpartition(".")[2]),
            )
            yield f"    norms: [{', '.join(norms)}]  # over all heads, so no head can be removed alone"
    else:
        twice = [name for name in inputs if own[name][0] == 2 * own[output][1]]
        yield "  mlp:"
        yield "    kind: channels"
        yield f"    inputs: [{', '.join(name for name in inputs for _ in range(1 + (name in twice)))}]"
        yield f"    output: {output}"


def _quote(name: str) -> str:
    """Return a name in the form that YAML accepts inside a list."""
    return f'"{name}"' if "{" in name else name


def _find_prefix(checkpoint: Checkpoint) -> str:
    found = find_numbered_modules(checkpoint)
    if found is None:
        raise UserError(f"model: {checkpoint.folder}: no tensor name contains a number, so no blocks can be found")
    return found


def _generalise(name: str, prefixes: list[str]) -> str:
    for prefix in prefixes:
        before = re.escape(prefix.split("{")[0])
        name = re.sub(rf"^{before}\d+\.", f"{prefix}.", name)
    return re.sub(r"(?<=\.)\d+(?=\.)", "{expert}", name)
