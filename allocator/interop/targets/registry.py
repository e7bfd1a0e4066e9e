"""All targets, by the name that ``--to`` takes."""

from __future__ import annotations

from allocator.interop.contract import Target
from allocator.interop.targets.darwinlm import DarwinLM
from allocator.interop.targets.evopress import EvoPress
from allocator.interop.targets.hf import HuggingFace
from allocator.interop.targets.hf_padded import HuggingFacePadded
from allocator.interop.targets.llm_compressor import LlmCompressor
from allocator.interop.targets.mlflow import MLflow
from allocator.interop.targets.optuna import Optuna
from allocator.interop.targets.ratios import Ratios
from allocator.interop.targets.torch_pruning import TorchPruning
from allocator.interop.targets.torchao import TorchAo
from allocator.interop.targets.tyr import Tyr

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
