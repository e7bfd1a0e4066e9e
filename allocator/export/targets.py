"""All targets, by the name that ``--to`` takes."""

from __future__ import annotations

from allocator.export.contract import Target
from allocator.export.hf import HuggingFace
from allocator.export.hf_padded import HuggingFacePadded
from allocator.export.ratios import Ratios

TARGETS: dict[str, Target] = {target.name: target for target in (HuggingFace(), HuggingFacePadded(), Ratios())}
