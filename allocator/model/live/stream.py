"""A model with one block in memory at a time. Embeddings, norms and head stay loaded; blocks are read from disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import init_empty_weights
from torch import nn

from allocator.core.errors import UserError
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.checkpoint.stock import find_stock_class
from allocator.model.family.layout import Layout
from allocator.model.live.load import straighten
from allocator.model.live.walk import BlockWalker
from allocator.model.live.write import read_tensors


class StreamedWalker(BlockWalker):
    """A walker of a dense checkpoint that keeps a block in memory only while it is :meth:`loaded`."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, dtype: torch.dtype = torch.float32) -> None:
        """Read everything but the blocks.

        Raises:
            UserError: The checkpoint's tensors are not the parameters of its architecture.
        """
        architecture = find_stock_class(checkpoint.folder, checkpoint.architecture)
        with init_empty_weights(include_buffers=False):
            model = architecture(architecture.config_class.from_dict(dict(checkpoint.config)))
        straighten(model)
        super().__init__(model.eval().requires_grad_(False), layout)
        self._checkpoint, self._dtype = checkpoint, dtype
        inside = tuple(f"{name}." for name in layout.blocks)
        outside = [name for name in checkpoint.shapes if not name.startswith(inside)]
        # the head of a causal language model may have another name in the checkpoint than in the model
        headed = [name for name in outside if layout.tail and name.startswith(f"{layout.tail[-1]}.")]
        self._fill(model, "", [name for name in outside if name not in headed])
        if headed:
            self._fill(model.get_output_embeddings(), f"{layout.tail[-1]}.", headed)
        model.tie_weights()
        missing = [name for name, p in model.named_parameters() if p.is_meta and not name.startswith(inside)]
        if missing:
            raise UserError(f"model: {checkpoint.folder}: tensor {missing[0]} is missing. Copy the model again")

    @property
    def dtype(self) -> torch.dtype:
        """Data type that the model computes in."""
        return self._dtype

    @contextmanager
    def loaded(self, index: int) -> Iterator[None]:
        """Read the weights of a block, and drop them, or their replacements, at the end."""
        block, prefix = self.blocks[index], f"{self._names[index]}."
        places = [(module, name) for module in block.modules() for name in list(module._parameters)]
        self._fill(block, prefix, [name for name in self._checkpoint.shapes if name.startswith(prefix)])
        if missing := [name for name, parameter in block.named_parameters() if parameter.is_meta]:
            raise UserError(
                f"model: {self._checkpoint.folder}: tensor {prefix}{missing[0]} is missing. Copy the model again"
            )
        try:
            yield
        finally:
            for module, name in places:
                if (parameter := module._parameters[name]) is not None:
                    module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    def _fill(self, root: nn.Module, prefix: str, names: list[str]) -> None:
        for name, tensor in read_tensors(self._checkpoint, names).items():
            module, _, attribute = name.removeprefix(prefix).rpartition(".")
            try:
                owner = root.get_submodule(module)
            except AttributeError:
                owner = nn.Module()
            if (buffer := owner._buffers.get(attribute)) is not None:  # buffers keep their own data type
                owner._buffers[attribute] = tensor.to(buffer.dtype, copy=True)
                continue
            if attribute not in owner._parameters:
                raise UserError(
                    f"model: {self._checkpoint.folder}: {self._checkpoint.architecture} has no parameter {name}"
                )
            # cloned because memory-mapped tensors may be unaligned, and kernels may then round differently
            value = tensor.clone() if tensor.dtype == self._dtype else tensor.to(self._dtype)
            owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
