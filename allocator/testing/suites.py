"""One test class for each member of a registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def make_suites(contract: type, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, type]:
    """Return subclasses of a contract, as a test module adds them to its globals: ``globals().update(...)``.

    Args:
        contract: The suite.
        cases: The attributes of each subclass, by what it tests.
    """
    names = {case: "Test_" + re.sub(r"\W+", "_", case) for case in cases}
    assert len({*names.values()}) == len(cases), "two cases have one name"
    return {names[case]: type(names[case], (contract,), dict(attributes)) for case, attributes in cases.items()}
