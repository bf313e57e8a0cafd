"""Who is updated at a step: parameters, or parts of them, that rules hold still keep value and optimizer state."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..optim import innermost

Mask = Callable[[], Tensor | None]


class UpdateMask:
    """The update mask of one training run; what several rules ask for is combined: a number is updated if no rule holds
    it still.

    Whole parameters (`hold`) get `requires_grad=False` and lose their gradient, so that none is computed and neither
    clipping nor the optimizer sees them. An optimizer has to be built before the run, from all that trains: one that
    is built meanwhile would not have them, and a run that then begins with it is refused. Parts of a parameter
    (`hold_part`) lose their gradient as it arrives, before clipping, and value and optimizer state are put back bit
    for bit after the step, whatever weight decay or momentum did to them. Updates of parts can be multiplied
    (`scale_part`), as a learning rate of their own would. That hangs on the optimizer's own step hooks (`attach`): it
    holds in any loop, and a step that a gradient scaler skips does nothing. `release` ends all of it.
    """

    def __init__(self) -> None:
        self._held: dict[Hashable, dict[int, nn.Parameter]] = {}
        self._still: dict[int, nn.Parameter] = {}
        self._suspended = False
        self._parts: dict[Hashable, list[tuple[nn.Parameter, Mask, bool, bool]]] = {}
        self._factors: dict[Hashable, list[tuple[nn.Parameter, Mask]]] = {}
        self._places: dict[int, tuple[Tensor, int, Tensor]] = {}
        self._hooks: dict[int, Any] = {}
        self._optimizer: Any = None
        self._optimizer_hooks: list[Any] = []
        self._saved: list[tuple[Tensor, Tensor, Tensor]] = []
        self._scaled: list[tuple[Tensor, Tensor, Tensor]] = []

    def hold(self, rule: Hashable, parameters: Iterable[nn.Parameter]) -> None:
        """Hold exactly these still as far as `rule` is concerned; what it held before is updated again unless another
        rule holds it. Parameters that the user froze stay out of it."""
        self.resume()
        self._held[rule] = {id(parameter): parameter for parameter in parameters}
        wanted = {key: parameter for held in self._held.values() for key, parameter in held.items()}
        for key in [key for key in self._still if key not in wanted]:
            self._still.pop(key).requires_grad_(True)
        for key, parameter in wanted.items():
            if key in self._still or parameter.requires_grad:
                self._still[key] = parameter
                parameter.requires_grad_(False)
                parameter.grad = None

    def suspend(self) -> None:
        """Between two steps, until `resume`: whole parameters that are held still may train. What is saved then has
        them, where a checkpoint leaves frozen parameters out (FSDP2's full state dict)."""
        self._suspended = True
        for parameter in self._still.values():
            parameter.requires_grad_(True)

    def resume(self) -> None:
        """Before a step: hold still what was held before `suspend`."""
        for parameter in self._still.values() if self._suspended else ():
            parameter.requires_grad_(False)
            parameter.grad = None
        self._suspended = False

    def hold_part(
        self,
        rule: Hashable,
        parts: Iterable[tuple[nn.Parameter, Mask]],
        keep_state: bool = True,
        keep_value: bool = True,
    ) -> None:
        """Hold parts of these parameters still, and of no others as far as `rule` is concerned.

        Args:
            parts: parameters, each with a function that gives what to hold at this step: numbers (nonzero in a tensor
                of the parameter's shape), slices along axis 0 (nonzero in `[k]`), or None.
            keep_state: whether the optimizer's state there is put back too; False where it is of no use any more.
            keep_value: False zeroes the gradient only: momentum and weight decay act as on any number without one.
        """
        self._parts[rule] = [(parameter, mask, keep_state, keep_value) for parameter, mask in parts]
        wanted = {id(parameter): parameter for held in self._parts.values() for parameter, *_ in held}
        for key in [key for key in self._hooks if key not in wanted]:
            self._hooks.pop(key).remove()
        for key, parameter in wanted.items():
            if key not in self._hooks:
                self._hooks[key] = self._on_gradient(parameter)

    def _on_gradient(self, parameter: nn.Parameter) -> Any:
        trains = parameter.requires_grad
        parameter.requires_grad_(True)  # else torch takes no hook; what is frozen now may train later
        try:
            return parameter.register_hook(partial(self._zero, parameter))
        finally:
            parameter.requires_grad_(trains)

    def scale_part(self, rule: Hashable, parts: Iterable[tuple[nn.Parameter, Mask]]) -> None:
        r"""Multiply the updates of these parameters, and of no others as far as `rule` is concerned:
        :math:`\theta_t = \theta_{t-1} + c\,(\theta'_t - \theta_{t-1})`, :math:`\theta'_t` the optimizer's result.
        Most updates are proportional to the learning rate, decoupled weight decay included: `c` multiplies that.

        Args:
            parts: parameters, each with a function that gives `c` at this step, in the parameter's shape or `[k]` for
                slices along axis 0, or None for 1. Where `c` is 1 the optimizer's result stays to the bit.
        """
        self._factors[rule] = list(parts)

    def held_numbers(self, parameter: nn.Parameter) -> Tensor | None:
        """Bool of the parameter's shape: the numbers whose value is held still at this step; None where none is. What a
        rule writes after an update leaves them as they are."""
        if any(id(parameter) in held for held in self._held.values()):
            return torch.ones_like(parameter, dtype=torch.bool)
        found = None
        for mask, _, keep_value in self._masks_of(parameter):
            if keep_value:
                wide = mask if mask.shape == parameter.shape else mask.view(-1, *[1] * (parameter.dim() - 1))
                held = wide.bool().expand_as(parameter)
                found = held if found is None else found | held
        return found

    def _zero(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor | None:
        for mask, *_ in self._masks_of(parameter):
            held = mask.bool() if mask.shape == gradient.shape else mask.bool().view(-1, *[1] * (gradient.dim() - 1))
            gradient = gradient.masked_fill(held, 0)
        return gradient

    def _masks_of(self, parameter: nn.Parameter) -> list[tuple[Tensor, bool, bool]]:
        held = [(mask(), *keep) for parts in self._parts.values() for one, mask, *keep in parts if one is parameter]
        return [one for one in held if one[0] is not None]

    def attach(self, optimizer: Any) -> None:
        """Hang on `optimizer`'s step hooks (the innermost one's, behind wrappers).

        Raises:
            ValueError: an optimizer without step hooks, which nothing of torch is.
        """
        inner = innermost(optimizer)
        if inner is self._optimizer:
            return
        if not hasattr(inner, "register_step_pre_hook"):
            raise ValueError(
                f"{type(inner).__name__} has no step hooks, so that nothing can be held still in its steps. Derive it "
                "from torch.optim.Optimizer."
            )
        self._detach()
        self._optimizer = inner
        self._optimizer_hooks = [
            inner.register_step_pre_hook(lambda *_: self._save()),
            inner.register_step_post_hook(lambda *_: self.restore()),
        ]

    @torch.no_grad()
    def _save(self) -> None:
        self._saved, self._scaled = [], []
        for parameter, factor in (part for parts in self._factors.values() for part in parts):
            if parameter.grad is not None and (found := factor()) is not None:
                found = found if found.shape == parameter.shape else found.view(-1, *[1] * (parameter.dim() - 1))
                self._scaled.append((parameter.data, found, parameter.detach().clone()))
        for parameter in self._still.values():
            parameter.grad = None  # a closure, or a second backward pass, may have brought one
        for parameter in {id(p): p for held in self._parts.values() for p, *_ in held}.values():
            if parameter.grad is None:
                continue
            for mask, keep_state, keep_value in self._masks_of(parameter):
                if not keep_value:
                    continue
                place = self._place(parameter, mask)
                states = _entry_states(self._optimizer.state.get(parameter, {}), parameter) if keep_state else []
                for tensor in (parameter.data, *states):
                    self._saved.append((tensor, place, tensor[place].clone()))

    def _place(self, parameter: nn.Parameter, mask: Tensor) -> Tensor:
        """Where the numbers or slices of a mask are; read anew only when rewritten, as reading waits for a GPU."""
        if mask.shape == parameter.shape and mask.dim() > 1:
            return mask.bool()
        known = self._places.get(id(parameter))
        if known is None or known[0] is not mask or known[1] != mask._version:
            known = self._places[id(parameter)] = (mask, mask._version, mask.nonzero().squeeze(1))
        return known[2]

    @torch.no_grad()
    def restore(self) -> None:
        """Scale updates, and put back what the last step must not have changed; also what a step that was broken off
        half-way did."""
        for tensor, factor, before in self._scaled:
            tensor.copy_(torch.where(factor == 1, tensor, before + factor * (tensor - before)))
        for tensor, place, values in self._saved:
            tensor[place] = values
        self._saved, self._scaled = [], []

    def release(self) -> list[nn.Parameter]:
        """Let everything be updated again; returns the whole parameters that were held still."""
        self.restore()
        self._detach()
        for hook in self._hooks.values():
            hook.remove()
        still = list(self._still.values())
        self._held, self._still, self._parts, self._factors, self._hooks, self._places = {}, {}, {}, {}, {}, {}
        for parameter in still:
            parameter.requires_grad_(True)
        return still

    def _detach(self) -> None:
        for hook in self._optimizer_hooks:
            hook.remove()
        self._optimizer, self._optimizer_hooks = None, []


def _entry_states(state: dict[str, Any], parameter: Tensor) -> list[Tensor]:
    found = [v for v in state.values() if isinstance(v, Tensor) and v.shape == parameter.shape]
    if any(tensor.dtype in (torch.uint8, torch.int8) for tensor in found):
        raise ValueError(
            "Parts of a parameter keep their optimizer state while they are held still, and 8-bit state cannot be "
            "edited entry by entry. Use a 32-bit optimizer, or hf_sparse_peft.optim.use_32bit_states."
        )
    return found
