"""One short course of real training for a combination of parts: a parametrization, a kind of base, a rule.

A rule that is new is covered by being registered: it gets its options from `RULES`, and a test fails where it has none.
"""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel, get_peft_model

from hf_sparse_peft import (
    AdamSSpec,
    FactoredConfig,
    KernelLoraConfig,
    MaskedLoraConfig,
    Rule,
    SparseLoraConfig,
    SpectralLoraConfig,
    StructuredConfig,
    callbacks_for,
    make_optimizer,
)
from hf_sparse_peft.tuners.factored import ChannelBits, Codebooks, GroupBits, LowRankSparse, Spectral
from hf_sparse_peft.tuners.masked_lora import DenseUpdate, NoUpdate, ScoredMask
from hf_sparse_peft.tuners.spectral_lora import SVD, Diagonal, Full, SharedBases
from hf_sparse_peft.tuners.structured import (
    PHM,
    Bottleneck,
    Circulant,
    DenseMatrix,
    FactorPair,
    Givens,
    Hypernetwork,
    Kronecker,
    LowRankExperts,
    Quantised,
    QuasiGivens,
    Reflections,
    ScaleExperts,
    ScaleShift,
)
from hf_sparse_peft.utils.parts import part_types

STEPS, SAVE_AT = 8, 4
TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
SPARSE = {"r": 0, "density": 0.2, "block_size": 4}

PARAMETRIZATIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "entries": (SparseLoraConfig, SPARSE),
    "blocks": (SparseLoraConfig, {**SPARSE, "granularity": "block"}),
    "rows": (SparseLoraConfig, {**SPARSE, "granularity": "row"}),
    "columns": (SparseLoraConfig, {**SPARSE, "granularity": "column"}),
    "diagonal": (SparseLoraConfig, {**SPARSE, "granularity": "diagonal", "diagonal_blocks": 8, "density": 0.5}),
    "subnet": (SparseLoraConfig, {**SPARSE, "granularity": "subnet"}),
    "low rank": (SparseLoraConfig, {"r": 4, "density": 0.0}),
    "low rank + entries": (SparseLoraConfig, {"r": 2, "density": 0.05}),
    "kernel": (KernelLoraConfig, {"r": 4, "kernel": "mixed", "sparsity": 0.5}),
    "core": (SpectralLoraConfig, {"r": 4, "bases": SVD(train_B=True), "core": Full("values", residual="init")}),
    "shared bases": (SpectralLoraConfig, {"r": 4, "bases": SharedBases("AB", init="normal"), "core": Diagonal()}),
    "masked weights": (MaskedLoraConfig, {"update": DenseUpdate(), "mask": "all"}),
    "mask by scores": (MaskedLoraConfig, {"update": NoUpdate(), "masking": ScoredMask(), "mask": "all"}),
    "factored": (FactoredConfig, {"keep_base": True}),
    "codebooks": (FactoredConfig, {"keep_base": True, "form": Codebooks(groups=1, bits=2, examples=8)}),
    "low rank + rows": (FactoredConfig, {"keep_base": True, "form": LowRankSparse(0.1)}),
    "singular vectors": (FactoredConfig, {"keep_base": True, "form": Spectral(4)}),
    "channel bits": (FactoredConfig, {"keep_base": True, "form": ChannelBits(4)}),
    "group bits": (FactoredConfig, {"keep_base": True, "form": GroupBits(size=8, bits=3)}),
    "kronecker": (StructuredConfig, {"form": Kronecker(8, 4)}),
    "scale and shift": (StructuredConfig, {"form": ScaleShift(std=0.0)}),
    "bottleneck": (StructuredConfig, {"form": Bottleneck(4, matrix=DenseMatrix(std=0.1))}),
    "hypernetwork": (StructuredConfig, {"form": Hypernetwork(reduction=8, embedding=4, hidden=8, projected=4)}),
    "rotations": (StructuredConfig, {"form": Givens(lengths=True)}),
    "maps of pairs": (StructuredConfig, {"form": QuasiGivens()}),
    "reflections": (StructuredConfig, {"form": Reflections(True, "both", 4)}),
    "hypercomplex": (StructuredConfig, {"form": Bottleneck(4, matrix=PHM(2, rule_std=0.1))}),
    "circulant": (StructuredConfig, {"form": Circulant()}),
    "quantised factors": (StructuredConfig, {"form": FactorPair(4, 4, Quantised(2))}),
    "routed low ranks": (StructuredConfig, {"form": LowRankExperts(4, 2)}),
    "routed scales": (StructuredConfig, {"form": ScaleExperts(4)}),
}
KINDS = {
    "entries": {"support", "module"},
    "blocks": {"support", "module"},
    "rows": {"support", "module"},
    "columns": {"support", "module"},
    "diagonal": {"support", "module"},
    "subnet": {"subnet_row", "subnet_column", "module"},
    "low rank": {"rank", "module"},
    "low rank + entries": {"support", "rank", "module"},
    "kernel": {"kernel", "module"},
    "core": {"core", "basis", "module"},
    "shared bases": {"core", "module"},
    "masked weights": {"mask", "module"},
    "mask by scores": {"mask", "module"},
    "codebooks": {"module"},
    "low rank + rows": {"row", "module"},
    "singular vectors": {"vector", "module"},
    "factored": {"factors", "module"},
    "channel bits": {"channel", "module"},
    "group bits": {"module"},
    "kronecker": {"module"},
    "scale and shift": {"module"},
    "bottleneck": {"module"},
    "hypernetwork": {"module"},
    "rotations": {"module"},
    "maps of pairs": {"pair", "module"},
    "reflections": {"module"},
    "hypercomplex": {"module"},
    "circulant": {"module"},
    "quantised factors": {"module"},
    "routed low ranks": {"expert", "module"},
    "routed scales": {"expert", "module"},
}
"""Kinds of unit spaces that each has."""
BASES = ("fp32", "bf16", "nf4", "conv1d")

