"""Modelling code of a structurally pruned checkpoint: the stock architecture with smaller layers.

This file lies beside the weights and needs nothing but torch and transformers. `config.json` says under
`pruned` which matrices are smaller (`shapes`: module name to [rows, columns]), which of them gained a bias
(`biases`: module names), which modules are gone (`removed`: module name to what takes its place, see `remove`), and
which of their attributes count what is left (`counts`: module name to attribute names, and the share [kept, total]).
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import LlamaForCausalLM as Dense
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D


class RemovedAttention(nn.Module):
    """Attention that adds nothing. It keeps its place in the cache, whose length other layers rely on."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, *args, past_key_values=None, layer_past=None, **kwargs):
        cache = layer_past if past_key_values is None else past_key_values
        if cache is not None:
            batch, length, _ = hidden_states.shape
            placeholder = hidden_states.new_zeros(batch, 1, length, 1)
            cache.update(placeholder, placeholder, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class RemovedMLP(nn.Module):
    """A feed-forward network that adds nothing."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


class RemovedOutput(nn.Module):
    """An output projection that gives nothing."""

    def __init__(self, out_features):
        super().__init__()
        self.out_features = out_features

    def forward(self, hidden_states):
        return hidden_states.new_zeros(*hidden_states.shape[:-1], self.out_features)


def remove(model, name, part):
    """Put a module without parameters in the place of another.

    A sub-block, which is `attention` or `mlp`, then adds nothing. One that is no module of its own goes in pieces: its
    attention proper, or what is `input` to its output projection, and that `output`.
    """
    old = model.get_submodule(name)
    if part == "attention":
        new = RemovedAttention(getattr(old, "layer_idx", None))  # encoders number no layers, and have no cache
    elif part == "output":
        new = RemovedOutput(old.nf if isinstance(old, Conv1D) else old.out_features)
    else:
        new = nn.Identity() if part == "input" else RemovedMLP()
    model.set_submodule(name, new)


def regroup(attention):
    """Say how many query heads share a key/value head, where a family keeps that in an attribute."""
    if hasattr(attention, "num_key_value_groups") and hasattr(attention, "k_proj"):
        attention.num_key_value_groups = len(attention.q_proj.weight) // len(attention.k_proj.weight)


def owner(module, name):
    """Return what has the attribute `name` of a module: itself, what is inside it (`self.x`), or a configuration."""
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
    return module


def counted(module, names):
    """Return attributes of a module by name; a configuration of which one is (`config.x`) is then the module's own."""
    for path in {name.rpartition(".")[0] for name in names}:
        if path.rpartition(".")[2] == "config":
            holder = owner(module, path)
            holder.config = copy.copy(holder.config)
    return {name: getattr(owner(module, name), name.rpartition(".")[2]) for name in names}


def recount(module, dense, kept, total):
    """Set attributes that are proportional to what a module keeps, given those of the dense one by `counted`."""
    for name, value in dense.items():
        setattr(owner(module, name), name.rpartition(".")[2], value * kept // total)


def linear_like(old, rows, columns, bias):
    """Return a layer of the kind of another, in another shape."""
    like = {"device": old.weight.device, "dtype": old.weight.dtype}
    return Conv1D(rows, columns).to(**like) if isinstance(old, Conv1D) else nn.Linear(columns, rows, bias=bias, **like)


def resize(model, pruned):
    """Give a freshly built dense model the shapes of the checkpoint."""
    for name, part in pruned["removed"].items():
        remove(model, name, part)
    for name, (rows, columns) in pruned["shapes"].items():
        old = model.get_submodule(name)
        bias = old.bias is not None or name in pruned.get("biases", ())
        model.set_submodule(name, linear_like(old, rows, columns, bias))
        regroup(model.get_submodule(name.rpartition(".")[0]))
    for name, (names, (kept, total)) in pruned.get("counts", {}).items():
        module = model.get_submodule(name)
        recount(module, counted(module, names), kept, total)


@contextmanager
def uniform(config):
    """Hide `per_layer_config`, which says the same for other readers: stock classes refuse or misread it."""
    layers = config.to_dict().get("per_layer_config")
    if layers:
        config.per_layer_config = None
    yield
    if layers:
        config.per_layer_config = layers


def pruned_class(dense):
    """Return the pruned counterpart of a stock class."""

    class PrunedForCausalLM(dense):
        def __init__(self, config):
            with uniform(config):
                super().__init__(config)
            resize(self, config.pruned)
            # names that transformers converts as it loads; it looks for them by the class, and this is none of its own
            conversions = get_checkpoint_conversion_mapping(dense.__name__)
            conversions = conversions or get_checkpoint_conversion_mapping(config.model_type) or []
            register_checkpoint_conversion_mapping(type(self).__name__, conversions, overwrite=True)

    return PrunedForCausalLM


PrunedForCausalLM = pruned_class(Dense)
