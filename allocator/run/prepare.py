"""Making a job from a configuration. Every input is checked before any work starts or any file is written."""

from __future__ import annotations

from collections.abc import Mapping

from allocator.core.budget import Budget, budget_for
from allocator.core.costs import COSTS, check_known
from allocator.core.errors import UserError
from allocator.core.notify import Notify, silent
from allocator.core.plan import Plan
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.spec import check_device
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.data.examples import Examples
from allocator.model.data.read import read_examples
from allocator.pruning.pruners.protocol import LocalPruner, PrunerSpec
from allocator.pruning.pruners.registry import check_own_pruner, make_pruner
from allocator.run.config.run import RunConfig
from allocator.run.job import Job
from allocator.run.model import check_length, fingerprint_ladders, read_model, read_texts
from allocator.searchers.rules.baselines import uniform


def prepare_job(config: RunConfig, notify: Notify = silent, pruner: LocalPruner | None = None) -> Job:
    """Read and check every input of a configuration.

    Args:
        config: The configuration. The job gets a copy with a loss that suits the model.
        notify: Called with messages about the examples for the user.
        pruner: A local pruner that the user passed from Python. None for the configured pruner.

    Raises:
        UserError: An input is missing, damaged, too short or not accessible.
    """
    if config.workers == 0:
        check_device(config.device)
    checkpoint, layout, space = read_model(config)
    config = with_default_loss(config, checkpoint)
    _check_objectives(config, space)
    budget = budget_for(space, config.target, config.bounds)
    pruner = _choose_pruner(config, space) if pruner is None else check_own_pruner(pruner, config.pattern)
    along = _choose_path(config, checkpoint, space, budget)
    tokens = read_splits(config, checkpoint, notify)
    _check_labels(config, checkpoint, tokens)
    return Job(
        config=config,
        checkpoint=checkpoint,
        layout=layout,
        space=space,
        budget=budget,
        pruner=pruner,
        tokens=tokens,
        along=along,
    )


def read_splits(config: RunConfig, checkpoint: Checkpoint, notify: Notify = silent) -> dict[str, Examples]:
    """Read the examples of every split.

    Raises:
        UserError: The text or other data cannot be read, or a split holds too few examples.
    """
    wanted, length = _count_tokens(config), config.tokens.sequence_length
    check_length(checkpoint, length, "tokens.sequence_length")
    if config.domains:
        return read_texts(config.domains, checkpoint, wanted, length)
    return read_examples(config.text, checkpoint, wanted, length, notify)


def _check_objectives(config: RunConfig, space: SearchSpace) -> None:
    """Raise if an objective is a cost that the space does not know or that no level changes."""
    for cost in (name for name in config.objectives if name in COSTS):
        check_known(space, cost)
        if space.cost(space.sparsest, cost) == space.cost(space.dense, cost):
            raise UserError(
                f"objectives: no level of {config.pattern} pruning changes {cost}. Leave this objective out, "
                "or use --pattern structured"
            )


def _choose_pruner(config: RunConfig, space: SearchSpace) -> LocalPruner:
    """Return the configured local pruner, or the default of the pattern."""
    settings = config.pruner
    experts = settings.experts if any(unit.kind == "experts" for unit in space.units) else None
    spec = PrunerSpec(name=settings.name, damping=settings.damping, bias=settings.bias, experts=experts)
    return make_pruner(spec, config.pattern)


def _count_tokens(config: RunConfig) -> dict[str, int]:
    """Return the number of tokens of every split.

    Raises:
        UserError: A number is not a multiple of the sequence length, or too small for one sequence of each domain.
    """
    search, length = config.search, config.tokens.sequence_length
    wanted = {
        "calibration": config.tokens.calibration,
        "search": search.fidelities[-1],
        "selection": config.tokens.selection,
        "test": config.tokens.test,
        **({"training": search.training} if search.training else {}),
    }
    for name, count in [*wanted.items(), *(("search", count) for count in search.fidelities)]:
        if count % length:
            raise UserError(
                f"tokens: {name} asks for {count} tokens, which is not a multiple of the sequence length {length}. "
                f"Ask for {-(-count // length) * length}, or set tokens.sequence_length"
            )
        if count < len(config.domains) * length:
            raise UserError(
                f"domains: {name} asks for {count} tokens, which are too few. One sequence of {length} tokens from "
                f"each of the {len(config.domains)} domains takes {len(config.domains) * length}. Ask for more "
                "tokens, or set a smaller tokens.sequence_length"
            )
    step = config.training.batch_sequences * length
    for count in search.evolution.training:
        if count % step:
            raise UserError(
                f"search.evolution.training: {count} tokens are not whole batches of {config.training.batch_sequences} "
                f"sequences of {length}. Ask for {-(-count // step) * step}, or set training.batch_sequences"
            )
    return wanted


def with_default_loss(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """Return a configuration with the model's default loss, if the configuration names no loss.

    Raises:
        UserError: This kind of model does not support a setting of the configuration.
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
            f"objectives: nll needs a model that predicts the next token or a label. {checkpoint.architecture} "
            "predicts neither"
        )
    if config.search.training:
        raise UserError(
            f"search.evolution.training: only causal language models are trained, and {checkpoint.architecture} is "
            "not one. Use another method"
        )
    if config.workload.latency is not None:
        raise UserError(
            f"workload.latency: {checkpoint.architecture} does not generate text, so it has no latency table. "
            "Leave workload.latency out"
        )
    if config.domains and kind.reads != "text":
        raise UserError(
            f"domains: domains are texts, and {checkpoint.architecture} reads {kind.words}. "
            "Use text in place of domains"
        )
    if config.domains and kind.answers == "classes":
        raise UserError(
            f"domains: {checkpoint.architecture} is a classifier, and domains have no labels. "
            "Use text in place of domains"
        )
    return config


def _check_labels(config: RunConfig, checkpoint: Checkpoint, tokens: Mapping[str, Examples]) -> None:
    """Raise if a run minimises the negative log-likelihood of labels and the examples have no labels."""
    asked = "loss" if config.loss == "nll" else "objectives" if "nll" in config.objectives else ""
    if asked and checkpoint.kind.answers == "classes" and any(batch.labels is None for batch in tokens.values()):
        raise UserError(f"{asked}: nll needs labels, and the examples have none. Add labels, or leave nll out")


def _choose_path(config: RunConfig, checkpoint: Checkpoint, space: SearchSpace, budget: Budget) -> Allocation | None:
    """Return the allocation along which units are pruned. None for dense or expected inputs."""
    if config.pruner.inputs != "path":
        if config.pruner.along is not None:
            found = config.pruner.inputs or "the default"
            raise UserError(
                f"pruner.along: it needs pruner.inputs=path, found {found}. Set pruner.inputs=path, or leave "
                "pruner.along out"
            )
        return None
    if config.pruner.along is None:
        return uniform(space, budget)
    plan = Plan.load(config.pruner.along)
    if plan.model["fingerprint"] != checkpoint.fingerprint or fingerprint_ladders(plan.space) != fingerprint_ladders(
        space
    ):
        raise UserError(
            f"pruner.along: {config.pruner.along} is a plan for another model or other ladders. "
            "Use a plan with the model, pattern and ladders of this run, or leave pruner.along out for uniform"
        )
    return plan.allocation
