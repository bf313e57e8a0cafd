"""Which rows and columns of a transformer block's linear layers belong together: attention heads and FFN channels."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

HEADS, CHANNELS = "heads", "channels"
Kind = Literal["heads", "channels"]

# Names of query, key, value and output projections, beside one another; a name that comes twice holds several of them,
# one below the other in its rows.
_ATTENTION = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
    ("qkv_proj", "qkv_proj", "qkv_proj", "o_proj"),
    ("c_attn", "c_attn", "c_attn", "c_proj"),
    ("query", "key", "value", "..output.dense"),
)
# Names of gate, up and down projections; the first is None where there is no gate.
_FEED_FORWARD = (
    ("gate_proj", "up_proj", "down_proj"),
    ("gate_up_proj", "gate_up_proj", "down_proj"),
    (None, "fc1", "fc2"),
    (None, "c_fc", "c_proj"),
    (None, "lin1", "lin2"),
    (None, "intermediate.dense", "output.dense"),
)


@dataclass(frozen=True)
class Member:
    """Rows or columns of one linear weight `[out, in]` that the units of a block own: unit `u` has the `span` of them
    from `start + u * span` on."""

    role: str
    """"query", "key", "value", "output", "gate", "up" or "down"."""
    module: str
    """Full name of the linear layer."""
    axis: int
    """0: rows, with their entries of the bias; 1: columns."""
    start: int
    span: int

    def lines(self, units: Tensor) -> Tensor:
        """Rows or columns of `units` (int64 `[k]`), int64 `[k * span]`, unit by unit."""
        return (self.start + units[:, None] * self.span + torch.arange(self.span, device=units.device)).flatten()


@dataclass(frozen=True)
class BlockStructure:
    """Linear layers of one transformer block, by role.

    Names are full module names. Query, key and value bear one name where one layer holds them, its rows in this order
    (GPT-2's `c_attn`, Phi-3's `qkv_proj`); gate and up likewise (`gate_up_proj`). `gate` is "" where the block has
    none. Roles of a kind that was not asked for, or that the block lacks, are "" and their numbers 0.
    """

    name: str
    query: str = ""
    key: str = ""
    value: str = ""
    output: str = ""
    gate: str = ""
    up: str = ""
    down: str = ""
    heads: int = 0
    """Query heads."""
    kv_heads: int = 0
    """Key and value heads; query heads `g * u` to `g * u + g - 1` read head `u`, `g = heads / kv_heads`."""
    head_dim: int = 0
    width: int = 0
    """Intermediate channels of the feed-forward part."""

    def units(self, kind: Kind) -> int:
        """Units of a kind: key and value heads, each with its query heads; intermediate channels."""
        return self.kv_heads if kind == HEADS else self.width

    def members(self, kind: Kind) -> tuple[Member, ...]:
        """Where the units of a kind lie. Zeroing the rows and columns of a unit, biases of the rows included, takes it
        out of the block's output."""
        if not self.units(kind):
            return ()
        if kind == CHANNELS:
            gate = (Member("gate", self.gate, 0, 0, 1),) if self.gate else ()
            below = self.width if self.gate == self.up else 0
            return (*gate, Member("up", self.up, 0, below, 1), Member("down", self.down, 1, 0, 1))
        queries = self.heads // self.kv_heads * self.head_dim
        fused = self.query == self.key
        key_at = self.heads * self.head_dim if fused else 0
        value_at = key_at + self.kv_heads * self.head_dim if fused else 0
        return (
            Member("query", self.query, 0, 0, queries),
            Member("key", self.key, 0, key_at, self.head_dim),
            Member("value", self.value, 0, value_at, self.head_dim),
            Member("output", self.output, 1, 0, queries),
        )

    def query_heads(self, units: Tensor) -> Tensor:
        """The query heads of key and value heads `units`, int64."""
        group = self.heads // self.kv_heads
        return (units[:, None] * group + torch.arange(group, device=units.device)).flatten()


def structures_of(model: nn.Module, kinds: Iterable[Kind] = (HEADS, CHANNELS)) -> list[BlockStructure]:
    """The structure of every block, in the model's order, found by names and checked against the weights' shapes.

    Blocks are the modules of the outermost numbered lists that hold linear layers. Llama, Qwen, Mistral, Gemma, Phi-3,
    OPT, GPT-2, BERT and DistilBERT as transformers 5 names them. The model may carry adapters, whose base layers count.

    Raises:
        ValueError: nothing numbered; a block whose attention or feed-forward part, where it is asked for, is not
            understood (cross-attention, experts, other parameters per head, shapes that do not agree).
    """
    kinds, modules = set(kinds), dict(model.named_modules())
    return [_structure(model, name, modules, kinds) for name in block_names(model)]


