"""Updates with fixed or shared bases and a small trained core."""

from __future__ import annotations

from typing import Any

from ..tuners import SpectralLoraConfig
from ..tuners.spectral_lora import SVD, Diagonal, Full
from .registry import Method, register


@register(
    "lora-xs",
    paper="Bałazy et al., 2024",
    moves="nothing",
    use_when="an adapter of r * r numbers a module, whatever the width",
    cost="an SVD of each weight at injection; the bases are saved with the core",
)
def lora_xs(r: int = 64, lora_alpha: float = 16, std: float = 1e-5, **overrides: Any) -> Method:
    """LoRA-XS: a full core between the leading singular vectors, the singular values on the input side, as released;
    the update starts at N(0, std^2), not at 0. The authors train with lr 4e-3 (r 64, 7B), 10 to 50 times LoRA's."""
    options = {"r": r, "lora_alpha": lora_alpha, "bases": SVD(values_in_A=True), "core": Full(std=std)}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))


@register(
    "svfit",
    paper="Sun et al., 2024 (abstract; details are this project's)",
    moves="nothing",
    use_when="r numbers a module, the largest singular values themselves",
    cost="an SVD of each weight at injection; bases of r * (in + out) numbers in memory and file",
)
def svfit(r: int = 256, **overrides: Any) -> Method:
    r"""SVFit: :math:`U_r\,\mathrm{diag}(\sigma - \sigma^0)\,V_r^\top`, whose diagonal is trained from 0, so that
    weight decay pulls towards the pretrained singular values."""
    options = {"r": r, "bases": SVD(), "core": Diagonal()}
    return Method(SpectralLoraConfig(**{**options, "target_modules": "all-linear", **overrides}))
