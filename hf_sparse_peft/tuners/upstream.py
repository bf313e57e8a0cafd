"""Adapters of upstream peft as unit spaces, so that rules act on them: whole modules, and the components of LoRA and
AdaLoRA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import AdaLoraConfig, PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.adalora.layer import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..rules import Allocate, ComponentSpace, Follower, ModuleSpace, Orthogonality, Rule, Smoothed, UnitSpace
from ..sparsity import AverageRank
from ..utils.tensors import TensorSpec
from .shared.layer import AdapterLayer
from .shared.pieces import LowRank, Piece
from .shared.wrapped_names import plain_name

_STATE = "rule_"
"""Prefix of the layer's attributes that hold the state of rules."""


@dataclass(frozen=True)
class UpstreamRankSpace(ComponentSpace):
    r"""Components of an upstream LoRA or AdaLoRA layer: component i is row i of `A`, column i of `B` and, under
    AdaLoRA, number i of the gate `lora_E` `[r, 1]`.

    A component that does not live has a 1 in the state `dead` and a gate of 0, as upstream's allocator leaves it. Plain
    LoRA has no gate: none of its components can be switched off.
    """

    module_name: str = ""

    @property
    def name(self) -> str:
        """Name of the module."""
        return self.module_name

    @property
    def seed(self) -> int:
        """Upstream's configs have no seed."""
        return 0

    @property
    def A(self) -> nn.Parameter:
        """`[r, in]`."""
        return getattr(self.layer.lora_A[self.adapter], "weight", self.layer.lora_A[self.adapter])

    @property
    def B(self) -> nn.Parameter:
        """`[out, r]`."""
        return getattr(self.layer.lora_B[self.adapter], "weight", self.layer.lora_B[self.adapter])

    @property
    def gate(self) -> nn.Parameter | None:
        """`[r, 1]`; None for plain LoRA."""
        return self.layer.lora_E[self.adapter] if isinstance(self.layer, AdaLoraLayer) else None

    @property
    def size(self) -> int:
        """Components that there is room for."""
        return self.A.shape[0]

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Numbers of a component: its row of `A`, its column of `B`, its gate."""
        return self.A.shape[1] + self.B.shape[0] + (self.gate is not None)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """`(out, in)` of the adapted weight."""
        return self.B.shape[0], self.A.shape[1]

    def alive(self) -> Tensor:
        """Living components, sorted."""
        dead = self.state().get("dead")
        return torch.arange(self.size) if dead is None else (dead == 0).nonzero().squeeze(1)

    def followers(self) -> list[Follower]:
        """The parameters; where every component has its own slice, the state of rules stays with it."""
        return [Follower(parameter, axis) for parameter, axis in self.parameter_axes()]

    def state(self) -> dict[str, Tensor]:
        """State that rules keep for this adapter in this layer, by name."""
        return upstream_state(self.layer, self.adapter)

    def write(self, units: Tensor) -> None:
        """Let the components `units` live: the others' gates are zero from now on, in place.

        Raises:
            ValueError: without a gate no component can die.
        """
        self.check_needs(frozenset({"gate"}))
        dead = torch.ones_like(self.state()["dead"])
        dead[units.long()] = 0
        self.state()["dead"].copy_(dead)
        self.apply_mask()

    @torch.no_grad()
    def apply_mask(self) -> None:
        """Zero the gates of components that do not live; an optimizer may have moved them."""
        self.gate.data.mul_(1 - self.state()["dead"][:, None])

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raises `ValueError` where a rule needs what upstream's layers do not have."""
        if "gate" in needs and self.gate is None:
            raise ValueError(
                f"The components of '{self.name}' are upstream LoRA's, which have no gate, so that none can be "
                "switched off. Use AdaLoraConfig, or SparseLoraConfig(r=..., density=0, schedule=[rule])."
            )
        missing = needs - {"gate", "batches", "fixed_units", "two_passes"}
        if missing:
            raise ValueError(
                f"'{self.name}' is a layer of upstream peft, which has no {' or '.join(sorted(missing))} for a rule. "
                "Use an adapter of hf_sparse_peft."
            )


def upstream_layers(model: nn.Module) -> list[tuple[str, BaseTunerLayer]]:
    """Layers of upstream tuners in `model`, with the base's names for them, in model order."""
    found = [(plain_name(name), module) for name, module in model.named_modules()]
    return [
        (name.removeprefix("module.").removeprefix("base_model.model."), module)
        for name, module in found
        if isinstance(module, BaseTunerLayer) and not isinstance(module, AdapterLayer)
    ]


