"""Modelling code of a structurally pruned checkpoint: the stock architecture with smaller layers.

This file lies beside the weights and needs nothing but torch and transformers. `config.json` says under
`pruned` which matrices are smaller (`shapes`: module name to [rows, columns]), which of them gained a bias
(`biases`: module names), which modules are gone (`removed`: module name to what takes its place, see `remove`), which
of their attributes count what is left (`counts`: module name to attribute names, and the share [kept, total]), which
experts stay (`experts`: module name to that of their router, and their numbers), and which parts of names the files
call otherwise than the model does (`renamed`).
"""

import copy
from contextlib import contextmanager

import torch
from torch import nn
from transformers import LlamaForCausalLM as Dense
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
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


class Expert(nn.Module):
    """One expert of a mixture."""

    def __init__(self, gate_proj, up_proj, down_proj, act_fn):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, hidden_states):
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class Experts(nn.Module):
    """A module for each expert, under its number, in place of stacked matrices. A router counts those that are here."""

    def __init__(self, experts):
        super().__init__()
        for number, expert in experts.items():
            self.add_module(number, expert)

    def forward(self, hidden_states, top_k_index, top_k_weights):
        total = torch.zeros_like(hidden_states)
        for place, expert in enumerate(self.children()):
            token, choice = torch.where(top_k_index == place)
            if len(token):
                weighted = expert(hidden_states[token]) * top_k_weights[token, choice, None]
                total.index_add_(0, token, weighted.to(total.dtype))
        return total


class RemovedExperts(nn.Module):
    """Experts that add nothing."""

    def forward(self, hidden_states, *routing):
        return hidden_states * 0  # by a product, so that gradients in it can be asked for


class RemovedRouter(nn.Module):
    """A router that has nothing to choose from."""

    def forward(self, hidden_states):
        return None, None, None


def stacked(module):
    """Say whether a module holds the gated experts of a mixture as stacked matrices, outputs first, without biases."""
    shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
    if len(shapes) != 2 or not hasattr(module, "gate_up_proj") or not hasattr(module, "act_fn"):
        return False
    (count, rows, hidden), down = module.gate_up_proj.shape, module.down_proj.shape
    return tuple(down) == (count, hidden, rows // 2)


def split(module):
    """Return stacked experts one by one; their matrices are views."""

    def linear(weight):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return layer

    def expert(gate_up, down):
        gate, up = gate_up.chunk(2)
        return Expert(linear(gate), linear(up), linear(down), module.act_fn)

    pairs = zip(module.gate_up_proj.detach(), module.down_proj.detach(), strict=True)
    return Experts({str(number): expert(*pair) for number, pair in enumerate(pairs)})


def choose(model, name, router, kept, experts, gate):
    """Put some of a mixture's experts, by number, in its place, and say so to their router; its rows are as given."""
    if kept:
        model.set_submodule(name, Experts({str(number): experts.get_submodule(str(number)) for number in kept}))
        model.set_submodule(router, gate)
        gate.num_experts = len(kept)
    else:
        model.set_submodule(name, RemovedExperts())
        model.set_submodule(router, RemovedRouter())


def cut(router, kept):
    """Give a router the shapes of one of so many experts."""
    for name, parameter in router.named_parameters():
        setattr(router, name, nn.Parameter(parameter.detach()[:kept].clone(), requires_grad=False))
    for name, buffer in router.named_buffers():
        setattr(router, name, buffer[:kept].clone())


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
    for name, (router, kept) in pruned.get("experts", {}).items():
        gate = model.get_submodule(router)
        cut(gate, len(kept))
        choose(model, name, router, kept, split(model.get_submodule(name)), gate)
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


def rename(model, dense, renamed):
    """Have names of tensors converted as for the dense model, while nothing is stacked.

    transformers looks for conversions by the name of a class, or else by the type of a model; that of the class counts.
    """
    own = [WeightRenaming(rf"\.{old}\.", f".{new}.") for old, new in renamed.items()]
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        found = get_checkpoint_conversion_mapping((dense if module is model else type(module)).__name__)
        if found is None:
            found = get_checkpoint_conversion_mapping(module.config.model_type) or []
        kept = [conversion for conversion in found if isinstance(conversion, WeightRenaming)]
        if module is model:
            register_checkpoint_conversion_mapping(type(module).__name__, kept + own, overwrite=True)
        elif len(kept) < len(found):
            module.__class__ = type(f"Pruned{type(module).__name__}", (type(module),), {})
            register_checkpoint_conversion_mapping(type(module).__name__, [], overwrite=True)


def pruned_class(dense):
    """Return the pruned counterpart of a stock class."""

    class PrunedForCausalLM(dense):
        def __init__(self, config):
            with uniform(config):
                super().__init__(config)
            # transformers keeps this class for later dense checkpoints of the same configuration class
            if hasattr(config, "pruned"):
                resize(self, config.pruned)
                rename(self, dense, config.pruned.get("renamed", {}))

    return PrunedForCausalLM


PrunedForCausalLM = pruned_class(Dense)
