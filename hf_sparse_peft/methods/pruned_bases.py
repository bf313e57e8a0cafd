"""Methods for bases that were pruned."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from ..pruning.units.unit_masks import mask_units
from ..pruning.while_training.light_peft import EstimateImportance, LightPEFTCallback
from ..pruning.while_training.lora_prune import LoRAPruneCallback, PruneUnits
from ..pruning.while_training.transfer_pruning import LearnUnitMasks, TransferPruningCallback
from ..rules import AccumulatedGradient, Regrow
from ..sparsity import Curve, KeptWeights, Linear
from ..training import AgedAdamWSpec
from ..tuners import MaskedLoraConfig
from .registry import Method, register, row
from .upstream import Rules, upstream_method


@register(
    "mask-lora",
    paper="Zimmer et al., 2023 (PERP)",
    moves="nothing",
    use_when="a pruned base is retrained, or tuned, and is to stay as sparse when the adapter is merged",
    cost="a bit a weight; two dense products a layer more than LoRA's",
)
def mask_lora(r: int = 16, lora_alpha: float = 32, mask: str = "zeros", **overrides: Any) -> Method:
    """MaskLoRA: a LoRA whose product is masked by what the base keeps, so that it trains as it is merged. The official
    code reads the mask off the weight in every pass; here it is a bit an entry, saved with the adapter. The authors
    train with AdamW without weight decay, linear decay after 10 % warm-up, rates of 5e-6 to 5e-4."""
    options = {"r": r, "lora_alpha": lora_alpha, "mask": mask, "target_modules": "all-linear"}
    return Method(MaskedLoraConfig(**{**options, **overrides}))


@register(
    "loraprune",
    paper="Zhang et al., 2024 (LoRAPrune)",
    moves="heads and channels of the base: masked along a cubic curve",
    use_when="a base is to become smaller while it is tuned; slice_model cuts it afterwards",
    cost="two dense matrices of each adapted weight, one after the other, at each step",
    upstream="LoraConfig",
    changes_base=True,
)
def loraprune(
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    sparsity: float = 0.5,
    start: float = 0.1,
    end: float = 0.9,
    every: int = 10,
    whole_first: float = 0.1,
    whole_last: int = 1,
    schedule: Rules = (),
    **overrides: Any,
) -> Method:
    """A LoRA, and `PruneUnits` by the gradient that it estimates. The authors train with batches of 128 at 1e-4."""
    rule = PruneUnits(sparsity, start, end, every, whole_first=whole_first, whole_last=whole_last)
    options = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    return upstream_method("LoraConfig", schedule, overrides, partial(LoRAPruneCallback, rule), **options)


@register(
    "light-peft",
    paper="Gu et al., 2024 (Light-PEFT)",
    moves="nothing: factors on heads and channels train beside the LoRA, and say what a second run can do without",
    use_when="base and adapter are to be cut before a long run, after a short one",
    cost="a factor a head and channel; norms of all modules' outputs in the second half of the steps",
    upstream="LoraConfig",
    changes_base=True,
)
def light_peft(
    r: int = 8,
    lora_alpha: float = 16,
    l1: float = 1e-4,
    head_rate: float = 100.0,
    channel_rate: float = 50.0,
    schedule: Rules = (),
    **overrides: Any,
) -> Method:
    """The first of two stages (800 steps at 3e-4 in the paper): `callback.importance.second_stage()` says what is left
    for `slice_model` of the base as it was, and for the LoRA of the second."""
    rule = EstimateImportance(l1=l1, head_rate=head_rate, channel_rate=channel_rate)
    return upstream_method(
        "LoraConfig",
        schedule,
        overrides,
        partial(LightPEFTCallback, rule),
        partial(mask_units, trained=True),
        r=r,
        lora_alpha=lora_alpha,
    )


@register(
    "transfer-pruning",
    paper="Dery et al., 2023 (transfer pruning); Xia et al., 2022 (CoFi)",
    moves="heads, channels, whole parts of blocks: masked by gates that train beside the LoRA",
    use_when="a base is to become smaller for a task of few examples, and a related task has more",
    cost="a gate a head and channel with Adam's moments; a second pass, on a batch of the related task, at each step",
    upstream="LoraConfig",
    changes_base=True,
)
def transfer_pruning(
    r: int = 8,
    lora_alpha: float = 16,
    sparsity: float = 0.5,
    transfer_weight: float = 1.0,
    transfer_data: Iterable[Mapping[str, Any]] | None = None,
    start: float = 0.03,
    full: float = 0.2,
    end: float = 0.83,
    gate_rate: float = 0.01,
    multiplier_rate: float = 0.01,
    schedule: Rules = (),
    **overrides: Any,
) -> Method:
    """CoFi's hard-concrete masks, trained on the task and on `transfer_data`, batches of a related one, at once: the
    paper shares masks and weights, and finds that the second task helps most while masks train. `transfer_weight=0` is
    CoFi, which trains all weights and distils; here a LoRA trains. The numbers are those of CoFi's code."""
    rule = LearnUnitMasks(sparsity, transfer_weight, start, full, end, gate_rate, multiplier_rate)
    callback = partial(TransferPruningCallback, rule, transfer_data)
    return upstream_method("LoraConfig", schedule, overrides, callback, r=r, lora_alpha=lora_alpha)


@register(
    "seft",
    paper="Xiao et al., 2026 (SEFT)",
    moves="support: as spiel-ag, among the weights that a pruned base keeps",
    use_when="a pruned base is tuned by few entries, which move, and is to stay as sparse when they are merged",
    cost="as spiel-ag; the base weight is read at each move",
)
def seft(
    density: float = 0.01,
    every: int = 20,
    steps: int = 5,
    fraction: Curve | float = Linear(0.2, 0.0),
    drop: str = "magnitude",
    **overrides: Any,
) -> Method:
    """The idea of SEFT, of which only the abstract could be read: SpIEL's drop and grow on a pruned base. The abstract
    lets entries grow on pruned weights too and restores the sparsity by a sensitivity; here supports stay inside of
    what the base keeps (`pattern=KeptWeights()`), so that sparsity never changes. `drop="sensitivity"` drops by
    |value x gradient|. Use it on bases that were pruned; on a dense one it is spiel-ag.
    """
    move = Regrow(every=every, drop=drop, grow=AccumulatedGradient(steps=steps), fraction=fraction)
    options = {"r": 0, "density": density, "pattern": KeptWeights(), "schedule": [move]}
    return row(overrides, **options, target_modules="all-linear", optimizer=AgedAdamWSpec())
