r"""`LowRankExperts` and `ScaleExperts`: routed mixtures of low-rank updates, of scales."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Beside, Call, Product, Site, Tensors, times
from .routing import Experts

VECTORS = "layernorm_vectors"
"""Its name keeps weight decay of a Trainer off, which would pull scales from 1 to 0."""


@register_part("low_rank_experts")
@dataclass(frozen=True)
class LowRankExperts(Experts, Beside):
    r""":math:`y + \frac{\alpha}{r} \sum_e g_e(x)\,B_e A_e x` with gates g of a router that reads the layer's input.

    With all experts it is MoLoRA (Zadouri et al., 2024), with `top_k` of them, a `capacity` and `expert_dropout` SiRA
    (Zhu et al., 2023). Tokens that the batch's `attention_mask` hides go to no expert where `top_k` is set: they take
    no capacity and enter no balance. :math:`A_e` `[E, r, in]` starts with N(0, std^2), :math:`B_e` `[out, E, r]` at 0.
    """

    r: PositiveInt = 4
    """Rank of an expert."""
    lora_alpha: PositiveFloat = 16.0
    r""":math:`\alpha`."""
    std: PositiveFloat = 0.02
    """Of A at the start."""
    tensor_names: ClassVar[tuple[str, ...]] = ("experts_a", "experts_b")

    def expert_axes(self) -> dict[str, int]:
        """Rows of A and the router, columns of B."""
        return {"experts_a": 0, "experts_b": 1, "router": 0}

    def specs(self, site: Site) -> list[TensorSpec]:
        """A `[E, r, in]`, B `[out, E, r]`, the router `[E, in]`."""
        E, r = self.experts, self.r

        def start(generator: torch.Generator | None) -> Tensor:
            return torch.empty(E, r, site.cols).normal_(0, self.std, generator=generator)

        return [
            TensorSpec("experts_a", (E, r, site.cols), space="expert", start=start),
            TensorSpec("experts_b", (site.rows, E, r), space="expert", axis=1),
            *self.router_specs(site.cols),
        ]

    def branch(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """All experts in two products, the gates between them."""
        gates = self.route(x, tensors, call).gates.to(call.dtype)
        inner = times(x, tensors["experts_a"].flatten(0, 1).to(call.dtype)).unflatten(-1, (self.experts, self.r))
        inner = (inner * gates[..., None]).flatten(-2)
        return self.lora_alpha / self.r * times(inner, tensors["experts_b"].flatten(1).to(call.dtype))


@register_part("scale_experts")
@dataclass(frozen=True)
class ScaleExperts(Experts):
    r""":math:`(\sum_e g_e(a)\,v_e) \odot a` of a layer's output a, or of its input, with vectors :math:`v_e` that start
    at 1 (MoV; Zadouri et al., 2024). The router reads what is scaled.

    Gates of all experts sum to 1, so that it starts as the identity; those of `top_k` do so with `renormalise` alone.
    """

    input_modules: list[str] = field(default_factory=lambda: ["down_proj", "wo"])
    """Last parts of the names of layers whose input is scaled: the second matrices of MLPs."""
    head_size: PositiveInt | None = None
    """Outputs are scaled by head: the router reads a head's numbers, one router for all heads of the layer, and vectors
    are each head's own, as in the released code. None: by all outputs of the layer together. Inputs always are."""
    tensor_names: ClassVar[tuple[str, ...]] = (VECTORS,)

    def scales_input(self, site: Site) -> bool:
        """Whether it is the layer's input that is scaled."""
        return site.name.rpartition(".")[2] in self.input_modules

    def expert_axes(self) -> dict[str, int]:
        """The first."""
        return {VECTORS: 0, "router": 0}

    def specs(self, site: Site) -> list[TensorSpec]:
        """Vectors `[E, width]` and the router, `[E, width]` or `[E, head_size]`."""
        inputs = self.scales_input(site)
        width = site.cols if inputs else site.rows
        if not inputs and self.head_size and width % self.head_size:
            raise ValueError(
                f"ScaleExperts.head_size={self.head_size} does not divide the {width} outputs of '{site.name}'. Set it "
                "to the model's size of a head, or None."
            )
        shape = (self.experts, width)
        return [
            TensorSpec(VECTORS, shape, space="expert", start=lambda _: torch.ones(shape)),
            *self.router_specs(width if inputs else self.head_size or width),
        ]

    def scaled(self, a: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """What is scaled `[..., width]`, in its dtype."""
        vectors, heads = tensors[VECTORS], 1
        if self.head_size and not self.scales_input(call.site):
            heads = a.shape[-1] // self.head_size
        split = a.unflatten(-1, (heads, -1)) if heads > 1 else a[..., None, :]
        found = self.route(split.to(call.dtype) if heads > 1 else a.to(call.dtype), tensors, call)
        gates = found.gates if heads > 1 else found.gates[..., None, :]
        whole = self.renormalise or not self.routes
        vectors = vectors.to(gates.dtype) - 1 if whole else vectors.to(gates.dtype)
        scale = torch.einsum("...he,ehd->...hd", gates, vectors.unflatten(-1, (heads, -1)))
        scale = 1 + scale if whole else scale  # gates sum to 1: the start is the identity to the bit
        return (split * scale.to(a.dtype)).flatten(-2)

    def output(self, x: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The layer of the scaled input, or its output scaled."""
        if self.scales_input(call.site):
            return base(self.scaled(x, tensors, call))
        return self.scaled(base(x), tensors, call)

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """That less the layer's output."""
        if self.scales_input(call.site):
            return base(self.scaled(x, tensors, call)) - y
        return self.scaled(y, tensors, call) - y
