r"""`MatrixProductExperts`: a feed-forward network of several experts that share most of each matrix."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import autocast_dtype, autocast_off
from ...rules import UnitSpace
from ...utils.option_types import Fraction, PositiveFloat, PositiveInt, Range
from ...utils.parts import register_part
from ...utils.tensors import TensorSpec
from .form import Call, Form, Product, Site, Tensors, times
from .matrix_product import TENSORS, contract, decompose, shapes_of
from .routing import ROUTING, ExpertSpace, Routed, listed, living_spec, shown_tokens

CENTRAL = TENSORS // 2
ROUTER = "mpo_router"
LEAST_CAPACITY = 4


@register_part("matrix_product_experts")
@dataclass(frozen=True)
class MatrixProductExperts(Form):
    r""":math:`y = \sum_e g_e(x)\,\mathrm{FFN}_e(x)`, in the place of a feed-forward network: each matrix of expert e is
    a product of five tensors, of which the middle one, which has most of the numbers, is all experts' (MPOE; Gao et
    al., 2022; official code RUCAIBox/MPOE).

    All experts start as the base's network, with copies of the tensors that its matrices decompose into (the released
    code copies all but the central one, of which it keeps a random matrix's). The linears of one parent module are one
    network: those not named in `last` give the outputs of all experts, with an axis of them in front, on which the
    network's activations act, and the one in `last` sums them up by the gates of the network's input. A linear that is
    the only target of its parent is a network by itself.

    **Gates** are the two largest of a softmax, divided by their sum. In training the second expert is kept with
    probability :math:`g_2` / `threshold`, in evaluation where that is 1 or more (`draws_in_evaluation`: as in training,
    as in the released code). Each expert takes at most `capacity` times its even share of a sequence's tokens, first
    come, and no fewer than four; a token over that gets nothing of it. Tokens that the batch's `attention_mask` hides
    go to no expert. The balance loss :math:`E^2\,\mathrm{mean}_e(f_e P_e)`, with f of first experts, is
    `BalanceLoss(of="first")`.

    Experts are units of kind "expert" of the network, which its first linear has. One that a rule lets die is left out
    of the softmax, and shares are those of the experts that live.

    It acts alone: it replaces a network, and no other adapter adds to it. It cannot be merged.
    """

    experts: PositiveInt = 4
    """E."""
    last: tuple[str, ...] = ("down_proj", "wo", "fc2", "c_proj")
    """Last parts of the names of the linears that networks end with."""
    second: Literal["random", "all", "none", "threshold"] = "random"
    """Which second experts are kept in training; in evaluation those over the threshold for `random`."""
    threshold: PositiveFloat = 0.2
    """Gate from which on a second expert is always kept."""
    draws_in_evaluation: bool = False
    """Whether `second="random"` draws in evaluation too (released code)."""
    capacity: PositiveFloat | None = 1.25
    """Of an expert in training, in shares of tokens / E; None: no limit."""
    capacity_in_evaluation: PositiveFloat | None = 2.0
    """The same in evaluation."""
    central: Literal["frozen", "trained"] = "frozen"
    """Whether the shared tensor trains."""
    central_update_prob: Fraction = 1.0
    """Of a trained one: the share of passes in which it has a gradient; it gets that of all experts, and would move
    faster than their own tensors."""
    bond: Annotated[int, Range(least=1)] | None = None
    """Largest side between two tensors; None: as large as any matrix needs. With it experts start as approximations."""
    tensor_names: ClassVar[tuple[str, ...]] = (*(f"mpo_{at}" for at in range(TENSORS)), ROUTER, "living")
    reads_weight: ClassVar[bool] = True
    reads_mask: ClassVar[bool] = True
    alone: ClassVar[bool] = True

    @property
    def shared(self) -> tuple[str, ...]:
        """The router, which the first linear of a network has."""
        return (ROUTER,)

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Experts."""
        return frozenset({"expert"})

    @property
    def routes(self) -> bool:
        """Tokens go to two of the experts."""
        return True

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace]:
        """The experts of the network, at its first linear."""
        return [NetworkExperts(layer, adapter)] if layer.site(adapter).owns else []

    def group(self, site: Site) -> Hashable:
        """The linears of one parent module."""
        return site.name.rpartition(".")[0]

    def check_sharing(self, sizes: Mapping[str, list]) -> None:
        """Are the targets whole networks: linears, and after them one in `last`, or one alone?

        Raises:
            ValueError: names the network that is none.
        """
        networks: dict[str, list[str]] = {}
        for name in sizes:
            networks.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
        for parent, names in networks.items():
            if len(names) > 1 and (names[-1] not in self.last or any(name in self.last for name in names[:-1])):
                raise ValueError(
                    f"MatrixProductExperts.last={list(self.last)}: the targets in '{parent}' are {names}, and they are "
                    "to be a feed-forward network: all of its linears, the last of which is named there."
                )

    def specs(self, site: Site) -> list[TensorSpec]:
        """The tensors of all experts `[E, ...]`, the central one, and the router `[E, cols]` at the first linear."""
        found = []
        for at, shape in enumerate(shapes_of(site.rows, site.cols, self.bond)):
            if at == CENTRAL:
                found.append(TensorSpec(f"mpo_{at}", shape, role="trained" if self.central == "trained" else "saved"))
            else:
                found.append(TensorSpec(f"mpo_{at}", (self.experts, *shape), space="expert"))

        def start(generator: torch.Generator | None) -> Tensor:
            return torch.randn(self.experts, site.cols, generator=generator)

        if not site.owns:
            return found
        return [
            *found,
            TensorSpec(ROUTER, (self.experts, site.cols), space="expert", start=start),
            living_spec(self.experts),
        ]

    def start(self, weight: Tensor, site: Site) -> Tensors:
        """The weight's own tensors, for every expert."""
        found = decompose(weight, self.bond)
        return {
            f"mpo_{at}": tensor if at == CENTRAL else tensor.expand(self.experts, *tensor.shape)
            for at, tensor in enumerate(found)
        }

    def matrices(self, tensors: Tensors, training: bool = False) -> list[Tensor]:
        """The matrix `[rows, cols]` of each expert."""
        central = tensors[f"mpo_{CENTRAL}"]
        if training and central.requires_grad and self.central_update_prob < 1:
            kept = float(torch.rand(()) < self.central_update_prob)  # a gradient of 0, which DDP asks for
            held = central.detach()
            central = held if self.central_update_prob == 0 else held + kept * (central - held)
        with autocast_off(central.device.type):
            return [
                contract([central if at == CENTRAL else tensors[f"mpo_{at}"][expert] for at in range(TENSORS)])
                for expert in range(self.experts)
            ]

    def route(self, x: Tensor, tensors: Tensors, call: Call) -> Routed:
        """Where the tokens of `x` `[..., tokens, cols]` go; noted as `ROUTING`."""
        living = tensors["living"].bool()
        with autocast_off(x.device.type):
            logits = times(x.float(), tensors[ROUTER].float())
        whole = logits.masked_fill(~living, -torch.inf).softmax(-1)
        first, at = whole.max(-1)
        mask = F.one_hot(at, self.experts).to(whole)
        second, next_at = (whole * (1 - mask)).max(-1)
        next_mask = F.one_hot(next_at, self.experts).to(whole) * (second > 0)[..., None]
        shown = shown_tokens(call.mask, x)
        if shown is not None:
            mask, next_mask = mask * shown[..., None], next_mask * shown[..., None]
        total = first + second + 1e-9
        first, second = first / total, second / total
        next_mask = next_mask * self._kept(second, call.training)[..., None]
        chosen = mask + next_mask
        capacity = self.capacity if call.training else self.capacity_in_evaluation
        if capacity is not None:
            most = self._capacity(capacity, x, shown, living)
            mask = mask * ((mask.cumsum(-2) - mask) * mask < most)
            taken = mask.sum(-2, keepdim=True)
            next_mask = next_mask * (((next_mask.cumsum(-2) - next_mask) + taken) * next_mask < most)
        gates = first[..., None] * mask + second[..., None] * next_mask
        found = Routed(gates, whole, chosen.bool(), (mask + next_mask).bool())
        call.note(ROUTING, listed(found, shown))
        return found

    @staticmethod
    def _capacity(share: float, x: Tensor, shown: Tensor | None, living: Tensor) -> Tensor:
        """`[..., 1, 1]`: tokens of each sequence that an expert takes at most."""
        tokens = x.new_full(x.shape[:-2], x.shape[-2], dtype=torch.int64) if shown is None else shown.sum(-1)
        most = torch.minimum(tokens, (tokens.double() * share / living.sum()).long())
        return most.clamp_min(LEAST_CAPACITY)[..., None, None]

    def _kept(self, second: Tensor, training: bool) -> Tensor:
        if self.second == "all":
            return torch.ones_like(second)
        if self.second == "none":
            return torch.zeros_like(second)
        if self.second == "threshold" or not (training or self.draws_in_evaluation):
            return (second >= self.threshold).to(second)
        return (torch.rand_like(second) < second / self.threshold).to(second)

    def output(self, x: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The outputs of all experts `[E, ..., rows]`; in the last linear, of `x` of that form, their sum."""
        site, single = call.site, call.site.sharing.users == 1
        if site.owns:
            routed = self.route(x if x.dim() > 2 else x[None], tensors, call)
            call.memory["gates"] = routed.gates.view(*x.shape[:-1], -1)
        ends = single or site.name.rpartition(".")[2] in self.last
        if single or not ends:
            x = x.expand(self.experts, *x.shape)
        if not ends:
            return self._linear(x, tensors, call)
        gates = call.memory.pop("gates", None)
        if gates is None or x.shape[:-1] != (self.experts, *gates.shape[:-1]):
            raise ValueError(f"'{site.name}' has no outputs of its network's experts: its other linears did not run.")
        outputs = self._linear(x, tensors, call)
        return torch.einsum("...e,e...r->...r", gates.to(outputs.dtype), outputs)

    def _linear(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        matrices, given = self.matrices(tensors, call.training), x.to(call.dtype)
        found = torch.stack([times(one, M.to(call.dtype)) for one, M in zip(given, matrices, strict=True)])
        found = found if call.bias is None else found + call.bias.to(call.dtype)
        return found.to(autocast_dtype(x.device.type) or x.dtype)

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"MatrixProductExperts in '{call.site.name}' takes the place of its network, and no other adapter adds to "
            "it. Activate it alone: model.set_adapter(name)."
        )


@dataclass(frozen=True)
class NetworkExperts(ExpertSpace):
    """Experts of a network: their tensors in all of its linears, and their rows of the router."""

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """Each with the axis of the experts."""
        return list(self.scored_parameters().values())

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """The router, and the tensors of each linear by its number."""
        layers = [self.layer, *self.layer.structured_users.get(self.adapter, [])]
        found = {ROUTER: (self.layer.form_tensors(self.adapter)[ROUTER], 0)}
        for number, layer in enumerate(layers):
            tensors = layer.form_tensors(self.adapter)
            own = [at for at in range(TENSORS) if at != CENTRAL]
            found |= {f"{number}: mpo_{at}": (tensors[f"mpo_{at}"], 0) for at in own}
        return found
