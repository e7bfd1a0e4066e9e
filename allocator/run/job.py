"""A job: a configuration and all that was read for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from allocator.core.budget import Budget
from allocator.core.files import file_fingerprint, fingerprint
from allocator.core.header import JournalHeader
from allocator.core.provenance import collect_versions
from allocator.core.space import Allocation, SearchSpace
from allocator.core.user_objects import make_plain
from allocator.evaluation.spec import EngineSpec
from allocator.evaluation.training import Training
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.data.examples import Examples
from allocator.model.family.layout import Layout
from allocator.model.live.walk import SEQUENCES_PER_BATCH
from allocator.pruning.levels.store import LevelStore
from allocator.pruning.pruners.protocol import LocalPruner
from allocator.run.config.run import RunConfig
from allocator.run.model import fingerprint_ladders
from allocator.searchers.coarse_to_fine import Round
from allocator.searchers.rules.baselines import uniform

TRAINING_FOLDER = "training"
"""Folder inside a run in which the stages of its search keep trained candidates."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One round of a run: a configuration and all that was read for it.

    Attributes:
        config: The configuration.
        checkpoint: The dense model.
        layout: Where the model has its units.
        space: The units, their ladders and costs.
        budget: What every allocation keeps to.
        pruner: The local pruner.
        tokens: The examples of every split.
        along: The allocation along which units are pruned. None for dense or expected inputs.
        round: What this round begins with. None for the first round.
    """

    config: RunConfig
    checkpoint: Checkpoint
    layout: Layout
    space: SearchSpace
    budget: Budget
    pruner: LocalPruner
    tokens: dict[str, Examples]
    along: Allocation | None = None
    round: Round | None = None

    @cached_property
    def model_id(self) -> dict[str, str]:
        """The model's id, architecture and fingerprint, which do not depend on its folder."""
        return {
            "id": Path(self.config.model).resolve().name if Path(self.config.model).is_dir() else self.config.model,
            "architecture": self.checkpoint.architecture,
            "fingerprint": self.checkpoint.fingerprint,
        }

    @cached_property
    def text_fingerprints(self) -> dict[str, str]:
        """The fingerprint of every split."""
        return {split: examples.fingerprint() for split, examples in self.tokens.items()}

    @cached_property
    def pruner_id(self) -> dict[str, Any]:
        """The local pruner and all that its results depend on."""
        calibration = self.text_fingerprints["calibration"]
        return {
            "name": self.pruner.name,
            **make_plain(self.pruner.settings(), "pruner: its settings"),
            "inputs": self.inputs,
            **({"along": list(self.along)} if self.along is not None else {}),
            "execution": "recompute" if self.recompute else "assemble",
            "tokens": self.tokens["calibration"].num_tokens,
            "sequence_length": self.config.tokens.sequence_length,
            "dtype": self.config.dtype,
            "threads": self.config.threads,
            "calibration": calibration,
        }

    @property
    def target(self) -> float:
        """The share of the parameters in units to remove. Without a target, the share that uniform removes."""
        return self.config.target or round(self.space.sparsity(uniform(self.space, self.budget)), 6)

    @property
    def round_number(self) -> int:
        """The number of this round. The first is 1."""
        return 1 if self.round is None else self.round.number

    @property
    def inputs(self) -> str:
        """The inputs on which units are pruned; see :class:`~allocator.run.config.sections.PrunerSettings`."""
        is_last = self.config.search.is_last_round(self.round_number)
        return self.config.pruner.inputs or ("expected" if is_last and self.pruner.refit is not None else "dense")

    @property
    def recompute(self) -> bool:
        """Whether a plan is pruned again along its own path. If not, its levels come from the store."""
        chosen = self.config.pruner.execution
        return self.pruner.refit is not None if chosen is None else chosen == "recompute"

    @property
    def store_key(self) -> dict[str, str]:
        """What the level store of this round belongs to."""
        return {
            "model": self.checkpoint.fingerprint,
            "calibration": self.text_fingerprints["calibration"],
            "pruner": fingerprint({key: value for key, value in self.pruner_id.items() if key != "execution"}),
            "space": fingerprint_ladders(self.space),
        }

    @property
    def workload_id(self) -> dict[str, Any]:
        """The workload that costs of serving are for, and the fingerprint of the latency table."""
        work = self.config.workload
        table = {} if work.latency is None else {"latency": file_fingerprint(work.latency)}
        return {"batch": work.batch, "prompt": work.prompt, "generate": work.generate, **table}

    def identity(self) -> dict[str, Any]:
        """Return what two runs of the same search have in common, on any machine."""
        return {
            **self.config.identity(),
            "model": self.model_id["fingerprint"],
            "text": self.text_fingerprints,
            "space": fingerprint(self.space.to_json()),
            **{f"pruner.{key}": value for key, value in self.pruner_id.items()},
            **({"searcher": custom} if (custom := self.config.search.custom_identity()) else {}),
        }

    def engine_spec(self, store: LevelStore | None) -> EngineSpec:
        """Return what an engine of this round is made from."""
        checkpoint = replace(self.checkpoint, folder=self.checkpoint.folder.absolute())
        return EngineSpec(
            checkpoint=checkpoint,
            layout=self.layout,
            space=self.space,
            store=store,
            pruner=self.pruner,
            dtype=self.config.dtype,
            threads=self.config.threads,
            loss=self.config.loss,
            device=self.config.device,
            training=self._training,
            domains=tuple(self.config.domains),
        )

    @property
    def _training(self) -> Training | None:
        if not self.config.search.training:
            return None
        settings = self.config.training
        folder = self.config.folder.absolute() / TRAINING_FOLDER
        return Training(settings.learning_rate, settings.batch_sequences, folder)

    @property
    def training_id(self) -> dict[str, Any]:
        """How candidates are trained, under ``training``. Empty if they are not trained."""
        if not self.config.search.training:
            return {}
        return {
            "training": {"tokens": list(self.config.search.evolution.training), **self.config.training.model_dump()}
        }

    def make_header(self) -> JournalHeader:
        """Return the header of this round's journal."""
        config, cuda = self.config, self.config.device == "cuda"
        return JournalHeader(
            space=self.space,
            budget=self.budget,
            identity=self.identity(),
            model=self.model_id,
            pruner=self.pruner_id,
            asked=config.asked,
            method=config.search.method_name,
            seed=config.seed,
            loss=config.loss,
            objectives=config.objectives,
            tokens=config.search.settings_for_round(self.round_number).fidelities,
            selection=config.tokens.selection,
            text={
                split: {name: asdict(coverage) for name, coverage in examples.coverage.items()}
                for split, examples in self.tokens.items()
                if examples.coverage
            },
            workload=self.workload_id,
            training=self.training_id.get("training"),
            round=None if self.round is None else self.round.to_json(),
            device="cuda" if cuda else f"cpu {torch.backends.cpu.get_cpu_capability()}",
            micro_batch=(SEQUENCES_PER_BATCH, config.tokens.sequence_length),
            versions=collect_versions(),
        )
