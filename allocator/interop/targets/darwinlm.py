"""Export target for DarwinLM: every layer has one level for its heads and one for its channels."""

from __future__ import annotations

from pathlib import Path

from allocator.core.errors import UserError
from allocator.interop.contract import Source, Target
from allocator.interop.levels import (
    LEVELS,
    MODULES,
    RoundedLevel,
    apportion,
    count_heads,
    count_kept_if_shrunk,
    count_kept_if_zeroed,
    describe_loss,
    list_dense_shapes,
    select_outputs,
    write_levels,
)
from allocator.interop.verification import write_verify
from allocator.interop.writing import format_command


class DarwinLM(Target):
    """Writes levels of output projections. One level removes one head, or the same share of the channels.

    Level l removes ``cols_removed_attn[l]`` columns of ``o_proj`` and ``cols_removed_mlp[l]`` of ``down_proj``, the
    same in every layer. The lists are in ``metadata.pth``, which ``struct_prune.py`` writes from its arguments. Both
    lists have the same length and no repeated values. Those of attention are whole heads.
    ``evo_struct_prune_search.py`` raises one level and lowers another of the same kind by one. So the sum of the levels
    of a kind stays the same.

    Attention has one level for each number of removed heads, so its levels are exact. Channels have the same number of
    levels. They are rounded, so that their sum is nearest to the plan's. The published lists have 11 levels. DarwinLM's
    own search begins with one level for all layers. The mean of a plan need not be such a level. Channels are written
    first, as in DarwinLM.
    """

    name = "darwinlm"
    writes = "levels of heads and channels for DarwinLM, and what they mean"
    patterns = ("structured",)

    def check(self, source: Source) -> None:
        """Check that heads have the size that DarwinLM assumes.

        Raises:
            UserError: Heads have another size.
        """
        attention, heads = select_outputs(source)[0], count_heads(source)
        if attention.shape[0] % heads or attention.shape[1] != attention.shape[0]:
            raise UserError(
                f"export: DarwinLM assumes that a head has size hidden_size / {heads}, and {attention.module} is "
                f"{list(attention.shape)}. See 'allocator export --list' for another target"
            )

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the levels and their metadata."""
        heads = count_heads(source)
        rows, columns, lists = [], {}, {}
        for part, key in (("mlp", "cols_removed_mlp"), ("attention", "cols_removed_attn")):
            outputs = [matrix for matrix in select_outputs(source) if matrix.part == part]
            width = outputs[0].shape[1]
            lists[key] = [round(level * width / heads) for level in range(heads + 1)]
            targets = [matrix.sparsity * heads for matrix in outputs]
            levels = apportion(targets, [(0, heads)] * len(outputs), round(sum(targets)))
            for matrix, level in zip(outputs, levels, strict=True):
                columns[matrix.module] = width - lists[key][level]
                rows.append(RoundedLevel(matrix.module, level, matrix.sparsity, lists[key][level] / width))
        write_levels(folder, rows, lists, _readme(lists))
        verify = write_verify(
            folder, source, shapes=list_dense_shapes(source), kept=count_kept_if_zeroed(source, columns)
        )
        return [
            *describe_loss(rows, sum(m.kept for m in source.matrices), count_kept_if_shrunk(source, columns)),
            "DarwinLM zeroes columns of output projections, and shrinks the model afterwards; it chooses single "
            "heads, and keeps keys and values that heads share",
            f"next: README.txt; then, before it is shrunk, {verify}",
        ]


TARGET = DarwinLM()


def _readme(lists: dict[str, list[int]]) -> list[str]:
    prune = format_command(
        *("torchrun", "--nproc-per-node=1", "struct_prune.py", "--model_name_or_path", "MODEL"),
        *("--prunable_modules", MODULES, "--pre_block_modules", "model.embed_tokens", "model.rotary_emb"),
        *("--block_modules", "model.layers", "--calibration_data", "DATA"),
        *("--mlp_prune_name", "down_proj", "--attn_prune_name", "o_proj"),
        *(word for name, counts in lists.items() for word in (f"--{name}", *counts)),
        *("--save_dir", "DATABASE"),
    )
    measure = format_command(
        *("python", "lmeval.py", "--model", "hf", "--model_args", "pretrained=MODEL"),
        *("--sparse_weights_path", "DATABASE", "--sparse_config_path", f"HERE/{LEVELS}", "--tasks", "TASKS"),
    )
    return [
        "A plan as levels of DarwinLM (https://github.com/IST-DASLab/DarwinLM). In its folder, with this one as HERE:",
        "",
        f"  {prune}",
        f"  {measure}",
        "",
        "The first command writes the same metadata.pth into DATABASE.",
    ]
