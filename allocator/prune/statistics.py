"""What is to be known about the inputs of a matrix: their norms, their moments, or their Gram matrix.

Shapes: n tokens, i input features, e experts. ``input_ni``, ``gram_ii``, ``square_i``, ``mass_e``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import nn

from allocator.core.errors import UserError
from allocator.prune.experts import gates

Need = Literal["nothing", "norms", "moments", "gram"]

GRAM_BYTES = 64 << 20
"""Memory for the products of experts' outputs, which says how many tokens are looked at. Part of the numerics."""

_CHUNK = 64
"""Tokens of which the outputs of all experts are held at once."""


class Gram:
    """H = XᵀX, the sum of X and the number of tokens, accumulated in fp32. Shapes [in, in] and [in].

    Where outputs Y are aimed at that are not those of the weight at hand, also XᵀY, [in, out], and the sum of Y.
    """

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.gram_ii = torch.zeros(num_inputs, num_inputs, device=device)
        self.sum_i = torch.zeros(num_inputs, device=device)
        self.count = 0
        self.answer_io: torch.Tensor | None = None
        self.target_o: torch.Tensor | None = None

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        input_ni = input_ni.float()
        self.gram_ii.addmm_(input_ni.T, input_ni)
        self.sum_i += input_ni.sum(0)
        self.count += len(input_ni)

    def aim(self, input_ni: torch.Tensor, target_no: torch.Tensor) -> None:
        """Add the outputs that are aimed at for a batch that was added."""
        answer_io, target_o = input_ni.float().T @ target_no, target_no.sum(0)
        self.answer_io = answer_io if self.answer_io is None else self.answer_io.add_(answer_io)
        self.target_o = target_o if self.target_o is None else self.target_o.add_(target_o)

    def check(self, module: str) -> None:
        """Raise if an activation was not finite."""
        _check_finite(self.gram_ii, module)
        if self.answer_io is not None:
            _check_finite(self.answer_io, module)


class Norms:
    """Sum of squares of every input feature, which is diag(XᵀX). Shape [in]."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.square_i = torch.zeros(num_inputs, device=device)

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        self.square_i += input_ni.float().square().sum(0)

    def check(self, module: str) -> None:
        """Raise if an activation was not finite."""
        _check_finite(self.square_i, module)


class Moments:
    """Sum and sum of squares of every input feature, in float64, and the number of tokens. Shapes [in]."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        self.sum_i, self.square_i = torch.zeros(2, num_inputs, dtype=torch.float64, device=device)
        self.count = 0

    @property
    def variance_i(self) -> torch.Tensor:
        """Variance of every input feature over the tokens."""
        count = max(1, self.count)  # no token may have been sent to an expert
        return (self.square_i / count - (self.sum_i / count).square()).clamp_min(0.0)

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        input_ni = input_ni.double()
        self.sum_i += input_ni.sum(0)
        self.square_i += input_ni.square().sum(0)
        self.count += len(input_ni)

    def check(self, module: str) -> None:
        """Raise if an activation was not finite."""
        _check_finite(self.square_i, module)


class Routing:
    """What a router makes of the calibration text, and what every expert would answer.

    Attributes:
        mass_e: Sum over all tokens of the weights by which each expert's output is multiplied.
        inputs: Tokens that are looked at more closely, [n, in]; the first ones.
        gram_nee: For each of these, the inner products of what all experts answer, whether it is sent to them or not.
        router: A copy of the router, dense.
    """

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        self._experts, self.router = experts, copy.deepcopy(router)
        total = router.get_parameter("weight").shape[0]
        self._most = max(1, GRAM_BYTES // (4 * total * total))
        self.mass_e = torch.zeros(total, dtype=torch.float64)
        self.inputs: list[torch.Tensor] = []
        self._grams: list[torch.Tensor] = []
        self.count = 0

    def __getstate__(self) -> dict[str, Any]:
        """Leave the experts behind: what is known of them is small, and may be used elsewhere."""
        return {key: value for key, value in vars(self).items() if key != "_experts"}

    @property
    def gram_nee(self) -> torch.Tensor:
        """See above."""
        return torch.cat(self._grams)

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        self.mass_e += gates(self.router, input_ni, range(len(self.mass_e))).double().sum(0).cpu()
        own_ni = input_ni[: self._most - self.count]
        self.count += len(own_ni)
        self.inputs.append(own_ni.clone())  # a view would be sent elsewhere with all that it is a view of
        for chunk_ni in own_ni.split(_CHUNK):
            answers_eno = torch.stack([expert(chunk_ni) for expert in self._experts.children()]).float()
            self._grams.append(torch.einsum("eno,fno->nef", answers_eno, answers_eno).cpu())

    def check(self, module: str) -> None:
        """Raise if an activation was not finite."""
        _check_finite(self.mass_e, module)
        _check_finite(self.gram_nee, module)


class Nothing:
    """For pruners that look at weights alone."""

    def __init__(self, num_inputs: int, device: torch.device | str = "cpu") -> None:
        pass

    def add(self, input_ni: torch.Tensor) -> None:
        """Ignore the batch."""

    def check(self, module: str) -> None:
        """Nothing can be wrong."""


Statistics: TypeAlias = Gram | Norms | Moments | Nothing | Routing
"""What is gathered, by what is needed. Moments are for allocation rules, routing is for whole experts."""

KINDS: Mapping[Need, Callable[[int, torch.device], Statistics]] = {
    "gram": Gram,
    "norms": Norms,
    "moments": Moments,
    "nothing": Nothing,
}


def start(
    model: nn.Module, modules: Sequence[str], need: Need, mixtures: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Statistics]:
    """Return empty statistics of the inputs of named linear modules, on their devices.

    Args:
        model: Holds them.
        modules: Their names.
        need: What is gathered of them.
        mixtures: Routers among them, by name, with the name of their experts; what they choose is gathered.
    """

    def kind(name: str) -> Statistics:
        if name in mixtures:
            return Routing(model.get_submodule(name), model.get_submodule(mixtures[name]))
        weight = model.get_parameter(f"{name}.weight")
        return KINDS[need](weight.shape[1], weight.device)

    return {name: kind(name) for name in modules}


@contextmanager
def collected(
    model: nn.Module, modules: Sequence[str], need: Need, mixtures: Mapping[str, str] = MappingProxyType({})
) -> Iterator[dict[str, Statistics]]:
    """Collect statistics of the inputs of named linear modules while the body runs the model. See :func:`start`.

    Raises:
        UserError: At the end, if an input was NaN or infinite; names the module.
    """
    gathered = start(model, modules, need, mixtures)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(module: nn.Module, args: tuple[Any, ...]) -> None:
            gathered[name].add(args[0].flatten(0, -2))

        return add

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in modules]
    try:
        yield gathered
    finally:
        for handle in handles:
            handle.remove()
    for name, statistics in gathered.items():
        statistics.check(name)


def _check_finite(values: torch.Tensor, module: str) -> None:
    if not torch.isfinite(values).all():
        raise UserError(
            f"calibration: the inputs of {module} are not all finite. Check the weights, or use --set dtype=float32"
        )
