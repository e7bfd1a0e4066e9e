"""Measuring a latency table: how long a model's sub-blocks take at every shape on this device."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from allocator.core.errors import UserError
from allocator.core.files import check_file
from allocator.core.latency import LatencySettings, LatencyTable
from allocator.core.provenance import collect_versions
from allocator.evaluation.latency import make_table
from allocator.evaluation.spec import check_device
from allocator.model.family.serving_costs import check_timed
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.model import read_model
from allocator.run.reporting import Reporter, Silent

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from allocator.run.config.options import RunOptions

REPEATS = 20


def measure_latency(
    out: Path | str,
    model: str | Path | None = None,
    *,
    config: RunConfig | Path | str | None = None,
    repeats: int = REPEATS,
    reporter: Reporter | None = None,
    **options: Unpack[RunOptions],
) -> LatencyTable:
    """Measure how long a model's sub-blocks take at every shape on this device, and write the table.

    Args:
        out: The table's file.
        model: A Hugging Face folder or hub id. If None, the model of ``config``, else the packaged model.
        config: A configuration or a run file, which options override. ``workload``, ``dtype``, ``device`` and
            ``threads`` are those of the measurement.
        repeats: Measurements of each figure.
        reporter: Receives progress.
        options: See :class:`~allocator.run.config.options.RunOptions`.

    Raises:
        UserError: The model cannot be used, or the file cannot be written.
    """
    settings, out = build_config(model, config, options), Path(out)
    check_file(out, "--out")
    check_device(settings.device)
    work = settings.workload
    dense = settings.model_copy(update={"pattern": "structured", "workload": work.model_copy(update={"latency": None})})
    checkpoint, layout, space = read_model(dense)
    check_timed(layout)
    if not checkpoint.kind.generates:
        raise UserError(f"latency: {checkpoint.architecture} does not generate, and times are those of generation")
    reporter = reporter or Silent()
    reporter.start_phase("measuring", max(unit.num_levels for unit in space.units))
    measured = LatencySettings(
        batch=work.batch,
        prompt=work.prompt,
        generate=work.generate,
        dtype=settings.dtype,
        threads=settings.threads,
        repeats=repeats,
    )
    table = make_table(checkpoint, layout, space, measured, settings.device, collect_versions(), reporter.advance)
    table.save(out)
    return table
