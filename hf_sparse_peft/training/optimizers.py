"""The optimizers that a config can ask for, and building them from the arguments of a run."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from peft import PeftConfig
from torch import nn
from transformers import TrainingArguments

from ..optim import (
    AdamS,
    AgedAdamW,
    OptimizerSettings,
    OptimizerSpec,
    SparseSM3,
    ZerothOrderSGD,
    forgets_removed,
    innermost,
    parameter_groups,
    zeroth_order_groups,
)
from ..rules import UnitSpace
from ..tuners import adapter_layers
from ..utils.option_types import Decay, NonNegativeFloat, PositiveFloat, PositiveInt, Range
from ..utils.parts import UnknownPart, register_part, require
from .values_rate import values_ratios


@register_part("adamw")
@dataclass(frozen=True)
class AdamWSpec(OptimizerSpec):
    """`torch.optim.AdamW` with a Trainer's groups, but no weight decay for what a rule of the config wants to have none
    (`Rule.undecayed`), as SoRA's gates."""

    B_ratio: PositiveFloat = 1.0
    """Learning rate of low-rank factors `B` over the run's (LoRA+: about 16, peft's `loraplus_lr_ratio`; Hayou et al.,
    2024)."""
    scores_ratio: PositiveFloat = 1.0
    """Learning rate of a mask's trained scores over the run's (movement pruning: 1e-2 / 3e-5)."""

    builds: ClassVar[type[torch.optim.Optimizer]] = torch.optim.AdamW

    def build(self, model: nn.Module, settings: OptimizerSettings) -> torch.optim.AdamW:
        """Groups as Trainer makes them, times `B` and everything else; without decay for what rules name.

        Raises:
            ValueError: nothing trains, or no `B` does and it is to have a rate of its own.
        """
        ratios, no_decay = self.ratios(model), _no_decay_of_rules(model)

        def options_of(name: str, parameter: nn.Parameter) -> dict[str, Any]:
            return {"lr": settings.lr * ratios.get(id(parameter), 1.0)} | no_decay(name, parameter)

        groups = parameter_groups(model, settings.weight_decay, options_of)
        return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)

    def ratios(self, model: nn.Module) -> dict[int, float]:
        """Parameter's id -> its learning rate over the run's, where that is not 1; raises as `build`."""
        return _ratios_of_B(model, self) | _ratios_of_scores(model, self.scores_ratio)


@register_part("aged_adamw")
@dataclass(frozen=True)
class AgedAdamWSpec(OptimizerSpec):
    """`optim.AgedAdamW`: AdamW whose bias correction knows the age of every unit of the supports, for units that come
    and go; of low-rank components too where these do (`component_ages`). No weight decay for what a rule of the config
    wants to have none."""

    values_ratio: PositiveFloat | Literal["auto"] = 1.0
    """Learning rate of the values of supports and subnets over the run's; "auto": that of `values_rate`, with which
    LoRA's rate works unchanged."""
    B_ratio: PositiveFloat = 1.0
    """Learning rate of low-rank factors `B` over the run's, as that of `AdamWSpec`."""
    per_unit_age: bool = True
    """Whether every unit has an age of its own; False: one step count a parameter, as torch's AdamW."""
    component_ages: bool = False
    """Whether components of low-rank halves have an age, in each of their parameters."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of the moments; None: the run's."""

    builds: ClassVar[type[torch.optim.Optimizer]] = AgedAdamW

    def build(self, model: nn.Module, settings: OptimizerSettings) -> AgedAdamW:
        """Groups as Trainer makes them, times values of supports, components, `B` and everything else.

        Raises:
            ValueError: as `AdamWSpec.build`.
        """
        values = {id(parameter) for space in _supports(model) for parameter in space.parameters()}
        axes, no_decay = _component_axes(model) if self.component_ages else {}, _no_decay_of_rules(model)
        ratios = self.ratios(model)

        def options_of(name: str, parameter: nn.Parameter) -> dict[str, Any]:
            ages = self.per_unit_age and (id(parameter) in values or id(parameter) in axes)
            lr = settings.lr * ratios.get(id(parameter), 1.0)
            found = {"lr": lr, "per_unit_age": ages, "unit_axis": axes.get(id(parameter), 0) if ages else 0}
            return found | no_decay(name, parameter)

        groups = parameter_groups(model, settings.weight_decay, options_of)
        return AgedAdamW(groups, lr=settings.lr, betas=self.betas or settings.betas, eps=settings.eps)

    def ratios(self, model: nn.Module) -> dict[int, float]:
        """Parameter's id -> its learning rate over the run's, where that is not 1; raises as `build`."""
        sparse = [pair for pair in active_spaces(model) if pair[1].kind in ("support", "subnet_row")]
        if self.values_ratio == "auto":
            weights: dict[str, list[tuple[int, int]]] = {}
            for layer in adapter_layers(model):
                for name in filter(layer.holds, layer.active_adapters):
                    weights.setdefault(name, []).append((layer.out_features, layer.in_features))
            values = values_ratios(sparse, weights)
        else:
            values = {id(parameter): self.values_ratio for _, space in sparse for parameter in space.parameters()}
        return values | _ratios_of_B(model, self)


