"""Returning freed memory that the process still holds."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back() -> None:
    """Hand freed memory back to the system.

    glibc keeps freed pieces below 32 MB in its heap, where they fragment. Without this, memory would grow with every
    part of a model. On other systems nothing happens.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
