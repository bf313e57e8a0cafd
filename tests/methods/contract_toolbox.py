"""One short course of real training for every registered method, whose parts the contract tests look at.

A method that is new is covered by being registered: its options come from `TINY` by the names of its own arguments.
"""

from __future__ import annotations

import copy
import functools
import inspect
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainerCallback, TrainingArguments

from hf_sparse_peft import (
    Allocate,
    AverageRank,
    Fraction,
    GrowRank,
    Lobster,
    MaskedLoraConfig,
    Orthogonality,
    PlateauThreshold,
    ProximalGate,
    SampleRank,
    SeReNe,
    StableRank,
    methods,
    set_masks,
)
from hf_sparse_peft.sparsity import pack_bits
from hf_sparse_peft.tuners import adapter_layers

VOCAB, STEPS, SAVE_AT = 64, 8, 4

TINY: dict[str, Any] = {
    "target_modules": ["q_proj", "v_proj", "down_proj"],
    "density": 0.1,
    "every": 3,
    "steps": 2,
    "first": 2,
    "r": 4,
    "target_r": 2,
}
"""Values for a model of width 32, given to every method that has an argument of that name."""

OPTIONS: dict[str, dict[str, Any]] = {
    "mask-lora": {"mask": "given"},
    "curing": {"max_rank": 5, "examples": 8, "keep_base": True},
    "dsformer": {"ratio": 0.6, "keep_base": True},
    "losparse": {"sparse": 0.3, "window": 2, "initial_warmup": 0.2, "keep_base": True},
    "self-compression": {"bits": 4, "weight": 20.0, "keep_base": True},
    "sketchtune": {"groups": 1, "bits": 2, "examples": 8, "keep_base": True},
    "sst": {"keep_base": True},
    "perp": {"mask": "given", "norms": False},  # copies of norms are no bits of the base
    "spdf": {"norms": False},
    "welore": {"keep_base": True, "min_ratio": 0.0},
    "lord": {"keep_base": True, "examples": 8},
    "low-rank-transformer": {"keep_base": True},
    "trp": {"keep_base": True, "energy": 0.5},
    "unlearn-sparse": {"norms": False, "mask": "given"},
    "rosa": {"warmup": 2, "steps": 2},
    "lift": {"filter_rank": 4},
    "sara": {"min_side": 8},
    "adalora": {
        "schedule": [
            Allocate(budget=AverageRank(2), every=2, initial_warmup=0.0, final_warmup=0.25), Orthogonality(0.1),
        ],
    },
    "sora": {"schedule": [ProximalGate(0.2, scaled_by_lr=False)]},
    "dylora": {"schedule": [SampleRank(final_rank=2)]},
    "increlora": {"schedule": [GrowRank(every=1, warmup=2, modules=2), Orthogonality(0.1)]},
    "cuttlefish": {"schedule": [StableRank(1, window=2, last=2, threshold=10.0, first=1)]},
    "maestro": {"weight": 3.0, "every": 2},
    "joint-budget": {
        "schedule": [
            Allocate(("rank", "support"), Fraction(0.5), unit_score="mean", every=2, initial_warmup=0.0),
        ],
    },
    "fish": {"examples": 8},
    "lt-sft": {"warmup_steps": 3, "warmup_lr": 1e-3},
    "diablo": {"blocks": 8},
    "diffusekrona": {"rows": 8, "cols": 4},
    "houlsby": {"size": 4, "norms": False},
    "ssf": {"norms": False},
    "hyperformer": {"reduction": 8, "norms": False},
    "hyperformer++": {"reduction": 8, "norms": False},
    "mpoe": {"experts": 2, "target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "ether": {"blocks": 4},
    "ether+": {"blocks": 4},
    "compacter": {"reduction": 4, "norms": False},
    "compacter++": {"reduction": 8, "norms": False, "target_modules": ["down_proj"]},
    "loretta-adp": {"size": 4, "norms": False},
    "loretta-rep": {"norms": False},
    "smt": {"attention": 0.02, "mlp": 0.02, "block_size": 8, "warmup_steps": 3},
    "s2ft": {"down": 0.1, "target_modules": ["down_proj"]},
    "dsee": {"num_sparse": 24},
    "hft": {"period_steps": 3},
    "ist": {"trained": 0.5},
    "mosa": {"experts": 2},
    "nola": {"k": 8},
    "lora-mini": {"inner": 8},
    "gora": {"least": 1},
    "lora-sb": {"step_size": 1e-3, "examples": 8},
    "intrinsic-dimension": {"dimension": 40},
    "s2-lora": {"schedule": [ProximalGate(0.5)]},
    "mos": {"shards": 2, "r": 3},
    "capaboost": {"density": 0.5},
    "lobster": {"schedule": [Lobster(0.05), PlateauThreshold(0.5, 1, 2, slack=-0.5, data="training")]},
    "serene": {"schedule": [SeReNe(0.05), PlateauThreshold(0.5, 1, 2, slack=-0.5, data="training")]},
    "wgsef": {"weight": 20.0},
    "hspg": {"weight": 0.05, "epsilon": 0.99},
    "hesso": {"periods": 2},
    "gradual-pruning": {
        "schedule": [{"type": "prune", "final_fraction": 0.5, "every": 2, "start": 0.0, "end": 0.7}]
    },
}  # fmt: skip
"""What a method needs beyond `TINY` to move within eight steps."""


TRAINING: dict[str, dict[str, Any]] = {}
"""Arguments of `TrainingArguments` for methods that ask for others."""

EXCEPTIONS: dict[tuple[str, str], str] = {
    (
        "identity",
        "snell",
    ): "factors start at random, and the kernel of two random point sets is not 0 (as published)",
    ("identity", "snella"): "as snell",
    ("identity", "edora"): "as lora-xs",
    ("identity", "lora-xs"): "the core starts at N(0, 1e-10), not at 0 (as published)",
    ("identity", "dsformer"): "its factors are an approximation of the weight",
    ("identity", "losparse"): "its sum is the weight to rounding",
    ("identity", "self-compression"): "the weight is rounded",
    ("identity", "sst"): "its product is the weight to rounding",
    ("identity", "houlsby"): "both matrices start near 0 (as published)",
    ("identity", "hyperformer"): "all of it is drawn near 0 (as published)",
    ("identity", "hyperformer++"): "as hyperformer",
    ("identity", "ether"): "a reflection is never the identity",
    ("identity", "compacter"): "no matrix starts at 0 (as published)",
    ("identity", "compacter++"): "as compacter",
    ("identity", "mpoe"): "its product is the weight to rounding, and second experts are dropped",
    ("identity", "1-bit-adapters"): "a matrix of zeros has no deviation (as published)",
    ("identity", "loretta-adp"): "no core starts at 0 (as published)",
    ("identity", "loretta-rep"): "as loretta-adp",
    ("identity", "ssf"): "scales start at N(1, 0.02^2) (as published)",
    ("identity", "welore"): "factors are an approximation of the weight",
    ("identity", "pela"): "as welore",
    ("identity", "low-rank-transformer"): "as welore",
    ("moves", "dylora"): "a rank is sampled for a step, and all components live between steps",
    ("loss", "mezo"): "eight random directions need not lead down",
    ("loss", "sparse-mezo"): "as mezo",
    ("loss", "self-compression"): "a penalty of 20 takes bits faster than a few steps make up for",
}
"""(contract, method) -> why the method does not keep it. The tests hold these to be true too, but for `loss`."""


def excepted(contract: str, name: str) -> bool:
    return (contract, name) in EXCEPTIONS


def build(name: str):
    """The method `name` with options for a tiny model."""
    known = inspect.signature(methods.describe(name).build).parameters
    options = {key: value for key, value in TINY.items() if key in known or key == "target_modules"}
    return methods.get(name, **copy.deepcopy({**options, "task_type": "CAUSAL_LM", **OPTIONS.get(name, {})}))


@functools.cache
def brings_a_part() -> list[str]:
    """Methods that together have every kind of adapter, part of a config (rule, score, growth, budget, optimizer),
    Trainer's class and step of their own; each is the one that has most of what those before it leave out."""
    parts: dict[str, set[Any]] = {}
    for name in methods.names(upstream=False):
        method = build(name)
        parts[name] = {type(method.config), method.trainer_class, method.make_callbacks, method.make_ready is None}
        parts[name] |= set(_types(method.config.to_dict()))
    left, found = set().union(*parts.values()), []
    while left:
        found.append(max(parts, key=lambda name: len(parts[name] & left)))
        left -= parts[found[-1]]
    return found


def _types(value: Any, key: str = "") -> list[tuple[str, str]]:
    """Where a part stands, and its type: `("grow", "gradient")`."""
    if isinstance(value, dict):
        own = [(key, value["type"])] if "type" in value else []
        return own + [one for name, inner in value.items() for one in _types(inner, name)]
    return [one for inner in value for one in _types(inner, key)] if isinstance(value, list | tuple) else []


def save_base(folder: Path) -> None:
    """The tiny Llama that all courses start from."""
    tiny.llama(vocab_size=VOCAB, pad_token_id=None).save_pretrained(folder)


def load_base(folder: Path, kind: str):
    return copy.deepcopy(_loaded_base(folder, kind))


@functools.cache
def _loaded_base(folder: Path, kind: str):
    options = {}
    if kind == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return LlamaForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **options)


