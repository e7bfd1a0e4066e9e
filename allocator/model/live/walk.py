"""Running a model block by block: what it is shown in, hidden states between blocks, logits or states out.

The state between blocks is one tensor. Of a model with several towers it is the states of all of them in one row for
each example, [B, N], of which a block takes and replaces its own tower's part.

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
"""Sequences that run together; part of the numerics, so not derived from free memory."""

Recorded = tuple[dict[str, torch.Tensor], dict[str, Any]]
"""Inputs and outputs of modules, by full name. Inputs are those that are not given by keyword."""

Head = Callable[[torch.Tensor], torch.Tensor]
"""From what logits are made of, of any leading shape, to logits."""

_Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


class BlockWalker:
    """A model taken apart at its block boundaries. The modules are the model's own, and stay in place."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = model
        # without the head
        backbone = model.get_decoder() if layout.kind.generates else model.base_model  # type: ignore[operator]
        assert isinstance(backbone, nn.Module)
        self._backbone = backbone
        self.blocks = [model.get_submodule(name) for name in layout.blocks]
        self._names = layout.blocks
        self._tail = layout.tail
        self.tail = [model.get_submodule(name) for name in layout.tail[:-1]]
        self.kind = layout.kind
        towers = layout.towers or (len(layout.blocks),)
        self._first = [0, *itertools.accumulate(towers)][:-1]  # blocks that a tower begins with
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
        """Return what enters the first block, and note the arguments that the model passes to each block.

        Of several towers, it is what enters the first block of each.
        """
        entered: dict[nn.Module, torch.Tensor] = {}  # towers need not run in the order of their blocks
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
        """Return the states of every tower, [B, T, D] each, of the state between two blocks."""
        if len(self._first) == 1:
            return [hidden]
        sizes = [extent.numel() for extent in self._extents]
        return [part.unflatten(1, extent) for part, extent in zip(hidden.split(sizes, 1), self._extents, strict=True)]

    def residual(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the part of the state that a block adds to, [B, T, D]."""
        return self.parts(hidden)[self._tower[index]]

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Have the weights of block ``index`` in memory while the body runs. They always are, in a loaded model."""
        yield

    def run(
        self,
        index: int,
        hidden_btd: torch.Tensor,
        block: nn.Module | None = None,
        instead: Mapping[str, Any] = MappingProxyType({}),
    ) -> torch.Tensor:
        """Return the output of a block; inputs of this shape must have been embedded before.

        Gradients are followed if what enters asks for them.

        Args:
            index: Which block.
            hidden_btd: What enters it.
            block: A stand-in for the block.
            instead: By full names of modules, what they return without being run.
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
        """Yield tables that fill with inputs and outputs of some of a block's modules, by full name, as it runs."""
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
        """Run a block as far as some of its modules, and return their outputs by name, or what is ``entering`` them.

        Modules that were removed, or are not reached, are left out. Other arguments are those of :meth:`run`.
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
        """Check that block by block the model computes what it computes as a whole.

        Raises:
            UserError: It does not, so that blocks or tail of its family are not all there is.
        """
        hidden = self.run_all(self.embed(examples))
        if self.kind.generates:
            walked = self.logits(hidden).float()
            whole = self.model(**examples.inputs, **self._settings).logits.float()
        else:
            walked, whole = self.final_states(hidden, examples).float(), self._final_states(examples.inputs).float()
        # what is not finite is named where it is measured
        if whole.isfinite().all() and not torch.allclose(walked, whole, rtol=0, atol=0.05 * float(whole.abs().max())):
            raise UserError(
                f"family: the blocks and the tail {self._tail} are not what {type(self.model).__name__} computes. "
                "Name in 'tail' all modules that follow the blocks, in order"
                if self.kind.generates
                else f"family: the blocks are not what {type(self.model).__name__} computes between embedding and end"
            )

    def logit_inputs(self, hidden: torch.Tensor, examples: Examples) -> tuple[torch.Tensor, Head]:
        """Return what logits are made of, position by position [B, P, ...], and what makes them of it.

        For causal language models that is the output of the last block, whose logits need not be held at once; for
        others they are what the model itself says, classes at one position. Gradients are as in :meth:`run`.
        """
        if self.kind.generates:
            return hidden, self.logits
        with self._ending(hidden):
            logits = self.model(**examples.inputs).logits
        return (logits if logits.dim() == 3 else logits[:, None]), _as_it_is

    def final_states(self, hidden: torch.Tensor, examples: Examples) -> torch.Tensor:
        """Return the states that a model gives for the output of the last block: what its head reads, [B, P, D].

        Of two towers, the embeddings of both. Gradients are as in :meth:`run`.
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
        """Have the last block of every tower return what is given, and the others what enters them."""
        stand_ins: dict[nn.Module, Callable[..., Any]] = {block: _identity for block in self.blocks}
        ends = [*self._first[1:], len(self.blocks)]
        with torch.set_grad_enabled(hidden.requires_grad):
            for end, part_btd in zip(ends, self.parts(hidden), strict=True):
                stand_ins[self.blocks[end - 1]] = lambda *_, part_btd=part_btd, **__: part_btd
            with _replace_forwards(stand_ins):
                yield

    def logits(self, hidden_nd: torch.Tensor) -> torch.Tensor:
        """Return logits for the output of the last block, of any leading shape. Gradients are as in :meth:`run`.

        What follows the backbone is the model's own: its head, and any scale or cap.
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
        """Return what the head reads for the output of the last block, of any leading shape."""
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
    """What a backbone returns, in so far as a head reads it; what it only passes on is not there."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def _identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@contextmanager
def _replace_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Let modules run something else."""
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in forwards:
            del module.forward
