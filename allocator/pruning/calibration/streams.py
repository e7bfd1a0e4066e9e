"""One block, whole and pruned side by side: what enters its matrices, and what they should answer.

Pruners that choose new values aim at the dense model: the target of a matrix is its dense output on dense inputs,
and that of an output projection also makes up for what the residual stream already lacks. The weight that comes
nearest on the inputs at hand, W* = argmin ‖Y - X̃Wᵀ‖² + λ‖W - W_dense‖², takes the place of the dense one, and every
pruner solves the same problem as before, for ‖Y - X̃Ŵᵀ‖² = ‖Y - X̃W*ᵀ‖² + ‖X̃(W* - Ŵ)ᵀ‖² but for the damping λ.

Where a router sends other tokens to an expert once blocks are pruned, there is no dense output on the same tokens to
aim at: experts, and what stands beside them, answer on their own inputs as they did.

Shapes: n tokens, o output and i input features of one matrix.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from allocator.core.notify import Notify
from allocator.core.space import Unit
from allocator.model.family.sub_blocks import SubBlock
from allocator.pruning.calibration.factorise import factorise
from allocator.pruning.calibration.problem import Calibration, PruneStage, find_routers, plan_stages
from allocator.pruning.calibration.statistics import Gram, Statistics, start_statistics
from allocator.pruning.levels.assemble import Assembler, LevelSwitch
from allocator.pruning.levels.compact import CompactLevels, item_columns
from allocator.pruning.pruners.obs import centre_gram
from allocator.pruning.pruners.protocol import Refit, UnitProblem, UnitTask

_ADDS_UP = 1e-2
"""Relative error up to which a block's output is its input plus what its sub-blocks add."""

_ROUNDINGS = 4
"""Roundings of the residual stream in the model's data type that are no error."""


