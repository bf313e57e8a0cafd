"""Configs for kernel adapters on tiny bases, and the update from the papers' equations in dense float64."""

from __future__ import annotations

import torch
from peft import get_peft_model
from tuner_toolbox import TARGETS

from hf_sparse_peft import KernelLoraConfig
from hf_sparse_peft.tuners import adapter_layers
from hf_sparse_peft.tuners.kernel_lora import KernelLoraLayer
from hf_sparse_peft.tuners.kernel_lora.kernels import KernelPlan

KERNELS, MODES = ("distance", "mixed"), ("paper", "code")


def make_config(base: str = "fp32", **overrides) -> KernelLoraConfig:
    options = {
        "r": 8, "target_modules": TARGETS.get(base, ["q_proj", "v_proj", "down_proj"]), "init_weights": False,
        "task_type": "CAUSAL_LM",
    }  # fmt: skip
    return KernelLoraConfig(**{**options, **overrides})


def adapted(base, kind: str = "fp32", seed: int = 5, name: str = "default", **options):
    torch.manual_seed(seed)
    return get_peft_model(base, make_config(kind, **options), adapter_name=name)


def factors(rows: int, cols: int, q: int, mixed: bool, seed: int = 0, std: float = 1.0):
    """P `[2, cols, q/2]`, Q `[2, rows, q/2]` and mix for a weight of `rows` x `cols`."""
    generator = torch.Generator().manual_seed(seed)
    P, Q = (torch.randn(2, count, q // 2, generator=generator) * std for count in (cols, rows))
    return P, Q, torch.tensor([0.7, 1.3, -0.2]) if mixed else None


def plan(mode: str = "paper", survivors: int | None = None, tile: int = 1 << 22, scale: float = 0.1) -> KernelPlan:
    return KernelPlan(scale, mode, survivors, tile, torch.float32, "layer")


def reference_kernel(P, Q, mix, scale: float = 0.1) -> torch.Tensor:
    """`[out, in]`, one distance after the other by its definition."""
    gaps = (Q[:, :, None, :] - P[:, None, :, :]).square().sum(-1)
    distances = torch.where(gaps > 0, torch.where(gaps > 0, gaps, 1.0).sqrt(), 0.0)  # slope 0 where points meet
    D = scale * (distances[0] - distances[1])
    if mix is None:
        return D
    a, g, b = mix
    powers = (D / g - (D / g).max(0, keepdim=True).values.detach()).exp()
    return D + a * powers / powers.sum(0, keepdim=True) + b


def reference_update(P, Q, mix, mode: str, survivors: int | None, scale: float = 0.1) -> torch.Tensor:
    """The update `[out, in]` as the papers define it, differentiable, for kernels without ties."""
    w = reference_kernel(P, Q, mix, scale)
    if survivors is None:
        return w
    zeros = w.numel() - survivors
    tau = w.detach().abs().flatten().sort().values[zeros - 1] if zeros else torch.zeros((), dtype=w.dtype)
    if mode == "paper":
        return w * (w.abs() - tau).relu()  # slope 0 at tau itself, which loses
    return w * (w.abs() * (w.abs() > tau)).detach()


def reference_of(layer: KernelLoraLayer, adapter: str = "default") -> torch.Tensor:
    """The update of one adapter of a layer, `[out, in]` float64."""
    held = [getattr(layer, f"kernel_lora_{name}") for name in ("P", "Q", "mix")]
    P, Q, mix = (tensors[adapter].detach().double() if adapter in tensors else None for tensors in held)
    config, numel = layer.adapter_configs[adapter], layer.in_features * layer.out_features
    survivors = numel - round(config.sparsity * numel) if config.sparsity else None
    if adapter in layer.kernel_lora_survivors:
        survivors = int(layer.kernel_lora_survivors[adapter])
    return reference_update(P, Q, mix, config.mode, survivors, config.scale)


def trained(model, adapter: str = "default") -> dict[str, torch.Tensor]:
    return {
        f"{layer.module_name}.{name}": getattr(layer, name)[adapter]
        for layer in adapter_layers(model)
        for name in layer.adapter_layer_names
        if adapter in getattr(layer, name)
    }
