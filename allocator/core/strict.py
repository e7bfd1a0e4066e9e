"""The base of what is read from files: frozen, and strict about keys."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class StrictModel(BaseModel):
    """Data of a file in which an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)
