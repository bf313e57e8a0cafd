"""Methods whose units are structures of a transformer block: channels, heads, whole matrices, layers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from peft import PeftConfig

from ..rules import AlternateModules, SampleLayers
from ..sparsity import DataCriterion, Magnitude, Score, SmallestMagnitude, UnitsPerModule
from ..training import LayerSamplingCallback
from ..tuners import SparseLoraConfig, StructureConfig
from ..tuners.shared.config import AdapterConfig
from ..utils.parts import load_part_by_name
from .registry import Method, register, with_overrides

_ROWS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), "row")
_COLUMNS = dict.fromkeys(("o_proj", "down_proj"), "column")


@register(
    "s2ft",
    paper="Yang et al., 2024",
    moves="nothing",
    use_when="training should be fast and leave as a plain LoRA: a few whole channels or heads learn",
    cost="none; keeps only the chosen columns of the input for the backward pass",
)
def s2ft(
    down: float = 0.03,
    up: float = 0.0,
    gate: float = 0.0,
    o: float = 0.0,
    v: float = 0.0,
    channels: float = 0.0,
    heads: float = 0.0,
    scope: str = "model",
    criterion: str | Score = "random",
    largest: bool = True,
    **overrides: Any,
) -> Method:
    """Columns of `down_proj` drawn over all layers together, as published; `up` and `gate` choose rows. `o` and `v`
    choose whole heads: the columns of an attention head in `o_proj`, the rows of a key/value head in `v_proj`.

    Each ratio selects by itself. `channels` instead couples gate, up and down (row c, row c, column c), and `heads`
    couples q, k, v and o by key/value head; they replace the ratios of the same matrices. `criterion` and `largest` are
    the paper's selection strategies: `random` (its default), `magnitude` (weight norm), `activation`,
    `weighted_activation` (weight norm times activation norm) and `gradient`, the `largest` or the smallest. For models
    that name their matrices otherwise pass `structures`, `granularity_pattern` and `target_modules`.
    """
    ratios = {"down_proj": down, "up_proj": up, "gate_proj": gate, "o_proj": o, "v_proj": v}
    coupled = {
        ("gate_proj", "up_proj", "down_proj"): ("channel", channels),
        ("q_proj", "k_proj", "v_proj", "o_proj"): ("head", heads),
    }
    structures = []
    for names, (unit, density) in coupled.items():
        if density:
            structures.append(StructureConfig(list(names), unit, density, scope))
            ratios = {name: ratio for name, ratio in ratios.items() if name not in names}
    units = {"o_proj": "head", "v_proj": "head"}
    structures += [StructureConfig([n], units.get(n, "channel"), ratio, scope) for n, ratio in ratios.items() if ratio]
    targets, sides = [name for one in structures for name in one.modules], {**_ROWS, **_COLUMNS}
    if not {"structures", "target_modules"} & set(overrides):
        sides = {name: sides[name] for name in targets}
    options = {
        "r": 0,
        "density": 0.0,
        "structures": structures,
        "granularity_pattern": sides,
        "target_modules": targets,
        "criterion": criterion if largest else _smallest(criterion),
    }
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))


def _smallest(criterion: str | Score) -> Score:
    """The score by which the smallest rank first."""
    score = load_part_by_name(Score, criterion, "criterion")
    if isinstance(score, Magnitude):
        return SmallestMagnitude()
    if not isinstance(score, DataCriterion):
        raise ValueError(
            f"largest=False turns a ranking round, and criterion='{score.part_type}' has none to turn. It goes with "
            "'magnitude', 'activation', 'weighted_activation' and 'gradient'."
        )
    return replace(score, largest=False)


@register(
    "sltrain",
    paper="Han et al., 2024",
    moves="nothing",
    use_when="a low rank is too little and nobody knows which entries it misses",
    cost="4 bytes of index an entry in memory, one in the file",
)
def sltrain(density: float = 0.03, r: int = 128, lora_alpha: float = 32, **overrides: Any) -> Method:
    """`(alpha / r) B A + S` on a uniformly random fixed support, beside the frozen weight.

    The fine-tuning form: it starts as the identity, with B = 0 and values 0; `support_init="uniform"` draws the values
    from U(+-1/sqrt(columns)) as the pre-training form does.
    """
    options = {"r": r, "lora_alpha": lora_alpha, "density": density, "criterion": "random"}
    return Method(SparseLoraConfig(**with_overrides({**options, "target_modules": "all-linear"}, overrides)))


@register(
    "dsee",
    paper="Chen et al., 2023",
    moves="nothing",
    use_when="LoRA, with a few entries for what no low rank reaches",
    cost="a decomposition of each weight at injection: minutes for large models",
)
def dsee(r: int = 4, lora_alpha: float = 32, num_sparse: int = 128, **overrides: Any) -> Method:
    """`(alpha / r)(U V + S2)` on the query and value matrices (peft's default targets), with `num_sparse` entries where
    a low-rank + sparse decomposition of the pretrained weight has its largest sparse entries. The paper's update; its
    pruned base is another matter."""
    options = {
        "r": r,
        "lora_alpha": lora_alpha,
        "budget": UnitsPerModule(num_sparse),
        "criterion": "decomposition_residual",
        "scale_support": True,
        "factor_init": "normal",
    }
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))


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
    return Method(SparseLoraConfig(**with_overrides(options, overrides)))


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
    interval: int = 10,
    r: int = 32,
    lora_alpha: float = 64,
    **overrides: Any,
) -> Method:
    """Layer sampling over `adapter`, any peft config (upstream's `LoraConfig`); default: a low-rank half alone, on the
    paper's five matrices of a Llama block (for models that name theirs otherwise pass `target_modules`)."""
    sampling = SampleLayers(trained, suppressed, suppression, interval=interval)
    if adapter is None:
        targets = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
        options = {"r": r, "lora_alpha": lora_alpha, "density": 0.0, "schedule": [sampling]}
        return Method(SparseLoraConfig(**with_overrides({**options, "target_modules": targets}, overrides)))
    if overrides:
        raise ValueError(f"{sorted(overrides)} belong to the adapter's own config; set them there.")
    if isinstance(adapter, AdapterConfig):
        adapter = copy.copy(adapter)
        adapter.schedule = [*adapter.schedule, sampling]
        return Method(adapter)
    return Method(adapter, make_callbacks=lambda model: [LayerSamplingCallback(sampling)])
