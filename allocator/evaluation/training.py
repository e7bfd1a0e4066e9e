"""A brief training of a candidate before it is measured, in which pruned weights stay pruned.

After DarwinLM (Tang et al., COLM 2026), whose published code trains the dense network instead. A candidate gets its own
weights, always in float32, and all of them are trained: AdamW with its usual settings, next-token cross-entropy on
calibration text, no dropout. Structured units are compact, so that no removed weight can return. For single weights,
the gradients of removed ones are set to zero, so that moments and weight decay never change them, and the mask is
applied again after every step.

The rate is constant and step n reads batch n of the text. So training is a function of the allocation and the number of
tokens, and a later stage of a search continues from an earlier one, to the same weights as from the start. The paper
trains anew in each stage.
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
"""The state of AdamW for each parameter. Each has its own step, because an expert without tokens makes none."""


@dataclass(frozen=True, slots=True)
class Training:
    """How candidates are trained.

    Attributes:
        learning_rate: The constant learning rate of AdamW.
        batch_sequences: Number of sequences in one step.
        folder: Folder for states between the stages of a search; every worker should reach it.
    """

    learning_rate: float
    batch_sequences: int
    folder: Path


class Candidate:
    """A pruned model in training.

    Attributes:
        model: The model.
        trained: Number of tokens that it was trained on.
    """

    def __init__(self, model: nn.Module, removed: Mapping[str, torch.Tensor], training: Training) -> None:
        """Take over a model.

        Args:
            model: The model, in float32. It shares its weights with no other model.
            removed: Masks of removed weights, [out, in], by parameter name.
            training: How the model is trained.
        """
        self.model, self._removed, self._training = model.requires_grad_(True), removed, training
        self._parameters = dict(model.named_parameters())
        self._optimizer = torch.optim.AdamW(self._parameters.values(), lr=training.learning_rate)
        self.trained = 0

    def train(self, tokens_nt: torch.Tensor, until: int, dtype: torch.dtype) -> None:
        """Train until a number of tokens was seen since the beginning.

        Args:
            tokens_nt: Token ids [sequences, length] of the whole training text.
            until: Number of tokens, in whole batches.
            dtype: Data type of matrix products: bfloat16, or float32 for any other.

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
        """Return the weights and the state of the optimizer, by name."""
        tensors = {f"weight {name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            tensors.update({f"{key} {name}": moments[key] for key in _OPTIMIZER if key in moments})
        return tensors

    def resume(self, trained: int, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a state after ``trained`` tokens."""
        for name, parameter in self._parameters.items():
            parameter.data.copy_(state[f"weight {name}"])
            if f"step {name}" in state:
                step, *moments = (state[f"{key} {name}"] for key in _OPTIMIZER)
                values = (step.clone(), *(moment.to(parameter.device, copy=True) for moment in moments))
                self._optimizer.state[parameter] = dict(zip(_OPTIMIZER, values, strict=True))
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
    """Trains candidates, and writes the states from which later stages continue."""

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
        """Set what is trained, and how.

        Args:
            checkpoint: The dense model.
            layout: Its sub-blocks.
            space: Its units and their ladders.
            store: The level store.
            training: How candidates are trained.
            tokens_nt: Token ids [sequences, length] of the training text.
            dtype: Data type of the models that :meth:`train` returns.
            device: ``cpu`` or ``cuda``.
        """
        self._checkpoint, self._layout, self._space, self._store = checkpoint, layout, space, store
        self._training, self._tokens_nt = training, tokens_nt
        self._dtype, self._device = dtype, device
        self._states = TrainingStates(training.folder)

    def make_candidate(self, allocation: Allocation) -> Candidate:
        """Return the untrained model of an allocation, assembled from the level store."""
        model = load_model(self._checkpoint).to(self._device)
        assembler = Assembler(self._checkpoint, self._layout, self._space, self._store, model)
        switch = LevelSwitch(model, self._layout, assembler)
        removed: dict[str, torch.Tensor] = {}
        for unit, level in zip(self._space.units, allocation, strict=True):
            switch.set(unit.name, level)
            if unit.kind == "matrix" and level:
                weight_oi = model.get_parameter(f"{unit.name}.weight")
                kept_oi = kept_mask(self._store(unit.name), level, weight_oi.shape, weight_oi.device)
                removed[f"{unit.name}.weight"] = ~kept_oi
        for parameter in model.parameters():  # a level may be a view of a larger tensor
            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        return Candidate(model, removed, self._training)

    def train(self, request: Request, keep: bool) -> nn.Module:
        """Return the trained model of a request.

        Args:
            request: The allocation, and the number of training tokens.
            keep: Whether to write the state, because a longer training may continue from it.
        """
        candidate = self.make_candidate(request.allocation)
        if (state := self._states.load(request)) is not None:
            candidate.resume(*state)
        candidate.train(self._tokens_nt, request.training, self._dtype)
        if keep:
            self._states.save(request, candidate.state())
        for parameter in candidate.model.parameters():  # buffers keep their precision
            parameter.data = parameter.data.to(self._dtype)
        return candidate.model.requires_grad_(False)
