"""Which experts of a mixture go first: by what the router gives them, or by what is lost without them.

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
        routing: What is known of them.
        criterion: How they are chosen.
        num_groups: Runs of equally many experts. They go in rounds: in each, every group loses one.
        least: So many stay, for the router picks as many; which of them would go first, their gates say.
    """
    if criterion == "routing":
        first = by_routing(routing)
    elif num_groups == 1:
        first = by_reconstruction(routing, least)
    else:
        first = by_contribution(routing, num_groups, least)
    per_group = len(first) // num_groups
    groups = [[e for e in first if e // per_group == group] for group in range(num_groups)]
    return torch.tensor([e for group in groups for e in reversed(group)])


def by_routing(routing: Routing) -> list[int]:
    """Return experts in the order in which they go: first those to which the router gives least, over all tokens."""
    order: list[int] = routing.mass_e.argsort(stable=True).tolist()
    return order


def by_reconstruction(routing: Routing, least: int) -> list[int]:
    """Return experts in the order in which they go: always the one without which the output is least changed.

    With d the change of a token's gates, G the products of experts' outputs, the squared error of the mixture's output
    is dᵀGd, summed over tokens. Tokens that were sent to an expert that goes are routed again among the rest, as the
    pruned model routes them. Lu et al. (ACL 2024) compare all subsets of experts by this error; here one goes after
    the other.
    """
    input_ni, gram_nee = torch.cat(routing.inputs), routing.gram_nee
    total = len(routing.mass_e)
    whole_ne = gates(routing.router, input_ni, range(total)).cpu()
    kept, first = list(range(total)), []
    gate_ne = whole_ne
    # where gates are not made to add up, those of all tokens grow as any expert goes
    others_ne = gates(routing.router, input_ni, range(1, total)).cpu() if total > least else whole_ne
    unsent = whole_ne[:, 0] == 0
    local = torch.allclose(others_ne[unsent], whole_ne[unsent], rtol=1e-4, atol=1e-6)
    while len(kept) > least:
        error_n = _errors(gate_ne - whole_ne, gram_nee)
        best: tuple[float, int, torch.Tensor, torch.Tensor] | None = None
        for expert in kept:
            rest = [e for e in kept if e != expert]
            sent = gate_ne[:, expert].nonzero().flatten() if local else torch.arange(len(gate_ne))
            again_ne = gates(routing.router, input_ni[sent.to(input_ni.device)], rest).cpu()
            change = _errors(again_ne - whole_ne[sent], gram_nee[sent]).sum() - error_n[sent].sum()
            if best is None or float(change) < best[0]:
                best = float(change), expert, sent, again_ne
        assert best is not None
        _, expert, sent, again_ne = best
        gate_ne = gate_ne.index_copy(0, sent, again_ne)
        kept.remove(expert)
        first.append(expert)
    return first + sorted(kept, key=lambda e: float(routing.mass_e[e]))


def by_contribution(routing: Routing, num_groups: int, least: int) -> list[int]:
    """Return experts in the order in which they go, one of every group in each round, for routers that judge groups.

    Always the one whose output, times its gate, is least over all tokens (REAP, Lasby et al., 2025); after every round
    tokens are routed again.
    """
    input_ni = torch.cat(routing.inputs)
    norm_ne = routing.gram_nee.diagonal(dim1=1, dim2=2).sqrt()
    total = len(routing.mass_e)
    per_group = total // num_groups
    kept, first = list(range(total)), []
    while kept:
        if len(kept) >= least:
            score_e = (gates(routing.router, input_ni, kept).cpu() * norm_ne).double().sum(0)
        for group in range(num_groups):
            own = [e for e in kept if e // per_group == group]
            first.append(min(own, key=lambda e: float(score_e[e])))
            kept.remove(first[-1])
    return first


def _errors(change_ne: torch.Tensor, gram_nee: torch.Tensor) -> torch.Tensor:
    """Return dᵀGd for each token, in float64."""
    return torch.einsum("ne,nef,nf->n", change_ne.double(), gram_nee.double(), change_ne.double())
