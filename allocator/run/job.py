"""A job: a configuration whose every input was read and checked, before any work starts or any file is written."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from allocator.core.budget import Budget, budget_for
from allocator.core.costs import COSTS, check_known
from allocator.core.errors import UserError
from allocator.core.files import file_fingerprint, fingerprint
from allocator.core.latency import LatencyTable
from allocator.core.notify import Notify, silent
from allocator.core.plan import Plan
from allocator.core.space import Allocation, SearchSpace
from allocator.core.version import __version__
from allocator.evaluation.engine import EngineSpec, check_device
from allocator.evaluation.training import Training
from allocator.model.checkpoint.headers import Checkpoint, locate
from allocator.model.data.examples import LABELS, Examples, fingerprint_examples
from allocator.model.data.read import read_examples, read_tokens
from allocator.model.family.layout import Layout, open_model, resolve_layout
from allocator.model.family.serving_costs import Workload, served
from allocator.model.family.space import build_space
from allocator.model.live.load import check_stock
from allocator.pruning.levels.store import LevelStore
from allocator.pruning.pruners.registry import PRUNERS, LocalPruner, make_pruner
from allocator.run.config import RunConfig
from allocator.searchers.coarse_to_fine import Round
from allocator.searchers.rules.baselines import uniform

_OFFSET = ("roberta", "xlm-roberta", "camembert")
"""Model types whose positions begin after that of padding."""

TRAINING = "training"
"""Folder inside a run where trained candidates are kept between the stages of its search."""


@dataclass(frozen=True)
class Job:
    """What the commands work on.

    Attributes:
        config: As given.
        checkpoint: The dense model.
        layout: Where its units are.
        space: Their ladders and costs.
        budget: What the target allows.
        pruner: The local pruner.
        tokens: Token ids [sequences, length] by split, and ``training``; or other examples.
        along: The allocation along which units are pruned; None for dense or expected inputs.
        round: What this round of the search begins with; None for the first.
    """

    config: RunConfig
    checkpoint: Checkpoint
    layout: Layout
    space: SearchSpace
    budget: Budget
    pruner: LocalPruner
    tokens: dict[str, np.ndarray | Examples]
    along: Allocation | None = None
    round: Round | None = None

    @cached_property
    def model_id(self) -> dict[str, str]:
        """Which model this is, wherever it lies."""
        return {
            "id": Path(self.config.model).resolve().name if Path(self.config.model).is_dir() else self.config.model,
            "architecture": self.checkpoint.architecture,
            "fingerprint": self.checkpoint.fingerprint,
        }

    @cached_property
    def text_fingerprints(self) -> dict[str, str]:
        """Hash of the tokens of each split."""
        return {split: fingerprint_examples(shown) for split, shown in self.tokens.items()}

    @cached_property
    def pruner_id(self) -> dict[str, Any]:
        """The local pruner and what its results depend on."""
        calibration = self.text_fingerprints["calibration"]
        return {
            "name": self.pruner.name,
            **self.pruner.settings(),
            "inputs": self.inputs,
            **({"along": list(self.along)} if self.along is not None else {}),
            "execution": "recompute" if self.recompute else "assemble",
            "tokens": int(self.tokens["calibration"].size),
            "sequence_length": self.config.tokens.sequence_length,
            "dtype": self.config.dtype,
            "threads": self.config.threads,
            "calibration": calibration,
        }

    @property
    def target(self) -> float:
        """Share of the parameters in units to remove; what constraints come to for uniform, if none was named."""
        return self.config.target or round(self.space.sparsity(uniform(self.space, self.budget)), 6)

    @property
    def round_number(self) -> int:
        """Which round of the search this is, the first being 1."""
        return 1 if self.round is None else self.round.number

    @property
    def inputs(self) -> str:
        """What units are pruned on: see :class:`~allocator.run.config.PrunerSettings`."""
        is_last = self.config.search.is_last_round(self.round_number)
        return self.config.pruner.inputs or ("dense" if not is_last or self.pruner.need != "gram" else "expected")

    @property
    def recompute(self) -> bool:
        """Whether a plan is pruned again along its own path, and not put together from the store."""
        chosen = self.config.pruner.execution
        return self.pruner.need == "gram" if chosen is None else chosen == "recompute"

    @property
    def store_key(self) -> dict[str, str]:
        """What a level store must have been built for."""
        return {
            "model": self.checkpoint.fingerprint,
            "calibration": self.text_fingerprints["calibration"],
            "pruner": fingerprint({key: value for key, value in self.pruner_id.items() if key != "execution"}),
            "space": ladders_id(self.space),
        }

    @property
    def workload_id(self) -> dict[str, Any]:
        """What the plan's costs of serving are for, and the latency table that times are from."""
        work = self.config.workload
        table = {} if work.latency is None else {"latency": file_fingerprint(work.latency)}
        return {"batch": work.batch, "prompt": work.prompt, "generate": work.generate, **table}

    def identity(self) -> dict[str, Any]:
        """Return what makes two runs the same search, wherever they run."""
        return {
            **self.config.identity(),
            "model": self.model_id["fingerprint"],
            "text": self.text_fingerprints,
            "space": fingerprint(self.space.to_json()),
            **{f"pruner.{key}": value for key, value in self.pruner_id.items()},
        }

    def engine_spec(self, store: LevelStore | None) -> EngineSpec:
        """Return what an engine of this job is made from."""
        checkpoint = replace(self.checkpoint, folder=self.checkpoint.folder.absolute())
        return EngineSpec(
            checkpoint,
            self.layout,
            self.space,
            store,
            self.pruner,
            self.config.dtype,
            self.config.threads,
            self.config.loss,
            self.config.device,
            self._training,
            tuple(self.config.domains),
        )

    @property
    def _training(self) -> Training | None:
        if not self.config.search.training:
            return None
        settings = self.config.training
        folder = self.config.folder.absolute() / TRAINING
        return Training(settings.learning_rate, settings.batch_sequences, folder)

    @property
    def training_id(self) -> dict[str, Any]:
        """How candidates are trained, as ``training``; nothing where they are not."""
        if not self.config.search.training:
            return {}
        return {
            "training": {"tokens": list(self.config.search.evolution.training), **self.config.training.model_dump()}
        }


