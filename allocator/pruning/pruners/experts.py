"""The order in which whole experts are removed: by the router's gates, or by the error without them.

Shapes: n tokens, e experts, i input features, k experts that a token is sent to. ``input_ni``, ``gate_ne``,
``gram_nee``.
"""

from __future__ import annotations

import torch

from allocator.pruning.calibration.routing import Routing, gates
from allocator.pruning.pruners.protocol import Criterion


def expert_order(routing: Routing, criterion: Criterion, num_groups: int, least: int) -> torch.Tensor:
    """Return experts from the last removed to the first, one group after the other.

    Args:
        routing: Statistics of the router and its experts.
        criterion: ``routing`` for :func:`by_routing`; ``reconstruction`` for :func:`by_reconstruction`, or
            :func:`by_contribution` where there are several groups.
        num_groups: Number of groups of equally many consecutive experts. In each round, every group loses one expert.
        least: The least number of experts that a level keeps: as many as the router chooses for a token. The order of
            the last ones is that of their gates.
    """
    if criterion == "routing":
        removed = by_routing(routing)
    elif num_groups == 1:
        removed = by_reconstruction(routing, least)
    else:
        removed = by_contribution(routing, num_groups, least)
    per_group = len(removed) // num_groups
    groups = [[e for e in removed if e // per_group == group] for group in range(num_groups)]
    return torch.tensor([e for group in groups for e in reversed(group)])


def by_routing(routing: Routing) -> list[int]:
    """Return experts in the order of removal: by increasing sum of their gates over all tokens."""
    order: list[int] = routing.mass_e.argsort(stable=True).tolist()
    return order


def by_reconstruction(routing: Routing, least: int) -> list[int]:
    """Return experts in the order of removal: always the one whose removal changes the output least.

    With d the change of a token's gates and G the inner products of experts' outputs, the squared error of the
    mixture's output is dᵀGd, summed over tokens. Tokens that were sent to a removed expert are routed again among the
    rest, as the pruned model routes them. Lu et al. (ACL 2024) compare all subsets of experts by this error; here one
    expert is removed after the other.
    """
    input_ni, gram_nee = torch.cat(routing.inputs), routing.gram_nee
    total = len(routing.mass_e)
    dense_ne = gates(routing.router, input_ni, range(total)).cpu()
    kept, removed = list(range(total)), []
    gate_ne = dense_ne
    # if gates are not normalised, a removal changes the gates of all tokens
    others_ne = gates(routing.router, input_ni, range(1, total)).cpu() if total > least else dense_ne
    unsent = dense_ne[:, 0] == 0
    is_local = torch.allclose(others_ne[unsent], dense_ne[unsent], rtol=1e-4, atol=1e-6)
    while len(kept) > least:
        error_n = _errors(gate_ne - dense_ne, gram_nee)
        best: tuple[float, int, torch.Tensor, torch.Tensor] | None = None
        for expert in kept:
            rest = [e for e in kept if e != expert]
            sent = gate_ne[:, expert].nonzero().flatten() if is_local else torch.arange(len(gate_ne))
            again_ne = gates(routing.router, input_ni[sent.to(input_ni.device)], rest).cpu()
            change = _errors(again_ne - dense_ne[sent], gram_nee[sent]).sum() - error_n[sent].sum()
            if best is None or float(change) < best[0]:
                best = float(change), expert, sent, again_ne
        assert best is not None
        _, expert, sent, again_ne = best
        gate_ne = gate_ne.index_copy(0, sent, again_ne)
        kept.remove(expert)
        removed.append(expert)
    return removed + sorted(kept, key=lambda e: float(routing.mass_e[e]))


def by_contribution(routing: Routing, num_groups: int, least: int) -> list[int]:
    """Return experts in the order of removal, one of every group in each round, for routers that choose groups first.

    In each group, the expert whose gate times the norm of its output is least over all tokens (REAP, Lasby et al.,
    2025). After every round the tokens are routed again.
    """
    input_ni = torch.cat(routing.inputs)
    norm_ne = routing.gram_nee.diagonal(dim1=1, dim2=2).sqrt()
    total = len(routing.mass_e)
    per_group = total // num_groups
    kept, removed = list(range(total)), []
    while kept:
        if len(kept) >= least:
            score_e = (gates(routing.router, input_ni, kept).cpu() * norm_ne).double().sum(0)
        for group in range(num_groups):
            members = [e for e in kept if e // per_group == group]
            removed.append(min(members, key=lambda e: float(score_e[e])))
            kept.remove(removed[-1])
    return removed


def _errors(change_ne: torch.Tensor, gram_nee: torch.Tensor) -> torch.Tensor:
    """Return dᵀGd for each token, in float64."""
    return torch.einsum("ne,nef,nf->n", change_ne.double(), gram_nee.double(), change_ne.double())
