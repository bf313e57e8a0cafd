"""What the package's own optimizers share: optimizer state that stays fp32 through `load_state_dict`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor


class Fp32StateOptimizer(torch.optim.Optimizer):
    """An optimizer whose state is kept in fp32 (fp64 for fp64 parameters), whatever the parameter's dtype.

    `torch.optim.Optimizer.load_state_dict` casts every state tensor except `step` to the parameter's dtype: fp32
    moments of a bf16 parameter come back rounded. Here the tensors of the file are put back as they were saved, after
    the base class has matched parameters and groups. They are copies: two optimizers never share state.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(group, p, p.grad)
        return loss

    def _update(self, group: dict[str, Any], p: Tensor, grad: Tensor) -> None:
        """Step one parameter."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """As torch's; int16 tensors are int32 where processes train together, whose collectives have no int16: a full
        state dict of FSDP2 is broadcast when it is loaded."""
        found = super().state_dict()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            found["state"] = {key: {k: _sendable(v) for k, v in entry.items()} for key, entry in found["state"].items()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict; groups keep own options that the file does not know.

        Raises:
            ValueError: different group lengths, or a state tensor whose shape does not fit (torch would fail at the
                next step only).
        """
        seen: dict[str, Any] = {}

        def capture(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            groups = loaded["param_groups"]
            if len(groups) == len(self.param_groups):
                # A file of torch.optim.AdamW has no `per_unit_age`: losing it would turn ages off without a word.
                groups = [{**_options(own), **saved} for own, saved in zip(self.param_groups, groups, strict=True)]
            seen.update(loaded, param_groups=groups)
            return dict(seen)

        def restore(_: torch.optim.Optimizer) -> None:
            saved = chain.from_iterable(g["params"] for g in seen["param_groups"])
            for group, p in ((g, p) for g in self.param_groups for p in g["params"]):
                entry = seen["state"].get(next(saved))
                if entry:
                    self.state[p] = {
                        k: self._restored(group, p, k, v) if isinstance(v, Tensor) else v for k, v in entry.items()
                    }

        hooks = [self.register_load_state_dict_pre_hook(capture)]
        hooks.append(self.register_load_state_dict_post_hook(restore, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restored(self, group: dict[str, Any], p: Tensor, name: str, value: Tensor) -> Tensor:
        """The tensor to keep under `name`: a copy on the right device, checked."""
        return value.to(device=p.device, dtype=state_dtype(p), copy=True)


def state_dtype(p: Tensor) -> torch.dtype:
    """fp64 for fp64 parameters, else fp32."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _sendable(value: Any) -> Any:
    return value.int() if isinstance(value, Tensor) and value.dtype == torch.int16 else value


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}
