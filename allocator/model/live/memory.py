"""Memory that was freed, and that the process still holds."""

from __future__ import annotations

import ctypes
import sys
from contextlib import suppress


def give_back() -> None:
    """Hand freed memory back to the system.

    glibc keeps pieces below 32 MB in its heap, where they fragment: work on one part of a model after the other
    would hold a little more after each. Nothing happens on other systems.
    """
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
