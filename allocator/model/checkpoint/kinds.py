"""Kinds of models: their input, their output, and the transformers auto class that loads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

Reads = Literal["text", "images", "pairs"]
"""The input of a model: token ids, pixels, or both (an image and its caption)."""

Answers = Literal["next", "tokens", "classes", "states"]
"""The output of a model: logits of each next token, of each token itself or of classes; or hidden states alone."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What kind of model an architecture is.

    Attributes:
        auto: Name of the auto class that loads it.
        answers: Its output.
        reads: Its input.
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
        """Whether it returns logits."""
        return self.answers != "states"

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses that can measure it. The first is the default."""
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
        """Its input, in words."""
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
"""Endings of the architecture names that can be pruned."""


def find_kind(config: Mapping[str, Any]) -> Kind | None:
    """Return the kind of a configuration's model, dense or pruned. None if it cannot be pruned."""
    pruned = config.get("pruned") or {}
    name = str(pruned.get("architecture") or (config.get("architectures") or [""])[0])
    found = next((kind for ending, kind in _ENDINGS.items() if name.endswith(ending)), None)
    if found is None or found.generates:
        return found
    if "vision_config" in config:
        return replace(found, reads="pairs") if "text_config" in config else None
    return replace(found, reads="images" if "image_size" in config or "patch_size" in config else "text")
