"""Which adapted modules or layers are updated at a step."""

from __future__ import annotations

import copy
from typing import Any

from peft import PeftConfig

from ..rules import AlternateModules, Rule, SampleLayers, SwitchLayers
from ..training import RuleRunner
from ..tuners.shared.config import AdapterConfig
from .registry import Method, register, row


@register(
    "hft",
    paper="Hui et al., 2024",
    moves="which half of the matrices is updated, anew every period",
    use_when="full fine-tuning that forgets less is wanted and half of its optimizer state fits",
    cost="a dense fp32 delta of every adapted matrix; optimizer state of half of them",
)
def hft(period_steps: int | None = None, fraction: float = 0.5, level: str = "category", **overrides: Any) -> Method:
    """Whole-matrix deltas; 2 of 4 attention and 1 or 2 of 3 FFN matrices of a block train in a period (an epoch)."""
    options = {"r": 0, "density": 1.0, "granularity": "row", "target_modules": "all-linear"}
    options["schedule"] = [AlternateModules(period_steps, fraction, level)]
    return row(overrides, **options)


@register(
    "ist",
    paper="Yao et al., 2024",
    moves="which layers' adapters train, every step",
    use_when="memory for activations is short, or all layers at once overfit",
    cost="three forward passes of 16 samples in every 10 steps",
)
def ist(
    adapter: PeftConfig | None = None,
    trained: float = 0.25,
    suppressed: float = 0.5,
    suppression: float = 0.25,
    every: int = 10,
    r: int = 32,
    lora_alpha: float = 64,
    **overrides: Any,
) -> Method:
    """Layer sampling over `adapter`, any peft config (upstream's `LoraConfig`); default: a low-rank half alone, on the
    paper's five matrices of a Llama block (for models that name theirs otherwise pass `target_modules`)."""
    sampling = SampleLayers(trained, suppressed, suppression, every=every)
    targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    return _over(adapter, sampling, overrides, r=r, lora_alpha=lora_alpha, target_modules=targets)


@register(
    "lisa",
    paper="Pan et al., 2024",
    moves="which layers' adapters train, every 20 steps",
    use_when="optimizer state or gradients of all layers at once do not fit, and a probe is not wanted",
    cost="none",
)
def lisa(
    adapter: PeftConfig | None = None,
    layers: int = 2,
    every: int = 20,
    moments: str = "reset",
    r: int = 32,
    lora_alpha: float = 64,
    **overrides: Any,
) -> Method:
    """A few layers drawn alike train at a time (`SwitchLayers`), over `adapter`, any peft config; default: a low-rank
    half alone on all linears. The authors train full weights, and embedding and head always: for a head pass
    `modules_to_save`."""
    switching = SwitchLayers(layers, every, moments)
    return _over(adapter, switching, overrides, r=r, lora_alpha=lora_alpha, target_modules="all-linear")


def _over(adapter: PeftConfig | None, rule: Rule, overrides: dict[str, Any], **default: Any) -> Method:
    """`rule` over `adapter`, or over a low-rank half with the options `default`."""
    if adapter is None:
        return row(overrides, density=0.0, schedule=[rule], **default)
    if overrides:
        raise ValueError(f"{sorted(overrides)} belong to the adapter's own config; set them there.")
    if isinstance(adapter, AdapterConfig):
        adapter = copy.copy(adapter)
        adapter.schedule = [*adapter.schedule, rule]
        return Method(adapter)
    return Method(adapter, make_callbacks=lambda model: [RuleRunner(rule)])