def adapted(name: str, folder: Path, kind: str):
    """A fresh base with the method's adapter; returns model and method."""
    method, base = build(name), load_base(folder, kind)
    torch.manual_seed(1)  # the draw of low-rank factors
    model = get_peft_model(base, method.config)
    if isinstance(method.config, MaskedLoraConfig) and method.config.mask == "given":
        keep_all(model)
    method.prepare(model, first_run=lambda: _two_checkpoints(folder))
    return model, method


def keep_all(model) -> None:
    """Tell masked LoRAs that nothing was removed from the base."""
    sizes = {layer.module_name: layer.in_features * layer.out_features for layer in adapter_layers(model)}
    set_masks(model, {name: pack_bits(torch.zeros(size, dtype=torch.bool)) for name, size in sizes.items()})


def _two_checkpoints(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The base and what a run has made of it that changed a tenth of each weight."""
    before, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(4)
    return before, {name: t + (torch.rand(t.shape, generator=generator) < 0.1) for name, t in before.items()}


class TokenData(torch.utils.data.Dataset):
    """32 samples of random tokens, from eight different ones; `alike`: all the same."""

    def __init__(self, alike: bool = False) -> None:
        self.ids = torch.randint(VOCAB, (8, 12), generator=torch.Generator().manual_seed(3))
        self.alike = alike

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[0 if self.alike else index % 8]
        return {"input_ids": ids, "labels": ids.clone()}


class Watch(TrainerCallback):
    """Copies of everything that trains after the last step, and a checkpoint after `save_at`."""

    def __init__(self, save_at: int | None = None) -> None:
        self.save_at, self.state = save_at, {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        control.should_save = state.global_step == self.save_at
        if state.global_step == state.max_steps:
            self.state = all_state(model, optimizer)


def all_state(model, optimizer) -> dict[str, torch.Tensor]:
    """Every tensor of model and optimizer, by name."""
    found = {f"model.{name}": tensor.detach().clone() for name, tensor in model.state_dict().items()}
    names = {parameter: name for name, parameter in model.named_parameters()}
    for parameter, state in getattr(getattr(optimizer, "optimizer", optimizer), "state", {}).items():
        for key, value in state.items():
            if isinstance(value, torch.Tensor | int | float):
                found[f"optimizer.{names[parameter]}.{key}"] = torch.as_tensor(value).clone()
    return found


def differences(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> list[str]:
    """Names that are missing on one side or differ in a bit."""
    changed = [k for k in sorted(set(left) & set(right)) if not torch.equal(left[k], right[k])]
    return sorted(set(left) ^ set(right)) + changed


def train(name, model, method, out, *, resume=None, save_at=None, alike=False, **arguments):
    """One run of the method's own trainer with its callbacks and optimizer; returns trainer and the last state."""
    options = {
        "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.01,
        "save_strategy": "no", "report_to": [], "logging_steps": 1, "disable_tqdm": True, "use_cpu": True, "seed": 11,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    args = TrainingArguments(str(out), **{**options, **TRAINING.get(name, {}), **arguments})
    watch = Watch(save_at)
    trainer = method.trainer_class(
        model=model, args=args, train_dataset=TokenData(alike), callbacks=[*method.callbacks(model), watch],
        optimizers=(method.optimizer(model, args), None),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has one scalar step")
        trainer.train(resume_from_checkpoint=resume)
    return trainer, watch.state


@torch.no_grad()
def loss(model) -> float:
    """Mean loss on all that it is trained on."""
    ids = TokenData().ids
    scores = model(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(scores.flatten(0, 1), ids[:, 1:].flatten()))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    training = model.training
    model.eval()
    result = model(input_ids=torch.arange(36).view(3, 12) % VOCAB).logits
    model.train(training)
    return result


def base_bits(model) -> dict[str, torch.Tensor]:
    """Copies of what is saved of the model without its adapter, by the base's own names."""
    named = {k.replace(".base_layer", "").removeprefix("base_model.model."): v for k, v in model.state_dict().items()}
    return {
        k: v.detach().clone()
        for k, v in named.items()
        if not any(own in k for own in ("lora_", "kernel_", "factored_", "structured_"))
    }


@dataclass
class Course:
    """What one method did on one base."""

    name: str
    kind: str
    folder: Path
    base_before: dict[str, torch.Tensor] = field(default_factory=dict)
    base_after: dict[str, torch.Tensor] = field(default_factory=dict)
    logits: dict[str, torch.Tensor] = field(default_factory=dict)
    """`base`, `start`, `trained`, `disabled`."""
    start: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, torch.Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    """On the training data, before and after."""
    model: PeftModel | None = None

    @property
    def run_folder(self) -> Path:
        return self.folder / f"{self.name}-{self.kind}"


def take_course(name: str, kind: str, folder: Path) -> Course:
    """Build, look, train eight steps with a checkpoint in the middle, look again, save."""
    course = Course(name, kind, folder)
    model, method = adapted(name, folder / "base", kind)
    with model.disable_adapter():
        course.logits["base"] = logits(model)
    course.logits["start"] = logits(model)
    course.losses.append(loss(model.eval()))
    course.base_before = base_bits(model)
    course.start = {k: v.detach().clone() for k, v in model.state_dict().items()}
    trainer, course.state = train(name, model, method, course.run_folder, save_at=SAVE_AT)
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    course.losses.append(loss(model.eval()))
    course.base_after = base_bits(model)
    course.logits["trained"] = logits(model)
    with model.disable_adapter():
        course.logits["disabled"] = logits(model)
    model.save_pretrained(course.run_folder / "adapter")
    course.model = model
    return course


def reload(course: Course):
    """The saved adapter over a fresh base."""
    base = load_base(course.folder / "base", course.kind)
    return PeftModel.from_pretrained(base, str(course.run_folder / "adapter"))
