"""Kinds of models: what they read, what they answer, and which auto class of transformers loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Reads = Literal["text", "images", "pairs"]
"""What a model is given: token ids, pixels, or both, of an image and of what is said of it."""

Answers = Literal["next", "tokens", "classes", "states"]
"""What a model says: logits of the token that follows each, of each token itself, or of classes; or states alone."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What kind of model an architecture is.

    Attributes:
        auto: Name of the auto class that loads it.
        answers: What it says.
        reads: What it is given.
    """

    auto: str
    answers: Answers
    reads: Reads = "text"

    @property
    def generates(self) -> bool:
        """Whether it is a causal language model."""
        return self.answers == "next"

    @property
    def logits(self) -> bool:
        """Whether it says more than states."""
        return self.answers != "states"

    @property
    def losses(self) -> tuple[str, ...]:
        """What it can be measured by; the first is what serves best."""
        return {
            "next": ("kl", "topk_kl", "nll", "hidden"),
            "tokens": ("kl", "topk_kl", "hidden"),
            "classes": ("kl", "nll", "hidden"),
            "states": ("hidden",),
        }[self.answers]

    @property
    def pruned(self) -> str:
        """Name of the class of a compact checkpoint."""
        return f"Pruned{self.auto.removeprefix('Auto').removeprefix('Model') or 'Model'}"

    @property
    def words(self) -> str:
        """What it is given, in words."""
        return {"text": "text", "images": "images", "pairs": "images with text"}[self.reads]


CAUSAL = Kind("AutoModelForCausalLM", "next")

_ENDINGS = {
    "ForCausalLM": CAUSAL,
    "LMHeadModel": CAUSAL,
    "ForMaskedLM": Kind("AutoModelForMaskedLM", "tokens"),
    "ForSequenceClassification": Kind("AutoModelForSequenceClassification", "classes"),
    "ForImageClassification": Kind("AutoModelForImageClassification", "classes"),
    "Model": Kind("AutoModel", "states"),
}

ENDINGS = ", ".join(_ENDINGS)
"""How names of architectures end that can be served."""


def find_kind(config: Mapping[str, Any]) -> Kind | None:
    """Return the kind of model that a configuration is of, a pruned one too; None for one that is not served."""
    pruned = config.get("pruned") or {}
    name = str(pruned.get("architecture") or (config.get("architectures") or [""])[0])
    found = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
    if found is None or found.generates:
        return found
    if "vision_config" in config:
        return replace(found, reads="pairs") if "text_config" in config else None
    return replace(found, reads="images" if "image_size" in config or "patch_size" in config else "text")
