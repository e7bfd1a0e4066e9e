"""The expansion of the loss around an allocation: one backward pass for every level of every unit.

A level changes the weights of a unit. The inner product of this change with the gradient of the loss is the
first-order change of the loss. One backward pass gives it for all units and levels. At the dense model the gradient is
zero, because the distance from the dense model is least there. At a pruned model the gradient shows how the error of
the unit adds to the errors of all other units. A profile of single steps spends most of its evaluations to learn this.
What is left is the unit's own curvature. It is nearly proportional to the mean square of the change of the unit's
output, by a factor that hardly changes during a search.

Whole experts change a router's choice instead of weights. Their gradient is taken in the output of the mixture. The
mixture is run at every level, on the tokens that reach it.

Second-order Taylor saliency goes back to Optimal Brain Damage (LeCun et al., 1989), where single weights are removed
from the dense model. Here whole levels are taken, with their refits, around an allocation that is already pruned.

Shapes: B sequences, T tokens, D hidden size, n positions of all batches, o outputs and i inputs of a matrix.
``delta_no`` is the gradient in a matrix's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from allocator.core.protocols import Expansion
from allocator.core.space import Allocation, SearchSpace
from allocator.evaluation.teacher import LossSums, Teacher, TeacherBatch
from allocator.model.family.layout import Layout
from allocator.model.live.walk import SEQUENCES_PER_BATCH, BlockWalker
from allocator.pruning.levels.assemble import Assembler, LevelSwitch

BATCHES_PER_CHUNK = 2
"""Batches of one chunk. Other chunks may be computed elsewhere, so the number is part of the numerics."""

_DIGITS = 7
"""Significant digits of the result: those of float32."""

_Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpansionChunk:
    """The expansion on a part of the text.

    Attributes:
        sums: The loss of each of its batches.
        positions: Number of positions with a right answer.
        slope: First-order change of the summed loss, for each level of each unit.
        size: Squared change of the output, summed over the sampled positions, for each level of each unit.
        sized: Number of sampled positions.
        wall_s: Seconds that it took.
    """

    sums: list[LossSums]
    positions: int
    slope: _Rows
    size: _Rows
    sized: int
    wall_s: float = 0.0


def num_chunks(tokens: int, length: int) -> int:
    """Return the number of chunks of an expansion on ``tokens`` tokens, in sequences of ``length`` tokens."""
    return -(-tokens // (length * SEQUENCES_PER_BATCH * BATCHES_PER_CHUNK))


def merge_chunks(chunks: Sequence[ExpansionChunk]) -> Expansion:
    """Return the expansion of the mean loss over all chunks."""
    scale = 1.0 / sum(float(size_b.sum()) for chunk in chunks for _, size_b, _ in chunk.sums)
    per_position = 1.0 / sum(chunk.sized for chunk in chunks)
    slope = _sum([chunk.slope for chunk in chunks], scale)
    return Expansion(slope, _sum([chunk.size for chunk in chunks], per_position))


def _sum(tables: Sequence[_Rows], scale: float) -> _Rows:
    return tuple(
        tuple(float(f"{sum(values) * scale:.{_DIGITS}g}") for values in zip(*rows, strict=True))
        for rows in zip(*tables, strict=True)
    )


class Expander:
    """Expands the loss of a live model whose units are at an allocation, in dense shapes."""

    def __init__(
        self,
        walker: BlockWalker,
        layout: Layout,
        space: SearchSpace,
        assembler: Assembler,
        switch: LevelSwitch,
    ) -> None:
        self._walker, self._space, self._assembler, self._switch = walker, space, assembler, switch
        self._routed = {module for sub_block in layout.sub_blocks if sub_block.routed for module in sub_block.modules}
        self._routers = {
            sub_block.name: router for sub_block in layout.sub_blocks if sub_block.experts for router in sub_block.rows
        }
        outputs = {sub_block.name: sub_block.output for sub_block in layout.sub_blocks}
        self._modules = [outputs.get(unit.name, unit.name) for unit in space.units]

    def expand(
        self, allocation: Allocation, teacher: Teacher, batches: Sequence[TeacherBatch], sampled: range
    ) -> ExpansionChunk:
        """Return the expansion around an allocation, on some batches.

        The hidden states between all blocks are in memory, and the inputs and gradients of one block at a time.

        Args:
            allocation: The levels of the units, which the model has.
            teacher: The teacher of the batches.
            batches: The batches of one chunk.
            sampled: Positions in these batches that tell the size of changes.
        """
        walker, space = self._walker, self._space
        count = sum(batch.examples.num_tokens for batch in batches)  # a block may read more or fewer positions
        between: list[list[torch.Tensor]] = []
        sums: list[LossSums] = []
        gradients: list[torch.Tensor] = []
        for batch in batches:
            states = [walker.embed(batch.examples)]
            for index in range(len(walker.blocks)):
                states.append(walker.run(index, states[-1]))
            leaving_btd = states.pop()
            between.append(states)
            total_b, size_b, nll_b = teacher.score(batch, walker, leaving_btd)
            sums.append((total_b.cpu(), size_b.cpu(), nll_b.cpu()))  # for a process that may have no such device
            gradients.append(teacher.gradient(batch, walker, leaving_btd))
        slope: list[tuple[float, ...]] = [()] * len(space.units)
        size: list[tuple[float, ...]] = [()] * len(space.units)
        for index in reversed(range(len(walker.blocks))):
            units = [place for place, unit in enumerate(space.units) if unit.block == index]
            modules = [self._modules[place] for place in units]
            entering: dict[str, list[torch.Tensor]] = {module: [] for module in modules}
            deltas: dict[str, list[torch.Tensor]] = {module: [] for module in modules}
            for number, states in enumerate(between):
                block_in_btd = states.pop().detach().requires_grad_()
                with walker.record_io(index, modules) as (inputs, outputs):
                    block_out_btd = walker.run(index, block_in_btd)
                reached = [module for module in modules if module in outputs]  # a router may leave some out
                wanted = [block_in_btd, *(outputs[module] for module in reached)]
                gradients[number], *found = torch.autograd.grad(block_out_btd, wanted, gradients[number])
                for module, delta in zip(reached, found, strict=True):
                    entering[module].append(inputs[module].detach().flatten(0, -2))
                    deltas[module].append(delta.flatten(0, -2))
            for place, module in zip(units, modules, strict=True):
                if not entering[module]:
                    slope[place] = size[place] = (0.0,) * space.units[place].num_levels
                    continue
                input_ni, delta_no = (torch.cat(table.pop(module)) for table in (entering, deltas))
                positions = [position * len(input_ni) // count for position in sampled]
                if module in self._routed:  # only some tokens reach it
                    positions = [position for position in sampled if position < len(input_ni)]
                expand = self._mixture if module in self._routers else self._unit
                slope[place], size[place] = expand(place, allocation[place], input_ni, delta_no.float(), positions)
        answers = sum(batch.positions for batch in batches)
        return ExpansionChunk(sums=sums, positions=answers, slope=tuple(slope), size=tuple(size), sized=len(sampled))

    def _unit(
        self, place: int, own: int, input_ni: torch.Tensor, delta_no: torch.Tensor, sampled: Sequence[int]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the first-order change of the loss and the squared change of the output, for each level of a unit.

        Args:
            place: Index of the unit.
            own: Its level.
            input_ni: Inputs of its matrix.
            delta_no: Gradient in the outputs of its matrix.
            sampled: Positions that tell the size of changes.
        """
        unit, module = self._space.units[place], self._modules[place]
        input_ni = input_ni.float()
        gradient_oi, gradient_o, sampled_ni = delta_no.T @ input_ni, delta_no.sum(0), input_ni[sampled]
        before = self._assembler.wide(unit.name, own)
        slopes, sizes = [], []
        for level in range(unit.num_levels):
            after = before if level == own else self._assembler.wide(unit.name, level)
            change_oi, change_o = (_change(before, after, f"{module}.{kind}") for kind in ("weight", "bias"))
            of_weight, of_bias = gradient_oi * change_oi, gradient_o * change_o
            slopes.append(float(of_weight.sum(dtype=torch.float64) + of_bias.sum(dtype=torch.float64)))
            change_no = sampled_ni @ change_oi.T + change_o
            sizes.append(float(change_no.square().sum(dtype=torch.float64)))
        return tuple(slopes), tuple(sizes)

    @torch.no_grad()
    def _mixture(
        self, place: int, own: int, input_ni: torch.Tensor, delta_no: torch.Tensor, sampled: Sequence[int]
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return what :meth:`_unit` returns for whole experts, which are run at every level."""
        unit, model = self._space.units[place], self._walker.model
        answers = []
        for level in range(unit.num_levels):
            self._switch.set(unit.name, level)
            _, weights_nk, chosen_nk = model.get_submodule(self._routers[unit.name])(input_ni)
            answers.append(model.get_submodule(unit.name)(input_ni, chosen_nk, weights_nk).float())
        self._switch.set(unit.name, own)
        changes = [answer_no - answers[own] for answer_no in answers]
        slopes = tuple(float((delta_no * change_no).sum(dtype=torch.float64)) for change_no in changes)
        return slopes, tuple(float(change_no[sampled].square().sum(dtype=torch.float64)) for change_no in changes)


def _change(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    """Return the change of a tensor; a missing tensor counts as zero."""
    zero = torch.zeros(())
    return after.get(key, zero).float() - before.get(key, zero).float()
