"""Sparse-IFT's four members as models to train from scratch: larger sparse layers, a dense one's multiplications."""

from __future__ import annotations

import copy
import os
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from ...sparsity import lowest_of_rows, stream_seed
from ...tuners.shared.target_checks import expert_parameters
from ..criteria.one_shot_methods import RandomPruning
from ..reading.one_shot import prunable_layers
from ..units.kept_axes import FullShape, model_class
from .iso_flop import Member, iso_flop_size

_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim")


def sparse_ift(
    config: str | os.PathLike | PreTrainedConfig,
    member: Member,
    sparsity: float,
    *,
    activation: str | None = "relu",
    target_modules: Any = "all-linear",
    exclude_modules: Any = None,
    seed: int = 0,
) -> PreTrainedModel:
    r"""A new model whose linear layers are Sparse-IFT's transformation of those of `config`'s model (Thangarasa et al.,
    2024), to be trained from scratch: nothing of a pretrained weight can be taken over.

    A dense layer of n inputs and m outputs becomes one of

    * `wide`: a weight of :math:`n / \sqrt{1-s}` inputs and :math:`m / \sqrt{1-s}` outputs, sparse. The whole model is
      wider: `hidden_size`, the feed-forward width and the number of heads, whose size stays. Embeddings, norms,
      attention scores and the output head grow too, and cost more.
    * `parallel`: :math:`\sum_j \sigma(W_j x + b_j)` of g = 1 / (1 - s), rounded, sparse weights of its own size.
    * `factorized`: :math:`V \sigma(U x) + b`, both sparse, of the inner width of `iso_flop_size`.
    * `doped`: :math:`W x + V U x + b`, W sparse, V U dense and of the rank of `iso_flop_size`. (From a pretrained
      weight that is a LoRA beside a pruned base: `doped_ranks`.)

    The sparse weights of a layer keep exactly as many entries as make, with its dense factors, the `m n`
    multiplications of the dense layer: rounding of sizes moves the sparsity by a little, and never the cost. Which
    entries is drawn from `seed`, uniformly and for each layer by itself; they are 0 in the model, which is all that is
    known of the masks. Weights are drawn as the architecture draws them. The authors' batch norms behind each branch
    have no place between a transformer's linear layers, and are left out.

    Train it under its masks with `methods.get("spdf", phase="sparse", modules_to_save=[...])`; with
    `schedule=[Regrow(space="mask", grow=Gradient())]` they move as RigL's do, the authors' best. The same arguments
    give the same model again; that of `wide` is an ordinary one of its config, which `from_pretrained` loads. Zeros
    save no time on today's engines.

    Args:
        config: of the dense model, its folder or Hub id.
        member: "wide", "parallel", "factorized" or "doped".
        sparsity: s of the sparse weights, in (0, 1); 0.5, 0.75 and 0.9 in the paper.
        activation: :math:`\sigma`, a name of transformers' activations; None: the identity, for `factorized`.
        target_modules: linear layers of the trunk, as peft names them.
        exclude_modules: those that stay dense, in `wide` at their larger size.
        seed: of masks and weights.

    Raises:
        ValueError: an argument out of range, a sparsity that gives one branch or no rank, experts in 3-D parameters, or
            a config whose width is not understood.
    """
    config = config if isinstance(config, PreTrainedConfig) else AutoConfig.from_pretrained(config)
    _check(member, sparsity, activation)
    shapes = _dense_shapes(config, target_modules, exclude_modules)
    sizes = {name: _size(member, name, *shape, sparsity) for name, shape in shapes.items()}
    config = _widened(config, sparsity) if member == "wide" else copy.deepcopy(config)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(stream_seed(seed, "sparse_ift") % 2**63)
        model = model_class(config)._from_config(config)
        for name, (rows, cols) in shapes.items():
            if member == "wide":
                _keep(_matrix(model.get_submodule(name), rows, cols), rows * cols, name, seed)
                continue
            dense = model.get_submodule(name)
            made = _Maker(model, name, seed, dense.bias is not None, activation)
            made = getattr(made, member)(rows, cols, sizes[name])
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, made.to(dense.weight.dtype).train(dense.training))
    return model