def ladders_id(space: SearchSpace) -> str:
    """Return the hash of what pruned weights depend on: units and what their levels keep, whatever they serve."""
    return fingerprint([space.pattern, *([u.name, u.kind, u.total, u.kept, u.params, u.group] for u in space.units)])


def read_model(config: RunConfig) -> tuple[Checkpoint, Layout, SearchSpace]:
    """Read a model's headers and resolve its search space; no weight is loaded.

    Raises:
        UserError: The model or the family cannot be used.
    """
    if config.target is not None and not 0.0 < config.target < 1.0:
        raise UserError(f"target: expected a share in (0, 1), found {config.target}. 0.5 removes half of the units")
    checkpoint, family = open_model(locate(config.model), config.family)
    if "pruned" in checkpoint.config:
        raise UserError(f"model: {checkpoint.folder} is pruned already. Give the dense model that it was made from")
    ladder, structured = config.ladder, config.pattern == "structured"
    if config.pattern == "n:m" and ladder.sparsities is not None:
        raise UserError(
            f"ladder.sparsities: the levels of n:m are those of ladder.patterns, {', '.join(ladder.patterns)}. "
            "Leave ladder.sparsities out, or use --pattern unstructured"
        )
    if config.pattern == "n:m" and config.search.rounds > 1:
        raise UserError(
            f"search.rounds: every round halves the steps of ladders, and those of n:m are the patterns "
            f"{', '.join(ladder.patterns)}. Leave search.rounds out, or use --pattern unstructured"
        )
    if ladder.attention == "query_heads" and not structured:
        raise UserError(
            f"ladder.attention: query_heads serves structured pruning, and the pattern is {config.pattern}. "
            "Leave it out"
        )
    check_stock(checkpoint, family)
    layout = resolve_layout(family, checkpoint, ladder.attention, ladder.experts if structured else "inside")
    build = partial(
        build_space,
        layout,
        checkpoint,
        config.pattern,
        ladder=ladder.sparsities,
        align=ladder.align,
        patterns=ladder.patterns,
        bias=config.pruner.bias,
    )
    space = build(target=0.5 if config.target is None else config.target)
    if config.target is None:  # ladders are centred on what the constraint on parameters comes to, if there is one
        limits = [bound.limit(space) for bound in config.bounds if bound.name == "params"]
        share = min([1 - (limit - space.fixed["params"]) / space.unit_params for limit in limits], default=0.5)
        space = build(target=min(max(share, 0.0), 1.0))
    return checkpoint, layout, serving(config, checkpoint, layout, space)


