r"""Routing: which experts of a layer a token goes to, and experts as units that rules act on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...rules import UnitSpace
from ...utils.option_types import Decay, PositiveFloat, PositiveInt
from ...utils.parts import require
from ...utils.tensors import TensorSpec
from .form import Call, Form, Tensors, times

ROUTING = "routing"
"""What forms of experts note of a pass: `[3, n, E]` fp32 of the n tokens that no mask hides. First the router's
probabilities, with their graph, then 1 where an expert was chosen, then 1 where it had room as well."""


class Routed(NamedTuple):
    """Where tokens go."""

    gates: Tensor
    """`[..., E]`, 0 for experts that a token does not go to."""
    probabilities: Tensor
    """`[..., E]`, of the router."""
    chosen: Tensor
    """bool `[..., E]`."""
    served: Tensor
    """bool `[..., E]`: those that had room."""


@dataclass(frozen=True)
class Experts(Form):
    r"""Base of forms of E experts in each layer and a router :math:`p = \mathrm{softmax}(W_r x)` of each token, in
    fp32: all experts merged by p, or the `top_k` of the largest p.

    Experts are units of kind "expert". One that a rule lets die is left out of the softmax. Computed are all experts of
    a token, so that none is without a gradient on one of several processes.
    """

    experts: PositiveInt = 10
    """E."""
    top_k: PositiveInt | None = None
    """Experts of a token; None: all."""
    renormalise: bool = False
    """Whether the gates of the chosen experts are divided by their sum."""
    capacity: PositiveFloat | None = None
    r"""In training an expert takes :math:`\lceil c\,k\,n / E \rceil` of the n tokens of a forward pass, the first in
    the order of the batch; those after them lose its part. None: no limit."""
    expert_dropout: Decay = 0.0
    """Dropout, in training, before experts are chosen."""
    dropout_on: Literal["probabilities", "logits"] = "probabilities"
    """Of what."""
    router_std: PositiveFloat = 0.02
    """The router starts with N(0, std^2)."""
    tensor_names: ClassVar[tuple[str, ...]] = ("router", "living")
    reads_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.top_k is None or self.top_k <= self.experts
        require(fits, self, "top_k", f"None, or an integer from 1 to experts={self.experts}")
        accepted = "None where top_k=None: all experts take all tokens"
        require(self.capacity is None or self.top_k is not None, self, "capacity", accepted)

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Experts."""
        return frozenset({"expert"})

    @property
    def routes(self) -> bool:
        """Whether tokens go to some of the experts."""
        return self.top_k is not None

    def expert_axes(self) -> dict[str, int]:
        """Axis of the experts in each trained tensor, by its name; `router` is the last."""
        raise NotImplementedError

    def router_specs(self, width: int) -> list[TensorSpec]:
        """The router `[E, width]`, and which experts live, uint8 `[E]`."""
        E = self.experts

        def start(generator: torch.Generator | None) -> Tensor:
            return torch.empty(E, width).normal_(0, self.router_std, generator=generator)

        return [
            TensorSpec("router", (E, width), space="expert", start=start),
            living_spec(E),
        ]

    def spaces(self, layer, adapter: str) -> list[UnitSpace]:
        """The experts."""
        return [ExpertSpace(layer, adapter)]

    def route(self, x: Tensor, tensors: Tensors, call: Call) -> Routed:
        """Where the tokens `x` `[..., width]` go; noted as `ROUTING`."""
        living, wide = tensors["living"].bool(), torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # which would have the product in half precision
            logits = times(x.to(wide), tensors["router"].to(wide))
        p = logits.masked_fill(~living, -torch.inf).softmax(-1)
        dropped = p
        if self.expert_dropout and call.training:
            if self.dropout_on == "logits":
                logits = F.dropout(logits, self.expert_dropout)
                dropped = logits.masked_fill(~living, -torch.inf).softmax(-1)
            else:
                dropped = F.dropout(p, self.expert_dropout)
        shown = shown_tokens(call.mask, x)
        chosen = dropped > 0
        if self.routes:
            best = torch.zeros_like(chosen).scatter_(-1, dropped.topk(self.top_k, -1).indices, True)
            chosen = best & chosen if shown is None else best & chosen & shown[..., None]
        served = chosen
        if self.capacity is not None and call.training:
            served = chosen & self._has_room(chosen, shown, living)
        gates = dropped
        if self.renormalise:  # over the chosen ones: what has no room leaves the others as they are
            sums = (gates * chosen).sum(-1, keepdim=True)
            gates = gates / torch.where(sums > 0, sums, 1.0)
        found = Routed(gates * served, p, chosen, served)
        call.note(ROUTING, listed(found, shown))
        return found

    def _has_room(self, chosen: Tensor, shown: Tensor | None, living: Tensor) -> Tensor:
        taken = chosen.flatten(0, -2).cumsum(0).view(chosen.shape)
        tokens = taken.new_tensor(chosen[..., 0].numel()) if shown is None else shown.sum()
        return taken <= (self.capacity * self.top_k * tokens.double() / living.sum()).ceil()


