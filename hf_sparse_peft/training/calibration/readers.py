"""Feeding a statistic of one linear layer: with its weight's gradients, or with what flows in and out of it.

Readers know no tuner: they hook the layer's forward pass, so that they read every `AdapterLayer`, upstream peft's
layers and plain linear ones alike, dense or quantised.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...rules.collectives import all_reduce_sum
from ...rules.gradient_readers import UsesOfLayer
from ...sparsity import Statistic
from ...tuners import AdapterLayer
from ...tuners.shared import base_weight
from ...tuners.shared.parameters import ParameterWeight
from ...tuners.shared.quantised import backend_of


class Reader:
    """What a statistic knows of the layer `module`, called `name`."""

    def __init__(self, name: str, module: nn.Module, statistic: Statistic) -> None:
        self.name, self.module, self.statistic = name, module, statistic
        self.base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        self.cols, self.rows = _get_in_out_features(self.base)
        self.device = self.base.weight.device
        self.state = statistic.start(self.rows, self.cols, self.device)
        self.count = 0
        """Items that the state is a sum over; see `Statistic.finish`."""
        self.left_out = 0
        """Readings on this rank that were not finite (an fp16 overflow) and are not in the state."""
        self._hook: Any = None

    def attach(self) -> None:
        """Begin to read: hook the layer's forward pass."""
        self._hook = self.module.register_forward_hook(self._see)

    def detach(self) -> None:
        """Read no more."""
        if self._hook is not None:
            self._hook.remove()

    def _see(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        raise NotImplementedError

    def _is_finite(self, *tensors: Tensor) -> bool:
        finite = all(bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors)
        self.left_out += not finite
        return finite

    @torch.no_grad()
    def finish(self) -> None:
        """Add up the ranks' states, unless every rank has seen the same steps, and close the sum."""
        count = torch.tensor(self.count, device=self.device)
        if not self.statistic.per_step:
            for tensor in (*self.state.values(), count):
                all_reduce_sum(tensor)
        self.statistic.finish(self.state, int(count))

    def says_something(self) -> bool:
        """Whether the state is finite and not all 0."""
        finite = all(bool(torch.isfinite(tensor).all()) for tensor in self.state.values())
        return finite and any(bool(tensor.any()) for tensor in self.state.values())


class GradientReader(Reader):
    r"""Feeds a state with the gradients :math:`G = dY^\top X` `[rows, cols]` of the base weight, in backward passes."""

    def __init__(self, name: str, module: nn.Module, statistic: Statistic) -> None:
        super().__init__(name, module, statistic)
        self.items = 1
        """What the mean loss of the batch at hand is a mean of."""
        self.uses = UsesOfLayer()
        self.pending: Tensor | None = None
        self.probe = torch.zeros((), device=self.device, requires_grad=True)
        """A number that each use of the layer depends on: a backward pass towards it comes through the layer."""
        self._took = False

    def _see(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        self.uses.expect()
        if isinstance(self.base, ParameterWeight):
            return _ShowParametersGradient.apply(output, self.probe, self)
        return _ShowGradient.apply(output, args[0], self.probe, self, _product_dtype(self.base, output))

    @torch.no_grad()
    def __call__(self, dense: Tensor) -> None:
        """Take the gradient of the mean loss over `items`, of one use of the layer."""
        # Only where one example is read at a time is a sum over uses not as good as its terms.
        self._take(self.uses.add(dense) if self.statistic.per_example else dense)

    @torch.no_grad()
    def finish_backward(self) -> None:
        """Close a backward pass in which some use of the layer had no gradient."""
        self._take(self.uses.close())
        if self._took and not self.statistic.per_step:
            self.count += 1 if self.statistic.per_example else self.items
        self._took = False

    def _take(self, dense: Tensor | None) -> None:
        if dense is None:
            return
        # Where a step is read as a whole, all ranks must leave it out together: `finish_step` looks.
        if not self.statistic.per_step and not self._is_finite(dense):
            return
        self._took = True
        gradient = self.statistic.reduce(dense.to(torch.float32, copy=True))
        if not self.statistic.per_example and self.items != 1:
            gradient = gradient.mul_(self.items)  # sums over examples do not depend on how they are batched
        if self.statistic.per_step:
            self.pending = gradient if self.pending is None else self.pending.add_(gradient)
        else:
            self._update(gradient)

    def _update(self, gradient: Tensor) -> None:
        weight = dense_weight(self.module) if self.statistic.reads_weight else None
        self.statistic.update(self.state, gradient, weight)

    @torch.no_grad()
    def finish_step(self, items: int) -> None:
        """Close an optimizer step whose micro-batches were means over `items` on all ranks together.

        A step whose gradient is not finite is left out, and one without a gradient leaves averages as they are.
        """
        gradient, self.pending = self.pending, None
        if gradient is None:
            gradient = self.statistic.reduce(torch.zeros(self.rows, self.cols, device=self.device))
        gradient = all_reduce_sum(gradient).div_(items)
        if self._is_finite(gradient) and bool(gradient.any()):
            self._update(gradient)
            self.count += 1


class ActivationReader(Reader):
    """Feeds a state with inputs and outputs of the layer, in forward passes."""

    def __init__(self, name: str, module: nn.Module, statistic: Statistic) -> None:
        super().__init__(name, module, statistic)
        if isinstance(self.base, ParameterWeight):
            raise ValueError(
                f"'{statistic.name}' goes by what flows into a layer, and '{name}' is a parameter of a module that "
                "keeps that to itself. Choose a criterion by weights or gradients ('magnitude', 'fisher'), or leave "
                "it out of target_parameters."
            )
        self.visible: Tensor | None = None
        """The batch's attention mask, bool `[samples, tokens]`; None: every token counts."""

    @torch.no_grad()
    def _see(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        inputs, outputs = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (args[0], output))
        if not self._is_finite(inputs, outputs):
            return
        # A layer that sees other tokens than the batch's (a pooled head, a vision tower) has no use for its mask.
        if self.visible is not None and self.visible.numel() == inputs.shape[0]:
            seen = self.visible.flatten()
            inputs, outputs = inputs[seen], outputs[seen]
        self.count += inputs.shape[0]
        self.statistic.observe(self.state, inputs, outputs)


class _ShowGradient(torch.autograd.Function):
    """The identity of a layer's output; its backward pass shows the reader the gradient of the layer's weight."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor, probe: Tensor, reader: GradientReader, dtype: torch.dtype):
        ctx.save_for_backward(inputs)
        ctx.reader, ctx.dtype = reader, dtype
        return output.detach()  # unlike a view it may be written to in place, as the layer's own output may

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor):
        (inputs,) = ctx.saved_tensors
        with torch.autocast(grad_output.device.type, enabled=False):
            dy = grad_output.reshape(-1, grad_output.shape[-1]).to(ctx.dtype)
            x = inputs.reshape(-1, inputs.shape[-1]).to(ctx.dtype)
            ctx.reader(dy.t() @ x)
        return grad_output, None, None, None, None


class _ShowParametersGradient(torch.autograd.Function):
    """The identity of an adapted parameter; its backward pass shows the reader the gradient as one matrix."""

    @staticmethod
    def forward(ctx: Any, adapted: Tensor, probe: Tensor, reader: GradientReader):
        ctx.reader = reader
        return adapted.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor):
        ctx.reader(gradient.flatten(0, -2))
        return gradient, None, None


def _product_dtype(base: nn.Module, output: Tensor) -> torch.dtype:
    """The dtype in which the layer multiplies."""
    if base_weight.is_bnb_4bit(base) and getattr(base, "compute_dtype", None) is not None:
        return base.compute_dtype
    device = output.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else output.dtype


def dense_weight(module: nn.Module) -> Tensor:
    """The base weight of a linear layer as `[out, in]`, dequantised if need be; else it shares the layer's memory."""
    if isinstance(module, AdapterLayer):
        return module.dense_base_weight()
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    return base_weight.dense_weight(base, backend_of(base))