def serving(config: RunConfig, checkpoint: Checkpoint, layout: Layout, space: SearchSpace) -> SearchSpace:
    """Return a space with what its levels cost to serve."""
    work = config.workload
    table = None if work.latency is None else LatencyTable.load(work.latency)
    return served(space, layout, checkpoint, Workload(work.batch, work.prompt, work.generate), table)


def prepare(config: RunConfig, notify: Notify = silent) -> Job:
    """Read and check every input of a configuration.

    Args:
        config: What a user asks for. The job's own has a loss that fits the model.
        notify: Hears what a user should know of the examples.

    Raises:
        UserError: An input is missing, damaged, too short or out of reach.
    """
    if config.workers == 0:
        check_device(config.device)
    checkpoint, layout, space = read_model(config)
    config = fitted(config, checkpoint)
    for cost in (name for name in config.objectives if name in COSTS):
        check_known(space, cost)
        if space.cost(space.sparsest, cost) == space.cost(space.dense, cost):
            raise UserError(
                f"objectives: no level of {config.pattern} pruning changes {cost}. Leave it out, "
                "or use --pattern structured"
            )
    budget = budget_for(space, config.target, config.bounds)
    settings = config.pruner
    whole = settings.experts if any(unit.kind == "experts" for unit in space.units) else None
    name = settings.name or PRUNERS[config.pattern][0]
    pruner = make_pruner(name, config.pattern, settings.damping, settings.bias, whole)
    wanted = {
        "calibration": config.tokens.calibration,
        "search": config.search.fidelities[-1],
        "selection": config.tokens.selection,
        "test": config.tokens.test,
        **({"training": config.search.training} if config.search.training else {}),
    }
    length = config.tokens.sequence_length
    for name, count in [*wanted.items(), *(("search", count) for count in config.search.fidelities)]:
        if count % length:
            raise UserError(
                f"tokens: {name} asks for {count} tokens, which is not a multiple of the sequence length {length}. "
                f"Ask for {-(-count // length) * length}, or set tokens.sequence_length"
            )
        if count < len(config.domains) * length:
            raise UserError(
                f"domains: {name} asks for {count} tokens, and one sequence of {length} of each of "
                f"{len(config.domains)} domains takes {len(config.domains) * length}. Ask for as many, or set "
                "tokens.sequence_length"
            )
    step = config.training.batch_sequences * length
    for count in config.search.evolution.training:
        if count % step:
            raise UserError(
                f"search.evolution.training: {count} tokens are not whole batches of {config.training.batch_sequences} "
                f"sequences of {length}. Ask for {-(-count // step) * step}, or set training.batch_sequences"
            )
    check_length(checkpoint, length, "tokens.sequence_length")
    along = _along(config, checkpoint, space, budget)
    tokens: dict[str, np.ndarray | Examples]
    if config.domains:
        tokens = {**read_texts(config.domains, checkpoint, wanted, length)}
    else:
        tokens = read_examples(config.text, checkpoint, wanted, length, notify)
    _check_labels(config, tokens)
    return Job(config, checkpoint, layout, space, budget, pruner, tokens, along)


