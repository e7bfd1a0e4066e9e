"""EvoPress: one level per matrix; every step of a level is the same number of weights."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path

from allocator.core.errors import UserError
from allocator.interop.contract import Source, Target
from allocator.interop.levels import LEVELS, MODULES, RoundedLevel, apportion, describe_loss, write_levels
from allocator.interop.verification import write_verify
from allocator.interop.writing import format_command

_STEPS = 16
_TOLERANCE = 0.001  # its pruner rounds in blocks of columns


class EvoPress(Target):
    """Writes levels around the plan's mean sparsity.

    Level l of a matrix of n weights is the sparsity s + l · d / n; ``metadata.pth`` has s (``sparsity``) and d
    (``weights_diff``). ``prune.py`` makes up to ``num_levels`` levels on either side, as far as they stay within
    [0, 1]. ``evo_prune_search.py`` begins with zeros and exchanges one for one, so the levels of a model add up to
    zero.

    The levels of a plan add up to zero too: each is rounded within the levels that ``prune.py`` makes, and then those
    with the smallest error are moved. The step is the smallest with which 16 levels on either side reach every sparsity
    of the plan; the default of ``prune.py`` reaches less far. Lines are sorted by name, as in EvoPress.
    """

    name = "evopress"
    writes = "levels of matrices for EvoPress, and what they mean"
    patterns = ("unstructured",)

    def check(self, source: Source) -> None:
        """Check that ``prune.py`` looks for the names of all matrices.

        Raises:
            UserError: It does not.
        """
        for matrix in source.matrices:
            if not re.fullmatch(MODULES, matrix.module):
                raise UserError(
                    f"export: {self.name} looks for matrices with Llama's names, such as layers.0.mlp.up_proj, and "
                    f"this model has {matrix.module}. Use --to ratios, or --to hf for the executed plan"
                )

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the levels and their metadata."""
        matrices = sorted(source.matrices, key=lambda matrix: matrix.module)
        kept, size = sum(m.kept for m in matrices), sum(m.size for m in matrices)
        base = 1 - kept / size
        excess = [m.size - m.kept - base * m.size for m in matrices]
        step = max(1, ceil(max(map(abs, excess)) / _STEPS))
        levels = apportion(
            [weights / step for weights in excess], [find_limits(base, step / m.size) for m in matrices], 0
        )
        rows = [
            RoundedLevel(m.module, level, m.sparsity, base + level * step / m.size)
            for m, level in zip(matrices, levels, strict=True)
        ]
        kept_by_module = {m.module: round(m.size * (1 - row.rounded)) for m, row in zip(matrices, rows, strict=True)}
        metadata = {"sparsity": base, "weights_diff": step, "num_levels": _STEPS}
        write_levels(folder, rows, metadata, _readme(base, step))
        verify = write_verify(folder, source, tolerance=_TOLERANCE, kept=kept_by_module)
        return [*describe_loss(rows, kept, sum(kept_by_module.values())), f"next: README.txt; then {verify}"]


TARGET = EvoPress()


def find_limits(base: float, step: float) -> tuple[int, int]:
    """Return the lowest and the highest level that ``prune.py`` makes of a matrix, in the same floating point."""
    return -min(int(base // step), _STEPS), min(int((1 - base) // step), _STEPS)


def _readme(base: float, step: int) -> list[str]:
    prune = format_command(
        *("torchrun", "--nproc-per-node=1", "prune.py", "--model_name_or_path", "MODEL"),
        *("--prunable_modules", MODULES, "--pre_block_modules", "model.embed_tokens", "model.rotary_emb"),
        *("--block_modules", "model.layers", "--calibration_data", "DATA"),
        *("--sparsity", base, "--weights_diff", step, "--num_levels", _STEPS, "--save_dir", "DATABASE"),
    )
    measure = format_command(
        *("python", "eval_ppl.py", "--model_name_or_path", "MODEL"),
        *("--sparse_weights_path", "DATABASE", "--sparse_config_path", LEVELS),
    )
    return [
        "A plan as levels of EvoPress (https://github.com/IST-DASLab/EvoPress). Run in its folder:",
        "",
        f"  {prune}",
        f"  cp {LEVELS} DATABASE/",
        f"  {measure}",
        "",
        "The first command writes the same metadata.pth into DATABASE.",
    ]
