"""MKOR: gradients of linear layers preconditioned by inverse factors that rank-one updates keep, then AdamW."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..utils.option_types import Fraction, PositiveFloat, PositiveInt
from ..utils.parts import register_part
from ._fp32_state import state_dtype
from .aged_adamw import AgedAdamW
from .backward_steps import several_ranks
from .groups import embeddings_and_heads, parameter_groups
from .optimizer_kinds import refuse_partitioned
from .spec import OptimizerSettings, OptimizerSpec

_OWN = ("every", "blend", "reset_above")


class MeanVectors:
    """The mean input and the mean gradient of the output of linear layers, over the passes of one step.

    Args:
        linears: modules with a weight `[out, in]` that train.
    """

    def __init__(self, linears: Iterable[nn.Linear]) -> None:
        self._sums: dict[int, dict[str, list[Any]]] = {}
        reference = weakref.ref(self)
        for module in linears:
            module.register_forward_hook(partial(_read, reference))

    def of(self, weight: Tensor) -> tuple[Tensor, Tensor] | None:
        """Mean input `[in]` and mean output gradient `[out]`, over ranks too; None where no pass reached the layer."""
        found = self._sums.get(id(weight), {})
        if set(found) != {"input", "output"}:
            return None
        (inputs, count), (outputs, passed) = (_of_all_ranks(*found[name]) for name in ("input", "output"))
        ranks = torch.distributed.get_world_size() if several_ranks() else 1  # whose losses are averaged
        return inputs / count, outputs / (passed * ranks)

    def clear(self) -> None:
        """Forget the step's passes."""
        self._sums.clear()

    def add(self, weight: Tensor, name: str, vectors: Tensor) -> None:
        """Count vectors `[..., size]`."""
        flat = vectors.detach().flatten(0, -2)
        flat = flat.to(state_dtype(flat))
        held = self._sums.setdefault(id(weight), {}).setdefault(name, [0, 0])
        held[0], held[1] = held[0] + flat.sum(0), held[1] + flat.shape[0]


def _read(reference: weakref.ref, module: nn.Linear, args: tuple[Any, ...], output: Tensor) -> None:
    vectors = reference()
    if vectors is None or not module.training or not torch.is_tensor(output) or not output.requires_grad:
        return
    vectors.add(module.weight, "input", args[0])
    output.register_hook(lambda gradient: vectors.add(module.weight, "output", gradient))


def _of_all_ranks(total: Tensor, count: int) -> tuple[Tensor, Tensor | int]:
    if not several_ranks():
        return total, count
    both = torch.cat([total, total.new_tensor([float(count)])])
    torch.distributed.all_reduce(both)
    return both[:-1], both[-1]


