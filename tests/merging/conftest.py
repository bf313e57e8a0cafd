"""A base with a tokenizer, and adapters of it, on disk: those of the command line's tests, and more kinds."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from hf_sparse_peft import FactoredConfig, KernelLoraConfig, MaskedLoraConfig, SparseLoraConfig, SpectralLoraConfig, hub
from hf_sparse_peft.tuners.factored import FixedRank

SHARED = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
DRAWN = {"criterion": "random", **SHARED}
CONFIGS = {
    "entries": lambda seed: SparseLoraConfig(r=0, density=0.05, seed=seed, **DRAWN),
    "rows": lambda seed: SparseLoraConfig(r=0, density=0.1, granularity="row", seed=seed, **DRAWN),
    "both": lambda seed: SparseLoraConfig(r=2, density=0.05, seed=seed, **DRAWN),
    "factors": lambda seed: SparseLoraConfig(r=3, density=0, **SHARED),
    "subnet": lambda seed: SparseLoraConfig(r=0, density=0.05, granularity="subnet", seed=seed, **DRAWN),
    "kernel": lambda seed: KernelLoraConfig(r=4, **SHARED),
    "core": lambda seed: SpectralLoraConfig(r=4, **SHARED),
    "masked": lambda seed: MaskedLoraConfig(r=2, mask="all", **SHARED),
    "factored": lambda seed: FactoredConfig(rank=FixedRank(2), **SHARED),
    "other-modules": lambda seed: SparseLoraConfig(
        r=0, density=0.05, criterion="random", seed=seed, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    ),
    "lora": lambda seed: LoraConfig(r=3, lora_alpha=7, **SHARED),
    "rs-lora": lambda seed: LoraConfig(r=2, lora_alpha=3, use_rslora=True, rank_pattern={"up_proj": 4}, **SHARED),
    "dora": lambda seed: LoraConfig(r=2, use_dora=True, **SHARED),
    "heads": lambda seed: SparseLoraConfig(r=0, density=0.05, seed=seed, modules_to_save=["lm_head"], **DRAWN),
    "biases": lambda seed: SparseLoraConfig(r=0, density=0.05, seed=seed, bias="all", **DRAWN),
}  # fmt: skip


def load(base):
    return AutoModelForCausalLM.from_pretrained(base)


def save(base: Path, folder: Path, kind: str, seed: int = 0) -> Path:
    """An adapter of that kind with random values, saved."""
    model = get_peft_model(load(base), CONFIGS[kind](seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    if kind in ("lora", "rs-lora", "dora"):
        model.save_pretrained(str(folder))
        return folder
    return hub.save_adapter(model, folder)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with the demo's tokenizer."""
    folder = tmp_path_factory.mktemp("merging") / "base"
    demo = Path(__file__).parents[2] / "recipes" / "demo_base"
    tiny.llama(layers=2, vocab_size=512).save_pretrained(folder)
    for file in demo.glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="session")
def adapter(base, tmp_path_factory):
    """`adapter(kind, seed)` is the folder of such an adapter, made once."""
    made = {}

    def get(kind: str, seed: int = 0) -> Path:
        if (kind, seed) not in made:
            made[kind, seed] = save(base, tmp_path_factory.mktemp(kind) / f"{kind}-{seed}", kind, seed)
        return made[kind, seed]

    return get


@pytest.fixture(scope="session")
def updates(base):
    """Folder -> module -> update as the loaded model's own merge makes it, float64 `[out, in]`."""

    def of(folder) -> dict[str, torch.Tensor]:
        from peft import PeftModel

        before = {name: p.double() for name, p in load(base).requires_grad_(False).named_parameters()}
        model = PeftModel.from_pretrained(load(base).double(), str(folder), autocast_adapter_dtype=False)
        merged = dict(model.merge_and_unload().named_parameters())
        found = {name: merged[name].detach().double() - before[name] for name in before if name in merged}
        return {name.removesuffix(".weight"): update for name, update in found.items() if update.any()}

    return of
