"""All targets, by the name that ``--to`` takes."""

from __future__ import annotations

from allocator.export.contract import Target
from allocator.export.darwinlm import DarwinLM
from allocator.export.evopress import EvoPress
from allocator.export.mlflow import MLflow
from allocator.export.optuna import Optuna
from allocator.export.ratios import Ratios
from allocator.export.tyr import Tyr

TARGETS: dict[str, Target] = {
    target.name: target for target in (Ratios(), EvoPress(), Tyr(), DarwinLM(), Optuna(), MLflow())
}
