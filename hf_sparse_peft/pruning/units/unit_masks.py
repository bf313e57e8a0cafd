"""Masks over attention heads and feed-forward channels of a model that stays whole: what `slice_model` would cut."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...rules import ComponentSpace, UnitSpace
from ...tuners import AdapterLayer
from ...tuners.upstream import UpstreamRankSpace
from .kept_units import KeptUnits
from .structure import CHANNELS, HEADS, BlockStructure, Kind, structures_of

_NAME = "unit_masks"


class UnitMask(nn.Module):
    r"""Factors `m` `[units]`, fp32, of the units of one kind of one block: :math:`x_j \leftarrow m_{u(j)} x_j` at the
    input of the projection that units leave the block by, `u(j)` the unit of column `j`.

    A head or channel at 0 adds nothing, and none of its rows and columns gets a gradient: what zeros in the weights,
    or rows and columns that are cut, do. At 1 nothing changes.
    """

    def __init__(self, structure: BlockStructure, kind: Kind, device: torch.device, trained: bool) -> None:
        super().__init__()
        self.block, self.kind = structure.name, kind
        self.span = structure.members(kind)[-1].span
        self.module = structure.members(kind)[-1].module
        factors = torch.ones(structure.units(kind), device=device)
        if trained:
            self.factors = nn.Parameter(factors)
        else:
            self.register_buffer("factors", factors, persistent=False)

    def __call__(self, module: nn.Module, args: tuple) -> tuple:
        """A forward pre-hook of the projection."""
        x, *others = args
        return (x * self.factors.repeat_interleave(self.span).to(x.dtype), *others)


class UnitMasks(nn.Module):
    """The masks of a model, which `mask_units` puts on it."""

    def __init__(self, structures: list[BlockStructure], masks: list[UnitMask]) -> None:
        super().__init__()
        self.structures = {structure.name: structure for structure in structures}
        self.masks = nn.ModuleList(masks)
        self._hooks: list[Any] = []

    def kept(self) -> KeptUnits:
        """Units whose factor is not 0. A part of a block of which nothing is left (`closed`) keeps its first one, as no
        model has attention without heads: where `slice_model` cuts by the masks, it is of zeros."""
        kept = KeptUnits.all_of(self.structures.values())
        for mask in self.masks:
            units = mask.factors.detach().nonzero().flatten()
            kept.keep(mask.block, mask.kind, units if len(units) else torch.zeros(1, dtype=torch.int64))
        return kept

    def closed(self) -> list[tuple[str, Kind]]:
        """Blocks and kinds of which no unit is left: they add nothing but the bias of their last projection."""
        return [(mask.block, mask.kind) for mask in self.masks if not bool(mask.factors.detach().any())]

    def copied_to(self, model: nn.Module) -> UnitMasks:
        """The same masks on another model of these shapes: the dense one, say, of a 4-bit base, which can be sliced.

        Raises:
            ValueError: as `mask_units`; a model of other shapes.
        """
        kinds = {mask.kind for mask in self.masks}
        found = mask_units(model, self.kept(), kinds=kinds)
        for own, other in zip(self.masks, found.masks, strict=True):
            other.factors.copy_(own.factors.detach())
        return found

    @torch.no_grad()
    def keep(self, kept: KeptUnits) -> None:
        """Set factors of what is kept to 1, of the rest to 0; of blocks and kinds that `kept` says nothing about all
        stay as they are.

        Raises:
            ValueError: `kept` is of another model.
        """
        kept.check(self.structures.values())
        for mask in self.masks:
            units = kept.units(mask.block, mask.kind)
            if units is not None:
                mask.factors.zero_()[units.to(mask.factors.device)] = 1


def mask_units(
    model: nn.Module, kept: KeptUnits | None = None, *, kinds: Iterable[Kind] = (HEADS, CHANNELS), trained: bool = False
) -> UnitMasks:
    """Multiply heads and channels of every block by factors: 1, and 0 for what `kept` does not keep.

    Masks stay on the model, behind training too, until `slice_model(model)` cuts what they mask or `unmask_units` takes
    them off. They are no part of an adapter or of a saved model. Put them on after the adapter.

    Args:
        model: a transformers model, or a PeftModel.
        kept: None: all.
        kinds: what has masks.
        trained: whether the factors are parameters.

    Raises:
        ValueError: a model that has masks already, or whose blocks are not understood; `kept` of another model.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if unit_masks_of(model) is not None:
        raise ValueError("The model has unit masks already. Use unit_masks_of(model), or unmask_units(model) first.")
    structures, modules = structures_of(base, kinds), dict(base.named_modules())
    masks = [
        UnitMask(one, kind, _device(modules[one.members(kind)[-1].module]), trained)
        for one in structures
        for kind in (HEADS, CHANNELS)
        if one.units(kind)
    ]
    found = UnitMasks(structures, masks)
    if kept is not None:
        found.keep(kept)
    found._hooks = [modules[mask.module].register_forward_pre_hook(mask) for mask in masks]
    base.add_module(_NAME, found)
    return found


