"""Running a decoder block by block: embedded tokens in, hidden states between blocks, logits out.

Shapes: B sequences, T tokens, D hidden size, V vocabulary. ``tokens_bt``, ``hidden_btd``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from allocator.model.family import Layout


class BlockWalker:
    """A model taken apart at its block boundaries. The modules are the model's own, and stay in place."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self.model = model
        backbone = model.base_model  # without the head
        assert isinstance(backbone, nn.Module)
        self._backbone = backbone
        self.blocks = [model.get_submodule(name) for name in layout.blocks]
        self.tail = [model.get_submodule(name) for name in layout.tail]
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the model computes in."""
        return next(self.model.parameters()).dtype

    @torch.inference_mode()
    def embed(self, tokens_bt: torch.Tensor) -> torch.Tensor:
        """Return what enters the first block, and note the arguments that the model passes to each block."""
        entered: list[torch.Tensor] = []
        arguments: list[dict[str, Any]] = []

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append(args[0] if args else kwargs["hidden_states"])
            arguments.append({key: value for key, value in kwargs.items() if key != "hidden_states"})

        with _bypassed(self.blocks):
            handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in self.blocks]
            try:
                self._backbone(tokens_bt, use_cache=False)
            finally:
                for handle in handles:
                    handle.remove()
        self._arguments[tuple(tokens_bt.shape)] = arguments
        return entered[0]

    @torch.inference_mode()
    def run(self, index: int, hidden_btd: torch.Tensor) -> torch.Tensor:
        """Return the output of block ``index``; inputs of this shape must have been embedded before."""
        output = self.blocks[index](hidden_btd, **self._arguments[tuple(hidden_btd.shape[:2])][index])
        return output[0] if isinstance(output, tuple) else output

    @torch.inference_mode()
    def run_all(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        """Return the output of the last block."""
        for index in range(len(self.blocks)):
            hidden_btd = self.run(index, hidden_btd)
        return hidden_btd

    @torch.inference_mode()
    def logits(self, hidden_nd: torch.Tensor) -> torch.Tensor:
        """Return logits for the output of the last block, of any leading shape."""
        return self.tail[-1](self.states(hidden_nd))

    @torch.inference_mode()
    def states(self, hidden_nd: torch.Tensor) -> torch.Tensor:
        """Return what the head reads for the output of the last block, of any leading shape."""
        for module in self.tail[:-1]:
            hidden_nd = module(hidden_nd)
        return hidden_nd


@contextmanager
def _bypassed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let blocks return what enters them."""

    def identity(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states

    for block in blocks:
        block.forward = identity
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