class Mkor(AgedAdamW):
    r"""AdamW of gradients that inverse factors precondition (MKOR; Mozaffari et al., 2023), for groups with
    `factored=True`; `AgedAdamW` for the others.

    For a linear layer with weights `[out, in]`, the mean input :math:`a` and the mean output gradient :math:`g` of a
    step, before every `every`-th step but the first:

    .. math::
        X &= \rho L^{-1} + (1-\rho) I, \qquad L^{-1} \leftarrow X - \frac{X g\, g^\top X}{1 + g^\top X g}
            \quad(\text{and } R^{-1} \text{ by } a) \\
        \tilde G &= L^{-1} G R^{-1}, \qquad G \leftarrow \tilde G\,\frac{\|G\|}{\|\tilde G\|}

    A factor with an entry above `reset_above` becomes I. Both start as I. This is the released code's arithmetic; its
    paper's recursion could not be read. There the norms are those of weight and bias together, factors fp16, and the
    inner optimizer is a choice; here biases are AdamW's, factors fp32.

    State of a factored parameter: AdamW's, and `left_inverse` `[out, out]`, `right_inverse` `[in, in]`, each only if
    its side is at most `largest_side`; the other side is not preconditioned, as that of a low-rank factor.

    Args:
        params, lr, betas, eps, weight_decay: as `AgedAdamW`'s.
        vectors: gives a and g of a weight.
        factored: whether a group is preconditioned.
        every: steps between updates of the factors (released: 10).
        blend: :math:`\rho` (released: 0.95).
        reset_above: see above (released: 2).
        largest_side: largest side of a weight with a factor; None: any.

    Raises:
        ValueError: an option out of range, a factored parameter that is no matrix, a sharded gradient.

    Source: Mozaffari et al., 2023, github.com/Mohammad-Mozaffari/mkor.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        vectors: MeanVectors | None = None,
        factored: bool = False,
        every: int = 10,
        blend: float = 0.95,
        reset_above: float = 2.0,
        largest_side: int | None = None,
    ) -> None:
        self.vectors = vectors
        self._options = {"factored": factored, "every": every, "blend": blend, "reset_above": reset_above}
        self._options["largest_side"] = largest_side
        super().__init__(params, lr, betas, eps, weight_decay)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after checking its options and shapes."""
        group = {**self._options, **param_group}
        if not (group["every"] >= 1 and 0 <= group["blend"] <= 1 and group["reset_above"] > 0):
            raise ValueError(
                f"every={group['every']}, blend={group['blend']}, reset_above={group['reset_above']}: Mkor takes every "
                ">= 1, blend in [0, 1], reset_above > 0."
            )
        super().add_param_group(group)
        wrong = [tuple(p.shape) for p in self.param_groups[-1]["params"] if p.dim() != 2]
        if group["factored"] and wrong:
            self.param_groups.pop()
            raise ValueError(f"Mkor factors gradients of matrices, not of a parameter of shape {wrong[0]}.")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; the vectors of its passes are forgotten."""
        loss = super().step(closure)
        if self.vectors is not None:
            self.vectors.clear()
        return loss

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        if not group["factored"] or grad.is_sparse:
            return super()._update(group, p, grad)
        refuse_partitioned(grad, f"The gradient of a parameter of shape {tuple(p.shape)}")
        first, grad = not self.state[p], grad.to(state_dtype(p))
        super()._update(group, p, grad if first else self._preconditioned(group, p, grad))
        for name, size in zip(("left_inverse", "right_inverse"), p.shape, strict=True) if first else ():
            if group["largest_side"] is None or size <= group["largest_side"]:
                self.state[p][name] = torch.eye(size, dtype=grad.dtype, device=p.device)

    def _preconditioned(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> Tensor:
        state = self.state[p]
        if int(state["step"].item()) % group["every"] == 0 and self.vectors is not None:
            found = self.vectors.of(p)
            for name, vector in zip(("right_inverse", "left_inverse"), found or (), strict=False):
                if name in state:
                    state[name].copy_(rank_one_inverse(state[name], vector.to(grad), group["blend"]))
                    if not bool(state[name].abs().amax() <= group["reset_above"]):
                        state[name].copy_(torch.eye(len(vector), dtype=grad.dtype, device=p.device))
        turned = state["left_inverse"] @ grad if "left_inverse" in state else grad
        turned = turned @ state["right_inverse"] if "right_inverse" in state else turned
        norm = turned.norm()
        return torch.where(norm > 0, turned * (grad.norm() / norm), grad)

    def _restored(self, group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
        if name in ("left_inverse", "right_inverse"):
            size = p.shape[0 if name == "left_inverse" else 1]
            if tuple(value.shape) != (size, size):
                raise ValueError(
                    f"Loaded state '{name}' has shape {tuple(value.shape)}, its parameter {tuple(p.shape)}. Build the "
                    "model as when it was saved."
                )
            return value.to(device=p.device, dtype=state_dtype(p), copy=True)
        return super()._restored(group, p, name, value)


def rank_one_inverse(inverse: Tensor, vector: Tensor, blend: float = 1.0) -> Tensor:
    r""":math:`(X^{-1} + v v^\top)^{-1} = X - \frac{X v v^\top X}{1 + v^\top X v}` of
    :math:`X = \rho L^{-1} + (1-\rho) I` (Sherman and Morrison, 1950); `inverse` `[n, n]`, `vector` `[n]`."""
    x = blend * inverse + (1 - blend) * torch.eye(len(vector), dtype=inverse.dtype, device=inverse.device)
    turned = x @ vector
    return x - torch.outer(turned, turned) / (1 + vector @ turned)


@register_part("mkor")
@dataclass(frozen=True)
class MkorSpec(OptimizerSpec):
    """`optim.Mkor`: AdamW of gradients that are preconditioned by rank-one inverse factors (Mozaffari et al., 2023),
    for linear layers that train, of adapters of upstream peft too; AdamW for all else. The factors have in^2 + out^2
    numbers a layer; `largest_side=64` keeps them to the small side of low-rank factors."""

    every: PositiveInt = 10
    """Steps between updates of the factors."""
    blend: Fraction = 0.95
    """What is kept of a factor at an update; the rest is the identity."""
    reset_above: PositiveFloat = 2.0
    """A factor with a larger entry becomes the identity."""
    largest_side: PositiveInt | None = None
    """Largest side of a weight that gets a factor; None: any."""

    builds: ClassVar[type[torch.optim.Optimizer]] = Mkor

    def build(self, model: nn.Module, settings: OptimizerSettings) -> Mkor:
        """Groups as Trainer makes them, times weights of linear layers and everything else.

        Raises:
            ValueError: nothing trains, or no linear layer does.
        """
        apart = embeddings_and_heads(model)
        linears = [
            module
            for module in model.modules()
            if type(module) is nn.Linear and module.weight.requires_grad and id(module.weight) not in apart
        ]
        if not linears and any(p.requires_grad for p in model.parameters()):
            raise ValueError(
                "MkorSpec reads inputs and output gradients of torch.nn.Linear layers, and none trains here. Train "
                "whole weights or an adapter of upstream peft, or take AgedAdamWSpec()."
            )
        chosen = {id(module.weight) for module in linears}
        groups = parameter_groups(model, settings.weight_decay, lambda _, p: {"factored": id(p) in chosen})
        own = {name: getattr(self, name) for name in (*_OWN, "largest_side")}
        vectors = MeanVectors(linears)
        return Mkor(groups, settings.lr, settings.betas, settings.eps, vectors=vectors, **own)

    def check_run(self, *, accumulation: int, clips: bool, fp16: bool) -> None:
        """Raises `ValueError` under fp16, whose loss scale is in the output gradients."""
        if fp16:
            raise ValueError("MkorSpec reads gradients of outputs, which fp16=True scales. Set bf16=True.")
