"""The engine: one live model that is set to an allocation and then measured against the dense model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path

import torch

from allocator.core.effort import EXPANSION_POSITIONS
from allocator.core.errors import UserError
from allocator.core.notify import Notify, silent
from allocator.core.protocols import BEFORE, FEATURES, Outcome, Probe, Request
from allocator.evaluation import trie
from allocator.evaluation.expansion import BATCHES_PER_CHUNK, Expander, ExpansionChunk, merge_chunks, num_chunks
from allocator.evaluation.loss import Loss, feature_error
from allocator.evaluation.spec import DTYPES, EngineSpec, Execution, check_device
from allocator.evaluation.teacher import LossSums, Teacher, TeacherBatch
from allocator.evaluation.training import Trainer
from allocator.model.checkpoint.headers import Checkpoint, read_checkpoint
from allocator.model.data.examples import Examples
from allocator.model.live.load import load_model
from allocator.model.live.walk import BlockWalker
from allocator.pruning.calibration.build import prune_on_pruned_inputs
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.execute import save_pruned
from allocator.pruning.signals import cosines

_CHECKED = 16
"""Number of tokens on which the block-by-block forward pass is checked against the whole model."""

BOUNDARY_BYTES = 256 << 20
"""Memory limit for hidden states between blocks. Several allocations of a batch share these states."""


class Engine:
    """Measures allocations with one model on one device. No result depends on earlier measurements."""

    def __init__(self, spec: EngineSpec, tokens: Mapping[str, Examples]) -> None:
        """Load the model.

        Args:
            spec: What the engine is made from.
            tokens: Examples of each split. A fidelity uses the first examples of a split.

        Raises:
            UserError: This machine does not have the device.
        """
        check_device(spec.device)
        torch.set_num_threads(spec.threads)
        self._spec = spec
        self._arrays = tokens
        self._tokens = {split: examples.to_tensors() for split, examples in tokens.items()}
        self._walker = self._load(spec.checkpoint)
        example = next(iter(self._tokens.values()))[:1]
        self._walker.check(example.first_tokens(_CHECKED).to(spec.device))
        self._level_switch: LevelSwitch | None = None
        if spec.store is not None:
            assembler = Assembler(spec.checkpoint, spec.layout, spec.space, spec.store, self._walker.model)
            self._level_switch = LevelSwitch(self._walker.model, spec.layout, assembler)
            self._expander = Expander(self._walker, spec.layout, spec.space, assembler, self._level_switch)
        self._trainer: Trainer | None = None
        if spec.store is not None and spec.training is not None:
            assert spec.layout.kind.generates, "only causal language models can be trained"
            text = self._tokens["training"].inputs["input_ids"]
            self._trainer = Trainer(
                spec.checkpoint,
                spec.layout,
                spec.space,
                spec.store,
                spec.training,
                text,
                DTYPES[spec.dtype],
                spec.device,
            )
        on_device = {split: examples.to(spec.device) for split, examples in self._tokens.items()}
        self._teacher = Teacher(self._walker, on_device, lambda: self._switch(spec.space.dense))

    def measure(self, request: Request) -> Outcome:
        """Return the loss and the negative log-likelihood of an allocation."""
        return next(self.measure_batch([request]))

    def measure_batch(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Yield the outcome of each request. The order is chosen so that requests share work."""
        groups: dict[tuple[str, int, Probe], list[Request]] = {}
        for request in requests:
            if request.probe == "expansion":
                count = num_chunks(request.tokens, self._tokens[request.split].length)
                yield combine_chunks(request, self._spec.loss, [self.expand(request, index) for index in range(count)])
            else:
                groups.setdefault((request.split, request.tokens, request.probe), []).append(request)
        for group in groups.values():
            for outcome in self._measure_group(group):
                yield self._after_training(outcome) if outcome.request.training else outcome

    def expand(self, request: Request, index: int) -> ExpansionChunk:
        """Return one chunk of an expansion, from one part of the text. See :func:`combine_chunks`.

        Args:
            request: The allocation to expand around, and the fidelity.
            index: Index of the chunk.
        """
        assert not request.training, "an expansion needs an untrained allocation"
        start_s = time.perf_counter()
        batches = self._teacher.batches(request.split, request.tokens, self._spec.loss)
        edges = [0, *accumulate(batch.examples.num_tokens for batch in batches)]
        part = slice(index * BATCHES_PER_CHUNK, (index + 1) * BATCHES_PER_CHUNK)
        start, end = edges[part.start], edges[min(part.stop, len(batches))]
        every = -(-request.tokens // EXPANSION_POSITIONS)
        # evenly spaced, without the first position, because it may be an attention sink
        sampled = range((every // 2 - start) % every, end - start, every)
        self._switch(request.allocation, wide=True)
        chunk = self._expander.expand(request.allocation, self._teacher, batches[part], sampled)
        return replace(chunk, wall_s=time.perf_counter() - start_s)

    def measure_checkpoint(self, folder: Path, split: str, tokens: int) -> dict[str, float]:
        """Load a saved checkpoint, and measure it against the dense model and the text.

        Returns:
            ``kl`` from the dense model, or ``hidden`` if the model has no logits. If the examples have right answers,
            also ``nll``, with ``perplexity`` for a model that generates text or ``accuracy`` for a classifier.
        """
        walker, kind = self._load(read_checkpoint(folder)), self._walker.kind
        batches = self._teacher.batches(split, tokens, "kl" if kind.logits else "hidden")
        measured, _ = self._score(walker, batches)
        if kind.generates:
            return {**measured, "perplexity": math.exp(measured["nll"])}
        return {**measured, **(_accuracy(walker, batches) if kind.answers == "classes" else {})}

    def execute(self, execution: Execution, tokens: int, notify: Notify = silent) -> dict[str, float]:
        """Save a checkpoint, reload it, count its parameters and measure it on the test split.

        Args:
            execution: The allocation to save, and how its weights are made.
            tokens: Number of tokens of the test split.
            notify: Called with messages of the pruner. The checkpoint's name comes before each message.

        Returns:
            ``params``, and the measurements of :meth:`measure_checkpoint`.
        """
        spec = self._spec
        if execution.recompute:
            calibration = spec.calibration(
                self._arrays["calibration"], notify=lambda message: notify(f"{execution.out.name}: {message}")
            )
            compact = dict(prune_on_pruned_inputs(calibration, execution.allocation, every_level=False)).__getitem__
        else:
            assert spec.store is not None
            compact = spec.store
        params = save_pruned(execution.allocation, spec.checkpoint, spec.layout, spec.space, compact, execution.out)
        return {"params": params, **self.measure_checkpoint(execution.out, "test", tokens)}

    def _load(self, checkpoint: Checkpoint) -> BlockWalker:
        model = load_model(checkpoint, DTYPES[self._spec.dtype]).to(self._spec.device)
        return BlockWalker(model, self._spec.layout)

    def _measure_group(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Measure requests on the same tokens. Each starts where it first differs from an earlier one."""
        start_s = time.perf_counter()
        walker = self._walker
        split, tokens = requests[0].split, requests[0].tokens
        batches = self._teacher.batches(split, tokens, self._spec.loss)
        features = {n: self._teacher.features(split, tokens, n) for n in {r.blocks for r in requests} - {0}}
        embedded = [walker.embed(batch.examples) for batch in batches]
        limit = BOUNDARY_BYTES // sum(batch_btd.nbytes for batch_btd in embedded)
        kept: dict[int, list[torch.Tensor]] = {}
        turned: list[float] = []
        for step in trie.plan([self._path(request) for request in requests], limit):
            request = requests[step.index]
            self._switch(request.allocation)
            entering = kept[step.start] if step.start else embedded
            kept = {boundary: kept[boundary] for boundary in step.keep if boundary <= step.start}
            kept.update({boundary: [] for boundary in step.keep if boundary > step.start})
            sums: list[LossSums] = []
            errors: list[torch.Tensor] = []
            # before this start, the path equals the previous path, so its values stay
            turned = [*turned[: step.start], *[0.0] * (len(walker.blocks) - step.start)]
            for number, (batch, hidden_btd) in enumerate(zip(batches, entering, strict=True)):
                for index in range(step.start, request.blocks or len(walker.blocks)):
                    entering_btd, hidden_btd = hidden_btd, walker.run(index, hidden_btd)
                    if request.probe == "influence":
                        ends = [walker.residual(index, state) for state in (entering_btd, hidden_btd)]
                        turned[index] += float((1.0 - cosines(*ends)).sum())
                    if index + 1 in kept:
                        kept[index + 1].append(hidden_btd)
                if request.blocks:
                    teacher_btd = features[request.blocks][number]
                    errors.append(feature_error(walker.parts(teacher_btd), walker.parts(hidden_btd)))
                else:
                    sums.append(self._teacher.score(batch, walker, hidden_btd))
            if request.blocks:
                name, (measured, parts) = FEATURES, _mean_error(errors)
            else:
                name = self._spec.loss
                measured, parts = self._means(sums, batches)
            if request.probe == "influence":
                positions = [walker.residual(i, embedded[0]).shape[1] for i in range(len(turned))]  # number per example
                count = sum(len(state) for state in embedded)
                measured.update(
                    {f"influence.{i}": t / (count * n) for i, (t, n) in enumerate(zip(turned, positions, strict=True))}
                )
            now_s = time.perf_counter()
            yield Outcome(
                request=request, measured=measured, wall_s=now_s - start_s, loss_name=name, sequence_losses=parts
            )
            start_s = time.perf_counter()

    def _after_training(self, before: Outcome) -> Outcome:
        """Return the outcome after training. It also contains the loss before training."""
        start_s = time.perf_counter()
        assert self._trainer is not None, "a request with training needs training settings"
        request, loss = before.request, self._spec.loss
        # the last stage measures on the whole split, and nothing continues from its state
        keep = request.tokens < self._tokens[request.split].num_tokens
        walker = BlockWalker(self._trainer.train(request, keep), self._spec.layout)
        measured, parts = self._score(walker, self._teacher.batches(request.split, request.tokens, loss))
        measured[f"{loss}{BEFORE}"] = before.loss
        return Outcome(
            request=request,
            measured=measured,
            wall_s=before.wall_s + time.perf_counter() - start_s,
            loss_name=loss,
            sequence_losses=parts,
        )

    def _score(
        self, walker: BlockWalker, batches: Sequence[TeacherBatch]
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Return measurements by name, and the loss of each sequence, of a model that runs all blocks."""
        sums = [self._teacher.score(batch, walker, walker.run_all(walker.embed(batch.examples))) for batch in batches]
        return self._means(sums, batches)

    def _means(
        self, sums: Sequence[LossSums], batches: Sequence[TeacherBatch]
    ) -> tuple[dict[str, float], tuple[float, ...]]:
        """Return measurements by name, including the loss on every domain, and the loss of each sequence."""
        loss, domains = batches[0].loss, self._spec.domains
        measured, parts = _means(sums, loss, sum(batch.positions for batch in batches))
        by_domain = ((name, parts[index :: len(domains)]) for index, name in enumerate(domains))
        return {**measured, **{f"{loss}.{name}": sum(own) / len(own) for name, own in by_domain if own}}, parts

    def _path(self, request: Request) -> trie.Path:
        """Return the levels of each block that is run."""
        by_block: list[list[int]] = [[] for _ in self._walker.blocks]
        for unit, level in zip(self._spec.space.units, request.allocation, strict=True):
            by_block[unit.block].append(level)
        return tuple(tuple(levels) for levels in by_block[: request.blocks or None])

    def _switch(self, allocation: Sequence[int], wide: bool = False) -> None:
        """Set the model to an allocation. ``wide`` keeps dense shapes. An engine without a store is always dense."""
        if self._level_switch is not None:
            for unit, level in zip(self._spec.space.units, allocation, strict=True):
                self._level_switch.set(unit.name, level, wide)


def combine_chunks(request: Request, loss: Loss, chunks: Sequence[ExpansionChunk]) -> Outcome:
    """Return the outcome of an expansion. ``chunks`` are all of its chunks, in order.

    Raises:
        UserError: The gradient is not finite.
    """
    expansion = merge_chunks(chunks)
    if not all(math.isfinite(value) for row in (*expansion.slope, *expansion.size) for value in row):
        raise UserError("evaluation: the gradient of the loss is not finite. Use --set dtype=float32")
    sums = [loss_sums for chunk in chunks for loss_sums in chunk.sums]
    measured, parts = _means(sums, loss, sum(chunk.positions for chunk in chunks))
    return Outcome(
        request=request,
        measured=measured,
        wall_s=sum(chunk.wall_s for chunk in chunks),
        loss_name=loss,
        sequence_losses=parts,
        expansion=expansion,
    )


def _means(sums: Sequence[LossSums], loss: Loss, positions: int) -> tuple[dict[str, float], tuple[float, ...]]:
    """Return measurements by name, and the loss of each sequence, from the sums over each batch."""
    total, size, nll = (torch.cat(column).cpu() for column in zip(*sums, strict=True))
    measured: dict[str, float] = {loss: float(total.sum() / size.sum())}
    if positions:
        measured["nll"] = float(nll.sum()) / positions
    _check_finite(measured)
    return measured, tuple((total / size).tolist())


def _accuracy(walker: BlockWalker, batches: Sequence[TeacherBatch]) -> dict[str, float]:
    """Return the share of labelled examples whose label is the most probable class. Empty without labels."""
    right = known = 0
    for batch in batches:
        read_bpd, head = walker.logit_inputs(walker.run_all(walker.embed(batch.examples)), batch.examples)
        right += int((head(read_bpd).argmax(-1) == batch.labels_bp).sum())
        known += batch.positions
    return {"accuracy": right / known} if known else {}


def _mean_error(errors: Sequence[torch.Tensor]) -> tuple[dict[str, float], tuple[float, ...]]:
    """Return the mean error of features and the error of each sequence, from the errors of each batch."""
    parts = torch.cat(list(errors)).cpu()
    measured = {FEATURES: float(parts.mean())}
    _check_finite(measured)
    return measured, tuple(parts.tolist())


def _check_finite(measured: Mapping[str, float]) -> None:
    if not all(math.isfinite(value) for value in measured.values()):
        raise UserError(
            f"evaluation: the loss is not finite ({measured}). Check the weights, or use --set dtype=float32"
        )
