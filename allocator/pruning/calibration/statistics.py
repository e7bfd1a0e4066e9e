"""Statistics of the inputs of a matrix: their norms, their moments, or their Gram matrix.

Shapes: n tokens, i input features. ``input_ni``, ``gram_ii``, ``square_i``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from allocator.pruning.calibration.finite import check_finite
from allocator.pruning.calibration.routing import Routing

Need = Literal["nothing", "norms", "moments", "gram"]
"""The kind of statistics that a pruner or a rule uses."""


class Gram:
    """H = XᵀX, the sum of X and the number of tokens, accumulated in fp32. Shapes [in, in] and [in].

    If the targets Y are not the outputs of the dense weight on these inputs, also XᵀY, [in, out], and the sum of Y.

    Attributes:
        gram_ii: H.
        sum_i: The sum of X over tokens.
        count: The number of tokens.
        cross_io: XᵀY; None without targets.
        target_o: The sum of Y over tokens; None without targets.
    """

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.gram_ii = torch.zeros(num_inputs, num_inputs, device=device)
        self.sum_i = torch.zeros(num_inputs, device=device)
        self.count = 0
        self.cross_io: torch.Tensor | None = None
        self.target_o: torch.Tensor | None = None

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        input_ni = input_ni.float()
        self.gram_ii.addmm_(input_ni.T, input_ni)
        self.sum_i += input_ni.sum(0)
        self.count += len(input_ni)

    def add_targets(self, input_ni: torch.Tensor, target_no: torch.Tensor) -> None:
        """Add the targets [n, out] of a batch whose inputs were added."""
        cross_io, target_o = input_ni.float().T @ target_no, target_no.sum(0)
        self.cross_io = cross_io if self.cross_io is None else self.cross_io.add_(cross_io)
        self.target_o = target_o if self.target_o is None else self.target_o.add_(target_o)

    def check(self, module: str) -> None:
        """Raise if an activation was not finite; see :func:`~allocator.pruning.calibration.finite.check_finite`."""
        check_finite(self.gram_ii, module)
        if self.cross_io is not None:
            check_finite(self.cross_io, module)


class Norms:
    """Sum of squares of every input feature, which is diag(XᵀX). Shape [in]."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.square_i = torch.zeros(num_inputs, device=device)

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        self.square_i += input_ni.float().square().sum(0)

    def check(self, module: str) -> None:
        """Raise if an activation was not finite; see :func:`~allocator.pruning.calibration.finite.check_finite`."""
        check_finite(self.square_i, module)


class Moments:
    """Sum and sum of squares of every input feature, in float64, and the number of tokens. Shapes [in]."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.sum_i, self.square_i = torch.zeros(2, num_inputs, dtype=torch.float64, device=device)
        self.count = 0

    @property
    def variance_i(self) -> torch.Tensor:
        """Variance of every input feature over the tokens."""
        count = max(1, self.count)  # perhaps no token was routed to an expert
        return (self.square_i / count - (self.sum_i / count).square()).clamp_min(0.0)

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        input_ni = input_ni.double()
        self.sum_i += input_ni.sum(0)
        self.square_i += input_ni.square().sum(0)
        self.count += len(input_ni)

    def check(self, module: str) -> None:
        """Raise if an activation was not finite; see :func:`~allocator.pruning.calibration.finite.check_finite`."""
        check_finite(self.square_i, module)


class Nothing:
    """No statistics, for pruners that use weights alone."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        pass

    def add(self, input_ni: torch.Tensor) -> None:
        """Ignore the batch."""

    def check(self, module: str) -> None:
        """Do nothing."""


Statistics: TypeAlias = Gram | Norms | Moments | Nothing | Routing
"""Any kind of statistics. Moments are for allocation rules, routing is for whole experts."""

KINDS: Mapping[Need, Callable[[int, torch.device], Statistics]] = {
    "gram": Gram,
    "norms": Norms,
    "moments": Moments,
    "nothing": Nothing,
}


def start_statistics(
    model: nn.Module, modules: Sequence[str], need: Need, mixtures: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Statistics]:
    """Return empty statistics of the inputs of named linear modules, on their devices.

    Args:
        model: The model that holds the modules.
        modules: Names of the modules.
        need: The kind of statistics.
        mixtures: Routers among the modules, by name, with the name of their experts. Their gates are collected.
    """

    def make(name: str) -> Statistics:
        if name in mixtures:
            return Routing(model.get_submodule(name), model.get_submodule(mixtures[name]))
        weight = model.get_parameter(f"{name}.weight")
        return KINDS[need](weight.shape[1], weight.device)

    return {name: make(name) for name in modules}


@contextmanager
def collect_statistics(
    model: nn.Module, modules: Sequence[str], need: Need, mixtures: Mapping[str, str] = MappingProxyType({})
) -> Iterator[dict[str, Statistics]]:
    """Collect statistics of the inputs of named linear modules while the body runs the model.

    The arguments are those of :func:`start_statistics`.

    Raises:
        UserError: At the end, if an input was NaN or infinite; the message names the module.
    """
    collected = start_statistics(model, modules, need, mixtures)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            collected[name].add(args[0].flatten(0, -2))

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()
    for name, statistics in collected.items():
        statistics.check(name)