@register_part("sparse_sm3")
@dataclass(frozen=True)
class SparseSM3Spec(OptimizerSpec):
    """`optim.SparseSM3`: SM3 that knows which entry of which matrix every value of the supports is; m + n numbers of
    state a matrix (Anil et al., 2019; sparse form Ansell et al., 2024)."""

    momentum: Decay = 0.0
    """Decay rate of the momentum; 0, as in SpIEL, keeps no buffer."""

    builds: ClassVar[type[torch.optim.Optimizer]] = SparseSM3

    def build(self, model: nn.Module, settings: OptimizerSettings) -> SparseSM3:
        """Groups as Trainer makes them; entries are read anew at every step."""
        supports = [space for space in _supports(model) if space.unit == "entry"]
        spaces = {parameter: space for space in supports for parameter in space.parameters()}

        def indices_of(parameter: torch.Tensor) -> tuple[torch.Tensor, int, int] | None:
            if parameter not in spaces:
                return None
            space = spaces[parameter]
            units = space.alive()
            missing = parameter.shape[0] - units.numel()
            if missing:  # spare capacity has no gradient: any position does
                units = torch.cat([units, units.new_zeros(missing)])
            return units, *space.weight_shape

        groups = parameter_groups(model, settings.weight_decay)
        return SparseSM3(groups, lr=settings.lr, indices_of=indices_of, momentum=self.momentum)


@register_part("adam_s")
@dataclass(frozen=True)
class AdamSSpec(OptimizerSpec):
    """`optim.AdamS`: Adam that drives to 0 what an N:M mask does not keep of the weights, in every layer whose update
    is a matrix (`DenseUpdate`, `ScaledDenseUpdate`); plain Adam for all else (CAST; Huang et al., 2025). It goes with
    the rule `Cast`. Weight decay, which CAST has none of, acts on W + D."""

    decay: NonNegativeFloat = 4e-7
    """Strength of the decay, lambda (CAST, LLaMA-2-7B at a learning rate of 2e-5: 4e-7)."""
    keep: PositiveInt = 2
    """N: weights kept of each group."""
    of: PositiveInt = 4
    """M: consecutive inputs that make a group."""
    mask_every: PositiveInt = 10
    """Steps between two choices of the mask (CAST: 10)."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of the moments; None: the run's."""

    builds: ClassVar[type[torch.optim.Optimizer]] = AdamS

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.keep < self.of, self, "keep", f"fewer than of={self.of}")

    def build(self, model: nn.Module, settings: OptimizerSettings) -> AdamS:
        """Groups as Trainer makes them, times matrices in scope and everything else.

        Raises:
            ValueError: no adapter trains a matrix; one whose inputs are no multiple of `of`.
        """
        spaces = [space for _, space in active_spaces(model) if space.kind == "mask"]
        scope = {id(space.dense_change()): space for space in spaces}
        if not scope:
            raise ValueError(
                "AdamSSpec sparsifies trained matrices, and no active adapter has one. Train a MaskedLoraConfig("
                "update=DenseUpdate()), or take another optimizer."
            )
        groups = parameter_groups(model, settings.weight_decay, lambda _, p: {"cast_scope": id(p) in scope})
        own = {"decay": self.decay, "keep": self.keep, "of": self.of, "mask_every": self.mask_every}
        betas = self.betas or settings.betas

        def offset_of(parameter: torch.Tensor) -> torch.Tensor | None:
            space = scope.get(id(parameter))
            return None if space is None else space.base_weight()

        return AdamS(groups, settings.lr, betas, settings.eps, **own, offset_of=offset_of)


