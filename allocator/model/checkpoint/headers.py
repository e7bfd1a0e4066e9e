"""A model folder on disk: its configuration and the headers of its safetensors files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from allocator.core.errors import UserError
from allocator.core.files import check_name, fingerprint, read_json
from allocator.model.checkpoint.foreign import check_folder, check_tensors
from allocator.model.checkpoint.hashing import fingerprint_weights, same_values
from allocator.model.checkpoint.kinds import ENDINGS, Kind, find_kind

PACKAGED = "tiny-python-llama"
"""Name of the model inside the package. Every command uses it by default."""

INDEX = "model.safetensors.index.json"
_CONV1D = ("gpt2", "openai-gpt")
"""Model types whose blocks hold transformers' ``Conv1D`` in place of linear layers."""

_WANTED = ("*.json", "*.safetensors", "tokenizer*", "*.txt", "*.jinja", "*.model")
_REMEDY = "Give a local Hugging Face folder with config.json and *.safetensors"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint in the Hugging Face format. No weight is loaded.

    Attributes:
        folder: The model's folder.
        config: The content of ``config.json``.
        shapes: Shape of every tensor by name. Tied tensors appear once.
        shards: The file, inside ``folder``, of every tensor.
        dtypes: Safetensors data type (``BF16``, ``F32``, ...) of every tensor.
        transposed: Matrices that the files store as [inputs, outputs]. ``shapes`` has them as [outputs, inputs].
        stored: Names of tensors in the files, by their names in the model. It has only those that differ.
        renames: Parts of tensor names in the files, and what replaces them in the model.
        settings: The configuration with every default. It is empty for causal language models.
    """

    folder: Path
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]
    shards: Mapping[str, str]
    dtypes: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    stored: Mapping[str, str] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Kind:
        """The kind of the model."""
        kind = find_kind(self.config)
        assert kind is not None, "checked when the headers were read"
        return kind

    def with_names(self, names: Mapping[str, str]) -> Checkpoint:
        """Return a copy with other names for some tensors. ``stored`` keeps their names in the files."""
        every = {name: names.get(name, name) for name in self.shapes}
        return replace(
            self,
            shapes={every[name]: shape for name, shape in self.shapes.items()},
            shards={every[name]: shard for name, shard in self.shards.items()},
            dtypes={every[name]: dtype for name, dtype in self.dtypes.items()},
            transposed=frozenset(every[name] for name in self.transposed),
            stored={new: old for name, new in every.items() if new != (old := self.stored.get(name, name))},
        )

    def with_names_of(self, dense: Checkpoint) -> Checkpoint:
        """Return a copy with the tensor names of the dense model that it was made from."""
        return self.with_names({old: new for new, old in dense.stored.items()})

    def with_renamed_parts(self, table: Mapping[str, str]) -> Checkpoint:
        """Return a copy with parts of tensor names replaced, such as ``{"block_sparse_moe": "mlp"}``.

        Raises:
            UserError: Two tensors would get the same name.
        """
        names = {name: _replace_parts(name, table) for name in self.shapes}
        if len({*names.values()}) < len(names):
            raise UserError(f"family: renamed {dict(table)} gives two tensors of {self.folder} one name")
        return replace(self.with_names(names), renames=dict(table)) if table else self

    @property
    def architecture(self) -> str:
        """Class name of the model, such as ``LlamaForCausalLM``."""
        return str(self.config["architectures"][0])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the configuration and of every weight file. Reads all of them.

        Raises:
            UserError: A tensor holds NaN or infinity.
        """
        names = sorted(set(self.shards.values()))
        return fingerprint({"config": self.config, "files": {n: fingerprint_weights(self.folder / n) for n in names}})


def list_model_files(folder: Path) -> list[Path]:
    """Return the files of a model folder that a search reads."""
    return sorted({path for pattern in _WANTED for path in folder.glob(pattern) if path.is_file()})


def locate(model: str | Path) -> Path:
    """Return the folder of a model: the packaged one by name, a local folder, or a hub id in the local cache.

    Raises:
        UserError: There is no such folder, and the hub has no such model or cannot be reached.
    """
    if str(model) == PACKAGED:
        return Path(str(resources.files("allocator") / "packaged" / PACKAGED))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or str(model).startswith((".", "/", "~")) or str(model).count("/") != 1:
        raise UserError(f"model: {model}: no such folder. {_REMEDY}, or the name {PACKAGED!r}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), allow_patterns=list(_WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"model: {model}: no such folder, and the hub did not give a model of that name ({reason}). {_REMEDY}"
        ) from None


