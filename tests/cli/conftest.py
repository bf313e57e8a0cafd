"""A base with a tokenizer, and adapters of it, on disk."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import KernelLoraConfig, SparseLoraConfig, SpectralLoraConfig, hub

SHARED = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}
DRAWN = {"criterion": "random", **SHARED}
CONFIGS = {
    "entries": lambda seed: SparseLoraConfig(r=0, density=0.05, seed=seed, **DRAWN),
    "both": lambda seed: SparseLoraConfig(r=2, density=0.1, granularity="row", seed=seed, **DRAWN),
    "factors": lambda seed: SparseLoraConfig(r=3, density=0, **SHARED),
    "subnet": lambda seed: SparseLoraConfig(r=0, density=0.05, granularity="subnet", seed=seed, **DRAWN),
    "kernel": lambda seed: KernelLoraConfig(r=4, **SHARED),
    "core": lambda seed: SpectralLoraConfig(r=4, **SHARED),
}  # fmt: skip


def save(base: Path, folder: Path, kind: str, seed: int = 0) -> Path:
    """An adapter of that kind with random values, saved."""
    model = get_peft_model(load(base), CONFIGS[kind](seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return hub.save_adapter(model, folder)


def load(base: Path):
    """The base."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base)


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    """A tiny Llama with the demo's tokenizer, whose vocabulary it has."""
    folder = tmp_path_factory.mktemp("cli") / "base"
    demo = Path(__file__).parents[2] / "recipes" / "demo_base"
    from transformers import AutoTokenizer

    tiny.llama(layers=2, vocab_size=len(AutoTokenizer.from_pretrained(demo))).save_pretrained(folder)
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
