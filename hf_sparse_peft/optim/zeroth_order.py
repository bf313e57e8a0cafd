r"""Zeroth-order descent: two forward passes and a random direction instead of a gradient (MeZO; Malladi et al., 2023).

For the direction :math:`z \sim N(0, I)` of an optimizer step and the loss :math:`L` of its whole batch

.. math:: g = \frac{L(\theta + \epsilon z) - L(\theta - \epsilon z)}{2 \epsilon}, \qquad
          \theta \leftarrow \theta - \eta\,(g\,z + \lambda\,\theta).

`z` is never stored: it follows from (seed, step, parameter name) and is drawn anew, one chunk at a time, from a
generator of its own. Sparse MeZO (Liu et al., 2024) puts :math:`m \odot z` in its place, with
:math:`m = 1[|\theta| \le h]` and one fixed threshold `h` per tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..sparsity import pack_bits, stream_seed, unpack_bits
from .groups import _NO_DECAY
from .layerwise_shift import layerwise_shift
from .parameter_chunks import add_rounded_once, chunks, magnitude_threshold

PERTURBATIONS = ("in_place", "layerwise")


class ZerothOrderSGD(torch.optim.Optimizer):
    r"""MeZO (Malladi et al., 2023), and Sparse MeZO (Liu et al., 2024) with `sparsity > 0`.

    One optimizer step is, for each of its micro-batches, a forward inside `with optimizer.shifted(+1, model)`, one
    inside `shifted(-1, model)`, and `add_difference(loss_plus - loss_minus)`; then `step()`. All micro-batches of a
    step see the same `z`, so that `g` is that of the whole batch. `step(closure)` does it all for one batch.
    `hf_sparse_peft.training.ZerothOrderTrainer` does it under Trainer.

    How a parameter is shifted (`perturbation`):

    `in_place`: the parameter itself moves by `+eps z`, `-2 eps z` and back; the way back from the last pass is fused
    with the update, :math:`\theta_- + (\epsilon - \eta g) z` (without decay). Every
    move rounds once: fp32 parameters drift by some units in the last place a step; in bf16 and fp16, where
    :math:`\epsilon z` may be smaller than the spacing of large weights, they drift visibly. Sparse MeZO's mask is
    taken before the first move of a step and kept until its last, one bit a number.

    `layerwise`: a module's own parameters are shifted while its forward runs and copied back afterwards, bit for bit in
    any dtype; the mask follows from the true parameters each time. Nothing outside a forward ever sees a shifted
    parameter. Memory: a copy of the trained parameters of one module. A parameter that is read outside the
    forward of the module that owns it (a tied head that calls `F.linear(x, embedding.weight)`, DoRA's norm of `A`) is
    not shifted there: take `in_place` for those.

    Directions are drawn in fp32 (fp64 for fp64 parameters), added in fp32 and rounded once to the parameter's dtype.
    Decay moves only entries that the mask lets move. State: `threshold` per parameter with `sparsity > 0`, nothing
    else; the step count lies in the parameter groups as `updates`. A step whose `g` is not finite restores the
    parameters and leaves them there.

    Args:
        params: `(name, parameter)` pairs, or groups of them: names seed the directions.
        lr: learning rate; the paper's range is 1e-7 .. 1e-6 for all weights, around 1e-4 for LoRA.
        epsilon: size of the perturbation (paper: 1e-3 for all weights, 1e-2 for LoRA).
        weight_decay: decay of the group's parameters.
        seed: base seed of all directions.
        sparsity: fraction of every tensor's entries, the largest, that is neither perturbed nor trained; 0 is MeZO.
        perturbation: `in_place` or `layerwise`.

    Raises:
        ValueError: unnamed parameters, or a number out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        epsilon: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        sparsity: float = 0.0,
        perturbation: str = "in_place",
    ) -> None:
        _check("lr", lr, lr >= 0, "a number >= 0")
        _check("epsilon", epsilon, epsilon > 0 and math.isfinite(epsilon), "a positive number (paper: 1e-3, LoRA 1e-2)")
        _check("weight_decay", weight_decay, weight_decay >= 0, "a number >= 0")
        _check("sparsity", sparsity, 0 <= sparsity < 1, "a fraction in [0, 1); 0 perturbs every entry")
        _check("perturbation", perturbation, perturbation in PERTURBATIONS, f"one of {PERTURBATIONS}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "seed": int(seed), "updates": 0})
        if not all("param_names" in group for group in self.param_groups):
            raise ValueError(
                "ZerothOrderSGD seeds its directions by parameter name: pass model.named_parameters() or groups of "
                "(name, parameter) pairs, as zeroth_order_groups(model, weight_decay) builds them."
            )
        self.epsilon, self.sparsity, self.perturbation = float(epsilon), float(sparsity), perturbation
        self.last_update: dict[str, Any] | None = None
        """The last step: `update` (from 0), `passes`, `projected_gradient`, `lr` of each group, `perturbed_share`."""
        self._side = 0
        self._sides: dict[str, int] = {}
        self._masks: dict[str, list[Tensor]] = {}
        self._difference, self._passes = 0.0, 0

    # Perturbation

    @contextmanager
    def shifted(self, sign: int, model: nn.Module | None = None) -> Iterator[None]:
        r"""Inside, forwards of `model` see :math:`\theta + sign \cdot \epsilon z` of the current step.

        With `in_place` the shift outlives the block, until the next one, `restore()` or `step()`; an exception inside
        restores. `layerwise` needs the model, and undoes itself.
        """
        if self.perturbation == "layerwise":
            if model is None:
                raise ValueError(
                    "perturbation='layerwise' shifts inside a model's forwards: pass shifted(sign, model)."
                )
            self._prepare()
            with layerwise_shift(model, dict(self._named()), lambda name, p: self._shift(name, p, sign * self.epsilon)):
                yield
            return
        self._move(sign)
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def restore(self) -> None:
        """Bring parameters back from where `in_place` shifted them; nothing to do otherwise."""
        self._move(0)

    def abandon(self) -> None:
        """Bring parameters back and forget the step that was under way; nothing to do between two steps."""
        self.restore()
        self._masks, self._difference, self._passes = {}, 0.0, 0

    @torch.no_grad()
    def _move(self, side: int) -> None:
        self._prepare()
        for name, parameter in self._named():
            away = side - self._sides.get(name, 0)
            if away:
                self._shift(name, parameter, away * self.epsilon)
                self._sides[name] = side  # one by one: an interrupt may come between two of them
        self._side = side

    @torch.no_grad()
    def _shift(self, name: str, parameter: Tensor, amount: float) -> None:
        for piece, z, _ in self._pieces(name, parameter):
            add_rounded_once(piece, z, amount)

    def _pieces(self, name: str, parameter: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Chunk after chunk of a parameter: a view of it, its masked direction, its mask."""
        group = self.param_groups[0]
        seed = stream_seed(group["seed"], group["updates"], name)
        generator = torch.Generator(device=parameter.device).manual_seed(seed)
        for number, piece in enumerate(chunks(parameter.detach())):
            dtype = torch.float64 if piece.dtype == torch.float64 else torch.float32
            z = torch.randn(piece.shape, generator=generator, device=piece.device, dtype=dtype)
            mask = self._mask(name, parameter, number, piece)
            yield piece, z if mask is None else z.mul_(mask), mask

    # Masks of Sparse MeZO

    def _mask(self, name: str, parameter: Tensor, number: int, piece: Tensor) -> Tensor | None:
        if not self.sparsity:
            return None
        if name in self._masks:
            return unpack_bits(self._masks[name][number], piece.numel()).view(piece.shape)
        return piece.abs() <= self.state[parameter]["threshold"]

    @torch.no_grad()
    def _prepare(self) -> None:
        """Fix the thresholds before the first step, and the masks of `in_place` before the first move of each."""
        if not self.sparsity or self._masks:
            return
        for name, parameter in self._named():
            if "threshold" not in self.state[parameter]:
                self.state[parameter]["threshold"] = magnitude_threshold(parameter.detach(), 1 - self.sparsity, name)
        if self.perturbation == "in_place":
            for name, parameter in self._named():
                threshold = self.state[parameter]["threshold"]
                self._masks[name] = [pack_bits(piece.abs() <= threshold) for piece in chunks(parameter.detach())]

    # Steps

    def add_difference(self, difference: float) -> None:
        """Add one micro-batch's :math:`L_+ - L_-`, weighted by its part in the whole batch's loss."""
        self._difference += float(difference)
        self._passes += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Update from the differences added since the last step, or from a `closure` that returns the loss.

        Returns the mean of the closure's two losses. Raises `RuntimeError` where there is nothing to step by, and
        `ValueError` for a closure with `layerwise`, which has to know the model.
        """
        mean = None
        if closure is not None:
            with self.shifted(1):
                plus = closure()
            with self.shifted(-1):
                minus = closure()
            self.add_difference(float(plus) - float(minus))
            mean = (plus + minus) / 2
        if not self._passes:
            raise RuntimeError(
                "ZerothOrderSGD.step() was called without loss differences. Train with ZerothOrderTrainer "
                "(method.trainer_class), or call shifted(), add_difference() and then step()."
            )
        self._update(self.pending_gradient)
        return mean

    def _update(self, gradient: float) -> None:
        self._prepare()
        finite = math.isfinite(gradient)
        moved = total = 0
        for group in self.param_groups:
            lr = float(group["lr"]) if finite else 0.0
            shrink = lr * group["weight_decay"]
            # theta = x - side * epsilon * z, so both the way back and the update are one multiple of z
            amount = -(1 - shrink) * self._side * self.epsilon - (lr * gradient if finite else 0.0)
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                for piece, z, mask in self._pieces(name, parameter):
                    add_rounded_once(piece, z, amount, shrink, mask)
                    moved += piece.numel() if mask is None else int(mask.sum())
                    total += piece.numel()
        self.last_update = {
            "update": self.updates,
            "passes": self._passes,
            "projected_gradient": gradient,
            "lr": [float(group["lr"]) for group in self.param_groups],
            "perturbed_share": moved / total,
        }
        self._side, self._sides, self._masks = 0, {}, {}
        self._difference, self._passes = 0.0, 0
        for group in self.param_groups:
            group["updates"] += 1

    @property
    def pending_gradient(self) -> float:
        """The projected gradient of the differences added since the last step."""
        return self._difference / (2 * self.epsilon)

    @property
    def updates(self) -> int:
        """Steps taken; directions follow from it."""
        return self.param_groups[0]["updates"]

    def replay_step(self, passes: int, gradient: float, lrs: list[float]) -> None:
        """Take a logged step again without a forward, moving through the same points, so that rounding repeats too."""
        for group, lr in zip(self.param_groups, lrs, strict=True):
            group["lr"] = lr
        for number in range(passes if self.perturbation == "in_place" else 0):
            for side in (1, -1) if number == passes - 1 else (1, -1, 0):
                self._move(side)
        self._passes = passes
        with torch.no_grad():
            self._update(gradient)

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for group in self.param_groups:
            yield from zip(group["param_names"], group["params"], strict=True)


def zeroth_order_groups(model: nn.Module, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups of `(name, parameter)` pairs for `ZerothOrderSGD`: trainable parameters, no decay for biases and norms.

    Raises:
        ValueError: nothing is trainable.
    """
    from transformers.trainer_pt_utils import get_parameter_names

    decayed = set(get_parameter_names(model, [nn.LayerNorm], _NO_DECAY)) if weight_decay else set()
    groups: dict[bool, list] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[name in decayed].append((name, parameter))
    if not any(groups.values()):
        raise ValueError(
            "model has no trainable parameter. Add an adapter or set requires_grad before building groups."
        )
    return [{"params": pairs, "weight_decay": weight_decay if d else 0.0} for d, pairs in groups.items() if pairs]


def _check(field: str, value: Any, condition: bool, accepted: str) -> None:
    if not condition:
        raise ValueError(f"ZerothOrderSGD: {field}={value!r} is out of range: it takes {accepted}.")
