"""One block, dense and pruned side by side: the inputs of its matrices, and the targets of their outputs.

A pruner that refits aims at the dense model. The target Y of a matrix is its dense output on dense inputs. The target
of an output projection also includes what the residual stream already lacks. The weight that is nearest to the target
on the pruned model's inputs X̃, W* = argmin ‖Y - X̃Wᵀ‖² + λ‖W - W_dense‖², takes the place of the dense weight. The
pruner then solves the same problem as before, because ‖Y - X̃Ŵᵀ‖² = ‖Y - X̃W*ᵀ‖² + ‖X̃(W* - Ŵ)ᵀ‖², apart from the
damping λ.

Once blocks are pruned, a router may send other tokens to an expert, so there is no dense output on the same tokens.
Experts, and the sub-blocks that are added to them, therefore aim at their dense outputs on the inputs that they get.

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
"""Relative error up to which a block's output counts as its input plus what its sub-blocks add."""

_ROUNDINGS = 4
"""Roundings of the residual stream in the model's data type that do not count as an error."""


class DenseAndPruned:
    """One block of a model with the hidden states that enter it, in the dense and in the pruned model.

    Attributes:
        compact: Compact levels of the block's units that are pruned so far.
        adds_up: Whether the block's output is its input plus what its sub-blocks add.
    """

    def __init__(
        self,
        calibration: Calibration,
        index: int,
        dense: Sequence[torch.Tensor],
        pruned: Sequence[torch.Tensor],
        path: Mapping[str, int] | None,
    ) -> None:
        """Run the dense block.

        Args:
            calibration: The model, the pruner and the text.
            index: Index of the block.
            dense: Hidden states that enter the block in the dense model, batch by batch.
            pruned: Hidden states that enter the block after pruned blocks, batch by batch.
            path: The level of each unit in the pruned model; None for the expectation over all levels.
        """
        self.compact: dict[str, CompactLevels] = {}
        self._calibration, self._index, self._path = calibration, index, path
        self._dense, self._pruned = dense, pruned
        self._walker, layout = calibration.walker, calibration.layout
        # the outputs of a sub-block's first matrices are needed when some of them are pruned already
        self._structured = calibration.space.pattern == "structured"
        self._dense_block = None if self._structured else copy.deepcopy(self._walker.blocks[index])
        assembler = Assembler(
            calibration.checkpoint, layout, calibration.space, self.compact.__getitem__, self._walker.model
        )
        self._switch = LevelSwitch(self._walker.model, layout, assembler)
        writing = [stage for stage in plan_stages(layout, calibration.space)[index] if stage.writes]
        names = [name for stage in writing for name in dict.fromkeys((_enclosing_module(stage), stage.adds))]
        # what sub-blocks add, by module and batch: for the dense block, and for the sub-blocks that are pruned so far
        self._dense_added: list[dict[str, torch.Tensor]] = []
        self._pruned_added: list[dict[str, torch.Tensor]] = [{} for _ in pruned]
        self._projection_inputs: list[torch.Tensor] = []  # of the current sub-block
        self._dense_leaving: list[torch.Tensor] = []
        for batch in dense:
            with self._walker.record_io(index, names) as (_, outputs):
                self._dense_leaving.append(self._walker.run(index, batch))
            self._dense_added.append({stage.adds: outputs[stage.adds] for stage in writing})
        self._skipped = {stage.adds: _find_skipped(stage, outputs) for stage in writing}  # the same in every batch
        self.adds_up = self._check_sum()

    def problems(self, stage: PruneStage, levels: Mapping[UnitTask, tuple[int, ...]]) -> list[UnitProblem]:
        """Run both models up to a stage, and return the problems of its units.

        Args:
            stage: The stage; all stages before it are applied.
            levels: The units to prune, and the levels to make of each.
        """
        pruner, modules = self._calibration.pruner, [task.module for task in levels]
        if not modules:
            return []
        statistics = start_statistics(self._walker.model, modules, pruner.need, find_routers(levels))
        batches = zip(self._dense, self._dense_added, self._pruned, self._pruned_added, strict=True)
        for dense, dense_added, pruned, pruned_added in batches:
            inputs = self._capture_inputs(modules, pruned, pruned_added)
            if self._projects(stage):
                self._projection_inputs.append(inputs[stage.adds])
            for module, module_inputs in inputs.items():  # a module may be missing: no token was routed to it
                statistics[module].add(module_inputs.flatten(0, -2))
            if pruner.refit is None or stage.routed:
                continue
            outputs = dense_added
            if not stage.writes:
                known = self._known_outputs({output: dense_added[output] for output in pruned_added})
                outputs = self._walker.capture_outputs(self._index, dense, modules, self._dense_block, known)
            for module in modules:
                bias = getattr(self._walker.model.get_submodule(module), "bias", None)
                # in float32, and differences first: what is lacking is small compared with the residual stream
                target = _flatten(outputs[module]) - (0.0 if bias is None else bias.float())
                if stage.writes and self.adds_up:
                    target = target + (_flatten(self._residual(dense)) - _flatten(self._residual(pruned)))
                    for output in pruned_added:
                        target = target + (_flatten(dense_added[output]) - _flatten(pruned_added[output]))
                gram = statistics[module]
                assert isinstance(gram, Gram), f"{pruner.name} refits, and needs no gram"
                gram.add_targets(inputs[module].flatten(0, -2), target)
        return [self._make_problem(task, made, statistics[task.module]) for task, made in levels.items()]

    def apply(self, stage: PruneStage) -> None:
        """Put the stage's units at their level of the path; after its last stage, keep what a sub-block adds."""
        units, adds = [task.unit for task in stage.tasks], stage.adds
        if self._projects(stage) and not self._projection_inputs:  # no unit of the stage was to be pruned
            self._projection_inputs = [
                self._capture_inputs([adds], hidden, added)[adds]
                for hidden, added in zip(self._pruned, self._pruned_added, strict=True)
            ]
        if self._path is not None:
            for unit in units:
                if level := self._path[unit.name]:
                    self._switch.set(unit.name, level, wide=True)
        if not stage.writes:
            return
        if self._projects(stage) and self._path is None:
            self._switch.blend(stage.sub_block.name, _level_shares(units[0]))
            totals = self._project(stage.sub_block, pruned=True)
        elif self._path is not None and self._projects(stage):
            totals = self._project(stage.sub_block, pruned=self._path[units[0].name] > 0)
        elif self._path is None:
            totals = self._average_over_levels(stage)
        else:
            totals = [
                self._walker.capture_outputs(self._index, hidden, [adds], instead=self._known_outputs(added))[adds]
                for hidden, added in zip(self._pruned, self._pruned_added, strict=True)
            ]
        for added, total in zip(self._pruned_added, totals, strict=True):
            added[adds] = total
        self._projection_inputs = []

    def run(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the hidden states that leave the dense and the pruned block, batch by batch."""
        pruned = [
            self._walker.run(self._index, batch, instead=self._known_outputs(added))
            for batch, added in zip(self._pruned, self._pruned_added, strict=True)
        ]
        return self._dense_leaving, pruned

    def _projects(self, stage: PruneStage) -> bool:
        """Whether what a sub-block adds can be computed from the inputs of its output projection.

        It cannot for routed sub-blocks, nor for the average over the levels of several units.
        """
        return stage.writes and not stage.routed and (self._path is not None or self._structured)

    def _capture_inputs(
        self, modules: Sequence[str], pruned: torch.Tensor, added: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the inputs of modules in the pruned model."""
        known = self._known_outputs(added)
        return self._walker.capture_outputs(self._index, pruned, modules, instead=known, entering=True)

    def _known_outputs(self, added: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Return the outputs of modules that need not run, because what their sub-blocks add is known."""
        outputs = {}
        for output, tensor in added.items():
            module, rest = self._skipped[output]
            outputs[module] = tensor if rest is None else (tensor, *rest)
        return outputs

    def _make_problem(self, task: UnitTask, levels: tuple[int, ...], statistics: Statistics) -> UnitProblem:
        statistics.check(task.module)
        weight_oi = dense_oi = self._calibration.read_weight(task)
        if isinstance(statistics, Gram) and statistics.cross_io is not None:
            refit = self._calibration.pruner.refit
            assert refit is not None
            weight_oi = find_nearest(dense_oi, statistics, refit, task.unit.name, self._calibration.notify)
        return UnitProblem(task=task, weight_oi=weight_oi, statistics=statistics, levels=levels, dtype=dense_oi.dtype)

    def _project(self, sub_block: SubBlock, pruned: bool) -> list[torch.Tensor]:
        """Return the outputs of a sub-block's output projection on its inputs, batch by batch."""
        project = self._walker.model.get_submodule(sub_block.output)
        if pruned and self._structured and sub_block.name in self.compact:  # its columns are in the order of removal
            columns = item_columns(self.compact[sub_block.name]["order"].long(), sub_block.width)
            return [project(inputs[..., columns]) for inputs in self._projection_inputs]
        return [project(inputs) for inputs in self._projection_inputs]

    def _average_over_levels(self, stage: PruneStage) -> list[torch.Tensor]:
        """Return the mean output of sub-blocks over their levels, batch by batch. The sub-blocks have several units.

        The weight of a level is what it keeps. All units are at the same level, and the sub-blocks are run at each.
        """
        names = {name for sub_block in stage.sub_blocks for name in (sub_block.name, *sub_block.modules)}
        units = [unit for unit in self._calibration.space.units if unit.name in names]
        totals = [torch.zeros_like(added[stage.adds], dtype=torch.float32) for added in self._dense_added]
        for level, share in enumerate(_level_shares(max(units, key=lambda unit: unit.num_levels))):
            if share == 0:
                continue
            for unit in units:
                self._switch.set(unit.name, min(level, unit.num_levels - 1))
            for batch, (hidden, added) in enumerate(zip(self._pruned, self._pruned_added, strict=True)):
                known = self._known_outputs(added)
                outputs = self._walker.capture_outputs(self._index, hidden, [stage.adds], instead=known)
                totals[batch] = totals[batch] + outputs[stage.adds] * share
        return [total.to(self._walker.dtype) for total in totals]

    def _residual(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the part of the state that the block adds to."""
        return self._walker.residual(self._index, hidden)

    def _check_sum(self) -> bool:
        """Return whether the dense block adds up on the first batch."""
        leaving = _flatten(self._residual(self._dense_leaving[0]))
        entering = _flatten(self._residual(self._dense[0]))
        missing = leaving - entering - sum(_flatten(added) for added in self._dense_added[0].values())
        rounding = _ROUNDINGS * torch.finfo(self._walker.dtype).eps * leaving.norm()
        allowed = _ADDS_UP * (leaving - entering).norm() + rounding
        # a block that adds nothing adds up; a sum that is NaN is reported where the block's inputs are checked
        return not float(missing.norm()) > float(allowed)


def _flatten(tensor: torch.Tensor) -> torch.Tensor:
    """Return the features of all tokens, [n, features], in float32; some sub-blocks have no batch dimension."""
    return tensor.flatten(0, -2).float()


def _level_shares(unit: Unit) -> list[float]:
    """Return the weight of each level in the average over a unit's levels: its share of what all levels keep."""
    return [kept / sum(unit.kept) for kept in unit.kept]


def _enclosing_module(stage: PruneStage) -> str:
    """Return the module that holds all of a stage's sub-blocks."""
    return stage.adds if stage.routed else stage.sub_block.name


def _find_skipped(stage: PruneStage, outputs: Mapping[str, Any]) -> tuple[str, tuple[Any, ...] | None]:
    """Return which module need not run if what a sub-block adds is known, and what else that module returns.

    It is the sub-block, if that returns the output of its output projection, alone (None) or first of several values.
    If not, it is the output projection.
    """
    enclosing = _enclosing_module(stage)
    value, added = outputs[enclosing], outputs[stage.adds]
    first, rest = (value[0], value[1:]) if isinstance(value, tuple) else (value, None)
    return (enclosing, rest) if torch.equal(first, added) else (stage.adds, None)


def find_nearest(weight_oi: torch.Tensor, statistics: Gram, refit: Refit, name: str, notify: Notify) -> torch.Tensor:
    """Return the weight whose outputs are nearest to the targets on the pruned model's inputs.

    Args:
        weight_oi: The dense weight. The result stays close to it in directions that the inputs hardly reach.
        statistics: Statistics of the inputs and of the targets.
        refit: The pruner's damping. With an intercept the pruner fits a bias too, so that the inputs and the targets
            are centred.
        name: The unit, for messages.
        notify: Called with a message for every increase of the damping.

    Returns:
        W*, [out, in], float64.
    """
    assert statistics.cross_io is not None
    assert statistics.target_o is not None
    gram_ii, cross_io = statistics.gram_ii.double(), statistics.cross_io.double()
    if refit.intercept:
        mean_i = statistics.sum_i.double() / statistics.count
        gram_ii = centre_gram(gram_ii, mean_i, statistics.count)
        cross_io = (cross_io - torch.outer(mean_i, statistics.target_o.double())) * (gram_ii.diagonal() > 0)[:, None]
    factor = factorise(gram_ii, refit.damping, name, notify)
    right_io = cross_io + (factor.gram_ii - gram_ii) @ weight_oi.to(gram_ii).T
    return torch.cholesky_solve(right_io, factor.cholesky_ii).T
