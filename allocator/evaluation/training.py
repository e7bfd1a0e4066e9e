"""Brief training of a candidate before it is measured. Pruned weights stay pruned.

The method follows DarwinLM (Tang et al., COLM 2026). The published code of DarwinLM trains the dense network instead.
Each candidate has its own copy of the weights, always in float32. All weights of the copy are trained by AdamW with its
usual settings, on the next-token cross-entropy of calibration text, without dropout. Structured units are compact, so
removed weights cannot return. In unstructured pruning, the gradients of removed weights are set to zero, so moments and
weight decay never change these weights. The mask is also applied again after every step.

The learning rate is constant, and step n reads batch n of the text. So the trained weights depend only on the
allocation and the number of tokens. A later stage of a search continues the training of an earlier stage. The result is
the same as training from the start. The paper starts the training again in each stage.
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
"""AdamW's state for each parameter. Steps are counted per parameter: an expert without tokens makes no step."""


@dataclass(frozen=True, slots=True)
class Training:
    """How candidates are trained.

    Attributes:
        learning_rate: The constant learning rate of AdamW.
        batch_sequences: Number of sequences in one step.
        folder: Folder for states between the stages of a search. Every worker should have access to it.
    """

    learning_rate: float
    batch_sequences: int
    folder: Path


class Candidate:
    """A pruned model in training.

    Attributes:
        model: The model.
        trained: Number of tokens that the model was trained on so far.
    """

    def __init__(self, model: nn.Module, removed: Mapping[str, torch.Tensor], training: Training) -> None:
        """Prepare a model for training. The model is changed in place.

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
        """Train until the total number of training tokens is ``until``.

        Args:
            tokens_nt: Token ids [sequences, length] of the whole training text.
            until: Total number of tokens since the start, in whole batches.
            dtype: Data type of the model. Matrix products use bfloat16 if it is bfloat16, and float32 otherwise.

        Raises:
            UserError: The loss is not finite.
        """
        size = self._training.batch_sequences
        step_tokens = size * tokens_nt.shape[1]
        assert until % step_tokens == 0, f"{until} tokens are not whole batches of {step_tokens}"
        assert until <= tokens_nt.numel(), f"the training text has fewer than {until} tokens"
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
        """Return the weights and the optimizer's state, by name."""
        tensors = {f"weight {name}": parameter.detach() for name, parameter in self._parameters.items()}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state.get(parameter, {})
            tensors.update({f"{key} {name}": moments[key] for key in _OPTIMIZER if key in moments})
        return tensors

    def resume(self, trained: int, state: Mapping[str, torch.Tensor]) -> None:
        """Continue from a state that was saved after ``trained`` tokens."""
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
    """Trains candidates, and saves their states so that later stages can continue."""

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
        """Set the models to train, and the settings of training.

        Args:
            checkpoint: The dense model.
            layout: The sub-blocks of the dense model.
            space: The units of the dense model, and their ladders.
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
            keep: Whether to save the state, so that a longer training can continue from it.
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
