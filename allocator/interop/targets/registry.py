"""All targets of exports, by the name that ``--to`` takes.

A new target is a new module with a ``TARGET``, and a line here.
"""

from __future__ import annotations

from importlib import import_module

from allocator.interop.contract import Target

_MODULES = (
    "hf",
    "hf_padded",
    "llm_compressor",
    "torchao",
    "torch_pruning",
    "evopress",
    "tyr",
    "darwinlm",
    "ratios",
    "optuna",
    "mlflow",
)
"""In the order in which they are listed."""

_TARGETS: tuple[Target, ...] = tuple(import_module(f"allocator.interop.targets.{name}").TARGET for name in _MODULES)

TARGETS: dict[str, Target] = {target.name: target for target in _TARGETS}
