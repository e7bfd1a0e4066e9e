"""Training a candidate for a moment before it is measured, with what is pruned staying pruned.

After DarwinLM (Tang et al., COLM 2026), whose published code trains the dense network instead. A candidate gets
weights of its own, in float32 whatever evaluations compute in, and all of them are trained: AdamW with its usual
settings, next-token cross-entropy on calibration text, no dropout. Structured units are compact, so nothing is there
that could come back. Of single weights, the gradients of removed ones are zero, so that moments and weight decay never
touch them, and the mask is laid on again after every step.

The rate is constant and step n reads batch n of the text, so that training is a function of the allocation and the
number of tokens: what one stage of a search trained, the next goes on with, to the same weights as from the start. The
paper trains anew in each stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from allocator.core.errors import UserError
from allocator.core.protocols import Request
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.training_states import TrainingStates
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout
from allocator.model.live.load import load_model
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.masks import kept_mask
from allocator.pruning.levels.store import LevelStore

_OPTIMIZER = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter. Steps are its own: an expert without tokens has no gradient, and makes none."""


@dataclass(frozen=True, slots=True)
class Training:
    """How candidates are trained.

    Attributes:
        learning_rate: Of AdamW, constant.
        batch_sequences: Sequences of one step.
        folder: Where states are kept between the stages of a search; every worker should reach it.
    """

    learning_rate: float
    batch_sequences: int
    folder: Path


class Candidate:
    """A model in training.

    Attributes:
        model: The model.
        trained: Tokens that it was trained on.
    """

    def __init__(self, model: nn.Module, removed: Mapping[str, torch.Tensor], training: Training) -> None:
        """Take over a model.

        Args:
            model: With weights of its own, in float32.
            removed: By parameter name, which weights [out, in] are zero and stay so.
            training: How it is trained.
        """
        self.model, self._removed, self._training = model.requires_grad_(True), removed, training
        self._parameters = dict(model.named_parameters())
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=training.learning_rate)
        self.trained = 0

    def train(self, tokens_nt: torch.Tensor, until: int, dtype: torch.dtype) -> None:
        """Train until so many tokens were seen since the beginning.

        Args:
            tokens_nt: Token ids [sequences, length] of the whole training text.
            until: Tokens, in whole batches.
            dtype: Data type of matrix products, bfloat16 or else float32.

        Raises:
            UserError: The loss is not finite.
        """
        size = self._training.batch_sequences
        step_tokens = size * tokens_nt.shape[1]
        assert until % step_tokens == 0, f"{until} tokens are not whole batches of {step_tokens}"
        assert until <= tokens_nt.numel(), f"{until} tokens of training text were not packed"
        while self.trained < until:
            first = self.trained // tokens_nt.shape[1]
            tokens_bt = tokens_nt[first : first + size].to(next(self.model.parameters()).device)
            with torch.autocast(tokens_bt.device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits_btv = self.model(tokens_bt, use_cache=False).logits
            loss = functional.cross_entropy(logits_btv[:, :-1].flatten(0, 1).float(), tokens_bt[:, 1:].flatten())
            if not torch.isfinite(loss):
                raise UserError(
                    f"training: the loss is not finite after {self.trained} tokens. Use a lower training.learning_rate"
                )
            loss.backward()
            self._step()
            self.trained += step_tokens

    def state(self) -> dict[str, torch.Tensor]:
        """Return weights, and what the optimizer keeps, by name."""
        tensors = {f"weight {name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            own = self._optimizer.state.get(parameter, {})
            tensors.update({f"{key} {name}": own[key] for key in _OPTIMIZER if key in own})
        return tensors

    def resume(self, trained: int, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from a state after so many tokens."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[f"weight {name}"])
            if f"step {name}" in state:
                step, *moments = (state[f"{key} {name}"] for key in _OPTIMIZER)
                own = (step.clone(), *(moment.to(parameter.device, copy=True) for moment in moments))
                self._optimizer.state[parameter] = dict(zip(_OPTIMIZER, own, strict=True))
        self.trained = trained

    def _step(self) -> None:
        for name, removed_oi in self._removed.items():
            gradient_oi = self._parameters[name].grad
            if gradient_oi is not None:
                gradient_oi.masked_fill_(removed_oi, 0.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for name, removed_oi in self._removed.items():
            self._parameters[name].data.masked_fill_(removed_oi, 0.0)


class Trainer:
    """Trains candidates, and keeps the states that later stages go on from."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        space: SearchSpace,
        store: LevelStore,
        training: Training,
        tokens_nt: torch.Tensor,
        dtype: torch.dtype,
        device: str,
    ) -> None:
        """Train on token ids [sequences, length], and return models of a data type."""
        self._checkpoint, self._layout, self._space, self._store = checkpoint, layout, space, store
        self._training, self._tokens_nt = training, tokens_nt
        self._dtype, self._device = dtype, device
        self._states = TrainingStates(training.folder)

    def make_candidate(self, allocation: Allocation) -> Candidate:
        """Return an allocation, assembled from the level store, before any training."""
        model = load_model(self._checkpoint).to(self._device)
        assembler = Assembler(self._checkpoint, self._layout, self._space, self._store, model)
        switchboard = LevelSwitch(model, self._layout, assembler)
        removed: dict[str, torch.Tensor] = {}
        for unit, level in zip(self._space.units, allocation, strict=True):
            switchboard.set(unit.name, level)
            if unit.kind == "matrix" and level:
                weight_oi = model.get_parameter(f"{unit.name}.weight")
                kept_oi = kept_mask(self._store(unit.name), level, weight_oi.shape, weight_oi.device)
                removed[f"{unit.name}.weight"] = ~kept_oi
        for parameter in model.parameters():  # of its own: what was switched in may be a part of something larger
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        return Candidate(model, removed, self._training)

    def train(self, request: Request, keep: bool) -> nn.Module:
        """Return the model of a request after its training; ``keep`` its state where a longer one may go on from it."""
        candidate = self.make_candidate(request.allocation)
        if (found := self._states.load(request)) is not None:
            candidate.resume(*found)
        candidate.train(self._tokens_nt, request.training, self._dtype)
        if keep:
            self._states.save(request, candidate.state())
        for parameter in candidate.model.parameters():  # and not the buffers, which keep a precision of their own
            parameter.data = parameter.data.to(self._dtype)
        return candidate.model.requires_grad_(False)