@register_part("zeroth_order")
@dataclass(frozen=True)
class ZerothOrderSpec(OptimizerSpec):
    """`optim.ZerothOrderSGD`: two forward passes and a random direction in the place of a gradient (MeZO; Malladi et
    al., 2023; Sparse MeZO; Liu et al., 2024). Trains with `ZerothOrderTrainer`."""

    epsilon: PositiveFloat = 1e-3
    """Size of the perturbation (paper: 1e-3 for all weights, 1e-2 for LoRA)."""
    sparsity: Annotated[float, Range(least=0, below=1)] = 0.0
    """Fraction of every tensor's entries, the largest, that is neither perturbed nor trained; 0 is MeZO."""
    perturbation: Literal["in_place", "layerwise"] = "in_place"
    """How parameters are shifted; `layerwise` restores them bit for bit in every dtype."""

    needs: ClassVar[frozenset[str]] = frozenset({"loss_differences"})
    builds: ClassVar[type[torch.optim.Optimizer]] = ZerothOrderSGD

    def build(self, model: nn.Module, settings: OptimizerSettings) -> ZerothOrderSGD:
        """Everything that trains, by name: names seed the directions."""
        return ZerothOrderSGD(
            zeroth_order_groups(model, settings.weight_decay),
            lr=settings.lr,
            seed=settings.seed,
            epsilon=self.epsilon,
            sparsity=self.sparsity,
            perturbation=self.perturbation,
        )


def active_spaces(model: nn.Module) -> list[tuple[PeftConfig, UnitSpace]]:
    """Unit spaces of the active adapters, each with its adapter's config."""
    return [
        (layer.adapter_configs[name], space)
        for layer in adapter_layers(model)
        for name in layer.active_adapters
        if layer.holds(name)
        for space in layer.unit_spaces(name)
    ]


def _component_axes(model: nn.Module) -> dict[int, int]:
    """Parameter's id -> the axis that low-rank components lie along."""
    spaces = [space for _, space in active_spaces(model) if space.kind == "rank"]
    return {id(parameter): axis for space in spaces for parameter, axis in space.parameter_axes()}


def _no_decay_of_rules(model: nn.Module) -> Callable[[str, nn.Parameter], dict[str, float]]:
    """Options for `parameter_groups`: weight decay 0 for what rules want to have none."""
    undecayed = {
        id(parameter)
        for config, space in active_spaces(model)
        for rule in config.rules
        if space.kind in rule.acts_on and rule.undecayed
        for name, (parameter, _) in space.scored_parameters().items()
        if name in rule.undecayed
    }
    return lambda _, parameter: {"weight_decay": 0.0} if id(parameter) in undecayed else {}


def _supports(model: nn.Module) -> list[UnitSpace]:
    return [space for _, space in active_spaces(model) if space.kind == "support"]