def upstream_spaces(model: nn.Module) -> dict[str, list[UnitSpace]]:
    """Unit spaces of the active adapters of upstream peft, by adapter and in model order: every adapted module, and the
    components of linear LoRA and AdaLoRA layers."""
    found: dict[str, list[UnitSpace]] = {}
    layers = upstream_layers(model)
    held = [(layer, adapter, name) for name, layer in layers for adapter in layer.active_adapters]
    owners = Counter(id(parameter) for place in held for parameter in ModuleSpace(*place).parameters())
    shared = frozenset(key for key, count in owners.items() if count > 1)
    for name, layer in layers:
        for adapter in layer.active_adapters:
            module = ModuleSpace(layer, adapter, name, shared)
            if module.parameters():
                found.setdefault(adapter, []).append(module)
            if isinstance(layer, LoraLayer) and adapter in layer.lora_A:
                rank = UpstreamRankSpace(layer, adapter, name)
                if rank.A.ndim == 2 and rank.size:
                    found[adapter].append(rank)
    return found


@dataclass(frozen=True)
class UpstreamLowRank:
    """A linear LoRA or AdaLoRA layer of upstream's, as exports read an `AdapterLayer`."""

    module_name: str
    layer: LoraLayer

    @property
    def merged(self) -> bool:
        """Whether something is merged into the base weight."""
        return self.layer.merged

    @property
    def merged_adapters(self) -> list[str]:
        """What."""
        return self.layer.merged_adapters

    @property
    def in_features(self) -> int:
        """Columns of the weight."""
        return self.layer.in_features

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.layer.out_features

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether the base layer stores its weight as `[in, out]`."""
        return isinstance(self.layer.get_base_layer(), Conv1D)

    def get_base_layer_device(self) -> torch.device:
        """Device of the base layer's weight."""
        return self.layer.get_base_layer().weight.device

    def pieces(self, adapter_name: str) -> list[Piece]:
        r""":math:`s\,B\,\mathrm{diag}(E)\,A`, with AdaLoRA's :math:`s = \alpha / (r_0 + 10^{-5})`."""
        space = UpstreamRankSpace(self.layer, adapter_name, self.module_name)
        scale, gate = self.layer.scaling[adapter_name], space.gate
        if gate is not None:
            scale, gate = scale / (float(self.layer.ranknum[adapter_name]) + 1e-5), gate.detach()[:, 0]
        return [LowRank(space.B.detach(), space.A.detach(), gate, scale)]


def upstream_low_rank(model: nn.Module, adapter_name: str) -> list[UpstreamLowRank]:
    """The layers of an upstream LoRA or AdaLoRA, in model order; an empty list for other adapters.

    Raises:
        ValueError: an adapter that is more than `B A` on the weights of the base: DoRA and other variants, LoRA of
            embeddings and convolutions, biases of B, initialisations that changed the base.
    """
    layers = [(name, layer) for name, layer in upstream_layers(model) if isinstance(layer, LoraLayer)]
    layers = [(name, layer) for name, layer in layers if adapter_name in layer.scaling]
    config = configs_of(model).get(adapter_name)
    init = str(getattr(config, "init_lora_weights", True)).lower()
    if layers and init.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
        raise ValueError(
            f"init_lora_weights={init!r} has changed the base weights, and a LoRA of these factors would be another "
            "model. save_pretrained(..., path_initial_model_for_weight_conversion=...) makes one of both."
        )
    for name, layer in layers:
        held = adapter_name in layer.lora_A and UpstreamRankSpace(layer, adapter_name, name).A.ndim == 2
        if not held or adapter_name in layer.lora_variant or layer.lora_bias.get(adapter_name):
            raise ValueError(
                f"'{name}' is more than B A on a linear layer's weight (DoRA or another variant, an embedding, a "
                "convolution, lora_bias). Save it with save_pretrained; it is upstream's already."
            )
    return [UpstreamLowRank(name, layer) for name, layer in layers]


def configs_of(model: nn.Module) -> dict[str, PeftConfig]:
    """Configs of all adapters of `model`, by name."""
    return next((m.peft_config for m in model.modules() if isinstance(getattr(m, "peft_config", None), dict)), {})


def upstream_configs(model: nn.Module) -> dict[str, PeftConfig]:
    """Configs of the active adapters of upstream peft, by adapter."""
    held = configs_of(model)
    return {name: held[name] for name in upstream_spaces(model) if name in held}


# State of rules in layers that are not ours


def upstream_state(layer: BaseTunerLayer, adapter: str) -> dict[str, Tensor]:
    """The state that rules keep for `adapter` in an upstream layer, by the names of their specs."""
    names = [name for name in layer.other_param_names if name.startswith(_STATE)]
    return {
        name.removeprefix(_STATE): getattr(layer, name)[adapter] for name in names if adapter in getattr(layer, name)
    }


