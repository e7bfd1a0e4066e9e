"""Latency: a table of the times of sub-blocks at every shape, and whole models end to end.

Sub-blocks are timed inside a whole model of random weights whose sub-blocks all have the same level. So other
sub-blocks push their weights out of the caches, and the cost of calling them is included. The fixed time, which belongs
to no sub-block, is the rest of a pass at the last level, where hardly anything is left. At other levels the rest is
longer, because sub-blocks push more out of the caches. This excess is charged to the sub-blocks in equal shares. The
sum of times is then exact if all sub-blocks have the same level, and it is checked where they do not.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import nn

from allocator.core.latency import LatencySettings, LatencyTable, Timing
from allocator.core.space import SearchSpace
from allocator.model.checkpoint.headers import Checkpoint
from allocator.model.family.layout import Layout
from allocator.model.family.serving_costs import describe_shape, describe_size
from allocator.model.live.load import build_shaped_model

_WARM_UP = 2

_TURNS = 5
"""Number of turns over which repeats are spread, because a shared machine has slow seconds."""

_PHASES = ("prefill", "decode")


def make_table(
    checkpoint: Checkpoint,
    layout: Layout,
    space: SearchSpace,
    settings: LatencySettings,
    device: str,
    versions: Mapping[str, str],
    step: Callable[[int], None] = lambda done: None,
) -> LatencyTable:
    """Measure every sub-block at every level of its ladder.

    Args:
        checkpoint: The dense model; only its shapes are used.
        layout: Its sub-blocks.
        space: Its units and their ladders, of structured pruning.
        settings: The workload, and how to measure it.
        device: ``cpu`` or ``cuda``.
        versions: Versions of the packages that are measured with.
        step: Called with the number of levels that are done.
    """
    ladders = {unit.name: unit.kept for unit in space.units}
    shapes = {sub_block.name: describe_shape(sub_block, checkpoint) for sub_block in layout.sub_blocks}
    deepest = max(len(ladder) for ladder in ladders.values())
    levels = [
        {name: ladder[min(level, len(ladder) - 1)] for name, ladder in ladders.items()} for level in range(deepest)
    ]
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    spread: dict[tuple[str, int], list[float]] = {}
    timed = _in_turns(checkpoint, layout, levels, list(ladders), settings, device, step)
    fixed = {phase: _rest(*timed[-1][phase]) for phase in _PHASES}
    for kept, measured in zip(levels, timed, strict=True):
        present = [name for name, count in kept.items() if count]
        for phase, (total, times_of) in measured.items():
            excess = (median(_rest(total, times_of)) - median(fixed[phase])) / max(1, len(present))
            for name, times in times_of.items():
                key = shapes[name], kept[name]
                figure = median(times) + (excess if name in present else 0.0)
                found.setdefault(key, {p: [] for p in _PHASES})[phase].append(figure)
                spread.setdefault(key, []).append(_spread(times))
    units: dict[str, list[Timing]] = {}
    for (shape, count), medians in found.items():
        units.setdefault(shape, []).append(_timing(count, medians, median(spread[shape, count])))
    return LatencyTable(
        device=describe(device),
        versions=dict(versions),
        settings=settings,
        model=describe_size(checkpoint, layout),
        fixed=_timing(0, fixed, max(map(_spread, fixed.values()))),
        units={shape: tuple(sorted(timings, key=lambda t: -t.kept)) for shape, timings in units.items()},
    )


def _rest(total: Sequence[float], times: Mapping[str, Sequence[float]]) -> list[float]:
    """Return the time of each pass minus the times of its sub-blocks."""
    return [whole - sum(parts) for whole, *parts in zip(total, *times.values(), strict=True)]


def measure(
    checkpoint: Checkpoint,
    layout: Layout,
    shapes: Sequence[Mapping[str, int]],
    settings: LatencySettings,
    device: str,
    step: Callable[[int], None] = lambda done: None,
) -> list[dict[str, float]]:
    """Return the milliseconds of models of some shapes, end to end, by the names of the costs.

    Args:
        checkpoint: The dense model.
        layout: Its sub-blocks.
        shapes: The number of items that every sub-block keeps, for each model.
        settings: The workload, and how to measure it.
        device: ``cpu`` or ``cuda``.
        step: Called with the number of models that are done.
    """
    found = []
    for timed in _in_turns(checkpoint, layout, shapes, [], settings, device, step):
        prefill, decode = (median(timed[phase][0]) / 1e6 for phase in _PHASES)
        found.append({"prefill_ms": prefill, "decode_ms": decode, "latency_ms": prefill + settings.generate * decode})
    return found


def describe(device: str) -> dict[str, str]:
    """Return the type and the name of a device."""
    if device == "cuda":
        return {"type": "cuda", "name": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {"type": "cpu", "name": names[0] if names else platform.processor() or platform.machine()}


Times = dict[str, tuple[list[float], dict[str, list[float]]]]
"""By phase: nanoseconds of whole passes, and of each sub-block in each pass."""


def _in_turns(
    checkpoint: Checkpoint,
    layout: Layout,
    shapes: Sequence[Mapping[str, int]],
    names: Sequence[str],
    settings: LatencySettings,
    device: str,
    step: Callable[[int], None],
) -> list[Times]:
    """Time several models and their sub-blocks, a few repeats of each in turn, so that all share a slow moment."""
    found: list[Times] = [{phase: ([], {name: [] for name in names}) for phase in _PHASES} for _ in shapes]
    turns = min(_TURNS, settings.repeats)
    for turn in range(turns):
        repeats = settings.repeats * (turn + 1) // turns - settings.repeats * turn // turns
        for index, kept in enumerate(shapes):
            with _placed(device, settings.threads):
                model = build_shaped_model(checkpoint, layout, kept, getattr(torch, settings.dtype))
                _timed(model, layout, settings, repeats, device, found[index])
                del model  # frees its memory before the next model is made
            step((turn * len(shapes) + index + 1) // turns)
    return found


@torch.no_grad()
def _timed(
    model: nn.Module, layout: Layout, settings: LatencySettings, repeats: int, device: str, times: Times
) -> None:
    """Append the times of some repeats of one model to ``times``."""
    clock = _Clock(device)
    handles = []
    names = list(times[_PHASES[0]][1])
    for sub_block in layout.sub_blocks:
        if sub_block.name in names:
            first, last = (
                model.get_submodule(sub_block.modules_removed[0]),
                model.get_submodule(sub_block.modules_removed[-1]),
            )
            handles += [
                first.register_forward_pre_hook(lambda *_, name=sub_block.name: clock.note(name)),
                last.register_forward_hook(lambda *_, name=sub_block.name: clock.note(name)),
            ]
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    length = settings.prompt + settings.generate // 2
    ids = torch.randint(0, vocabulary, (settings.batch, length + 1), generator=generator).to(device)

    def run(phase: str, tokens: torch.Tensor, before: Any = None) -> None:
        for attempt in range(_WARM_UP + repeats):
            cache = deepcopy(before)  # because a call appends to it
            clock.read()
            clock.note("")
            model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            clock.note("")
            passed = clock.read()
            if attempt >= _WARM_UP:
                times[phase][0].append(passed.pop(""))
                for name in names:
                    times[phase][1][name].append(passed.get(name, 0.0))

    run("prefill", ids[:, : settings.prompt])
    run("decode", ids[:, -1:], model(ids[:, :length], use_cache=True, logits_to_keep=1).past_key_values)
    for handle in handles:
        handle.remove()


class _Clock:
    """Records when named spans begin and end, and returns their durations."""

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        self._marks: dict[str, list[Any]] = {}

    def note(self, name: str) -> None:
        """Record the beginning or the end of a span."""
        if self._cuda:
            mark: Any = torch.cuda.Event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter_ns()
        self._marks.setdefault(name, []).append(mark)

    def read(self) -> dict[str, float]:
        """Return the nanoseconds of every span since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
        marks, self._marks = self._marks, {}
        pairs = {name: marks_of for name, marks_of in marks.items() if len(marks_of) == 2}
        return {name: a.elapsed_time(b) * 1e6 if self._cuda else b - a for name, (a, b) in pairs.items()}


class _placed:  # noqa: N801 - a context manager
    """Runs its body on a device, with a number of threads."""

    def __init__(self, device: str, threads: int) -> None:
        self._device, self._threads = torch.device(device), threads

    def __enter__(self) -> None:
        self._before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        self._device.__enter__()

    def __exit__(self, *reason: Any) -> None:
        self._device.__exit__(*reason)
        torch.set_num_threads(self._before)


def _timing(kept: int, times: Mapping[str, Sequence[float]], spread: float) -> Timing:
    prefill, decode = (max(0, round(median(times[phase]))) for phase in _PHASES)
    return Timing(kept=kept, prefill_ns=prefill, decode_ns=decode, spread=round(spread, 4))


def _spread(times: Sequence[float]) -> float:
    if len(times) < 2 or median(times) <= 0:
        return 0.0
    low, _, high = quantiles(times, n=4)
    return (high - low) / 2 / median(times)