def _replace_parts(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        name = f".{name}.".replace(f".{old}.", f".{new}.")[1:-1]
    return name


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the configuration and the tensor headers of a model.

    Raises:
        UserError: The folder has no safetensors model of a supported kind, or a file is damaged.
    """
    if not folder.is_dir():
        raise UserError(f"model: {folder}: no such folder. {_REMEDY}")
    check_folder(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"model: {folder / 'config.json'}: no such file. {_REMEDY}")
    config = read_json(folder / "config.json", "model configuration")
    architectures = _read_architectures(folder, config)
    kind = find_kind(config)
    if kind is None:
        raise UserError(
            f"model: {folder}/config.json names the architecture {architectures[0]!r}, which "
            f"cannot be pruned. Give a model whose architecture ends in one of {ENDINGS}"
        )
    if (folder / INDEX).exists():
        index = read_json(folder / INDEX, "safetensors index")
        names = sorted(set(index.get("weight_map", {}).values()))
    else:
        names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise UserError(f"model: {folder}: no *.safetensors file. Save the model with save_pretrained")
    shapes: dict[str, tuple[int, ...]] = {}
    shards: dict[str, str] = {}
    dtypes: dict[str, str] = {}
    for name in names:
        check_name(name, folder / INDEX)
        try:
            with safe_open(folder / name, framework="numpy") as file:
                for key in file.keys():
                    view = file.get_slice(key)
                    if not _is_computed(key, view.get_shape()):
                        shapes[key], shards[key], dtypes[key] = tuple(view.get_shape()), name, view.get_dtype()
        except (SafetensorError, OSError, json.JSONDecodeError) as error:
            raise UserError(
                f"model: {folder / name}: not a readable safetensors file: {error}. Copy it again"
            ) from None
    check_tensors(folder, config, dtypes)
    if config.get("tie_word_embeddings") and "lm_head.weight" in shapes:
        _check_tied(folder, shards)
        for table in (shapes, shards, dtypes):
            del table["lm_head.weight"]
    transposed = frozenset(
        name
        for name, shape in shapes.items()
        if config.get("model_type") in _CONV1D and len(shape) == 2 and re.search(r"\.\d+\.", name)
    )
    shapes |= {name: shapes[name][::-1] for name in transposed}
    checkpoint = Checkpoint(
        folder=folder, config=config, shapes=shapes, shards=shards, dtypes=dtypes, transposed=transposed
    )
    return checkpoint if kind.generates else _use_model_names(checkpoint)


def _is_computed(name: str, shape: Sequence[int]) -> bool:
    """Whether transformers ignores a tensor of old checkpoints: rotary frequencies, attention masks."""
    return name.endswith(("rotary_emb.inv_freq", ".masked_bias")) or (name.endswith(".bias") and len(shape) == 4)


def _use_model_names(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose tensors have the names of the model."""
    from allocator.model.checkpoint.names import map_names

    dense = checkpoint.config.get("pruned", {}).get("architecture", checkpoint.architecture)
    names, settings = map_names(checkpoint.folder, checkpoint.config, dense, checkpoint.shapes)
    shapes = {new: checkpoint.shapes[old] for old, new in names.items()}
    shards, dtypes = (
        {new: table[old] for old, new in names.items()} for table in (checkpoint.shards, checkpoint.dtypes)
    )
    stored = {new: old for old, new in names.items() if new != old}
    return replace(checkpoint, shapes=shapes, shards=shards, dtypes=dtypes, stored=stored, settings=settings)


def _check_tied(folder: Path, shards: Mapping[str, str]) -> None:
    """Raise if a head differs from the embedding that it should be tied to. Transformers would keep both."""
    heads = [
        (folder / shards[name], name) for name in ("model.embed_tokens.weight", "lm_head.weight") if name in shards
    ]
    if len(heads) == 2 and not same_values(*heads):
        raise UserError(
            f"model: {folder}: lm_head.weight and model.embed_tokens.weight are one matrix by config.json "
            "(tie_word_embeddings), and differ. Set that to false, or leave lm_head.weight out of the files"
        )


def _read_architectures(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return the classes that a configuration names.

    Raises:
        UserError: It names no class, or no model type.
    """
    where, kind, named = folder / "config.json", config.get("model_type"), config.get("architectures")
    if not isinstance(named, list) or not named:
        raise UserError(
            f"model: {where} names no class (architectures: {json.dumps(named)}), so the kind of model is unknown. "
            'Write the class there, such as "architectures": ["LlamaForCausalLM"], or save the model again '
            "with save_pretrained"
        )
    if not isinstance(kind, str) or not kind:
        raise UserError(
            f"model: {where} names no type of model (model_type: {json.dumps(kind)}). Write that of {named[0]} there, "
            "or save the model again with save_pretrained"
        )
    return [str(name) for name in named]