UNSCALED = (KernelLoraConfig, FactoredConfig, MaskedLoraConfig)
SCALED = tuple(name for name, (cls, _) in PARAMETRIZATIONS.items() if cls not in UNSCALED)
RANKS = ("low rank", "low rank + entries")
SUPPORTS = tuple(name for name in PARAMETRIZATIONS if "support" in KINDS[name])
RULES: dict[str, dict[str, Any]] = {
    "freeze": {"only": ("entries", "low rank + entries")},
    "regrow": {"every": 3, "grow": "gradient", "fraction": 0.5, "retired": 0.3},
    "sample_layers": {"trained": 0.5, "every": 3, "probe_batch": 4, "only": SCALED},
    "choose_support": {"warmup": 2, "steps": 2, "reduction": "step", "only": SUPPORTS},
    "switch_layers": {"layers": 1, "every": 3},
    "l1_penalty": {"weight": 10.0},
    "nuclear_norm": {"weight": 0.1, "min_side": 8, "only": ("entries", "low rank + entries")},
    "search_support": {"trials": 2, "steps": 1, "batches": 1},
    "relocate_subnets": {"every": 3, "rate": "rewarm", "only": ("subnet",)},
    "prune": {"final_fraction": 0.5, "every": 2, "start": 0.0, "end": 0.7},
    "prune: experts": {
        "space": "expert", "final_fraction": 0.5, "every": 2, "start": 0.0, "end": 0.7,
        "only": ("routed low ranks", "routed scales"),
    },
    "balance_loss": {"weight": 0.5, "only": ("routed low ranks",)},
    "alternate_modules": {
        "period_steps": 3, "categories": {"attention": ["q_proj", "v_proj", "c_attn"], "ffn": ["down_proj", "c_proj"]},
    },
    "allocate": {
        "budget": {"type": "average_rank", "r": 1}, "every": 2, "initial_warmup": 0.0, "only": RANKS,
    },
    "allocate: jointly": {
        "spaces": ("rank", "support"), "budget": {"type": "fraction"}, "unit_score": "mean", "every": 2,
        "initial_warmup": 0.0, "only": ("low rank + entries",),
    },
    "allocate: kernel": {
        "spaces": ("kernel",), "budget": {"type": "density", "fraction": 0.2}, "every": 2, "initial_warmup": 0.0,
        "fixed_at_end": False, "only": ("kernel",),
    },
    "allocate: rows": {
        "spaces": ("row",), "budget": {"type": "fraction", "fraction": 0.3}, "score": {"type": "windowed", "steps": 2},
        "unit_score": "mean", "every": 2, "initial_warmup": 0.2, "count_from": 0, "fixed_at_end": False,
        "only": ("low rank + rows",),
    },
    "sample_vectors": {"every": 2, "iterations": 2, "warmup": 1},
    "cast": {"only": ("masked weights",)},
    "bit_penalty": {"weight": 20.0, "rate": 100.0},
    "distil": {"weight": 0.5},
    "distil_features": {"logits": 0.5},
    "largest_error": {"weight": 50.0, "only": ("factored",)},
    "trained_rank_pruning": {"every": 2, "energy": 0.5, "nuclear_norm": 0.1},
    "freeze_gradually": {"until": 0.7},
    "frobenius_decay": {"weight": 0.1},
    "error_feedback": {"penalty": 0.5, "proximal": 0.1, "weight_decay": 0.01, "only": ("masked weights",)},
    "learn_mask": {"final_density": 0.5, "penalty": 1.0, "only": ("mask by scores",)},
    "orthogonality": {"weight": 0.5},
    "pair_orthogonality": {"weight": 0.5},
    "train_nm": {"only": ("masked weights",)},
    "factor_experts": {"consistency": 0.0, "only": RANKS},
    "sample_rank": {"final_rank": 2, "only": RANKS},
    "adaptive_row_scale": {"max_scale": 2.0, "only": RANKS},
    "gradient_noise": {"sigma": 0.1, "only": RANKS},
    "stable_rank": {"every": 1, "window": 2, "last": 2, "threshold": 10.0, "first": 1, "only": RANKS},
    "group_lasso": {"weight": 3.0, "every": 2, "only": RANKS},
    "grow_rank": {"every": 1, "warmup": 2, "modules": 1, "only": RANKS},
    "l1_norm": {"weight": 0.01, "of": "update"},
    "lobster": {"weight": 0.05},
    "serene": {"weight": 0.05, "projections": 2},
    "plateau_threshold": {"tolerance": 0.5, "patience": 1, "every": 2, "slack": -0.5, "data": "training"},
    "mask_sparsity": {"weight": 0.5, "start": 0.25, "end": 0.75},
    "group_envelope": {"weight": 20.0, "only": (*SUPPORTS, *RANKS)},
    "half_space": {"weight": 0.5, "epsilon": 0.5},
    "hesso": {"periods": 2, "start": 0.2, "end": 0.8},
    "proximal_gate": {"weight": 0.2, "scaled_by_lr": False, "only": RANKS},
    "lora_prune": {"only": ()},  # units of the base, in callbacks of their own: tests/pruning
    "light_peft": {"only": ()},
    "transfer_pruning": {"only": ()},
}  # fmt: skip
"""Options with which a registered rule acts within eight steps; `only`: parametrizations that it is meant for."""
CONFIG: dict[str, dict[str, Any]] = {
    "cast": {"optimizer": AdamSSpec(mask_every=3)},
    "freeze": {"criterion": "smallest_magnitude"},
    "search_support": {"criterion": "random"},
    "factor_experts": {"factor_masks": {"kind": "stochastic", "experts": 2}},
}
"""What a rule wants of the config beside itself."""