def block_names(model: nn.Module) -> list[str]:
    """Names of a model's blocks in its order: modules of the outermost numbered lists that hold linear layers.

    Raises:
        ValueError: there are none.
    """
    found = (re.match(r"(?:.*?\.)?\d+(?=\.)", name) for name, module in model.named_modules() if _is_linear(module))
    names = list(dict.fromkeys(one.group() for one in found if one))
    if not names:
        raise ValueError(f"{type(model).__name__} has no numbered blocks with linear layers.")
    return names


def _structure(model: nn.Module, name: str, modules: dict[str, nn.Module], kinds: set[str]) -> BlockStructure:
    inside = {at: module for at, module in modules.items() if at.startswith(f"{name}.") or at == name}
    heads = _heads(model, name, inside) if HEADS in kinds else {}
    return BlockStructure(name, **heads, **(_channels(name, inside) if CHANNELS in kinds else {}))


def _heads(model: nn.Module, name: str, inside: dict[str, nn.Module]) -> dict[str, Any]:
    parent, (query, key, value, output) = _only(name, inside, _ATTENTION, "attention")
    attention = inside[parent]
    config = getattr(attention, "config", None) or model.config
    dim = getattr(attention, "head_dim", None) or getattr(attention, "attention_head_size", None)
    dim = dim or getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    wide = linear_shape(inside[output])[1]
    if query == key:
        narrow, rest = divmod(linear_shape(inside[query])[0] - wide, 2)
        agrees = not rest
    else:
        narrow = linear_shape(inside[key])[0]
        agrees = linear_shape(inside[query])[0] == wide and linear_shape(inside[value])[0] == narrow
    if not agrees or narrow <= 0 or wide % dim or narrow % dim or wide % narrow:
        raise ValueError(
            f"The projections of '{parent}' ({type(attention).__name__}) have shapes that do not make heads of {dim}: "
            "its heads are not understood here."
        )
    _refuse_others(parent, inside, {query, key, value, output}, dim, "heads")
    return {
        "query": query, "key": key, "value": value, "output": output,
        "heads": wide // dim, "kv_heads": narrow // dim, "head_dim": dim,
    }  # fmt: skip


def _channels(name: str, inside: dict[str, nn.Module]) -> dict[str, Any]:
    parent, (gate, up, down) = _only(name, inside, _FEED_FORWARD, "feed-forward part")
    width = linear_shape(inside[down])[1]
    rows = [linear_shape(inside[at])[0] for at in {gate, up} - {""}]
    if rows != [width * (2 if gate == up else 1)] * len(rows):
        raise ValueError(
            f"The projections of '{parent}' ({type(inside[parent]).__name__}) do not agree about its intermediate "
            f"channels ({rows} rows, {width} columns): they are not understood here."
        )
    if parent != name:
        _refuse_others(parent, inside, {gate, up, down}, 0, "channels")
    return {"gate": gate, "up": up, "down": down, "width": width}


def _only(name: str, inside: dict[str, nn.Module], families: tuple, what: str) -> tuple[str, tuple[str, ...]]:
    """The one module of a block that holds the layers of a family, and their names."""
    found = {}
    for parent in inside:
        for family in families:
            layers = tuple("" if one is None else _beside(parent, one) for one in family)
            if all(not one or _is_linear(inside.get(one)) for one in layers):
                found.setdefault(parent, layers)
    if len(found) != 1:
        kind = type(inside[name]).__name__
        raise ValueError(
            f"'{name}' ({kind}) has {len(found) or 'no'} {what}{'s' * (len(found) > 1)} of linear layers that this "
            f"package knows{': ' if found else ''}{', '.join(sorted(found))}. Heads and channels are understood where "
            "a block has one self-attention and one dense feed-forward part with the names of Llama, Phi-3, OPT, GPT-2 "
            "or BERT: leave out the pattern, or prune another model."
        )
    return next(iter(found.items()))


def _beside(parent: str, one: str) -> str:
    if one.startswith(".."):
        parent, one = parent.rpartition(".")[0], one[2:]
    return f"{parent}.{one}"


def _refuse_others(parent: str, inside: dict[str, nn.Module], known: set[str], dim: int, what: str) -> None:
    """Refuse parameters that might have an entry a head or channel, and would be left behind."""
    for at, module in inside.items():
        if not at.startswith(f"{parent}.") and at != parent:
            continue
        if any(at == one or at.startswith(f"{one}.") for one in known if one):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if tuple(parameter.shape) != (dim,):  # norms of a head's queries and keys are the same for all heads
                raise ValueError(
                    f"'{at}.{own}' {tuple(parameter.shape)} stands beside the projections of '{parent}', and what it "
                    f"has to do with the {what} is not understood here."
                )


def _base(module: nn.Module | None) -> nn.Module | None:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(_base(module), (nn.Linear, Conv1D))


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """`(out, in)` of a linear layer's weight, a packed one's and an adapted one's too."""
    cols, rows = _get_in_out_features(_base(module))
    return rows, cols
