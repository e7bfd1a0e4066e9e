"""Weight files byte by byte: their hash, a check for NaN and infinity, and a comparison of tensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from allocator.core.errors import UserError

_CHUNK_BYTES = 1 << 20

_EXPONENTS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
"""By safetensors data type: the unsigned integer of the same width, and the exponent bits.

A number whose exponent bits are all set is NaN or infinity.
"""


def fingerprint_weights(path: Path) -> str:
    """Return ``sha256:<hex>`` of a safetensors file's bytes.

    Raises:
        UserError: A tensor holds NaN or infinity. The message names the tensor.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        digest.update(size + header)
        entries = {name: entry for name, entry in json.loads(header).items() if name != "__metadata__"}
        # there are no gaps between tensors; safetensors checks that when it opens the file
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            while chunk := file.read(min(_CHUNK_BYTES, end - start)):
                start += len(chunk)
                digest.update(chunk)
                if not _is_finite(chunk, entry["dtype"]):
                    raise UserError(f"model: {path}: {name} holds NaN or infinity. Repair or replace the model")
    return "sha256:" + digest.hexdigest()


def same_values(first: tuple[Path, str], second: tuple[Path, str]) -> bool:
    """Whether two tensors have the same type, shape and bytes. Each is given by its file and name."""
    with first[0].open("rb") as one, second[0].open("rb") as other:
        left, right = _seek_tensor(one, first[1]), _seek_tensor(other, second[1])
        if left[0] != right[0]:
            return False
        size = left[1]
        while size > 0:
            count = min(_CHUNK_BYTES, size)
            if one.read(count) != other.read(count):
                return False
            size -= count
    return True


def _seek_tensor(file: BinaryIO, name: str) -> tuple[tuple[Any, ...], int]:
    """Go to the first byte of a tensor, and return its type and shape, and its size in bytes."""
    header_bytes = int.from_bytes(file.read(8), "little")
    entry = json.loads(file.read(header_bytes))[name]
    start, end = entry["data_offsets"]
    file.seek(8 + header_bytes + start)
    return (entry["dtype"], entry["shape"]), end - start


def _is_finite(chunk: bytes, dtype: str) -> bool:
    if dtype not in _EXPONENTS:
        return True
    width, exponent = _EXPONENTS[dtype]
    return int((np.frombuffer(chunk, width) & np.array(exponent, width)).max()) != exponent