def unit_masks_of(model: nn.Module) -> UnitMasks | None:
    """The masks that `mask_units` put on the model."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(base, _NAME, None)


def unmask_units(model: nn.Module) -> None:
    """Take the masks off; nothing to do without."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    masks = unit_masks_of(model)
    if masks is not None:
        for hook in masks._hooks:
            hook.remove()
        delattr(base, _NAME)


def _device(module: nn.Module) -> torch.device:
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return module.weight.device


@dataclass(frozen=True)
class MaskedUnits(UnitSpace):
    """Units of a mask as a rule sees them: those that live have a factor other than 0."""

    layer: UnitMask
    adapter: str
    kind: str = ""
    factors: tuple[tuple[Any, ComponentSpace], ...] = ()
    """Where the units lie (`Member`) in modules that have a low-rank adapter, with its components."""
    packed = False

    @property
    def name(self) -> str:
        """Name of the block."""
        return self.layer.block

    @property
    def size(self) -> int:
        """Units of the whole block."""
        return self.layer.factors.numel()

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Trained numbers of a unit: its factor, where that trains."""
        return int(isinstance(self.layer.factors, nn.Parameter))

    def alive(self) -> Tensor:
        """Sorted."""
        return self.layer.factors.detach().nonzero().flatten()

    def parameters(self) -> list[nn.Parameter]:
        """The factors, where they train; else those of the adapters that the units lie in."""
        if isinstance(self.layer.factors, nn.Parameter):
            return [self.layer.factors]
        return [parameter for _, components in self.factors for parameter in components.parameters()]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """The factors, where they train."""
        trained = isinstance(self.layer.factors, nn.Parameter)
        return {"factors": (self.layer.factors, 0)} if trained else super().scored_parameters()

    @torch.no_grad()
    def write(self, units: Tensor) -> None:
        """Mask all units but these."""
        alive = torch.zeros_like(self.layer.factors)
        alive[units.long().to(alive.device)] = 1
        self.layer.factors.mul_(alive)

    @torch.no_grad()
    def restore(self, units: Tensor) -> None:
        """Mask all units but these, which are at 1 where they were masked: what an earlier moment had may be more."""
        factors = self.layer.factors
        factors.masked_fill_(factors == 0, 1.0)
        self.write(units)


def masked_spaces(model: nn.Module, masks: UnitMasks, *, with_factors: bool = True) -> list[MaskedUnits]:
    """A space a mask, with the low-rank adapters of its block's modules.

    Args:
        model: that has the masks.
        masks: of it.
        with_factors: False: spaces know no adapter, which may be any then.

    Raises:
        ValueError: the masks were put on before the adapter; with factors, an adapter that is more than these.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    modules, found = dict(base.named_modules()), []
    for mask in masks.masks:
        if mask not in modules[mask.module]._forward_pre_hooks.values():
            raise ValueError(
                f"The mask of '{mask.block}' lies below the adapter of '{mask.module}'. Call unmask_units(model), and "
                "mask_units(model) after get_peft_model."
            )
        members = masks.structures[mask.block].members(mask.kind) if with_factors else ()
        held = [(member, components_of(modules[member.module], member.module)) for member in members]
        adapter = next((one.adapter for _, one in held if one is not None), "")
        found.append(MaskedUnits(mask, adapter, mask.kind, tuple((m, c) for m, c in held if c is not None)))
    return found


def components_of(module: nn.Module, name: str) -> ComponentSpace | None:
    """The low-rank components of a module's active adapter: upstream's LoRA, or a `SparseLoraConfig(density=0)`.

    Raises:
        ValueError: an adapter that is more, or several.
    """
    if not isinstance(module, BaseTunerLayer):
        return None
    active = [
        one for one in module.active_adapters if any(one in getattr(module, n) for n in module.adapter_layer_names)
    ]
    if isinstance(module, AdapterLayer):
        spaces = [s for one in active for s in module.unit_spaces(one) if s.kind != "module"]
    else:
        plain = all(one in getattr(module, "lora_A", ()) and one not in module.lora_variant for one in active)
        spaces = [UpstreamRankSpace(module, one, name) for one in active] if plain else []
    plain = len(spaces) == len(active) == 1 and isinstance(spaces[0], ComponentSpace) and spaces[0].gate is None
    if active and not plain:
        raise ValueError(
            f"'{name}' has adapters ({', '.join(active)}) that are not one plain LoRA. Train one LoraConfig, or one "
            "SparseLoraConfig(density=0, gate=None), without DoRA."
        )
    return spaces[0] if spaces else None
