"""The verb evaluate: measure a checkpoint on the test split, and compare it with the dense model."""

from __future__ import annotations

from pathlib import Path

from allocator.commands.dense_model import choose_model, open_dense
from allocator.core.errors import UserError
from allocator.core.results import Figures
from allocator.evaluation.engine import Engine
from allocator.evaluation.spec import EngineSpec
from allocator.model.checkpoint.headers import Checkpoint, locate, read_checkpoint
from allocator.model.data.read import read_examples
from allocator.model.family.layout import resolve_layout
from allocator.model.family.space import build_space
from allocator.model.live.write import count_params
from allocator.run.config.load import build_config
from allocator.run.config.run import RunConfig
from allocator.run.model import check_length


def evaluate(
    checkpoint: Path | str,
    *,
    model: str | Path | None = None,
    text: Path | str | None = None,
    family: Path | str | None = None,
    config: RunConfig | Path | str | None = None,
    tokens: int = 16384,
    length: int = 512,
) -> Figures:
    """Measure a checkpoint on the test split: its parameters, its loss, and its distance from the dense model.

    Args:
        checkpoint: A pruned or dense folder with the dense model's blocks.
        model: The dense model. If None, the model of ``config``, else the packaged model.
        text: Text or other examples. If None, the text of ``config``. ``python`` for the Python standard library.
        family: A family file. If None, the file of ``config``, else the files of the package.
        config: A configuration or a run file that names model, text and family.
        tokens: Number of tokens of the test split to measure on, a multiple of ``length``.
        length: Tokens per sequence. An example that is not plain text counts as this many tokens.

    Returns:
        ``params`` (zeros in prunable matrices are not counted), ``kl`` and ``nll`` (nats per token), ``perplexity``.
        Models without logits have ``hidden`` in place of the last three. Models that classify have ``accuracy``.

    Raises:
        UserError: A folder cannot be read, or the text is too short.
    """
    if tokens % length:
        raise UserError(f"tokens: {tokens} is not a multiple of the sequence length {length}")
    settings = build_config(model, config, {"text": text, "family": family})
    dense, named = open_dense(*choose_model(model, family, config))
    pruned = read_checkpoint(locate(checkpoint))
    check_length(dense, length, "length")
    if (shape := _describe_shape(pruned)) != (expected := _describe_shape(dense)):
        raise UserError(
            f"{pruned.folder}: it was pruned from {shape}, but {dense.folder} is {expected}. "
            "Name the dense model that it was made from with --model"
        )
    pattern = "structured" if "pruned" in pruned.config else "unstructured"
    layout = resolve_layout(named, dense, experts="whole" if pattern == "structured" else "inside")
    examples = read_examples(settings.text, dense, {"test": tokens}, length)
    space = build_space(layout, dense, pattern, target=0.5)
    engine = Engine(EngineSpec(checkpoint=dense, layout=layout, space=space), examples)
    return {
        "params": count_params(pruned.folder, space, dense),
        **engine.measure_checkpoint(pruned.folder, "test", tokens),
    }


def _describe_shape(checkpoint: Checkpoint) -> str:
    """Describe the architecture and the sizes that pruning does not change."""
    architecture = checkpoint.config.get("pruned", {}).get("architecture", checkpoint.architecture)
    sizes = (f"{key} {checkpoint.config.get(key)}" for key in ("num_hidden_layers", "hidden_size", "vocab_size"))
    return f"{architecture} with {', '.join(sizes)}"