def fitted(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """Return a configuration with a loss that the model can be measured by, where none was asked for.

    Raises:
        UserError: Something was asked for that this kind of model does not serve.
    """
    kind = checkpoint.kind
    if kind.generates:
        return config
    if config.loss not in kind.losses:
        if "loss" in config.model_fields_set:
            raise UserError(
                f"loss: {checkpoint.architecture} cannot be measured by {config.loss}. Use {' or '.join(kind.losses)}"
            )
        config = config.model_copy(update={"loss": kind.losses[0]})
        config.search.check_objectives(config.loss, config.objectives)
    if "nll" in config.objectives and kind.answers != "classes":
        raise UserError(
            f"objectives: nll is of text that follows, or of labels, and {checkpoint.architecture} has neither"
        )
    if config.search.training:
        raise UserError(
            f"search.evolution.training: {checkpoint.architecture} is not a causal language model, which alone are "
            f"trained. "
            "Use another method"
        )
    if config.workload.latency is not None:
        raise UserError(
            f"workload.latency: {checkpoint.architecture} does not generate, and has no table. Leave it out"
        )
    if config.domains and kind.reads != "text":
        raise UserError(
            f"domains: {checkpoint.architecture} reads {kind.words}, and domains are texts. Use text in place"
        )
    if config.domains and kind.answers == "classes":
        raise UserError(f"domains: {checkpoint.architecture} classifies, and domains have no labels. Use text in place")
    return config


def _check_labels(config: RunConfig, tokens: Mapping[str, np.ndarray | Examples]) -> None:
    """Check that a run that asks for the likelihood of labels has some."""
    asked = "loss" if config.loss == "nll" else "objectives" if "nll" in config.objectives else ""
    if asked and any(isinstance(each, Examples) and LABELS not in each.arrays for each in tokens.values()):
        raise UserError(f"{asked}: nll is of labels, and the examples have none. Give some, or use another")


def check_length(checkpoint: Checkpoint, length: int, asked: str) -> None:
    """Check that a model reads text of a length.

    Raises:
        UserError: It is too long, as ``asked`` for.
    """
    settings = checkpoint.settings or checkpoint.config
    longest = settings.get("max_position_embeddings") if checkpoint.kind.reads == "text" else None
    if longest is not None and str(checkpoint.config.get("model_type")) in _OFFSET:
        longest -= int(settings["pad_token_id"]) + 1
    if longest is not None and length > longest:
        raise UserError(f"{asked}: the model reads at most {longest} tokens, found {length}")


def _along(config: RunConfig, checkpoint: Checkpoint, space: SearchSpace, budget: Budget) -> Allocation | None:
    """Return the allocation along which units are pruned, if it is to be one."""
    if config.pruner.inputs != "path":
        if config.pruner.along is not None:
            found = config.pruner.inputs or "the default"
            raise UserError(f"pruner.along: it serves pruner.inputs=path, found {found}. Set that, or leave it out")
        return None
    if config.pruner.along is None:
        return uniform(space, budget)
    plan = Plan.load(config.pruner.along)
    if plan.model["fingerprint"] != checkpoint.fingerprint or ladders_id(plan.space) != ladders_id(space):
        raise UserError(
            f"pruner.along: {config.pruner.along} is a plan for another model or other ladders. "
            "Name a plan of this model with this pattern and these ladders, or leave it out for uniform"
        )
    return plan.allocation


def read_texts(
    texts: Mapping[str, Path | None], checkpoint: Checkpoint, wanted: dict[str, int], length: int
) -> dict[str, np.ndarray]:
    """Read several texts by name, as :func:`read_tokens` reads one: sequences of each in turn.

    Raises:
        UserError: A split holds too few tokens.
    """
    count = len(texts)
    if count == 1:
        return read_tokens(next(iter(texts.values())), checkpoint, wanted, length)
    packed = {split: np.empty((tokens // length, length), dtype=np.int64) for split, tokens in wanted.items()}
    for place, (name, text) in enumerate(texts.items()):
        own = {split: len(rows[place::count]) * length for split, rows in packed.items()}
        try:
            read = read_tokens(text, checkpoint, own, length)
        except UserError as error:
            raise UserError(f"domains.{name}: {error}") from None
        for split, rows in packed.items():
            rows[place::count] = read[split]
    return packed


def versions() -> dict[str, str]:
    """Return the versions of what results depend on."""
    packages = ("torch", "transformers", "numpy", "ray", "optuna", "pymoo")
    own = {"python": platform.python_version(), "allocator": __version__}  # on a cluster it may not be installed
    return {**own, **{name: metadata.version(name) for name in packages}}
