"""What a router chooses, and what the experts that it chooses from would answer.

Shapes: n tokens, e experts, i input features, o outputs, k experts that a token is sent to. ``input_ni``, ``gate_ne``,
``answers_eno``, ``gram_nee``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from allocator.pruning.calibration.finite import check_finite

GRAM_BYTES = 64 << 20
"""Memory for the products of experts' outputs, which says how many tokens are looked at. Part of the numerics."""

_CHUNK = 64
"""Tokens of which the outputs of all experts are held at once."""


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
        check_finite(self.mass_e, module)
        check_finite(self.gram_nee, module)


def gates(router: nn.Module, input_ni: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Return the weight of every expert for every token, [n, e], where a router knows some experts only."""
    total = router.get_parameter("weight").shape[0]
    chosen = torch.tensor(list(kept), device=input_ni.device)
    part = copy.copy(router)
    part._parameters = {
        name: nn.Parameter(each.detach()[chosen], requires_grad=False) for name, each in router.named_parameters()
    }
    part._buffers = {name: each[chosen] for name, each in router.named_buffers()}
    part.__dict__["num_experts"] = len(kept)
    _, weight_nk, place_nk = part.forward(input_ni)
    gate_ne = torch.zeros(len(input_ni), total, device=input_ni.device)
    return gate_ne.scatter_(1, chosen[place_nk], weight_nk.float())
