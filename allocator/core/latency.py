"""A latency table: the time of every kind of sub-block at every shape, measured on one device, readable on any."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, ValidationError

from allocator.core.errors import UserError
from allocator.core.files import read_json, write_json
from allocator.core.strict import StrictModel


class LatencySettings(StrictModel):
    """The workload and conditions of the measurements.

    Attributes:
        batch: Sequences at once.
        prompt: Tokens of each prompt.
        generate: Tokens decoded after the prompt. Decoding is measured at half of them.
        dtype: Data type of weights and activations.
        threads: CPU threads.
        repeats: Measurements of each figure, after warm-up.
    """

    batch: int = Field(ge=1)
    prompt: int = Field(ge=1)
    generate: int = Field(ge=0)
    dtype: str
    threads: int = Field(ge=1)
    repeats: int = Field(ge=1)


class Timing(StrictModel):
    """Median times at one shape.

    Attributes:
        kept: Number of items.
        prefill_ns: Time of the prompt.
        decode_ns: Time of one decoded token.
        spread: Half of the interquartile range relative to the median; the larger of the two times' values.
    """

    kept: int = Field(ge=0)
    prefill_ns: int = Field(ge=0)
    decode_ns: int = Field(ge=0)
    spread: float = Field(ge=0)


class LatencyTable(StrictModel):
    """Times of one model's sub-blocks on one device.

    Attributes:
        device: Type of the device, and the processor's name as the system reports it.
        versions: Versions of Python, torch and transformers.
        settings: The workload and conditions of the measurements.
        model: Hidden size, vocabulary and number of blocks of the measured model.
        fixed: Time outside sub-blocks: embeddings, norms, residuals, the head, and Python in between. ``kept`` is 0.
        units: Timings by shape of a sub-block, from the most items to the fewest.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    kind: Literal["allocator.latency"] = "allocator.latency"
    device: dict[str, str]
    versions: dict[str, str]
    settings: LatencySettings
    model: dict[str, int]
    fixed: Timing
    units: dict[str, tuple[Timing, ...]]

    def save(self, path: Path) -> None:
        """Write the table atomically."""
        write_json(path, self.model_dump(mode="json", by_alias=True))

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table.

        Raises:
            UserError: The file is missing or not a latency table.
        """
        try:
            return cls.model_validate(read_json(path, "latency table"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise UserError(
                f"{path}: not a latency table: at {where}: {first['msg']}. Make it again with 'allocator latency'"
            ) from None

    def ladder(self, shape: str, kept: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the nanoseconds of prefill and of a decoded token, for each level of a ladder.

        Times between measured shapes are interpolated. No level counts as faster than a sparser one, so noise, or a
        width for which a kernel is slow, never makes the removal of items look expensive.

        Raises:
            UserError: The table has no such shape, or fewer items than a level keeps.
        """
        timings = self.units.get(shape)
        if timings is None:
            raise UserError(
                f"latency table: no sub-block of shape {shape!r}, it has {', '.join(map(repr, self.units))}. "
                "Make one of this model with 'allocator latency'"
            )
        at = [timing.kept for timing in reversed(timings)]
        if kept[0] > at[-1] or kept[-1] < at[0]:
            raise UserError(
                f"latency table: {shape!r} was measured with {at[0]} to {at[-1]} items, and levels keep {kept[-1]} to "
                f"{kept[0]}. Make one of this model with 'allocator latency'"
            )
        both = []
        for name in ("prefill_ns", "decode_ns"):
            times = [getattr(timing, name) for timing in reversed(timings)]
            drawn = [round(float(np.interp(count, at, times))) for count in reversed(kept)]
            both.append(tuple(accumulate(drawn, max))[::-1])
        return both[0], both[1]