def living_spec(experts: int) -> TensorSpec:
    """Which experts live, uint8 `[E]`."""
    return TensorSpec(
        "living", (experts,), torch.uint8, "saved", start=lambda _: torch.ones(experts), check=_check_living
    )


def shown_tokens(mask: Tensor | None, x: Tensor) -> Tensor | None:
    """bool in the shape of the tokens of `x`: those that the mask does not hide; None where it says nothing of them."""
    if mask is None or mask.shape != x.shape[: mask.dim()] or mask.dim() == x.dim():
        return None
    shown = mask.to(x.device).bool()
    while shown.dim() < x.dim() - 1:
        shown = shown.unsqueeze(-1)
    return shown.expand(x.shape[:-1])


def listed(found: Routed, shown: Tensor | None) -> Tensor:
    """What is noted as `ROUTING`."""
    listed = torch.stack([found.probabilities, found.chosen.to(found.gates), found.served.to(found.gates)])
    return listed.flatten(1, -2) if shown is None else listed[:, shown]


def _check_living(tensor: Tensor, key: str) -> None:
    if bool((tensor > 1).any()) or not bool(tensor.any()):
        raise ValueError(f"'{key}' says which experts live, by 0 and 1 with a 1 at least, and has {tensor.tolist()}.")


@dataclass(frozen=True)
class ExpertSpace(UnitSpace):
    """Experts of a layer: their tensors, and their rows of the router."""

    kind: ClassVar[str] = "expert"
    packed: ClassVar[bool] = False

    @property
    def form(self) -> Experts:
        """The adapter's form."""
        return self.layer.form(self.adapter)

    @property
    def living(self) -> Tensor:
        """uint8 `[E]`."""
        return self.layer.form_tensors(self.adapter)["living"]

    @property
    def size(self) -> int:
        """E."""
        return self.form.experts

    capacity = size

    @property
    def routes(self) -> bool:
        """Whether tokens go to some of the experts."""
        return self.form.routes

    @property
    def unit_numel(self) -> int:
        """Numbers of an expert, and of its row of the router."""
        return sum(parameter.numel() // self.size for parameter in self.parameters())

    def alive(self) -> Tensor:
        """Experts that live, sorted."""
        return self.living.nonzero().squeeze(1)

    def parameters(self) -> list[nn.Parameter]:
        """The experts' tensors and the router."""
        return [parameter for parameter, _ in self.parameter_axes()]

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """Each with the axis of the experts."""
        tensors = self.layer.form_tensors(self.adapter)
        return [(tensors[name], axis) for name, axis in self.form.expert_axes().items()]

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """All of them, by name."""
        return dict(zip(self.form.expert_axes(), self.parameter_axes(), strict=True))

    @torch.no_grad()
    def write(self, units: Tensor) -> None:
        """Let the experts `units` live: no token goes to another.

        Raises:
            ValueError: there are none.
        """
        if not units.numel():
            raise ValueError(f"No expert of '{self.name}' would live. Leave one at least.")
        living = self.living
        living.copy_(torch.zeros_like(living).index_fill_(0, units.long().to(living.device), 1))

    def reading(self, reader: Callable[[Tensor], None]) -> AbstractContextManager[None]:
        """Inside, training passes of the layer show `reader` their `ROUTING`, those that checkpointing repeats left
        out."""

        def read(adapter: str, name: str, tensor: Tensor) -> None:
            if adapter == self.adapter and name == ROUTING and self.layer.training:
                reader(tensor)

        return self.layer.read_passes(read)