class Branches(nn.Module):
    """The sum of modules that read one input."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        """Their outputs, added in their order."""
        first, *others = self.children()
        total = first(x)
        for branch in others:
            total = total + branch(x)
        return total


class _Maker:
    """What stands in the place of one linear layer."""

    def __init__(self, model: PreTrainedModel, name: str, seed: int, bias: bool, activation: str | None) -> None:
        self.model, self.name, self.seed, self.bias, self.activation = model, name, seed, bias, activation

    def parallel(self, rows: int, cols: int, branches: int) -> nn.Module:
        """Branches that share the dense layer's entries out."""
        each, more = divmod(rows * cols, branches)
        made = {}
        for at in range(branches):
            linear = self._sparse(rows, cols, each + (at < more), f"branch_{at}", self.bias)
            made[f"branch_{at}"] = nn.Sequential(OrderedDict(linear=linear, activation=ACT2FN[self.activation]))
        return Branches(**made)

    def factorized(self, rows: int, cols: int, width: int) -> nn.Module:
        """Two sparse factors, which share the entries out by their sizes."""
        inner = round(rows * cols * cols / (rows + cols))
        chain = OrderedDict(down=self._sparse(width, cols, inner, "down", False))
        if self.activation is not None:
            chain["activation"] = ACT2FN[self.activation]
        chain["up"] = self._sparse(rows, width, rows * cols - inner, "up", self.bias)
        return nn.Sequential(chain)

    def doped(self, rows: int, cols: int, rank: int) -> nn.Module:
        """One sparse weight, and two dense factors."""
        sparse = self._sparse(rows, cols, rows * cols - rank * (rows + cols), "sparse", self.bias)
        dense = OrderedDict(down=self._linear(rank, cols, False), up=self._linear(rows, rank, False))
        return Branches(sparse=sparse, dense=nn.Sequential(dense))

    def _linear(self, rows: int, cols: int, bias: bool) -> nn.Linear:
        linear = nn.Linear(cols, rows, bias)
        self.model._init_weights(linear)
        return linear

    def _sparse(self, rows: int, cols: int, entries: int, part: str, bias: bool) -> nn.Linear:
        linear = self._linear(rows, cols, bias)
        _keep(linear.weight, entries, f"{self.name}.{part}", self.seed)
        return linear


def _keep(weight: Tensor, entries: int, name: str, seed: int) -> None:
    """Keep exactly `entries` of the entries, drawn; the others become 0, in place."""
    drawn = RandomPruning().scores(weight, None, name, seed).reshape(1, -1)
    weight.masked_fill_(lowest_of_rows(drawn, weight.numel() - entries).view(weight.shape), 0)


def _matrix(module: nn.Module, rows: int, cols: int) -> Tensor:
    """The weight of a layer of a wider model, `rows x cols` in the dense one.

    Raises:
        ValueError: it has fewer entries than the dense one.
    """
    if module.weight.numel() < rows * cols:
        raise ValueError(
            f"The wider model has a {tuple(module.weight.shape)} weight where the dense has {rows}x{cols}."
        )
    return module.weight


def _check(member: str, sparsity: float, activation: str | None) -> None:
    if member not in ("wide", "parallel", "factorized", "doped"):
        raise ValueError(f"member={member!r} is unknown; choose 'wide', 'parallel', 'factorized' or 'doped'.")
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1:
        raise ValueError(f"sparsity={sparsity!r} is no fraction in (0, 1).")
    if activation is not None and activation not in ACT2FN:
        raise ValueError(f"activation={activation!r} is unknown; choose one of {sorted(ACT2FN)}.")
    if activation is None and member == "parallel":
        raise ValueError(
            "activation=None makes one linear layer of the parallel branches. Name one, 'relu' for example."
        )


def _dense_shapes(config: PreTrainedConfig, target_modules: Any, exclude_modules: Any) -> dict[str, FullShape]:
    with torch.device("meta"):
        dense = model_class(config)._from_config(copy.deepcopy(config))
    experts = [f"{name}.{own}" for name, module in dense.named_modules() for own, _ in expert_parameters(name, module)]
    if experts:
        raise ValueError(f"Experts in 3-D parameters, such as '{experts[0]}', are not transformed here.")
    layers = prunable_layers(dense, target_modules, exclude_modules)
    return {layer.name: (layer.grid.rows, layer.grid.cols) for layer in layers}


def _size(member: Member, name: str, rows: int, cols: int, sparsity: float) -> int:
    size = iso_flop_size(member, rows, cols, sparsity)
    if size < {"parallel": 2, "doped": 1}.get(member, 0):
        what = "one branch" if member == "parallel" else "no rank"
        raise ValueError(f"sparsity={sparsity} gives '{name}' ({rows}x{cols}) {what}. Raise it, or exclude the module.")
    return size


def _widened(config: PreTrainedConfig, sparsity: float) -> PreTrainedConfig:
    """The config with :math:`1 / \\sqrt{1-s}` times the width in hidden state, feed-forward part and heads.

    Raises:
        ValueError: a part of a composite config, or one without heads.
    """
    wide = copy.deepcopy(config)
    if wide.get_text_config() is not wide or not getattr(wide, "num_attention_heads", 0):
        raise ValueError(f"member='wide' does not know how a {type(config).__name__} is widened: take another member.")
    heads, hidden = wide.num_attention_heads, wide.hidden_size
    shared = heads // (getattr(wide, "num_key_value_heads", None) or heads)
    own_size = getattr(wide, "head_dim", None)
    groups = max(round(heads // shared / (1 - sparsity) ** 0.5), heads // shared)
    wide.num_attention_heads = groups * shared
    if getattr(wide, "num_key_value_heads", None):
        wide.num_key_value_heads = groups
    size = own_size or hidden // heads
    wide.hidden_size = iso_flop_size("wide", hidden, hidden, sparsity) if own_size else wide.num_attention_heads * size
    for option in _WIDTHS:
        width = getattr(wide, option, None)
        if isinstance(width, int):
            setattr(wide, option, iso_flop_size("wide", width, width, sparsity))
    if getattr(wide, "word_embed_proj_dim", None) == hidden:
        wide.word_embed_proj_dim = wide.hidden_size
    return wide
