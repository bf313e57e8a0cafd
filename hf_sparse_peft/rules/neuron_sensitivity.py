"""How much a model's outputs depend on the pre-activations of adapted layers (SeReNe), in the passes of a step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gradients_unread
from ..sparsity import stream_seed
from .collectives import all_reduce_sum
from .space import UnitSpace

Use = tuple[nn.Module, Tensor, Tensor]
"""One use of a layer in a pass: the layer, its input and its output."""


class NeuronSensitivity:
    r"""Reads, in every training pass of a step, the sensitivities of layers' outputs and of their low-rank components,

    .. math:: S_i = \frac1C \sum_c \mathrm{mean}\,\Big|\frac{\partial y_c}{\partial p_i}\Big|

    the mean over samples and over positions that are no padding, of all micro-batches and ranks. The pre-activation of
    output i is the layer's output there, that of component i :math:`(A x)_i`.

    Outputs `[batch, C]` are classes. Of token logits `[batch, tokens, vocabulary]`, N of a sample, C random projections
    stand for all: :math:`y_c = N^{-1/2} \sum_{t,v} u_t z_v\,o_{tv}` with fixed random signs, so that :math:`S_i` is
    about the root of the mean square of all derivatives.

    Args:
        spaces: of the layers to read.
        kind: "full" reads each output by itself; "lower_bound" :math:`|\sum_c \partial y_c / \partial p_i| / C` in one
            backward pass; "local" takes 1 where the mean pre-activation is above 0, else 0, without any.
        projections: C of token logits.
        seed: of the signs.
        scale: what outputs are multiplied by on the way back (the loss scale of fp16).
    """

    def __init__(self, spaces: list[UnitSpace], kind: str, projections: int, seed: int, scale: float) -> None:
        self.kind, self.projections, self.seed, self.scale = kind, projections, seed, scale
        self.passes = 0
        """Training passes read."""
        self._layers: dict[nn.Module, list[UnitSpace]] = {}
        for space in spaces:
            self._layers.setdefault(space.layer, []).append(space)
        self._uses: list[Use] | None = None
        self._mask: Tensor | None = None
        self._sums: dict[tuple[UnitSpace, str], Tensor] = {}
        self._counts: dict[nn.Module, float] = {}

    @property
    def saw_layers(self) -> bool:
        """Whether a layer was used where gradients reach it."""
        return bool(self._counts)

    @contextmanager
    def reading(self, model: nn.Module) -> Iterator[None]:
        """Inside, training passes of `model` are read."""
        handles = [layer.register_forward_hook(self._note_use) for layer in self._layers]
        handles.append(model.register_forward_pre_hook(self._begin_pass, with_kwargs=True))
        handles.append(model.register_forward_hook(self._read_pass))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._uses = None

    def insensitivity(self, space: UnitSpace, of: str) -> Tensor | None:
        r""":math:`\max(0, 1 - S)` fp32 of the layer's outputs (`of="output"`, `[out]`) or the space's components
        (`"component"`, `[r]`), the same on all ranks; None where nothing was read, or all of it 0 or not finite."""
        width = space.weight_shape[0] if of == "output" else space.size
        total = self._sums.get((space, of), torch.zeros(width, device=space.parameters()[0].device))
        count = torch.tensor(self._counts.get(space.layer, 0.0), device=total.device)
        total, count = all_reduce_sum(total.clone()), all_reduce_sum(count)
        if not bool(count > 0) or not bool(torch.isfinite(total).all()) or not bool(total.any()):
            return None
        mean = total / count
        return (mean <= 0).float() if self.kind == "local" else (1 - mean).clamp_min(0)

    # In a pass

    def _begin_pass(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self._uses = [] if model.training and torch.is_grad_enabled() else None
        mask = kwargs.get("attention_mask")
        self._mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def _note_use(self, layer: nn.Module, args: tuple, output: Tensor) -> None:
        active = not layer.disable_adapters and not layer.merged and output.shape[-1] == layer.out_features
        if self._uses is not None and active and (output.requires_grad or self.kind == "local"):
            self._uses.append((layer, args[0].detach(), output))

    def _read_pass(self, model: nn.Module, args: tuple, output: Any) -> None:
        uses, self._uses = self._uses, None
        if uses is None:
            return
        self.passes += 1
        for layer, _, y in uses:
            weights = self._weights(y)
            count = y.numel() / y.shape[-1] if weights is None else float(weights.sum())
            self._counts[layer] = self._counts.get(layer, 0.0) + count
        if self.kind == "local":
            self._read_local(uses)
        elif uses:
            self._read_gradients(uses, logits_of(output))

    def _read_local(self, uses: list[Use]) -> None:
        for layer, x, y in uses:
            for space in self._layers[layer]:
                self._add(space, "output", y.detach().float(), y)
                if space.kind == "rank":
                    self._add(space, "component", x.float() @ space.A.detach().float().t(), y)

    def _read_gradients(self, uses: list[Use], logits: Tensor) -> None:
        single = logits.dim() == 2
        share = 1 if self.kind == "lower_bound" else logits.shape[1] if single else self.projections
        targets = [y for _, _, y in uses]
        with gradients_unread():
            for output in self._outputs(logits.float()):
                found = torch.autograd.grad(output * self.scale, targets, retain_graph=True, allow_unused=True)
                for (layer, _, y), gradient in zip(uses, found, strict=True):
                    if gradient is None:
                        continue
                    gradient = gradient.float() / (self.scale * share)
                    for space in self._layers[layer]:
                        self._add(space, "output", gradient.abs(), y)
                        if space.kind == "rank":
                            self._add(space, "component", (gradient @ _scaled_columns(space)).abs(), y)

    def _outputs(self, logits: Tensor) -> Iterator[Tensor]:
        """Numbers whose derivatives are taken; summed over samples, which do not depend on each other."""
        if logits.dim() == 2:
            mean = self.kind == "lower_bound"
            yield from [logits.sum() / logits.shape[1]] if mean else (column.sum() for column in logits.unbind(1))
            return
        weights = self._weights(logits)
        weights = torch.ones_like(logits[..., 0]) if weights is None else weights
        numbers = (weights.flatten(1).sum(1).clamp_min(1) * logits.shape[-1]).view(-1, *[1] * (logits.dim() - 2))
        if self.kind == "lower_bound":
            yield (logits.sum(-1) * weights / numbers).sum()
            return
        for c in range(self.projections):
            generator = torch.Generator().manual_seed(stream_seed(self.seed, "serene", c))
            z, u = (_signs(shape, generator).to(logits) for shape in (logits.shape[-1:], logits.shape[1:-1]))
            yield ((logits @ z) * u * weights / numbers.sqrt()).sum()

    def _weights(self, tensor: Tensor) -> Tensor | None:
        """1 for tokens that are no padding, where the tensor has the mask's tokens; None where it has not."""
        if self._mask is None or tensor.dim() != 3 or tensor.shape[:2] != self._mask.shape:
            return None
        return self._mask.to(device=tensor.device, dtype=torch.float32)

    def _add(self, space: UnitSpace, of: str, part: Tensor, output: Tensor) -> None:
        weights = self._weights(output)
        part = part if weights is None else part * weights[..., None]
        total = part.reshape(-1, part.shape[-1]).sum(0)
        known = self._sums.get((space, of))
        self._sums[space, of] = total if known is None else known + total


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output.

    Raises:
        ValueError: it has none.
    """
    logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ValueError(
            f"SeReNe reads the model's logits, and a training pass gave a {type(output).__name__} without them. Switch "
            "off what fuses loss and head, or set SeReNe.kind='local'."
        )
    return logits


def _signs(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(2, tuple(shape), generator=generator).float().mul_(2).sub_(1)


@torch.no_grad()
def _scaled_columns(space: UnitSpace) -> Tensor:
    B = space.B.float() * space.scale
    return B if space.gate is None else B * space.gate.float().flatten()