def _ratios_of_B(model: nn.Module, spec: AdamWSpec | AgedAdamWSpec) -> dict[int, float]:
    if spec.B_ratio == 1:
        return {}
    held = [space.scored_parameters().get("B") for _, space in active_spaces(model)]
    factors = [pair[0] for pair in held if pair is not None and pair[0].requires_grad]
    if not factors:
        raise ValueError(
            f"{type(spec).__name__}.B_ratio={spec.B_ratio} is for low-rank factors B, and none trains in this model. "
            "Set r >= 1, or B_ratio=1."
        )
    return {id(factor): spec.B_ratio for factor in factors}


def _ratios_of_scores(model: nn.Module, ratio: float) -> dict[int, float]:
    if ratio == 1:
        return {}
    held = [space.scored_parameters() for _, space in active_spaces(model) if space.kind == "mask"]
    scores = [one[name][0] for one in held for name in ("scores", "score_factors") if name in one]
    if not scores:
        raise ValueError(
            f"AdamWSpec.scores_ratio={ratio} is for trained scores of a mask, and none trains in this model. Set "
            "masking=ScoredMask(), or scores_ratio=1."
        )
    return {id(one): ratio for one in scores}


def _misses_ratios(model: nn.Module, optimizer: Any, spec: AdamWSpec | AgedAdamWSpec) -> bool:
    """Whether parameters have other learning rates, relative to each other, than the config says."""
    groups = {id(p): group for group in innermost(optimizer).param_groups for p in group["params"]}
    trained = {id(p) for _, space in active_spaces(model) for p in space.parameters()} & set(groups)
    ratios = spec.ratios(model)
    rates = [float(groups[p].get("initial_lr", groups[p]["lr"])) / ratios.get(p, 1.0) for p in trained]
    return bool(rates) and max(rates) > min(rates) * (1 + 1e-6)


def asked_configs(model_or_config: nn.Module | PeftConfig) -> list[PeftConfig]:
    """A config itself, or those of a model's active adapters of this package, each once."""
    if isinstance(model_or_config, PeftConfig):
        return [model_or_config]
    found = {
        id(config): config
        for layer in adapter_layers(model_or_config)
        for config in (layer.adapter_configs[name] for name in layer.active_adapters if layer.holds(name))
    }
    return list(found.values())


def optimizer_spec(model_or_config: nn.Module | PeftConfig) -> OptimizerSpec | None:
    """The optimizer that a config, or the active adapters of a model, ask for; None: whatever the loop takes.

    Raises:
        ValueError: one that this installation does not have, or adapters that ask for different ones.
    """
    specs = [config.optimizer for config in asked_configs(model_or_config) if getattr(config, "optimizer", None)]
    for spec in specs:
        if isinstance(spec, UnknownPart):
            raise ValueError(
                f"optimizer={spec.data} cannot train here: {spec.reason}. Import the package that registers it, update "
                "hf-sparse-peft, or set optimizer=None in the config for the Trainer's own."
            )
        if spec != specs[0]:
            raise ValueError(f"Active adapters ask for different optimizers, {specs[0]} and {spec}. Activate one.")
    return specs[0] if specs else None


def make_optimizer(
    model: nn.Module,
    args: TrainingArguments | None = None,
    *,
    spec: OptimizerSpec | None = None,
    lr: float | None = None,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    seed: int = 0,
) -> torch.optim.Optimizer | None:
    """The optimizer that the active adapters of `model` ask for (`config.optimizer`); None where they ask for none.

    Args:
        model: with its adapters, or any model that trains, with `spec`.
        args: a Trainer's arguments, from which all other options are taken.
        spec: the optimizer to make instead, where no adapter asks for one.
        lr, weight_decay, betas, eps, seed: of a loop without them; `lr` is needed.

    Raises:
        ValueError: neither `args` nor `lr`; the loop or the rules of the adapters do what the optimizer cannot follow;
            see `optimizer_spec` too.
    """
    spec = asked_or_given(model, spec)
    if spec is None:
        return None
    if args is not None:
        _check_loop(spec, args)
        settings = settings_of(args)
    elif lr is None:
        raise ValueError("make_optimizer(model) has no learning rate: pass a Trainer's args, or lr=...")
    else:
        settings = OptimizerSettings(lr, weight_decay, betas, eps, seed)
    optimizer = spec.build(model, settings)
    refuse_moves(model, optimizer)
    return forgets_removed(optimizer)


