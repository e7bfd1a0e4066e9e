"""torchao: the list of sparsifiers that torch.ao.pruning and torchao share, by the name of a weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from allocator.core.files import write_json
from allocator.interop.contract import Source, Target, require_linear_layers
from allocator.interop.matrices import Matrix, round_share_up
from allocator.interop.verification import write_verify
from allocator.interop.writing import copy_script


class TorchAo(Target):
    """Writes ``sparsifier.json``, which either tool takes as it is, and a script that applies it.

    An entry states every setting, because defaults may prune otherwise: WeightNormSparsifier removes blocks of four
    weights by default. Dense matrices have no entry.
    """

    name = "torchao"
    writes = "sparsifier list for torch.ao.pruning and torchao, apply.py"
    patterns = ("unstructured", "n:m")

    def check(self, source: Source) -> None:
        """Check that all matrices belong to linear layers."""
        require_linear_layers(self, source)

    def write(self, source: Source, folder: Path) -> list[str]:
        """Write the list and the scripts."""
        pruned = [matrix for matrix in source.matrices if matrix.kept < matrix.size]
        write_json(folder / "sparsifier.json", [_entry(matrix) for matrix in pruned])
        copy_script("torchao/apply.py", folder)
        copy_script("calibration.py", folder)
        write_verify(folder, source)
        halves = all(matrix.group is None or matrix.group[0] * 2 == matrix.group[1] for matrix in pruned)
        wanda = "by Wanda with --wanda TEXT" if halves else "not by Wanda: that of torchao zeroes only half of a group"
        return [
            f"the plan is for {source.plan.pruner.get('name')}; here weights are removed by magnitude, or {wanda}. "
            "The kept weights are not refitted",
            "run: python apply.py MODEL OUT && python verify.py OUT",
        ]


TARGET = TorchAo()


def _entry(matrix: Matrix) -> dict[str, Any]:
    entry = {"tensor_fqn": f"{matrix.module}.weight"}
    if matrix.group is None:
        level = round_share_up(matrix.size - matrix.kept, matrix.size)
        return {**entry, "sparsity_level": level, "sparse_block_shape": [1, 1], "zeros_per_block": 1}
    kept, size = matrix.group
    # level 1.0 is the share of blocks: every block loses zeros_per_block
    grouped = {**entry, "sparsity_level": 1.0, "sparse_block_shape": [1, size], "zeros_per_block": size - kept}
    # torchao's Wanda reads this instead, and supports only halves
    return {**grouped, "semi_structured_block_size": size} if kept * 2 == size else grouped
