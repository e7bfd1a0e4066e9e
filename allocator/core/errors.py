"""The one error that users see: what is wrong, where, what was found, and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """Bad input. The command line prints the message alone and exits with code 2."""


def did_you_mean(found: str, known: Iterable[str]) -> str:
    """Return a hint such as ``; did you mean 'target'?``, or the list of known names."""
    known = sorted(known)
    close = get_close_matches(found, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"
