"""All targets, by the name that ``--to`` takes."""

from __future__ import annotations

from allocator.export.contract import Target
from allocator.export.llm_compressor import LlmCompressor
from allocator.export.ratios import Ratios
from allocator.export.torch_pruning import TorchPruning
from allocator.export.torchao import TorchAo

TARGETS: dict[str, Target] = {target.name: target for target in (LlmCompressor(), TorchAo(), TorchPruning(), Ratios())}
