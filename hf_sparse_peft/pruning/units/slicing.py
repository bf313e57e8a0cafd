"""`slice_model`: heads and feed-forward channels cut out of a model, which is smaller afterwards."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ...tuners.shared.rollback import unchanged_on_error
from .kept_axes import KeptAxes, axes_of, cut_structures, kept_of
from .kept_units import KeptUnits
from .structure import CHANNELS, HEADS, BlockStructure
from .unit_masks import UnitMasks, unit_masks_of, unmask_units

_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_QUERY_ROWS = ("embed_dim", "split_size", "all_head_size", "dim")
_KEY_HEADS = ("num_key_value_heads",)
_WIDTHS = ("intermediate_size", "ffn_dim", "n_inner", "hidden_dim")


@torch.no_grad()
def slice_model(model: nn.Module, kept: KeptUnits | None = None) -> nn.Module:
    """Cut out of a model what `kept` does not keep, in place: rows of query, key, value, gate and up projections with
    their biases, columns of output and down projections.

    The result computes what the full model does under masks (`mask_units`), which are taken off. Blocks may keep
    different numbers. Where all keep the same and the model's config has an option for it, the config says so too, and
    `save_pretrained` and `from_pretrained` are enough; `save_sliced` and `load_sliced` take any. A plain LoRA on the
    model is cut with it. Where masks leave a part of a block nothing (`UnitMasks.closed`), one unit stays there, and
    its output or down projection is of zeros.

    Args:
        model: a transformers model, or a PeftModel.
        kept: None: what the model's masks keep.

    Returns: `model`, whose base has `kept` as `kept_units`.

    Raises:
        ValueError: units that the model does not have; none left of a kind in a block; a model that was sliced before;
            quantised, shared, computed or merged weights; adapters other than plain LoRA; a layer that takes the number
            of heads from the config. The model is as it was then.
    """
    base, masks = model.get_base_model() if hasattr(model, "get_base_model") else model, unit_masks_of(model)
    if kept is None and masks is None:
        raise ValueError("kept is None, and the model has no masks that say what is kept. Pass it.")
    closed = _last_projections(masks) if kept is None else []
    kept = masks.kept() if kept is None else kept
    if getattr(base, "kept_units", None) is not None:
        raise ValueError("The model was sliced before, and kept units are numbers of the full one. Slice that.")
    structures = cut_structures(base, kept)
    axes, modules = axes_of(structures, kept), dict(base.named_modules())
    axes |= {name: KeptAxes() for name in closed if name not in axes}
    for structure in structures:
        _refuse_fused(structure, kept, modules)
    _refuse(base, axes, modules)
    with unchanged_on_error(model):
        for name, axis in axes.items():
            _cut(modules[name], axis)
        for name in closed:
            _zero(modules[name])
        for structure in structures:
            if kept_of(kept, structure.name, HEADS) is not None:
                _set_heads(
                    modules[structure.query.rpartition(".")[0]], structure, len(kept.blocks[structure.name].heads)
                )
        base.kept_units = kept
    unmask_units(model)
    small = config_of_sizes(base, structures, kept)
    if small is not None:
        base.config.__dict__.update(small.__dict__)
    return model


def config_of_sizes(base: nn.Module, structures: list[BlockStructure], kept: KeptUnits) -> PreTrainedConfig | None:
    """A config that says what was cut, where one does: all blocks keep the same numbers, and a model of that config has
    the shapes of `base`."""
    config = getattr(base, "config", None)
    if not isinstance(base, PreTrainedModel) or not structures:
        return None
    small = copy.deepcopy(config)
    counts = {kind: {len(kept.blocks[one.name].units(kind)) for one in structures} for kind in (HEADS, CHANNELS)}
    one, text = structures[0], small.get_text_config()
    if kept_of(kept, one.name, CHANNELS) is not None:
        for option in _WIDTHS:
            if getattr(text, option, None) == one.width or (option == "n_inner" and hasattr(text, option)):
                setattr(text, option, max(counts[CHANNELS]))
    if kept_of(kept, one.name, HEADS) is not None and getattr(text, "head_dim", None):
        text.num_key_value_heads = max(counts[HEADS])
        text.num_attention_heads = max(counts[HEADS]) * (one.heads // one.kv_heads)
    if max(map(len, counts.values())) > 1 or small.to_dict() == config.to_dict():
        return None
    try:
        with torch.device("meta"):
            told = type(base)._from_config(small)
    except (ValueError, TypeError, AttributeError):  # numbers that do not go together in this architecture
        return None
    return small if _shapes(told) == _shapes(base) else None


def _shapes(model: nn.Module) -> Mapping[str, torch.Size]:
    named = {name.replace(".base_layer", ""): tensor.shape for name, tensor in model.named_parameters()}
    return {name: shape for name, shape in named.items() if ".lora_" not in name}


def _cut(module: nn.Module, axis: KeptAxes) -> None:
    if isinstance(module, BaseTunerLayer):
        for adapter in module.lora_A:
            _cut(module.lora_A[adapter], KeptAxes(None, axis.cols))
            _cut(module.lora_B[adapter], KeptAxes(axis.rows, None))
        _cut(module.get_base_layer(), axis)
    transposed = isinstance(module, Conv1D)
    for kept, dim, sizes in ((axis.rows, 0, ("out_features", "nf")), (axis.cols, 1, ("in_features", "nx"))):
        if kept is None:
            continue
        for size in sizes:
            if hasattr(module, size):
                setattr(module, size, len(kept))
        if not isinstance(module, BaseTunerLayer):
            module.weight = _selected(module.weight, kept, 1 - dim if transposed else dim)
            if dim == 0 and module.bias is not None:
                module.bias = _selected(module.bias, kept, 0)


def _last_projections(masks: UnitMasks) -> list[str]:
    """Output and down projections of what the masks leave nothing."""
    return [masks.structures[block].members(kind)[-1].module for block, kind in masks.closed()]


def _zero(module: nn.Module) -> None:
    if isinstance(module, BaseTunerLayer):
        for half in module.lora_A.values():
            _zero(half)
        module = module.get_base_layer()
    module.weight = nn.Parameter(torch.zeros_like(module.weight), module.weight.requires_grad)


def _selected(parameter: nn.Parameter, kept: Tensor, dim: int) -> nn.Parameter:
    return nn.Parameter(parameter.data.index_select(dim, kept.to(parameter.device)), parameter.requires_grad)


def _set_heads(attention: nn.Module, structure: BlockStructure, kv_heads: int) -> None:
    """Tell the layer what it was told of heads when it was made."""
    heads = kv_heads * (structure.heads // structure.kv_heads)
    width = structure.heads * structure.head_dim
    for names, old, new in (
        (_QUERY_HEADS, structure.heads, heads),
        (_KEY_HEADS, structure.kv_heads, kv_heads),
        (_QUERY_ROWS, width, heads * structure.head_dim),
    ):
        for name in names:
            if vars(attention).get(name) == old:
                setattr(attention, name, new)


def _refuse_fused(structure: BlockStructure, kept: KeptUnits, modules: dict[str, nn.Module]) -> None:
    heads = kept_of(kept, structure.name, HEADS) is not None
    if heads and structure.query == structure.key and not hasattr(_parent(modules, structure.query), "split_size"):
        raise ValueError(
            f"'{structure.query}' is split by the config's number of heads at each forward, so blocks cannot lose "
            "heads. Keep all heads, and cut channels."
        )


def _parent(modules: dict[str, nn.Module], name: str) -> nn.Module:
    return modules[name.rpartition(".")[0]]


def _refuse(base: nn.Module, axes: Mapping[str, KeptAxes], modules: dict[str, nn.Module]) -> None:
    owners: dict[int, set[str]] = {}
    for name, parameter in base.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.replace(".base_layer", "").rpartition(".")[0])
    for name in axes:
        module = modules[name]
        if isinstance(module, BaseTunerLayer):
            _refuse_adapter(name, module)
            module = module.get_base_layer()
        if type(module) not in (nn.Linear, Conv1D) or not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise ValueError(
                f"'{name}' is a {type(module).__name__}, and dense weights of their own are cut: slicing a quantised "
                "one would round it again. Slice the dense model, save_sliced it, and quantise it while it is loaded: "
                "load_sliced(folder, quantization_config=...)."
            )
        shared = owners[id(module.weight)] - {name}
        if shared:
            raise ValueError(f"'{name}' and '{min(shared)}' share one weight, which cannot be cut for one of them.")


def _refuse_adapter(name: str, module: Any) -> None:
    plain = isinstance(module, LoraLayer) and set(module.lora_A) == set(module.scaling) and not module.lora_variant
    if not plain or any(type(half) is not nn.Linear for half in (*module.lora_A.values(), *module.lora_B.values())):
        raise ValueError(
            f"'{name}' has an adapter that is no plain LoRA of peft's, and cannot be cut with the weight. Export it "
            "(hub.export_lora), merge it, or slice the base before it gets an adapter."
        )
    if module.merged:
        raise ValueError(f"An adapter is merged into '{name}': unmerge it, or merge_and_unload before slicing.")