EXCEPTIONS = {
    ("identity", "kernel"): "factors start at random, and the kernel of two random point sets is not 0 (as published)",
    ("identity", "factored"): "its factors are an approximation of the weight",
    ("identity", "low rank + rows"): "its sum is the weight to rounding",
    ("identity", "singular vectors"): "its product is the weight to rounding",
    ("identity", "channel bits"): "the weight is rounded",
    ("identity", "group bits"): "the weight is rounded",
    ("identity", "bottleneck"): "both of its matrices start near 0 (as published)",
    ("identity", "hypercomplex"): "as bottleneck",
    ("identity", "quantised factors"): "a matrix of zeros has no deviation (as published)",
    ("merging", "hypercomplex"): "as bottleneck",
    ("identity", "hypernetwork"): "all of it is drawn near 0 (as published)",
    ("merging", "hypernetwork"): "as bottleneck",
    ("merging", "bottleneck"): "it is no change of a weight, and refuses to be merged",
    ("merging", "routed low ranks"): "as bottleneck",
    ("merging", "routed scales"): "as bottleneck",
    ("accumulation", "balance_loss"): "it is of a forward pass's tokens, and no sum over them (as published)",
    ("accumulation", "factor_experts"): "every forward pass draws experts of its own (as published)",
    ("accumulation", "train_nm"): "many 4-bit weights are equal, and the last bit of a sum decides which are kept",
    ("accumulation", "gradient_noise"): "every micro-batch has noise of its own (as published)",
}
"""(contract, parametrization or rule) -> why it is not kept; the tests hold these to be true too."""