class DenseAndPruned:
    """One block of a model with the calibration text at its door, dense and pruned.

    Attributes:
        compact: Compact levels of its units, as they are made.
        adds_up: Whether its output is its input plus what its sub-blocks add.
    """

    def __init__(
        self,
        calibration: Calibration,
        index: int,
        dense: Sequence[torch.Tensor],
        pruned: Sequence[torch.Tensor],
        levels: Mapping[str, int] | None,
    ) -> None:
        """Run the block while it is dense.

        Args:
            calibration: The model and the text.
            index: Which block.
            dense: Hidden states that enter it in the dense model, batch by batch.
            pruned: Hidden states that enter it after pruned blocks.
            levels: The level at which each unit passes the text on; None for the expectation over all.
        """
        self.compact: dict[str, CompactLevels] = {}
        self._calibration, self._index, self._levels = calibration, index, levels
        self._dense, self._pruned = dense, pruned
        self._walker, layout = calibration.walker, calibration.layout
        # within a sub-block of several matrices, dense outputs are asked for when some of them are pruned already
        self._structured = calibration.space.pattern == "structured"
        self._whole = None if self._structured else copy.deepcopy(self._walker.blocks[index])
        assembler = Assembler(
            calibration.checkpoint, layout, calibration.space, self.compact.__getitem__, self._walker.model
        )
        self._switchboard = LevelSwitch(self._walker.model, layout, assembler)
        every = [stage for stage in plan_stages(layout, calibration.space)[index] if stage.writes]
        names = [name for stage in every for name in dict.fromkeys((_around(stage), stage.adds))]
        # what sub-blocks add, by the module that gives it, batch by batch: all of the dense block, and those settled
        self._given: list[dict[str, torch.Tensor]] = []
        self._added: list[dict[str, torch.Tensor]] = [{} for _ in pruned]
        self._entered: list[torch.Tensor] = []  # the output projection of the sub-block at hand
        self._leaving: list[torch.Tensor] = []
        for batch in dense:
            with self._walker.record_io(index, names) as (_, heard):
                self._leaving.append(self._walker.run(index, batch))
            self._given.append({stage.adds: heard[stage.adds] for stage in every})
        self._passed_over = {stage.adds: _passed_over(stage, heard) for stage in every}  # of any batch
        self.adds_up = self._check_sum()

    def problems(self, stage: PruneStage, wanted: Mapping[UnitTask, tuple[int, ...]]) -> list[UnitProblem]:
        """Run both streams up to a stage, and return what pruners need for the levels that are wanted of its units."""
        pruner, modules = self._calibration.pruner, [task.module for task in wanted]
        if not modules:
            return []
        gathered = start_statistics(self._walker.model, modules, pruner.need, find_routers(wanted))
        for dense, given, pruned, added in zip(self._dense, self._given, self._pruned, self._added, strict=True):
            entering = self._entering(modules, pruned, added)
            if self._projects(stage):
                self._entered.append(entering[stage.adds])
            for module, entered in entering.items():  # no token of a batch may have been sent to an expert
                gathered[module].add(entered.flatten(0, -2))
            if pruner.refit is None or stage.routed:
                continue
            whole = given
            if not stage.writes:
                known = self._known({output: given[output] for output in added})
                whole = self._walker.capture_outputs(self._index, dense, modules, self._whole, known)
            for module in modules:
                bias = getattr(self._walker.model.get_submodule(module), "bias", None)
                # in fp32, and differences first: what is lost is small beside the stream that it is lost from
                target = _flat(whole[module]) - (0.0 if bias is None else bias.float())
                if stage.writes and self.adds_up:
                    target = target + (_flat(self._own(dense)) - _flat(self._own(pruned)))
                    for earlier in added:
                        target = target + (_flat(given[earlier]) - _flat(added[earlier]))
                statistics = gathered[module]
                assert isinstance(statistics, Gram)
                statistics.aim(entering[module].flatten(0, -2), target)
        return [self._problem(task, levels, gathered[task.module]) for task, levels in wanted.items()]

    def settle(self, stage: PruneStage) -> None:
        """Put what was pruned into the block, at its level of the path; know what a sub-block adds when it is done."""
        units, adds = [task.unit for task in stage.tasks], stage.adds
        if self._projects(stage) and not self._entered:  # no problem was asked for
            self._entered = [
                self._entering([adds], hidden, added)[adds]
                for hidden, added in zip(self._pruned, self._added, strict=True)
            ]
        if self._levels is not None:
            for unit in units:
                if level := self._levels[unit.name]:
                    self._switchboard.set(unit.name, level, wide=True)
        if not stage.writes:
            return
        if self._projects(stage) and self._levels is None:
            self._switchboard.blend(stage.sub_block.name, _shares(units[0]))
            totals = self._projected(stage.sub_block, pruned=True)
        elif self._levels is not None and self._projects(stage):
            totals = self._projected(stage.sub_block, pruned=self._levels[units[0].name] > 0)
        elif self._levels is None:
            totals = self._average_over_levels(stage)
        else:
            totals = [
                self._walker.capture_outputs(self._index, hidden, [adds], instead=self._known(added))[adds]
                for hidden, added in zip(self._pruned, self._added, strict=True)
            ]
        for added, total in zip(self._added, totals, strict=True):
            added[adds] = total
        self._entered = []

    def _projects(self, stage: PruneStage) -> bool:
        """Whether what a sub-block adds follows from what enters its output projection: all but averages of several."""
        return stage.writes and not stage.routed and (self._levels is not None or self._structured)

    def leaving(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return what leaves the block, dense and pruned, batch by batch."""
        pruned = [
            self._walker.run(self._index, batch, instead=self._known(added))
            for batch, added in zip(self._pruned, self._added, strict=True)
        ]
        return self._leaving, pruned

    def _entering(
        self, modules: Sequence[str], pruned: torch.Tensor, added: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return what enters modules in the pruned stream."""
        return self._walker.capture_outputs(self._index, pruned, modules, instead=self._known(added), entering=True)

    def _known(self, added: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return what modules answer that need not run, for it is known what their sub-blocks add."""
        answers = {}
        for output, tensor in added.items():
            module, rest = self._passed_over[output]
            answers[module] = tensor if rest is None else (tensor, *rest)
        return answers

    def _problem(self, task: UnitTask, levels: tuple[int, ...], statistics: Statistics) -> UnitProblem:
        statistics.check(task.module)
        weight = dense_weight = self._calibration.dense_weight(task)
        if isinstance(statistics, Gram) and statistics.answer_io is not None:
            refit = self._calibration.pruner.refit
            assert refit is not None
            weight = nearest(dense_weight, statistics, refit, task.unit.name, self._calibration.notify)
        return UnitProblem(task=task, weight_oi=weight, statistics=statistics, levels=levels, dtype=dense_weight.dtype)

    def _projected(self, sub_block: SubBlock, pruned: bool) -> list[torch.Tensor]:
        """Return what a sub-block's output projection makes of what entered it, batch by batch."""
        project = self._walker.model.get_submodule(sub_block.output)
        if pruned and self._structured and sub_block.name in self.compact:  # its columns are in the order of removal
            columns = item_columns(self.compact[sub_block.name]["order"].long(), sub_block.width)
            return [project(entered[..., columns]) for entered in self._entered]
        return [project(entered) for entered in self._entered]

    def _average_over_levels(self, stage: PruneStage) -> list[torch.Tensor]:
        """Return the average of what sub-blocks of several units give over their levels, batch by batch.

        A level counts as much as it keeps. Units are at the same level together, and the sub-blocks are run at each.
        """
        names = {name for sub_block in stage.sub_blocks for name in (sub_block.name, *sub_block.modules)}
        units = [unit for unit in self._calibration.space.units if unit.name in names]
        totals = [torch.zeros_like(given[stage.adds], dtype=torch.float32) for given in self._given]
        for level, share in enumerate(_shares(max(units, key=lambda unit: unit.num_levels))):
            if share == 0:
                continue
            for unit in units:
                self._switchboard.set(unit.name, min(level, unit.num_levels - 1))
            for batch, (hidden, added) in enumerate(zip(self._pruned, self._added, strict=True)):
                given = self._walker.capture_outputs(self._index, hidden, [stage.adds], instead=self._known(added))
                totals[batch] = totals[batch] + given[stage.adds] * share
        return [total.to(self._walker.dtype) for total in totals]

    def _own(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the part of the state that the block adds to."""
        return self._walker.residual(self._index, hidden)

    def _check_sum(self) -> bool:
        leaving, entered = _flat(self._own(self._leaving[0])), _flat(self._own(self._dense[0]))
        missing = leaving - entered - sum(_flat(added) for added in self._given[0].values())
        allowed = (
            _ADDS_UP * (leaving - entered).norm() + _ROUNDINGS * torch.finfo(self._walker.dtype).eps * leaving.norm()
        )
        # a block that adds nothing adds up; one whose sum is NaN is named where its inputs are checked
        if not float(missing.norm()) > float(allowed):
            return True
        return False


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """Return features of tokens, [n, features], in float32: some sub-blocks work on sequences, some on all tokens."""
    return tensor.flatten(0, -2).float()


def _shares(unit: Unit) -> list[float]:
    """Return how much each level counts in the average over a unit's levels: as much as it keeps."""
    return [kept / sum(unit.kept) for kept in unit.kept]


def _around(stage: PruneStage) -> str:
    """Return the module that holds all that a stage's sub-blocks are."""
    return stage.adds if stage.routed else stage.sub_block.name


def _passed_over(stage: PruneStage, heard: Mapping[str, Any]) -> tuple[str, tuple[Any, ...] | None]:
    """Return which module need not run where it is known what a sub-block adds, and what it returns besides.

    That is the sub-block if it returns what its output projection gives, alone (None) or first of several.
    """
    whole, own = heard[_around(stage)], heard[stage.adds]
    first, rest = (whole[0], whole[1:]) if isinstance(whole, tuple) else (whole, None)
    return (_around(stage), rest) if torch.equal(first, own) else (stage.adds, None)


def nearest(weight_oi: torch.Tensor, statistics: Gram, refit: Refit, name: str, notify: Notify) -> torch.Tensor:
    """Return the weight that comes nearest to what is aimed at on the inputs at hand.

    Args:
        weight_oi: The dense weight, near which it stays where the inputs say little.
        statistics: Of the inputs, and of the outputs that are aimed at.
        refit: The pruner's damping, and whether it will fit a bias too, so that only what varies is to be met.
        name: The unit, for what is reported.
        notify: Hears of more damping.

    Returns:
        W*, [out, in], float64.
    """
    assert statistics.answer_io is not None
    assert statistics.target_o is not None
    gram_ii, answer_io = statistics.gram_ii.double(), statistics.answer_io.double()
    if refit.intercept:
        mean_i = statistics.sum_i.double() / statistics.count
        gram_ii = centre_gram(gram_ii, mean_i, statistics.count)
        answer_io = (answer_io - torch.outer(mean_i, statistics.target_o.double())) * (gram_ii.diagonal() > 0)[:, None]
    factor = factorise(gram_ii, refit.damping, name, notify)
    right_io = answer_io + (factor.gram_ii - gram_ii) @ weight_oi.to(gram_ii).T
    return torch.cholesky_solve(right_io, factor.cholesky_ii).T
