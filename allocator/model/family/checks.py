"""Checks of a family file against a model, before anything is pruned."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint

_DEPTH = re.compile(r"^(n|num)_((hidden|encoder|decoder)_)?layers?$|^(en|de)coder_layers$")


def check_depth(blocks: str, numbers: Sequence[int], checkpoint: Checkpoint) -> None:
    """Check that a model has all blocks of a name, and that no two blocks share weights.

    Raises:
        UserError: No block has the name, a number is missing, or the configuration states another number of layers.
    """
    if not numbers:
        there = find_numbered_modules(checkpoint)
        hint = "" if there is None else f", whose numbered modules are {there}"
        raise UserError(
            f"family: blocks {blocks!r} matches no module of {checkpoint.architecture}{hint}. Name its blocks "
            "with {block} in place of the number"
        )
    gap = next((number for number in range(numbers[-1]) if number not in numbers), None)
    if gap is not None:
        raise UserError(
            f"family: blocks {blocks!r} matches {len(numbers)} blocks of {checkpoint.architecture} up to number "
            f"{numbers[-1]}, but number {gap} is missing. Copy the model again, or correct the line"
        )
    stated = sorted({*_list_depths(checkpoint.config)})
    if stated and len(numbers) not in stated:
        raise UserError(
            f"family: blocks {blocks!r} matches {len(numbers)} blocks of {checkpoint.architecture}, and config.json "
            f"says {' or '.join(map(str, stated))} layers. Copy the model again, or correct the line; layers that "
            "share their weights cannot be pruned"
        )


def _list_depths(config: Mapping[str, Any]) -> Iterator[int]:
    """Yield every number of layers that a configuration states."""
    for key, value in config.items():
        if isinstance(value, int) and _DEPTH.match(key):
            yield value
        elif isinstance(value, Mapping):
            yield from _list_depths(value)


def find_numbered_modules(checkpoint: Checkpoint) -> str | None:
    """Return the most common prefix of numbered modules, with ``{block}`` for the number; None if there is none."""
    found = Counter(match[1] for name in checkpoint.shapes if (match := re.match(r"^(.*?\.)\d+\.", name)))
    return f"{found.most_common(1)[0][0]}{{block}}" if found else None


def check_skipped(
    skipped: Mapping[str, str], tail: Sequence[str], owned: Collection[str], checkpoint: Checkpoint
) -> None:
    """Check that every matrix is either in a unit or under ``skip``, and not in both.

    A line of ``skip`` may match no matrix, because one family file serves models with and without that matrix. If a
    matrix is not covered, the error also names the most similar line of ``skip`` that matches nothing.

    Args:
        skipped: The line of ``skip`` for each module, by module name.
        tail: Modules that follow the blocks.
        owned: Matrices of units.
        checkpoint: The model.

    Raises:
        UserError: A matrix is in neither of them, or in both.
    """
    for module in sorted(owned):
        other = "skip" if module in skipped else "tail" if module in tail else None
        if other is not None:
            raise UserError(f"family: {module} is both in a unit and under {other!r}. Take it out of one of them")
    there = {name.removesuffix(".weight"): shape for name, shape in checkpoint.shapes.items()}
    idle = [line for module, line in skipped.items() if module not in there]
    for module, shape in there.items():
        if len(shape) >= 2 and module not in owned and module not in skipped:
            near = get_close_matches(_drop_numbers(module), idle, n=1) if idle else []
            hint = f". 'skip' names {near[0]!r}, which the model lacks: correct that line" if near else ""
            raise UserError(
                f"family: matrix {module} {list(shape)} of {checkpoint.architecture} is in no unit{hint}. "
                "Name the matrix in a unit, or list it under 'skip'"
            )


def check_heads(inputs: Sequence[str], output: str, fused: bool, checkpoint: Checkpoint) -> None:
    """Check that the matrices of attention divide into heads.

    The inputs are queries, keys and values, in this order. If ``fused``, one input holds all three.

    Raises:
        UserError: A matrix does not divide into heads.
    """
    heads = read_num_heads(checkpoint)
    rows = {module: checkpoint.shapes[f"{module}.weight"][0] for module in inputs}
    columns = checkpoint.shapes[f"{output}.weight"][1]
    if columns % heads:
        _raise_mismatch(output, f"{columns} columns, which {heads} query heads do not divide")
    width = columns // heads
    if fused:
        rest = rows[inputs[0]] - columns
        if rest <= 0 or rest % (2 * width):
            _raise_mismatch(
                inputs[0],
                f"{rows[inputs[0]]} rows, which are not {heads} query heads of width {width} and "
                "equally many key and value heads",
            )
        groups = rest // (2 * width)
    else:
        # configurations that are older than grouped queries state only the number of query heads
        groups = int(checkpoint.config.get("num_key_value_heads") or heads)
        query, key, value = inputs
        if groups < 1:
            raise UserError(f"family: num_key_value_heads of config.json is {groups}. Correct it")
        for module, count, kind in (
            (query, heads, "query heads"),
            (key, groups, "kv_groups"),
            (value, groups, "kv_groups"),
        ):
            if rows[module] % count:
                _raise_mismatch(module, f"{rows[module]} rows, which {count} {kind} do not divide")
        if rows[query] * groups != rows[key] * heads:
            _raise_mismatch(
                key,
                f"{rows[key]} rows for {groups} KV groups, and {query} has {rows[query]} for {heads} query heads: "
                "their heads differ in width",
            )
        if rows[value] * heads != columns * groups:
            _raise_mismatch(
                value,
                f"{rows[value]} rows for {groups} KV groups, and {output} has {columns} columns for {heads} query "
                "heads: their heads differ in width",
            )
    if heads % groups:
        _raise_mismatch(inputs[0], f"{heads} query heads, which {groups} kv_groups do not divide")


def _raise_mismatch(module: str, found: str) -> NoReturn:
    raise UserError(
        f"family: {module} has {found}. Correct the counts of heads in config.json, or the names in the family file"
    )


def read_num_heads(checkpoint: Checkpoint) -> int:
    """Return the number of query heads of a layer.

    Raises:
        UserError: The configuration does not state it.
    """
    for key in ("num_attention_heads", "n_head", "n_heads"):
        heads = checkpoint.config.get(key)
        if isinstance(heads, int) and heads > 0:
            return heads
    raise UserError(
        f"model: config.json of {checkpoint.architecture} does not say how many query heads a layer has "
        f"(num_attention_heads: {checkpoint.config.get('num_attention_heads')}). Add it, or save the model again"
    )


def check_biases(owned: Collection[str], checkpoint: Checkpoint) -> None:
    """Check the lengths of all biases, and that blocks agree on which biases they have.

    A bias must have one value per row of its matrix. A matrix of a unit must have a bias in every block or in none.

    Raises:
        UserError: A bias has another length, or only some blocks have it.
    """
    remedy = "Copy the model again, or save it again with save_pretrained"
    first: dict[str, str] = {}
    for name, shape in checkpoint.shapes.items():
        module = name.removesuffix(".weight")
        if module == name or len(shape) != 2:
            continue
        bias = checkpoint.shapes.get(f"{module}.bias")
        if bias not in (None, shape[:1]):
            raise UserError(
                f"model: {module}.bias has the shape {list(bias or ())}, and {name} has {shape[0]} rows. {remedy}"
            )
        other = first.setdefault(_drop_numbers(module), module) if module in owned else module
        if (f"{other}.bias" in checkpoint.shapes) != (bias is not None):
            there, absent = (module, other) if bias is not None else (other, module)
            raise UserError(f"model: {checkpoint.folder}: {there}.bias exists, but {absent}.bias does not. {remedy}")


def _drop_numbers(module: str) -> str:
    return re.sub(r"\.\d+\.", ".{block}.", module)


def check_vectors(
    name: str,
    lost: Collection[int],
    inputs: Collection[str],
    output: str,
    skipped: Collection[str],
    own: Mapping[str, tuple[int, ...]],
    checkpoint: Checkpoint,
) -> None:
    """Check that no vector of a sub-block would have to lose values when its matrices lose rows or columns.

    For example, a norm over hidden channels or over all heads would have to. Only its length shows this. A vector of
    the hidden size may have such a length by chance. It is accepted if its module lies next to the output projection
    and not next to the inputs, because it then acts on what the sub-block adds. A vector that stays can be listed under
    ``skip``.

    Args:
        name: Name of the sub-block.
        lost: Lengths that pruning reduces.
        inputs: Matrices that lose rows.
        output: The matrix that loses columns.
        skipped: Modules that stay unchanged.
        own: Shapes of the sub-block's tensors.
        checkpoint: The model.

    Raises:
        UserError: A vector would have to lose values.
    """
    hidden = checkpoint.shapes[f"{output}.weight"][0]
    for key, shape in own.items():
        if len(shape) != 1 or shape[0] not in lost:
            continue
        module = key.rpartition(".")[0]
        if key == f"{module}.bias" and len(checkpoint.shapes.get(f"{module}.weight", ())) == 2:
            continue
        parent = f"{module.rpartition('.')[0]}."
        beside_output = output.startswith(parent) and not any(each.startswith(parent) for each in inputs)
        if module not in skipped and not (shape[0] == hidden and beside_output):
            raise UserError(
                f"family: {key} of {checkpoint.architecture} has {shape[0]} values, and pruning reduces a dimension of "
                f"this size in {name}. No line says that the vector loses values too, so the model cannot be pruned. "
                "If the vector does not depend on what is removed, list its module under 'skip', with {block} in place "
                "of the number"
            )