def rule_names() -> list[str]:
    """The package's own rules; what tests register is theirs."""
    return sorted(n for n, cls in part_types(Rule).items() if cls.__module__.startswith("hf_sparse_peft."))


def fits(parametrization: str, rule: str | None) -> bool:
    """Whether the rule has something to act on there."""
    if parametrization == "mask by scores":
        return rule == "learn_mask"  # nothing else changes the mask
    if rule is None:
        return True
    only = RULES[rule].get("only", tuple(PARAMETRIZATIONS))
    return parametrization in only and bool(rule_of(rule).acts_on & KINDS[parametrization])


def rule_of(name: str) -> Rule:
    """The rule of that name in `RULES`."""
    options = {option: value for option, value in RULES[name].items() if option != "only"}
    return part_types(Rule)[name.split(":")[0]](**options)


PAIRS = [(p, rule) for p in PARAMETRIZATIONS for rule in (None, *RULES) if fits(p, rule)]


def combinations(default: list[tuple[str, str | None]], bases: tuple[str, ...] = BASES) -> pytest.MarkDecorator:
    """Every pair of `PAIRS` on each of `bases`. Those of `default` run by default, on one base, which is dealt out in
    turns; the rest is slow."""
    cases = []
    for parametrization, rule in PAIRS:
        turn = default.index((parametrization, rule)) % len(bases) if (parametrization, rule) in default else None
        for place, base in enumerate(bases):
            marks = () if place == turn else (pytest.mark.slow,)
            cases.append(pytest.param(parametrization, base, rule, marks=marks, id=f"{parametrization}-{base}-{rule}"))
    return pytest.mark.parametrize(("parametrization", "base", "rule"), cases)


def each_rule(times: int) -> list[tuple[str, str | None]]:
    """Each rule, and none, with the `times` parametrizations that have had fewest; then no rule with those that had
    none."""
    seen, found = Counter(), []
    for rule in (*RULES, None):
        for least in sorted((p for p, other in PAIRS if other == rule), key=seen.__getitem__)[:times]:
            seen[least] += 1
            found.append((least, rule))
    return found + [(parametrization, None) for parametrization in PARAMETRIZATIONS if not seen[parametrization]]


EVERY_PAIR = combinations(each_rule(2))
EVERY_PART = combinations(each_rule(1), tuple(base for base in BASES if base != "bf16"))
"""Without bf16, which rounds the sum of two micro-batches otherwise than that of one."""


