"""Modelling code of a structurally pruned checkpoint: the stock architecture with smaller layers.

This file lies beside the weights and needs nothing but torch and transformers. `config.json` says under
`pruned` which matrices are smaller (`shapes`: module name to [rows, columns]) and which sub-blocks are gone
(`removed`: module name to its part of the block).
"""

import torch
from torch import nn
from transformers import LlamaForCausalLM as Dense


class RemovedAttention(nn.Module):
    """Attention that adds nothing. It keeps its place in the cache, whose length other layers rely on."""

    def __init__(self, layer_idx):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states, past_key_values=None, **kwargs):
        if past_key_values is not None:
            batch, length, _ = hidden_states.shape
            placeholder = hidden_states.new_zeros(batch, 1, length, 1)
            past_key_values.update(placeholder, placeholder, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class RemovedMLP(nn.Module):
    """A feed-forward network that adds nothing."""

    def forward(self, hidden_states):
        return torch.zeros_like(hidden_states)


def remove(model, name, part):
    """Put a module that adds nothing in the place of the sub-block `name`."""
    old = model.get_submodule(name)
    model.set_submodule(name, RemovedAttention(old.layer_idx) if part == "attention" else RemovedMLP())


def resize(model, pruned):
    """Give a freshly built dense model the shapes of the checkpoint."""
    for name, part in pruned["removed"].items():
        remove(model, name, part)
    for name, (rows, columns) in pruned["shapes"].items():
        old = model.get_submodule(name)
        like = {"device": old.weight.device, "dtype": old.weight.dtype}
        model.set_submodule(name, nn.Linear(columns, rows, bias=old.bias is not None, **like))


def pruned_class(dense):
    """Return the pruned counterpart of a stock causal language model class."""

    class PrunedForCausalLM(dense):
        def __init__(self, config):
            super().__init__(config)
            resize(self, config.pruned)

    return PrunedForCausalLM


PrunedForCausalLM = pruned_class(Dense)
