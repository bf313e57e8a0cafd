"""Floor 6: what happens to an adapter during training."""

from __future__ import annotations

from peft import PeftConfig
from torch import nn
from transformers import TrainerCallback

from ..tuners import adapter_layers
from ..tuners.sparse_lora import sparse_layers
from .base import ScheduleCallback
from .budget_competition import BudgetCompetitionCallback
from .calibration import initialize_support, load_support, save_support, write_supports
from .callbacks import LayerSamplingCallback, MaskRegrowthCallback, PruningCallback
from .initial_support import InitialSupportCallback
from .loop import Controller
from .penalties import L1PenaltyCallback, NuclearNormCallback
from .rank_reallocation import RankReallocationCallback
from .runner import RuleRunner
from .stochastic_factors import SplitFactorsCallback, TwoPassTrainer
from .support_picture import draw_support_history
from .support_search import SupportSearchCallback
from .telemetry import SupportTelemetryCallback
from .trainer_checks import NamedAdapterCallback
from .zeroth_order_trainer import ZerothOrderCallback, ZerothOrderTrainer, zeroth_order_optimizer

# In the order they must act at one step.
SCHEDULE_CALLBACKS: tuple[type[ScheduleCallback], ...] = (
    SupportSearchCallback,
    RankReallocationCallback,
    BudgetCompetitionCallback,
    L1PenaltyCallback,
    NuclearNormCallback,
    SplitFactorsCallback,
)


def callbacks_for(model_or_config: nn.Module | PeftConfig) -> list[TrainerCallback]:
    """The callbacks that carry out the schedules of a model's active adapters, or of a config; often an empty list.

    Pass them to `Trainer(callbacks=...)` or `trl.SFTTrainer(peft_config=config, callbacks=callbacks_for(config))`.

    Raises:
        TypeError: neither a config of this package nor a model with one of its adapters.
    """
    if hasattr(model_or_config, "asked_schedules"):
        configs = [model_or_config]
    elif isinstance(model_or_config, nn.Module) and (layers := adapter_layers(model_or_config)):
        configs = [layer.adapter_configs[n] for layer in layers for n in layer.active_adapters if layer.holds(n)]
    else:
        raise TypeError(
            "callbacks_for takes a config of this package or a model that has such an adapter, not "
            f"{type(model_or_config).__name__}. Call it after get_peft_model, or pass the config."
        )
    asked = [cls for cls in SCHEDULE_CALLBACKS if any(cls.option in config.asked_schedules for config in configs)]
    schedules = [cls() for cls in asked]
    if any(config.schedule for config in configs):
        # A rule must find the first support.
        schedules.insert(sum(isinstance(one, SupportSearchCallback) for one in schedules), RuleRunner())
    if isinstance(model_or_config, nn.Module):
        if any(name != "default" for layer in layers for name in layer.active_adapters):
            schedules.append(NamedAdapterCallback())
        waits = any(
            layer.is_undecided(name) for layer in sparse_layers(model_or_config) for name in layer.active_adapters
        )
    else:
        waits = getattr(model_or_config, "data_driven", False)
    # First of all: schedules look at the supports.
    return [InitialSupportCallback(), *schedules] if waits else schedules


__all__ = [
    "SCHEDULE_CALLBACKS",
    "BudgetCompetitionCallback",
    "Controller",
    "InitialSupportCallback",
    "L1PenaltyCallback",
    "LayerSamplingCallback",
    "MaskRegrowthCallback",
    "NuclearNormCallback",
    "PruningCallback",
    "RankReallocationCallback",
    "RuleRunner",
    "ScheduleCallback",
    "SplitFactorsCallback",
    "SupportSearchCallback",
    "SupportTelemetryCallback",
    "TwoPassTrainer",
    "ZerothOrderCallback",
    "ZerothOrderTrainer",
    "callbacks_for",
    "draw_support_history",
    "initialize_support",
    "load_support",
    "save_support",
    "write_supports",
    "zeroth_order_optimizer",
]