def allocate_upstream_state(space: UnitSpace, specs: Iterable[TensorSpec]) -> None:
    """Allocate what rules keep for `space` as buffers of its layer, zeros; what is there stays. peft saves and loads
    them with the adapter, and deletes them with it."""
    layer = space.layer
    for spec in specs:
        name = f"{_STATE}{spec.name}"
        if not hasattr(layer, name):
            setattr(layer, name, BufferDict({}, persistent=True))
            layer.other_param_names = (*layer.other_param_names, name)
        held = getattr(layer, name)
        if space.adapter not in held:
            held[space.adapter] = torch.zeros(spec.shape, dtype=spec.dtype, device=space.parameters()[0].device)


def drop_upstream_state(layer: BaseTunerLayer, adapter: str, names: Iterable[str]) -> None:
    """Free the state of these names, so that it is not shipped with the adapter."""
    for name in (f"{_STATE}{name}" for name in names):
        held = getattr(layer, name, {})
        if adapter in held:
            del held[adapter]
            if not len(held):
                delattr(layer, name)
                layer.other_param_names = tuple(known for known in layer.other_param_names if known != name)


def upstream_specs(rule: Rule, space: UnitSpace) -> list[TensorSpec]:
    """What `rule` keeps for `space`; where it moves components, with the mark of those that do not live."""
    found = list(rule.state(space))
    if space.kind == "rank" and "units" in rule.writes:
        found.append(TensorSpec("dead", (space.size,), torch.uint8, role="rule", space="rank"))
    return found


# AdaLoRA


def rules_of_upstream(config: PeftConfig, total_steps: int) -> list[Rule]:
    r"""The rules that an upstream config asks for: of `AdaLoraConfig` its allocator and its regulariser.

    `Allocate` is upstream's `update_and_allocate`, called after the optimizer's step with the number of steps done
    before it: the same masks, gates and averages, with these departures where upstream fails: a run whose budget never
    falls (`init_r == target_r`) trains on instead of stopping, the target is reached also with `tfinal=0`, ties take no
    more than the budget says, a run that is resumed has its averages. `Orthogonality` adds the gradient of
    `orth_reg_weight` once a step: not to evaluation losses, nor again for each micro-batch or rank.

    Raises:
        ValueError: `tinit` and `tfinal` leave no step for the budget to fall in.
    """
    if not isinstance(config, AdaLoraConfig):
        return []
    if config.tinit + config.tfinal >= total_steps:
        raise ValueError(
            f"AdaLoraConfig(tinit={config.tinit}, tfinal={config.tfinal}) leaves none of this run's {total_steps} "
            "steps for the budget to fall in. Lower them, or train longer; total_step is the run's own."
        )
    allocate = Allocate(
        budget=AverageRank(config.target_r),
        score=Smoothed(beta1=config.beta1, beta2=config.beta2),
        initial_warmup=config.tinit / total_steps,
        final_warmup=config.tfinal / total_steps,
        every=config.deltaT,
        count_from=0,
    )
    return [allocate, Orthogonality(config.orth_reg_weight)]


def freeze_adalora_ranks(model: nn.Module) -> None:
    """Stop the divisor `ranknum` of AdaLoRA's layers from training: peft 0.21.2 marks it as trained and does not save
    it, so that a resumed run and a loaded adapter would have another scaling."""
    for module in model.modules():
        if isinstance(module, AdaLoraLayer):
            module.ranknum.requires_grad_(False)


def take_over_adalora(model: nn.Module) -> None:
    """Let AdaLoRA's model leave its regulariser out of the loss, which `Orthogonality` replaces, until `give_back`."""
    freeze_adalora_ranks(model)
    for module in model.modules():
        if isinstance(module, AdaLoraModel):
            module.forward = module.model.forward


def give_back_adalora(model: nn.Module) -> None:
    """Undo `take_over_adalora`."""
    for module in model.modules():
        if isinstance(module, AdaLoraModel):
            module.__dict__.pop("forward", None)


def finish_adalora(space: UnitSpace, config: Any, total_steps: int) -> None:
    """Note in `config` which components of `space` live, as upstream does, whose saver then leaves the others out."""
    config.total_step = total_steps
    alive = torch.zeros(space.size, dtype=torch.bool)
    alive[space.alive().cpu().long()] = True
    pattern = {} if config.rank_pattern is None else config.rank_pattern
    config.rank_pattern = {**pattern, f"{space.name}.lora_E.{space.adapter}": alive.tolist()}
