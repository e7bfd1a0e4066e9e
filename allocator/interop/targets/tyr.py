"""Týr-the-Pruner: the plan as the start of its next iteration."""

from __future__ import annotations

from pathlib import Path

from allocator.core.errors import UserError
from allocator.interop.contract import Source, Target
from allocator.interop.levels import (
    LEVELS,
    METADATA,
    RoundedLevel,
    count_heads,
    count_kept_columns,
    count_kept_if_shrunk,
    count_kept_if_zeroed,
    describe_loss,
    list_dense_shapes,
    select_outputs,
    write_levels,
)
from allocator.interop.verification import write_verify
from allocator.interop.writing import format_command

_TYPES = ("llama", "gemma", "gemma2", "phi3", "mistral")
_CHANNELS, _LEVELS = 32, 9
_ABOVE = 1 / 1024


class Tyr(Target):
    """Writes the metadata of a supernet whose level zero is the plan, and levels of zero.

    Level l of an output projection of n weights is the sparsity s + l · d / n. ``metadata.pth`` has an s for every
    layer, ``mha_sparsity`` and ``ffn_sparsity``, and one step d for heads and one for channels, ``weights_diff_mha``
    and ``weights_diff_mlp``. ``prune_to_supernet.py`` reads both files as a supernet and its configuration, and
    makes the levels of the next supernet around them. ``search_sparsity_dist.py`` exchanges one level for one among
    heads, and among channels, so that the levels of each kind add up to zero.

    Every layer has its own s, so nothing is rounded to levels. Týr keeps int(k · (1 - s)) of k heads or channels. Since
    floating point may fall just below a whole number, s is chosen for a thousandth of an item more.
    """

    name = "tyr"
    writes = "a plan for Týr-the-Pruner to execute or refine"
    patterns = ("structured",)

    def check(self, source: Source) -> None:
        """Check that Týr knows the type of the model.

        Raises:
            UserError: It does not.
        """
        model_type = str(source.checkpoint.config.get("model_type"))
        if model_type not in _TYPES:
            raise UserError(
                f"export: Týr takes models of type {', '.join(_TYPES)}, and this one is of type {model_type!r}. "
                "See 'allocator export --list' for another target"
            )
        select_outputs(source)

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the levels and their metadata."""
        columns, heads = count_kept_columns(source), count_heads(source)
        shares: dict[str, list[float]] = {"attention": [], "mlp": []}
        rows = []
        for matrix in select_outputs(source):
            width = matrix.shape[1] // heads if matrix.part == "attention" else 1
            share = _sparsity(columns[matrix.module] // width, matrix.shape[1] // width)
            shares[matrix.part].append(share)
            rows.append(RoundedLevel(matrix.module, 0, matrix.sparsity, share))
        hidden = select_outputs(source)[0].shape[0]
        steps = {
            "weights_diff_mlp": _CHANNELS * hidden,
            "weights_diff_mha": hidden * (hidden // heads),
        }
        sparsity = sum(row.planned for row in rows) / len(rows)
        metadata = {
            "sparsity": sparsity,
            "mha_sparsity": shares["attention"],
            "ffn_sparsity": shares["mlp"],
            **steps,
            "num_sparsity_levels": _LEVELS,
        }
        write_levels(folder, sorted(rows, key=lambda row: row.module), metadata, _readme(sparsity, steps))
        verify = write_verify(
            folder, source, shapes=list_dense_shapes(source), kept=count_kept_if_zeroed(source, columns)
        )
        return [
            *describe_loss(rows, sum(m.kept for m in source.matrices), count_kept_if_shrunk(source, columns)),
            "Týr zeroes columns of output projections and keeps every shape; it chooses single heads, and keeps "
            "keys and values that heads share",
            f"next: README.txt; then {verify}",
        ]


TARGET = Tyr()


def _sparsity(kept: int, total: int) -> float:
    return 1 - (kept + _ABOVE) / total if 0 < kept < total else 1.0 - kept / total


def _readme(sparsity: float, steps: dict[str, int]) -> list[str]:
    prune = format_command(
        *("torchrun", "--nproc_per_node=1", "prune_to_supernet.py", "--model_name_or_path", "MODEL"),
        *("--prunable_modules", "^(?!.*(?:embedding|emb|head)).+$"),
        *("--pre_block_modules", "model.embed_tokens", "model.rotary_emb", "--block_modules", "model.layers"),
        *("--calibration_data", "DATA", "--error_accumulation", "--sparsity", sparsity),
        *(word for name, step in steps.items() for word in (f"--{name}", step)),
        *("--num_sparsity_levels", _LEVELS, "--supernet_dir", "HERE", "--supernet_config", f"HERE/{LEVELS}"),
        *("--save_dir", "SUPERNET"),
    )
    return [
        "A plan for Týr-the-Pruner (https://github.com/AMD-AGI/Tyr-the-Pruner). HERE is this folder. In that of Týr:",
        "",
        f"  {prune}",
        "",
        f"makes a supernet around the plan, from {METADATA} and {LEVELS}. Its level 0 is the plan: src.model_utils.",
        f"load_sparse_weights(model, SUPERNET, HERE/{LEVELS}) loads it, and search_sparsity_dist.py goes on from it.",
    ]
