"""Every form of a spectral adapter, on tiny models, with numbers in it as after training."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from peft import get_peft_model

from hf_sparse_peft import FreezeGradually, ProximalGate, SpectralLoraConfig
from hf_sparse_peft.tuners.spectral_lora import (
    LDU,
    SVD,
    Band,
    Diagonal,
    Factors,
    Fastfood,
    Full,
    RandomA,
    RandomBases,
    RandomCombination,
    Shards,
    SharedBases,
    TwoFactors,
    spectral_layers,
)

FORMS: dict[str, dict[str, Any]] = {
    "full core": {"bases": SVD(values_in_A=True), "core": Full(), "lora_alpha": 8},
    "bases found again": {"bases": SVD(saved=False), "core": Full()},
    "band": {"bases": SVD(), "core": Band(1)},
    "trained basis": {"bases": SVD(train_B=True), "core": Full("values", residual="init")},
    "norms": {"bases": SVD(), "core": Full("zeros"), "use_dora": True},
    "pivots": {"bases": LDU(), "core": Diagonal("values", residual="init", trained_scale=True)},
    "two factors": {"bases": RandomBases(8, 6), "core": TwoFactors()},
    "random A": {"bases": RandomA(), "core": None, "lora_alpha": 6},
    "factors": {"bases": Factors(), "core": None},
    "combination": {"bases": RandomCombination(6), "core": None},
    "shared A": {"bases": SharedBases("A"), "core": None},
    "shared by shape": {"bases": SharedBases("AB", "shape", "normal"), "core": Diagonal()},
    "shards": {"bases": Shards(2, 2, 1), "core": None},
    "subspace": {"bases": Fastfood(40), "core": None},
}
TARGETS = ["q_proj", "v_proj", "down_proj"]


def config_of(form: str, **options) -> SpectralLoraConfig:
    defaults = {"r": 3, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **FORMS[form]}
    return SpectralLoraConfig(**{**defaults, **options})


@torch.no_grad()
def fill(model, name: str = "default", seed: int = 0) -> None:
    """Move every trained number of the adapter."""
    for layer in spectral_layers(model):
        for at, parameter in enumerate(layer.trained_parameters(name) if name in layer.adapter_configs else ()):
            generator = torch.Generator().manual_seed(seed + at)
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        seed += 10


def adapted(form: str, base="fp32", name: str = "default", **options):
    """A fresh base with a filled adapter, in evaluation mode."""
    torch.manual_seed(1)
    model = get_peft_model(tiny.base(base) if isinstance(base, str) else base, config_of(form, **options), name)
    fill(model, name)
    return model.eval()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=torch.arange(24).view(2, 12) % tiny.VOCAB).logits


def deltas(model, name: str = "default") -> dict[str, torch.Tensor]:
    """Dense updates `[out, in]`, by module name."""
    found = {}
    for layer in spectral_layers(model):
        delta = layer.get_delta_weight(name)
        found[layer.module_name] = delta.t() if layer.fan_in_fan_out else delta
    return found


RULED = {
    "random A": FreezeGradually(0.5),
    "trained basis": FreezeGradually(0.5),
    "shared by shape": ProximalGate(0.5),
}
"""A rule that acts on the form."""
