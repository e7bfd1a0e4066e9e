"""Run a model block by block: from examples through the hidden states between blocks to logits or final states.

The state between blocks is one tensor. A model with several towers has the states of all towers in one row per
example, [B, N]. A block reads and replaces its own tower's part of the row.

Shapes: B sequences, T tokens, D hidden size, V vocabulary. ``tokens_bt``, ``hidden_btd``.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from allocator.core.errors import UserError
from allocator.model.data.examples import Examples
from allocator.model.family.layout import Layout

SEQUENCES_PER_BATCH = 4
"""Sequences that run together. It affects rounding, so it must not depend on free memory."""

Recorded = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Inputs and outputs of modules, by full name. An input is the first positional argument."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""Maps the head's input, of any leading shape, to logits."""

_Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class BlockWalker:
    """A model that runs block by block. It uses the model's own modules, in place."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = model
        # the backbone is the model without its head
        backbone = model.get_decoder() if layout.kind.generates else model.base_model  # type: ignore[operator]
        assert isinstance(backbone, nn.Module)
        self._backbone = backbone
        self.blocks = [model.get_submodule(name) for name in layout.blocks]
        self._names = layout.blocks
        self._tail = layout.tail
        self.tail = [model.get_submodule(name) for name in layout.tail[:-1]]
        self.kind = layout.kind
        towers = layout.towers or (len(layout.blocks),)
        self._first = [0, *itertools.accumulate(towers)][:-1]  # the first block of every tower
        self._tower = [tower for tower, count in enumerate(towers) for _ in range(count)]
        self._extents: list[torch.Size] = []  # [T, D] of every tower
        takes = inspect.signature(type(backbone).forward).parameters
        self._settings = {"use_cache": False} if self.kind.generates or "use_cache" in takes else {}
        self._arguments: dict[tuple[int, ...], list[tuple[tuple[Any, ...], dict[str, Any]]]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the model computes in."""
        return next(self.model.parameters()).dtype

    @torch.no_grad()
    def embed(self, examples: Examples) -> torch.Tensor:
        """Return the input of the first block, and store the arguments that the model passes to each block.

        With several towers, return the inputs of all their first blocks, [B, N].
        """
        entered: dict[nn.Module, torch.Tensor] = {}  # towers may run in another order than ``blocks``
        arguments: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered[module] = args[0] if args else kwargs["hidden_states"]
            arguments[module] = args[1:], {key: value for key, value in kwargs.items() if key != "hidden_states"}

        with _replace_forwards({block: _identity for block in self.blocks}):
            handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
            try:
                self._backbone(**examples.inputs, **self._settings)
            finally:
                for handle in handles:
                    handle.remove()
        first = [entered[self.blocks[index]] for index in self._first]
        self._extents = [part_btd.shape[1:] for part_btd in first]
        state = first[0] if len(first) == 1 else torch.cat([part_btd.flatten(1) for part_btd in first], 1)
        self._arguments[tuple(state.shape[:2])] = [arguments[block] for block in self.blocks]
        return state

    def parts(self, hidden: torch.Tensor) -> list[torch.Tensor]:
        """Split the state between two blocks into the states of each tower, [B, T, D]."""
        if len(self._first) == 1:
            return [hidden]
        sizes = [extent.numel() for extent in self._extents]
        return [part.unflatten(1, extent) for part, extent in zip(hidden.split(sizes, 1), self._extents, strict=True)]

    def residual(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the part of the state that belongs to a block's tower, [B, T, D]."""
        return self.parts(hidden)[self._tower[index]]

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Keep the weights of block ``index`` in memory while the body runs. Here, all weights stay in memory."""
        yield

    def run(
        self,
        index: int,
        hidden_btd: torch.Tensor,
        block: nn.Module | None = None,
        instead: Mapping[str, Any] = MappingProxyType({}),
    ) -> torch.Tensor:
        """Return the output of a block. :meth:`embed` must have seen examples of this shape.

        Gradients are tracked if the input requires them.

        Args:
            index: Number of the block.
            hidden_btd: Its input.
            block: A module to run in place of the block.
            instead: Outputs to use in place of running some modules, by full name of the module.
        """
        root = self.blocks[index] if block is None else block
        found = [(self._find(index, root, name), answer) for name, answer in instead.items()]
        answers = {module: lambda *_, answer=answer, **__: answer for module, answer in found if module is not None}
        args, kwargs = self._arguments[tuple(hidden_btd.shape[:2])][index]
        with _replace_forwards(answers), torch.set_grad_enabled(hidden_btd.requires_grad):
            parts = self.parts(hidden_btd)
            output = root(parts[self._tower[index]], *args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            if len(parts) == 1:
                return output
            parts[self._tower[index]] = output
            return torch.cat([part.flatten(1) for part in parts], 1)

    @contextmanager
    def record_io(self, index: int, modules: Sequence[str]) -> Iterator[Recorded]:
        """Yield tables of inputs and outputs of some modules of a block. They are filled while the block runs."""
        inputs: dict[str, torch.Tensor] = {}
        outputs: dict[str, Any] = {}

        def listener(name: str) -> _Hook:
            def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
                inputs.update({name: args[0]} if args else {})
                outputs[name] = output

            return hook

        with self._attach_hooks(index, self.blocks[index], {name: listener(name) for name in modules}):
            yield inputs, outputs

    @torch.no_grad()
    def capture_outputs(
        self,
        index: int,
        hidden_btd: torch.Tensor,
        modules: Sequence[str],
        block: nn.Module | None = None,
        instead: Mapping[str, Any] = MappingProxyType({}),
        entering: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run a block until it has reached some of its modules, and return their outputs by name.

        If ``entering``, return their inputs instead. Modules that were removed or not reached are left out. The other
        arguments are those of :meth:`run`.
        """
        root = self.blocks[index] if block is None else block
        heard: dict[str, torch.Tensor] = {}

        def listener(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], *output: torch.Tensor) -> None:
                heard[name] = args[0] if entering else output[0]
                if len(heard) == len(there):
                    raise _AllCaptured

            return hook

        there = [name for name in dict.fromkeys(modules) if self._find(index, root, name) is not None]
        hooks = {name: listener(name) for name in there}
        with suppress(_AllCaptured), self._attach_hooks(index, root, hooks, before=entering):
            self.run(index, hidden_btd, root, instead)
        return heard

    def run_all(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        """Return the output of the last block."""
        for index in range(len(self.blocks)):
            hidden_btd = self.run(index, hidden_btd)
        return hidden_btd

    @contextmanager
    def _attach_hooks(
        self, index: int, root: nn.Module, hooks: Mapping[str, Callable[..., Any]], before: bool = False
    ) -> Iterator[None]:
        found = {name: self._find(index, root, name) for name in hooks}
        handles = [
            (module.register_forward_pre_hook if before else module.register_forward_hook)(hooks[name])
            for name, module in found.items()
            if module is not None
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _find(self, index: int, root: nn.Module, name: str) -> nn.Module | None:
        try:
            return root.get_submodule(name.removeprefix(f"{self._names[index]}."))
        except AttributeError:
            return None

    @torch.no_grad()
    def check(self, examples: Examples) -> None:
        """Check that running block by block gives the same output as one pass of the model.

        Raises:
            UserError: The outputs differ, because the blocks or the tail in the family file are incomplete.
        """
        hidden = self.run_all(self.embed(examples))
        if self.kind.generates:
            walked = self.logits(hidden).float()
            whole = self.model(**examples.inputs, **self._settings).logits.float()
        else:
            walked, whole = self.final_states(hidden, examples).float(), self._final_states(examples.inputs).float()
        # values that are not finite are reported by the measurement
        if whole.isfinite().all() and not torch.allclose(walked, whole, rtol=0, atol=0.05 * float(whole.abs().max())):
            raise UserError(
                f"family: the blocks and the tail {self._tail} do not compute what {type(self.model).__name__} does. "
                "Name in 'tail' all modules that follow the blocks, in order"
                if self.kind.generates
                else f"family: the blocks do not compute what {type(self.model).__name__} does after its embedding"
            )

    def logit_inputs(self, hidden: torch.Tensor, examples: Examples) -> tuple[torch.Tensor, Head]:
        """Return the input of the logits at every position, [B, P, ...], and the function that maps it to logits.

        For causal language models, the input is the output of the last block. So logits can be computed in chunks. For
        other models, the input is the logits themselves, and the function returns them unchanged. Models that classify
        have one position. Gradients are tracked as in :meth:`run`.
        """
        if self.kind.generates:
            return hidden, self.logits
        with self._ending(hidden):
            logits = self.model(**examples.inputs).logits
        return (logits if logits.dim() == 3 else logits[:, None]), _as_it_is

    def final_states(self, hidden: torch.Tensor, examples: Examples) -> torch.Tensor:
        """Return the states that the head reads, [B, P, D], computed from the output of the last block.

        With two towers, return the embeddings of both. Gradients are tracked as in :meth:`run`.
        """
        if self.kind.generates:
            return self.states(hidden)
        with self._ending(hidden):
            return self._final_states(examples.inputs)

    def _final_states(self, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        outputs = self._backbone(**inputs, **self._settings)
        if self.kind.reads == "pairs":
            return torch.stack([outputs.text_embeds, outputs.image_embeds], 1)
        given: torch.Tensor = outputs.last_hidden_state
        return given

    @contextmanager
    def _ending(self, hidden: torch.Tensor) -> Iterator[None]:
        """Make the last block of every tower return its part of ``hidden``. Every other block returns its input."""
        stand_ins: dict[nn.Module, Callable[..., Any]] = {block: _identity for block in self.blocks}
        ends = [*self._first[1:], len(self.blocks)]
        with torch.set_grad_enabled(hidden.requires_grad):
            for end, part_btd in zip(ends, self.parts(hidden), strict=True):
                stand_ins[self.blocks[end - 1]] = lambda *_, part_btd=part_btd, **__: part_btd
            with _replace_forwards(stand_ins):
                yield

    def logits(self, hidden_nd: torch.Tensor) -> torch.Tensor:
        """Return logits for the output of the last block, of any leading shape.

        The model itself runs everything after the backbone: its head, and any scale or cap of the logits.
        Gradients are tracked as in :meth:`run`.
        """
        states_nd = self.states(hidden_nd)
        entering = _Output(last_hidden_state=states_nd.view(1, -1, states_nd.shape[-1]))
        with (
            _replace_forwards({self._backbone: lambda *_, **__: entering}),
            torch.set_grad_enabled(hidden_nd.requires_grad),
        ):
            logits = self.model(use_cache=False).logits
        return logits.view(*states_nd.shape[:-1], -1)

    def states(self, hidden_nd: torch.Tensor) -> torch.Tensor:
        """Return the states that the head reads, computed from the output of the last block, of any leading shape."""
        with torch.set_grad_enabled(hidden_nd.requires_grad):
            for module in self.tail:
                hidden_nd = module(hidden_nd)
            return hidden_nd


def _as_it_is(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


class _AllCaptured(Exception):  # noqa: N818 - it ends a pass, and is no error
    """All modules of interest were reached."""


@dataclass
class _Output(BaseModelOutput):
    """The output of a backbone, with the states that a head reads. All other fields are None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@contextmanager
def _replace_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Run other functions in place of modules while the body runs."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
