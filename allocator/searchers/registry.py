"""The search methods by name. A new method is a file with its settings and its searcher, and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_type_hints

from allocator.searchers.methods.auto import AutoMethod, GuidedMethod, TrustRegionMethod
from allocator.searchers.methods.bayesian import GpSettings, TpeSettings
from allocator.searchers.methods.emo_pms import EmoPmsSettings
from allocator.searchers.methods.evolution import EvolutionMethod
from allocator.searchers.methods.nsga import Nsga2Method, Nsga3Method
from allocator.searchers.methods.presets import PRESETS
from allocator.searchers.methods.steady import SteadySettings
from allocator.searchers.methods.sweep import SweepMethod
from allocator.searchers.methods.thompson import ThompsonSettings
from allocator.searchers.problem import MethodSettings

SHARED = ("tokens",)
"""Keys under ``search`` that methods read and that are no sections of settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A search method, as runs name it.

    Attributes:
        settings: The class of its settings, all of which have defaults.
        section: The key under ``search`` that holds them. Without one, the fields of ``settings`` are themselves keys
            under ``search``, and other methods may have the same.
        one_budget: Whether it minimises the loss alone, within a budget.
        front: Which fronts it finds: none, those of the loss and costs, or those of any measurements and costs.
        presets: Published values of ``search.evolution`` by pattern, for a method that is a preset of evolution.
    """

    settings: type[MethodSettings]
    section: str = ""
    one_budget: bool = True
    front: Literal["none", "costs", "any"] = "none"
    presets: Mapping[str, Mapping[str, Any]] | None = None


METHODS: Mapping[str, Method] = {
    "auto": Method(settings=AutoMethod),
    "trust_region": Method(settings=TrustRegionMethod),
    "guided": Method(settings=GuidedMethod),
    "evolution": Method(settings=EvolutionMethod),
    "evopress": Method(settings=EvolutionMethod, presets=PRESETS["evopress"]),
    "darwinlm": Method(settings=EvolutionMethod, presets=PRESETS["darwinlm"]),
    "tyr": Method(settings=EvolutionMethod, presets=PRESETS["tyr"]),
    "steady": Method(settings=SteadySettings, section="steady"),
    "sweep": Method(settings=SweepMethod, one_budget=False, front="costs"),
    "nsga2": Method(settings=Nsga2Method, one_budget=False, front="any"),
    "nsga3": Method(settings=Nsga3Method, one_budget=False, front="any"),
    "emo_pms": Method(settings=EmoPmsSettings, section="emo_pms", one_budget=False, front="costs"),
    "tpe": Method(settings=TpeSettings, section="tpe", front="any"),
    "gp": Method(settings=GpSettings, section="gp", front="any"),
    "thompson": Method(settings=ThompsonSettings, section="thompson"),
}
"""By the name that ``search.method`` gives."""


def find_sections() -> dict[str, type]:
    """Return the sections of settings under ``search``, with their classes, in the order of the methods."""
    sections: dict[str, type] = {}
    for method in METHODS.values():
        if method.section:
            sections[method.section] = method.settings
            continue
        hints = get_type_hints(method.settings)
        sections.update((name, hints[name]) for name in _fields(method) if name not in SHARED)
    return sections


def find_keys(name: str) -> list[str]:
    """Return the keys under ``search`` that a method reads; none for a method that is not registered."""
    if name not in METHODS:
        return []
    return [METHODS[name].section] if METHODS[name].section else _fields(METHODS[name])


def configure(name: str, search: object) -> MethodSettings:
    """Return the settings of a method.

    Args:
        name: Of the method.
        search: Holds the sections and the shared keys as attributes.
    """
    method = METHODS[name]
    if method.section:
        settings: MethodSettings = getattr(search, method.section)
        return settings
    return method.settings(**{field: getattr(search, field) for field in _fields(method)})


def _fields(method: Method) -> list[str]:
    return [field.name for field in fields(method.settings)]  # type: ignore[arg-type]
