"""All targets, by the name that ``--to`` takes."""

from __future__ import annotations

from allocator.export.contract import Target
from allocator.export.darwinlm import DarwinLM
from allocator.export.evopress import EvoPress
from allocator.export.hf import HuggingFace
from allocator.export.hf_padded import HuggingFacePadded
from allocator.export.llm_compressor import LlmCompressor
from allocator.export.mlflow import MLflow
from allocator.export.optuna import Optuna
from allocator.export.ratios import Ratios
from allocator.export.torch_pruning import TorchPruning
from allocator.export.torchao import TorchAo
from allocator.export.tyr import Tyr

_ALL = (
    HuggingFace(),
    HuggingFacePadded(),
    LlmCompressor(),
    TorchAo(),
    TorchPruning(),
    EvoPress(),
    Tyr(),
    DarwinLM(),
    Ratios(),
    Optuna(),
    MLflow(),
)

TARGETS: dict[str, Target] = {target.name: target for target in _ALL}
