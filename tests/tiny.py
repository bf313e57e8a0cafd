"""The one builder of tests: tiny models of every kind of base, data, and short runs of the real Trainer."""

from __future__ import annotations

import copy
import functools
import itertools
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_sparse_peft import Allocate, Density

VOCAB = 64


def kernel_allocation(sparsity: float = 0.3, **options) -> Allocate:
    """SNELLA's competition of matrices, at every step of a run."""
    return Allocate(("kernel",), Density(1 - sparsity), **{"every": 1, "fixed_at_end": False, **options})


BASES = ("fp32", "bf16", "nf4", "int8", "conv1d")


def needs(requirement: str) -> pytest.MarkDecorator:
    """Skips a test, naming the requirement (`"trl>=1.16"`) and what is installed instead."""
    wanted = Requirement(requirement)
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        found = None
    fits = found is not None and wanted.specifier.contains(found.split("+")[0], prereleases=True)
    return pytest.mark.skipif(not fits, reason=f"needs {requirement}; installed: {found or 'none'}")


def crossed(**axes) -> pytest.MarkDecorator:
    """Parametrizes a test over the product of `axes`, of which the default suite runs a diagonal.

    There each value of each axis comes at least twice, with other partners each time; the rest of the product is marked
    slow. For axes that the code under test treats independently: each of them has its own exact tests elsewhere.
    """
    names, values = list(axes), [list(axis) for axis in axes.values()]
    longest = max(map(len, values))
    chosen = {
        tuple((at + turn * (axis + 1)) % len(values[axis]) for axis in range(len(values)))
        for turn in range(2)
        for at in range(longest)
    }
    cases = []
    for place in itertools.product(*(range(len(axis)) for axis in values)):
        picked = [axis[at] for axis, at in zip(values, place, strict=True)]
        marks = () if place in chosen else (pytest.mark.slow,)
        cases.append(pytest.param(*picked, marks=marks, id="-".join(map(_label, picked))))
    return pytest.mark.parametrize(names, cases)


def _label(value) -> str:
    if isinstance(value, tuple):
        return "+".join(map(_label, value))
    return getattr(value, "__name__", None) or str(value)


def llama(
    cls=LlamaForCausalLM,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    layers: int = 2,
    **config,
):
    """A Llama with weights of standard deviation 1/sqrt(columns): 0.02 makes so few layers too flat to tell
    adapters apart. `cls` may be another head's class; `config` overrides fields of `LlamaConfig`."""
    torch.manual_seed(seed)
    fields = {
        "hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    model = cls(LlamaConfig(**{**fields, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=parameter.shape[1] ** -0.5)
    return model.to(dtype)


def units_of_sizes(config) -> dict[str, int]:
    """Units of each module, from the config's `sizes`."""
    return {name: units for name, (units, _, _) in config.sizes.items()}


def gpt2(*, seed: int = 0, hidden: int = 32, layers: int = 2, vocab_size: int = VOCAB) -> GPT2LMHeadModel:
    """A GPT-2, whose linear layers are `Conv1D`: weights stored `[in, out]`."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocab_size, n_embd=hidden, n_layer=layers, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


@functools.cache
def _saved_llama(hidden: int, layers: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="tiny-llama-"))
    llama(hidden=hidden, layers=layers).save_pretrained(folder)
    return folder


def base(kind: str = "fp32", *, hidden: int = 32, layers: int = 2, compute_dtype: torch.dtype = torch.float32):
    """A fresh base of a kind in `BASES`; quantised ones are `llama`'s weights, `hidden` must be a multiple of 32."""
    if kind == "conv1d":
        return gpt2(hidden=hidden, layers=layers)
    if kind in ("fp32", "bf16"):
        return llama(hidden=hidden, layers=layers, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    return copy.deepcopy(_quantised(kind, hidden, layers, compute_dtype))


@functools.cache
def _quantised(kind: str, hidden: int, layers: int, compute_dtype: torch.dtype):
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options = four_bit if kind == "nf4" else {"load_in_8bit": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = LlamaForCausalLM.from_pretrained(
            _saved_llama(hidden, layers), device_map="cpu", dtype=torch.float32,
            quantization_config=BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=compute_dtype),
        )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # where the CPU has bf16, bnb repacks or fails
            module.support_avx512bf16_for_cpu = False
    return model


class TokenData(torch.utils.data.Dataset):
    """Random token ids as language-model samples; `masked` sets all labels to -100, `repeated` repeats each sample."""

    def __init__(
        self, samples: int = 96, length: int = 10, seed: int = 3, *, repeated: int = 1, masked: bool = False
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.ids = torch.randint(1, VOCAB, (samples, length), generator=generator)
        self.repeated, self.masked = repeated, masked

    def __len__(self) -> int:
        return len(self.ids) * self.repeated

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index // self.repeated]
        return {"input_ids": ids, "labels": torch.full_like(ids, -100) if self.masked else ids.clone()}


class At(TrainerCallback):
    """`At(on_step_end=f)` calls `f(step, model, optimizer)`; `step` is the update under way, counted from 1."""

    def __init__(self, **functions) -> None:
        for event, function in functions.items():
            setattr(self, event, self._calls(function, 0 if event in ("on_step_end", "on_train_end") else 1))

    @staticmethod
    def _calls(function, shift):
        def call(args, state, control, model=None, optimizer=None, **kwargs):
            function(state.global_step + shift, model, optimizer)

        return call


def arguments(out, steps: int, **options) -> TrainingArguments:
    """Quiet `TrainingArguments` for `steps` steps of 4 samples on the CPU; nothing is saved or reported."""
    defaults = {
        "max_steps": steps, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_strategy": "no",
        "report_to": [], "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True, "seed": 11,
    }  # fmt: skip
    return TrainingArguments(str(out), **{**defaults, **options})


def train(model, out, steps: int, *, callbacks=(), data=None, optimizer=None, resume=None, **options) -> Trainer:
    """Train with the real Trainer and return it. `optimizer(model, args)` builds one; `options` are the arguments'."""
    args = arguments(out, steps, **options)
    trainer = Trainer(
        model=model, args=args, train_dataset=TokenData() if data is None else data, callbacks=list(callbacks),
        optimizers=(None if optimizer is None else optimizer(model, args), None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer
