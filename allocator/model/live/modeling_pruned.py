"""Modelling code of a structurally pruned checkpoint: the stock architecture with smaller layers.

This file is stored with the weights and needs only torch and transformers. The key `pruned` of `config.json` holds:

- `shapes`: smaller matrices, as module name to [rows, columns]
- `biases`: names of the matrices that gained a bias
- `removed`: removed modules, as module name to what takes its place (see `remove`)
- `counts`: attributes that count heads, as module name to attribute names and the share [kept, total]
- `experts`: kept experts, as module name to the name of the router and the numbers of the experts
- `renamed`: parts of tensor names in the files, and their names in the model
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
    """Attention that adds nothing. It fills the cache with placeholders: other layers read its length."""

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
    """An output projection that returns zeros."""

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
    """One module for each kept expert, named by its number, in place of stacked matrices."""

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
        return hidden_states * 0  # a product, so that it has a gradient


class RemovedRouter(nn.Module):
    """A router without experts."""

    def forward(self, hidden_states):
        return None, None, None


def stacked(module):
    """Return whether a module holds gated experts as stacked matrices, outputs first, without biases."""
    shapes = [tuple(parameter.shape) for parameter in module.parameters(recurse=False)]
    if len(shapes) != 2 or not hasattr(module, "gate_up_proj") or not hasattr(module, "act_fn"):
        return False
    (count, rows, hidden), down = module.gate_up_proj.shape, module.down_proj.shape
    return tuple(down) == (count, hidden, rows // 2)


def split(module):
    """Return stacked experts as one module for each. Their matrices are views."""

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
    """Keep the experts of a mixture whose numbers are in `kept`. `gate` is the router with their rows alone."""
    if kept:
        model.set_submodule(name, Experts({str(number): experts.get_submodule(str(number)) for number in kept}))
        model.set_submodule(router, gate)
        gate.num_experts = len(kept)
    else:
        model.set_submodule(name, RemovedExperts())
        model.set_submodule(router, RemovedRouter())


def cut(router, kept):
    """Shrink a router to the shapes of a router of `kept` experts."""
    for name, parameter in router.named_parameters():
        setattr(router, name, nn.Parameter(parameter.detach()[:kept].clone(), requires_grad=False))
    for name, buffer in router.named_buffers():
        setattr(router, name, buffer[:kept].clone())


def remove(model, name, part):
    """Replace a module by one without parameters.

    `part` says what the module is. A whole sub-block (`attention` or `mlp`) then adds nothing. A sub-block without a
    module of its own is replaced in pieces: its attention or its `input` matrices, and its `output` projection.
    """
    old = model.get_submodule(name)
    if part == "attention":
        new = RemovedAttention(getattr(old, "layer_idx", None))  # layers of encoders have no index and no cache
    elif part == "output":
        new = RemovedOutput(old.nf if isinstance(old, Conv1D) else old.out_features)
    else:
        new = nn.Identity() if part == "input" else RemovedMLP()
    model.set_submodule(name, new)


def regroup(attention):
    """Update the number of query heads per key/value head, if the family keeps it in an attribute."""
    if hasattr(attention, "num_key_value_groups") and hasattr(attention, "k_proj"):
        attention.num_key_value_groups = len(attention.q_proj.weight) // len(attention.k_proj.weight)


def owner(module, name):
    """Return the object that has an attribute: the module, a module inside it (`self.x`), or a configuration."""
    for part in name.split(".")[:-1]:
        module = getattr(module, part)
    return module


def counted(module, names):
    """Return attributes of a module by name. A configuration that holds one (`config.x`) is copied first."""
    for path in {name.rpartition(".")[0] for name in names}:
        if path.rpartition(".")[2] == "config":
            holder = owner(module, path)
            holder.config = copy.copy(holder.config)
    return {name: getattr(owner(module, name), name.rpartition(".")[2]) for name in names}


def recount(module, dense, kept, total):
    """Scale the attributes of a module to its kept share. `dense` holds their values in the dense model."""
    for name, value in dense.items():
        setattr(owner(module, name), name.rpartition(".")[2], value * kept // total)


def linear_like(old, rows, columns, bias):
    """Return a layer of the same kind in another shape."""
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
    """Hide `per_layer_config` from stock classes, which refuse or misread it."""
    layers = config.to_dict().get("per_layer_config")
    if layers:
        config.per_layer_config = None
    yield
    if layers:
        config.per_layer_config = layers


def rename(model, dense, renamed):
    """Register the tensor-name conversions of the dense model for the pruned class, without those that stack experts.

    transformers looks up conversions by the name of the class first, and then by the type of the model.
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
