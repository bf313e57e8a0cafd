"""`FactoredModel`: decides ranks, puts forms in the place of weights, and exports them."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from peft.utils.quantization_utils import get_quantization_kwargs
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..shared.base_weight import dense_weight
from ..shared.file_check import file_being_loaded
from ..shared.merge import warn_of_biases
from ..shared.model import AdapterModel, AdapterPlan
from ..shared.module_patterns import pattern_key
from ..shared.quantised import backend_of
from ..shared.wrapped_names import plain_name
from .channel_bits import ChannelBits, PackedChannels
from .config import FactoredConfig
from .form import Form
from .group_bits import GroupBits
from .layer import FactoredLayer, FactoredLinear
from .ranks import largest_rank
from .released import HOW_TO_KEEP, ReleasedLinear


class FactoredModel(AdapterModel):
    r"""Forms of fewer numbers in the place of the weights of linear layers, :math:`Y = X F(\theta)^\top + b`.

    Args: as every peft tuner (`model`, `peft_config`, `adapter_name`, `low_cpu_mem_usage`).
    """

    tuner_layer_cls = FactoredLayer
    linear_cls = FactoredLinear
    _copying: bool = False

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put forms in the place of the targets' weights, in all of them or in none."""
        given = self.peft_config[adapter_name]
        self._copying = any(own is given for name, own in self.peft_config.items() if name != adapter_name)
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def plan(self, peft_config: FactoredConfig, model: nn.Module, targets: dict[str, nn.Module]) -> AdapterPlan:
        """The rank of each form, written into `sizes`, and who stays dense, into `left_dense`.

        Raises:
            ValueError: no form saves anything, a weight was released already, or a file is of another base.
        """
        shapes = {name: tuple(reversed(_get_in_out_features(base))) for name, base in targets.items()}
        file = file_being_loaded()
        if file is not None and not peft_config.sizes:  # a config of one's own, config= of from_pretrained
            peft_config.sizes, peft_config.left_dense = dict(file.config.sizes), list(file.config.left_dense)
        if file is not None or self._targets_of_state_dict is not None or self._copying:
            _check_sizes(peft_config, shapes)
            return AdapterPlan(sizes={name: size[2] for name, size in peft_config.sizes.items()})
        gone = next((name for name, base in targets.items() if isinstance(base, ReleasedLinear)), None)
        if gone is not None:
            raise ValueError(
                f"'{gone}' has no weight any more: it was released when the factors of another adapter took its place. "
                f"{HOW_TO_KEEP}"
            )
        merged = any(isinstance(module, BaseTunerLayer) and module.merged_adapters for module in model.modules())
        if merged:
            raise ValueError("Adapters are merged into this base: call model.unmerge_adapter() before it is factored.")
        ranks = _ranks(peft_config, shapes, targets, get_quantization_kwargs(model))
        saving = {name for name, rank in ranks.items() if _saves(peft_config, *shapes[name], rank)}
        peft_config.sizes = {name: [*shapes[name], ranks[name]] for name in targets if name in saving}
        peft_config.left_dense = [name for name in targets if name not in saving]
        if targets:
            _tell_dense(peft_config, shapes, ranks)
        sizes = {name: size[2] for name, size in peft_config.sizes.items()}
        slow = any(not base.weight.is_meta for base in targets.values()) and not peft_config.needs_calibration
        progress = tqdm(total=len(sizes), desc="Factoring", delay=3, disable=not slow)
        return AdapterPlan(sizes=sizes, progress=progress)

    def _create_and_replace(
        self, peft_config: FactoredConfig, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        name = plain_name(kwargs["current_key"] if "current_key" in kwargs else args[2])
        if name in self._plan.sizes:
            super()._create_and_replace(peft_config, adapter_name, target, *args, **kwargs)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter; see `AdapterModel.delete_adapter`.

        Raises:
            ValueError: its form is all that is left of a weight; nothing is removed then, its config neither.
        """
        for layer in self.adapted_layers():
            layer.check_deletion(adapter_name)
        super().delete_adapter(adapter_name)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        for layer in self.adapted_layers():
            names = (self.active_adapters if adapter_names is None else adapter_names) if merge else ()
            if layer.released and not any(layer.holds(name) for name in names):
                raise ValueError(
                    f"'{layer.module_name}' has no weight to go back to: it was released when its factors took its "
                    f"place. merge_and_unload() gives the dense model that the factors make. {HOW_TO_KEEP}"
                )
        unbiased = {layer for layer in self.adapted_layers() if getattr(layer.get_base_layer(), "bias", None) is None}
        unloaded = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        added = [layer.module_name for layer in unbiased if getattr(layer.get_base_layer(), "bias", None) is not None]
        warn_of_biases(added, FactoredLayer.without_biases)
        return unloaded

    def export_modules(self, adapter_name: str | None = None) -> nn.Module:
        """The base model with torch's own linear layers in the place of each factored weight, for LoRA on the factors,
        or serving without this package; the adapted model itself is used up, as by `merge_and_unload()`.

        Low rank gives `nn.Sequential(down, up)`, of the base's dtype; names of what is inside are `q_proj.down` and
        `q_proj.up`. transformers' `from_pretrained` knows nothing of them: keep the model by `torch.save`, or keep the
        adapter.

        Raises:
            ValueError: the form has no such layers, several adapters are active, or something is merged.
        """
        names = [adapter_name] if adapter_name else list(self.active_adapters)
        layers = [layer for layer in self.adapted_layers() if any(layer.holds(name) for name in names)]
        if len(names) != 1 or not layers:
            raise ValueError(f"adapter_name={adapter_name!r} of {names}: name one factored adapter.")
        built = {}
        for layer in layers:
            if layer.merged:
                raise ValueError(f"{layer.merged_adapters} is merged; call unmerge_adapter() first.")
            if layer.awaits_calibration(names[0]):
                raise ValueError(layer.calibration_message(names[0]))
            dtype = layer._base_dtype()
            tensors = layer.form_tensors(names[0])
            tensors = {n: t.detach().to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
            form, own = layer.form(names[0]), getattr(layer.get_base_layer(), "bias", None)
            built[layer] = form.modules(tensors, form.bias(tensors, own))
        for key, layer in [(k, m) for k, m in self.model.named_modules() if m in built]:
            parent_name, _, child = key.rpartition(".")
            setattr(self.model.get_submodule(parent_name), child, built[layer].train(layer.training))
        return super()._unload_and_optionally_merge(merge=False)

    def pack_channels(self, adapter_name: str | None = None) -> None:
        """Give an adapter of form `ChannelBits` the form `PackedChannels`, of the same weights to the bit: integers at
        the bit depth of each row, rounded up, in place of fp32 weights. `save_pretrained` then writes the file to ship.

        Nothing of it trains any more, and its rules are dropped from its config: save a checkpoint before. All layers
        are packed, or none.

        Raises:
            ValueError: the adapter has another form, several are active, it is merged, or a row has too many bits.
        """
        name, layers = self._to_pack(adapter_name, ChannelBits)
        found = {}
        for layer in layers:
            try:
                found[layer] = layer.form(name).packed(layer.form_tensors(name))
            except ValueError as error:
                raise ValueError(f"'{layer.module_name}' cannot be packed: {error}") from error
        config = copy.deepcopy(self.peft_config[name])  # another model may have the same
        config.form, config.schedule = PackedChannels(), []
        config.sizes |= {layer.module_name: [*config.sizes[layer.module_name][:2], found[layer][0]] for layer in layers}
        self.peft_config[name] = config
        for layer, (rank, tensors) in found.items():
            layer.replace_form(name, config, rank, tensors)

    def pack_groups(self, adapter_name: str | None = None) -> None:
        """Give an adapter of form `GroupBits` the form `PackedGroups`, of the same weights to the bit: frozen integers,
        of which scales and zero points go on training, the same parameters (GQSA's E2E-OQP).

        An optimizer that was made before holds weights that are gone: make a new one. Rules are dropped from the
        config. All layers are packed, or none.

        Raises:
            ValueError: the adapter has another form, several are active, or it is merged.
        """
        name, layers = self._to_pack(adapter_name, GroupBits)
        found = {layer: layer.form(name).packed(layer.form_tensors(name)) for layer in layers}
        config = copy.deepcopy(self.peft_config[name])  # another model may have the same
        config.form, config.schedule = next(iter(found.values()))[0], []
        self.peft_config[name] = config
        for layer, (_, tensors) in found.items():
            layer.replace_form(name, config, config.sizes[layer.module_name][2], tensors)

    def _to_pack(self, adapter_name: str | None, form: type[Form]) -> tuple[str, list[FactoredLayer]]:
        """The one adapter of a form that is meant, and its layers.

        Raises:
            ValueError: another form, several adapters, or something is merged.
        """
        names = [adapter_name] if adapter_name else list(self.active_adapters)
        layers = [layer for layer in self.adapted_layers() if any(layer.holds(name) for name in names)]
        if len(names) != 1 or not layers or not isinstance(layers[0].form(names[0]), form):
            raise ValueError(
                f"adapter_name={adapter_name!r} of {names}: name one adapter of FactoredConfig(form={form.__name__}())."
            )
        merged = next((layer for layer in layers if layer.merged), None)
        if merged is not None:
            raise ValueError(f"{merged.merged_adapters} is merged; call unmerge_adapter() first.")
        return names[0], layers


def factored_layers(model: nn.Module) -> list[FactoredLayer]:
    """All layers of `model` with a factored adapter, in model order."""
    return [module for module in model.modules() if isinstance(module, FactoredLayer)]


def _ranks(
    config: FactoredConfig, shapes: dict[str, tuple[int, int]], targets: dict[str, nn.Module], quantisation: dict
) -> dict[str, int]:
    form, found = config.form, {}
    for name, (rows, cols) in shapes.items():
        key = pattern_key(config.rank_pattern, name, "rank_pattern")
        own = None if form.reads_size else form.own_rank(rows, cols)
        if form.reads_size:
            found[name] = _size_of(form, name, (rows, cols), targets[name], quantisation, key)
        elif key is not None:
            found[name] = min(config.rank_pattern[key], rows, cols)
        elif own is not None:
            found[name] = own
    open_ = {name: shape for name, shape in shapes.items() if name not in found}
    if not open_:
        return found
    if config.rank.reads_weights and any(targets[name].weight.is_meta for name in open_):
        return found | {name: largest_rank(form, *s, s[0] * s[1] - 1) for name, s in open_.items()}
    with tqdm(total=len(open_), desc="Choosing ranks", delay=3) as progress:

        def weight_of(base: nn.Module) -> Tensor:
            progress.update()
            weight = dense_weight(base, backend_of(base, **quantisation))
            return weight.to(torch.promote_types(weight.dtype, torch.float32))

        return found | config.rank.ranks(form, open_, {name: partial(weight_of, targets[name]) for name in open_})


def _size_of(
    form: Form, name: str, shape: tuple[int, int], base: nn.Module, quantisation: dict, key: str | None
) -> int:
    """What the weight's content says.

    Raises:
        ValueError: a pattern says it too, or the form has no size on it; names the module.
    """
    if key is not None:
        raise ValueError(
            f"rank_pattern[{key!r}] gives '{name}' a size, and that of {type(form).__name__} follows from the weight. "
            "Leave it out."
        )
    try:
        if base.weight.is_meta:
            return form.size_of(torch.empty(shape, device="meta"))
        return form.size_of(dense_weight(base, backend_of(base, **quantisation)))
    except ValueError as error:
        raise ValueError(f"'{name}': {error}") from error


def _saves(config: FactoredConfig, rows: int, cols: int, rank: int) -> bool:
    return config.form.exact or (rank > 0 and config.form.stored_numbers(rows, cols, rank) < rows * cols)


def _tell_dense(config: FactoredConfig, shapes: dict[str, tuple[int, int]], ranks: dict[str, int]) -> None:
    form = type(config.form).__name__
    if not config.sizes:
        name = next((name for name in config.left_dense if name in ranks), config.left_dense[0])
        if not ranks:
            raise ValueError(
                f"No target is factored: rank={config.rank} leaves all {len(shapes)} dense ('{name}', ...). Ask for a "
                "larger reduction, or a smaller min_ratio."
            )
        raise ValueError(
            f"No target is factored: {form} at rank {ranks[name]} saves nothing of '{name}' "
            f"({shapes[name][0]}x{shapes[name][1]}), and so it is with all {len(shapes)}. Lower the rank."
        )
    wasteful = [name for name in config.left_dense if name in ranks]
    if wasteful:
        name = wasteful[0]
        numbers = config.form.stored_numbers(*shapes[name], ranks[name])
        warnings.warn(
            f"{len(wasteful)} of {len(shapes)} targets stay dense, because their factors save nothing: '{name}' "
            f"({shapes[name][0]}x{shapes[name][1]}) would take {numbers:.0f} numbers at rank {ranks[name]}. All are in "
            "the config's left_dense. Lower their rank (rank_pattern), or leave them out with exclude_modules.",
            stacklevel=2,
        )


def _check_sizes(config: FactoredConfig, shapes: dict[str, tuple[int, int]]) -> None:
    for name, (rows, cols, _) in config.sizes.items():
        if name in shapes and shapes[name] != (rows, cols):
            found = "x".join(map(str, shapes[name]))
            raise ValueError(
                f"sizes[{name!r}] has a weight of {rows}x{cols}, and this base's is {found}. Load the adapter on the "
                "base that it was made from."
            )
