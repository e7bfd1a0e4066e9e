"""The options of a run: the one list that the Python API takes as keywords and the command line as flags."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args, get_type_hints


@dataclass(frozen=True, slots=True, kw_only=True)
class Flag:
    """How an option looks on the command line.

    Attributes:
        help: What it does, in one line.
        name: The flag. Empty for the option's own name.
        metavar: What stands for its value. Empty for the type's name.
        default: The default in words. Empty for none.
    """

    help: str
    name: str = ""
    metavar: str = ""
    default: str = ""


class RunOptions(TypedDict, total=False):
    """The options of a run. Each has the key of the same name in a run file, except the last three.

    ``method`` and ``budget`` are the keys ``search.method`` and ``search.budget``. ``settings`` sets any other key, as
    ``["search.evolution.generations=10"]``.
    """

    text: Annotated[Path | str | None, Flag(help=".txt or .jsonl file or folder.", default="Python's library")]
    family: Annotated[Path | str | None, Flag(help="Family file.", default="those of the package")]
    pattern: Annotated[str | None, Flag(help="structured, unstructured or n:m.", default="structured")]
    target: Annotated[float | None, Flag(help="Share of the units' parameters to remove.", default="0.5")]
    constraints: Annotated[
        Sequence[str] | None,
        Flag(help="Such as 'latency_ms <= 12' or 'kv_bytes <= 0.5x'.", name="--constraint", metavar="BOUND"),
    ]
    objectives: Annotated[
        Sequence[str] | None,
        Flag(
            help="Minimised in addition to the loss: a cost, nll, or kl.DOMAIN. Finds a front.",
            name="--objective",
            metavar="NAME",
        ),
    ]
    workers: Annotated[int | None, Flag(help="Ray workers; 0 for none.", default="one per core, at most 4")]
    seed: Annotated[int | None, Flag(help="Seed of the search.", default="0")]
    name: Annotated[str | None, Flag(help="Name of the run.")]
    runs_dir: Annotated[Path | str | None, Flag(help="Folder of runs.", default="runs")]
    address: Annotated[str | None, Flag(help="Running Ray cluster.", default="a local one")]
    method: Annotated[str | None, Flag(help="Search method.", default="auto")]
    budget: Annotated[str | None, Flag(help="'300 evaluations', '2e6 tokens' or '20 minutes'.")]
    settings: Annotated[
        Sequence[str] | None, Flag(help="Any other key of a run file.", name="--set", metavar="KEY=VALUE")
    ]


def list_flags() -> dict[str, tuple[Any, Flag]]:
    """Return the type and the flag of every option."""
    hints = get_type_hints(RunOptions, include_extras=True)
    return {name: (get_args(hint)[0], get_args(hint)[1]) for name, hint in hints.items()}