def asked_or_given(model_or_config: nn.Module | PeftConfig, spec: OptimizerSpec | None) -> OptimizerSpec | None:
    """`spec`, or what a config or a model's active adapters ask for.

    Raises:
        ValueError: both, and they are not the same; as `optimizer_spec`.
    """
    asked = optimizer_spec(model_or_config)
    if None not in (spec, asked) and spec != asked:
        raise ValueError(
            f"optimizer={spec} is given, and the config asks for {asked}. Set optimizer=None in one place."
        )
    return asked if spec is None else spec


def _check_loop(spec: OptimizerSpec, args: TrainingArguments) -> None:
    if hasattr(spec, "check_run"):
        accumulation, clips = args.gradient_accumulation_steps, bool(args.max_grad_norm)
        spec.check_run(accumulation=accumulation, clips=clips, fp16=bool(args.fp16))


def refuse_moves(model: nn.Module, optimizer: Any) -> None:
    """Refuse rules that move units of parameters whose moments are those of a subspace, or, where updates are made in
    the backward pass, anything that rules do around an update.

    Raises:
        ValueError: names the rule and the mend.
    """
    projects = getattr(optimizer, "projects", None)
    if projects is None:
        return
    kind = type(optimizer).__name__
    for config, space in active_spaces(model):
        for rule in (rule for rule in config.rules if space.kind in rule.acts_on):
            if "units" in rule.writes and any(projects(parameter) for parameter in space.parameters()):
                raise ValueError(
                    f"{type(rule).__name__} moves units of '{space.name}', and {kind} projects its gradient: its "
                    "moments are of no unit and cannot follow. Leave the module out by target_modules of the "
                    "optimizer, or take AgedAdamWSpec()."
                )
            if getattr(optimizer, "steps_in_backward", False) and rule.writes - {"trains", "forward"}:
                raise ValueError(
                    f"{type(rule).__name__} acts on gradients or before an update, and layerwise=True updates in the "
                    "backward pass. Set layerwise=False."
                )


def warn_of_other_optimizer(model: nn.Module, optimizer: Any, mend: str) -> None:
    """Say that the optimizer of a run is not the one that the active adapters of `model` ask for.

    Args:
        model: with its adapters.
        optimizer: the run's, maybe wrapped; None: not made yet, nothing is said.
        mend: how the loop gets the right one, as the end of a sentence.
    """
    trained = [config.optimizer for config in asked_configs(model) if not config.inference_mode]
    for spec in trained if optimizer is not None else ():
        other = isinstance(spec, OptimizerSpec) and not isinstance(innermost(optimizer), spec.builds)
        asks = any(getattr(spec, name, 1) != 1 for name in ("values_ratio", "B_ratio", "scores_ratio"))
        if other or (asks and _misses_ratios(model, optimizer, spec)):
            found = type(innermost(optimizer)).__name__ + ("" if other else " with other learning rates")
            warnings.warn(
                f"The config asks for optimizer={spec}, and the run has {found}: {mend}, or set optimizer=None in the "
                "config.",
                stacklevel=3,
            )
            return


def settings_of(args: Any) -> OptimizerSettings:
    """What a Trainer's arguments say about its optimizer."""
    return OptimizerSettings(
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        betas=(args.adam_beta1, args.adam_beta2),
        eps=args.adam_epsilon,
        seed=args.seed,
    )