def config_of(parametrization: str, base: str, rule: str | None):
    """A fresh config."""
    cls, options = PARAMETRIZATIONS[parametrization]
    targets = {**TARGETS, "target_modules": ["c_attn", "c_proj"]} if base == "conv1d" else TARGETS
    schedule = [] if rule is None else [rule_of(rule)]
    return cls(**{**options, **targets, **CONFIG.get(rule, {}), "schedule": schedule})


def adapted(parametrization: str, base: str, rule: str | None):
    """The base with a fresh adapter."""
    model = tiny.base(base)
    torch.manual_seed(1)  # the draw of factors
    return get_peft_model(model, config_of(parametrization, base, rule))


def all_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer, by name."""
    found = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in getattr(optimizer, "optimizer", optimizer).state.items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor | int | float):
                found[f"optimizer.{names[parameter]}.{key}"] = torch.as_tensor(value).clone()
    return found


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing on one side or differ in a bit."""
    changed = [key for key in sorted(set(left) & set(right)) if not torch.equal(left[key], right[key])]
    return sorted(set(left) ^ set(right)) + changed


def train(model, out, *, resume=None, save_at=None, **options) -> dict[str, torch.Tensor]:
    """Eight steps; returns everything that trains after the last one."""
    state: dict[str, torch.Tensor] = {}

    class Watch(tiny.TrainerCallback):
        def on_step_end(self, args, trainer_state, control, model=None, optimizer=None, **kwargs):
            control.should_save = trainer_state.global_step == save_at
            if trainer_state.global_step == trainer_state.max_steps:
                state.update(all_state(model, optimizer))

    options = {"weight_decay": 0.01, "lr_scheduler_type": "constant", **options}
    steps = options.pop("steps", STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = tiny.TokenData(32, repeated=options.pop("repeated", 1))
        callbacks = [*callbacks_for(model), Watch()]
        made = {"callbacks": callbacks, "optimizer": options.pop("optimizer", make_optimizer)}
        tiny.train(model, out, steps, data=data, resume=resume, **made, **options)
    return state


OWN = ("_lora_", ".factored_", ".structured_")
"""What names of adapters' tensors have in them."""


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """Scores of fixed tokens in evaluation mode."""
    training = model.training
    model.eval()
    result = model(input_ids=torch.arange(36).view(3, 12) % tiny.VOCAB).logits
    model.train(training)
    return result


def base_bits(model) -> dict[str, torch.Tensor]:
    """Copies of what is saved of the model without its adapter, by the base's own names."""
    named = {k.replace(".base_layer", "").removeprefix("base_model.model."): v for k, v in model.state_dict().items()}
    return {k: v.detach().clone() for k, v in named.items() if not any(kind in k for kind in OWN)}


@dataclass
class Course:
    """What one combination did."""

    folder: Path
    logits: dict[str, torch.Tensor]
    """`base`, `start`, `trained`, `disabled`."""
    bits: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]
    """The base before and after."""
    start: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    config: Any


def take_course(folder: Path, parametrization: str, base: str, rule: str | None) -> Course:
    """Build, look, train eight steps with a checkpoint in the middle, look again, save."""
    model, seen = adapted(parametrization, base, rule), {}
    with model.disable_adapter():
        seen["base"] = logits(model)
    seen["start"] = logits(model)
    before, start = base_bits(model), {k: v.detach().clone() for k, v in model.state_dict().items()}
    state = train(model, folder, save_at=SAVE_AT)
    after, seen["trained"] = base_bits(model), logits(model)
    with model.disable_adapter():
        seen["disabled"] = logits(model)
    model.save_pretrained(folder / "adapter")
    return Course(folder, seen, (before, after), start, state, model.peft_config["default"])


def reloaded(course: Course, base: str):
    """The saved adapter over a fresh base."""
    return PeftModel.from_pretrained(tiny.base(base), str(course.folder / "adapter"))
