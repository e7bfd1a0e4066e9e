"""Statistics of a router: the gates of every expert, and the outputs of all experts on the same tokens.

Shapes: n tokens, e experts, i input features, o outputs, k experts that a token is sent to. ``input_ni``, ``gate_ne``,
``output_eno``, ``gram_nee``.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from allocator.pruning.calibration.finite import check_finite

GRAM_BYTES = 64 << 20
"""Memory for the products of experts' outputs. It sets how many tokens are observed, so it is part of the numerics."""

_CHUNK = 64
"""Number of tokens whose outputs of all experts are in memory at once."""


class Routing:
    """The gates of a router on the calibration text, and the outputs of every expert.

    Attributes:
        mass_e: Sum over all tokens of each expert's gate, by which its output is multiplied.
        inputs: The observed tokens: the first ones, in batches of [n, in].
        count: Number of observed tokens.
        router: A copy of the dense router.
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
        """Return the state without the experts, so that the small statistics can be sent to another process."""
        return {key: value for key, value in vars(self).items() if key != "_experts"}

    @property
    def gram_nee(self) -> torch.Tensor:
        """Inner products of the outputs of all experts for each observed token, routed to them or not."""
        return torch.cat(self._grams)

    def add(self, input_ni: torch.Tensor) -> None:
        """Add a batch."""
        self.mass_e += gates(self.router, input_ni, range(len(self.mass_e))).double().sum(0).cpu()
        first_ni = input_ni[: self._most - self.count]
        self.count += len(first_ni)
        self.inputs.append(first_ni.clone())  # pickling a view would send all of its base tensor
        for chunk_ni in first_ni.split(_CHUNK):
            output_eno = torch.stack([expert(chunk_ni) for expert in self._experts.children()]).float()
            self._grams.append(torch.einsum("eno,fno->nef", output_eno, output_eno).cpu())

    def check(self, module: str) -> None:
        """Raise if an activation was not finite; see :func:`~allocator.pruning.calibration.finite.check_finite`."""
        check_finite(self.mass_e, module)
        check_finite(self.gram_nee, module)


def gates(router: nn.Module, input_ni: torch.Tensor, kept: Sequence[int]) -> torch.Tensor:
    """Return the gate of every expert for every token, [n, e], if only some experts are kept.

    Args:
        router: The dense router.
        input_ni: The tokens.
        kept: Indices of the experts that the router may choose from; the gates of the others are 0.
    """
    total = router.get_parameter("weight").shape[0]
    chosen = torch.tensor(list(kept), device=input_ni.device)
    smaller = copy.copy(router)
    smaller._parameters = {
        name: nn.Parameter(tensor.detach()[chosen], requires_grad=False) for name, tensor in router.named_parameters()
    }
    smaller._buffers = {name: tensor[chosen] for name, tensor in router.named_buffers()}
    smaller.__dict__["num_experts"] = len(kept)
    _, weight_nk, index_nk = smaller.forward(input_ni)
    gate_ne = torch.zeros(len(input_ni), total, device=input_ni.device)
    return gate_ne.scatter_(1, chosen[index_nk], weight_nk.float())
