"""Feeding a criterion's statistics of one layer: with its dense gradients, or with what flows in and out of it."""

from __future__ import annotations

from typing import Any

import torch

from ..rules.collectives import all_reduce_sum
from ..rules.gradient_readers import UsesOfLayer
from ..sparsity import DataCriterion
from ..tuners.sparse_lora.layer import SparseLoraLayer


class Reader:
    """What is known of one layer by a criterion."""

    def __init__(self, layer: SparseLoraLayer, criterion: DataCriterion) -> None:
        self.layer, self.criterion = layer, criterion
        self.state = criterion.start(layer.out_features, layer.in_features, layer.get_base_layer_device())
        self.left_out = 0
        """Readings on this rank that were not finite (an fp16 overflow) and are not in the state."""

    def _is_finite(self, *tensors: torch.Tensor) -> bool:
        finite = all(bool(torch.isfinite(tensor.sum(dtype=torch.float32))) for tensor in tensors)
        self.left_out += not finite
        return finite

    def attach(self, adapter_name: str) -> None:
        """Begin to read."""
        raise NotImplementedError

    def detach(self, adapter_name: str) -> None:
        """Read no more."""
        raise NotImplementedError

    @torch.no_grad()
    def finish(self) -> None:
        """Add up the ranks' states."""
        for tensor in self.state.values() if not self.criterion.per_step else ():
            all_reduce_sum(tensor)


class GradientReader(Reader):
    """Feeds a criterion's state of one layer with that layer's dense gradients; read in its backward pass."""

    def __init__(self, layer: SparseLoraLayer, criterion: DataCriterion) -> None:
        super().__init__(layer, criterion)
        self.items = 1
        self.uses = UsesOfLayer()
        self.pending: torch.Tensor | None = None

    def attach(self, adapter_name: str) -> None:
        """Read the layer's gradient."""
        self.layer.add_gradient_reader(adapter_name, self)

    def detach(self, adapter_name: str) -> None:
        """Read it no more."""
        self.layer.remove_gradient_reader(adapter_name, self)

    def expect(self) -> None:
        """The layer runs once more in this forward pass."""
        self.uses.expect()

    @torch.no_grad()
    def __call__(self, dense: torch.Tensor) -> None:
        """Take the dense gradient of the mean loss over `items`, of one use of the layer."""
        # Only where one example is read at a time is a sum over uses not as good as its terms.
        self._take(self.uses.add(dense) if self.criterion.per_example else dense)

    @torch.no_grad()
    def finish_backward(self) -> None:
        """Close a backward pass in which some use of the layer had no gradient."""
        self._take(self.uses.close())

    def _take(self, dense: torch.Tensor | None) -> None:
        if dense is None:
            return
        # Where a step is read as a whole, all ranks must leave it out together: `finish_step` looks.
        if not self.criterion.per_step and not self._is_finite(dense):
            return
        gradient = dense.to(torch.float32, copy=True)
        if not self.criterion.per_example and self.items != 1:
            gradient = gradient.mul_(self.items)  # sums over examples do not depend on how they are batched
        if self.criterion.per_step:
            self.pending = gradient if self.pending is None else self.pending.add_(gradient)
        else:
            self._update(gradient)

    def _update(self, gradient: torch.Tensor) -> None:
        weight = self.layer.dense_base_weight() if self.criterion.reads_weight else None
        self.criterion.update(self.state, gradient, weight)

    @torch.no_grad()
    def finish_step(self, items: int) -> None:
        """Close an optimizer step whose micro-batches were means over `items` on all ranks together.

        A step whose gradient is not finite is left out, and one without a gradient leaves averages as they are.
        """
        gradient, self.pending = self.pending, None
        if gradient is None:
            device = self.layer.get_base_layer_device()
            gradient = torch.zeros(self.layer.out_features, self.layer.in_features, device=device)
        gradient = all_reduce_sum(gradient).div_(items)
        if self._is_finite(gradient) and bool(gradient.any()):
            self._update(gradient)


class ActivationReader(Reader):
    """Feeds a criterion's state of one layer with that layer's inputs and outputs; a forward hook."""

    def __init__(self, layer: SparseLoraLayer, criterion: DataCriterion) -> None:
        super().__init__(layer, criterion)
        self.visible: torch.Tensor | None = None
        """The batch's attention mask, bool `[samples, tokens]`; None: every token counts."""
        self._hook: Any = None

    def attach(self, adapter_name: str) -> None:
        """Hook the layer's forward pass."""
        self._hook = self.layer.register_forward_hook(self)

    def detach(self, adapter_name: str) -> None:
        """Take the hook away."""
        if self._hook is not None:
            self._hook.remove()

    @torch.no_grad()
    def __call__(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
        """Take one forward pass's inputs `[..., in]` and outputs `[..., out]`."""
        inputs, outputs = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (args[0], output))
        if not self._is_finite(inputs, outputs):
            return
        # A layer that sees other tokens than the batch's (a pooled head, a vision tower) has no use for its mask.
        if self.visible is not None and self.visible.numel() == inputs.shape[0]:
            seen = self.visible.flatten()
            inputs, outputs = inputs[seen], outputs[seen]
        self.criterion.observe(self.state, inputs, outputs)
