"""Weights of examples by what learning from each does to a validation loss (learning to reweight; LiST)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def soft_label_losses(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    r"""`[n]`: :math:`\mathrm{KL}(p_i \| q_i)` of a teacher's classes :math:`p = \mathrm{softmax}(z_T / T)` and a
    student's :math:`q = \mathrm{softmax}(z_S)`, both logits `[n, classes]`. A temperature below 1 sharpens the
    teacher's."""
    target = F.log_softmax(teacher.detach() / temperature, -1)
    return (target.exp() * (target - F.log_softmax(logits, -1))).sum(-1)


def meta_weights(
    parameters: Iterable[nn.Parameter], example_losses: Callable[[], Tensor], validation_loss: Callable[[], Tensor]
) -> Tensor:
    r"""Weights `[n]` of examples, by one look-ahead step of SGD (Ren et al., 2018; LiST, Wang et al., 2022):

    .. math::
        w_i = \frac{\max(\langle \nabla L_{val}, \nabla \ell_i \rangle, 0)}
            {\sum_j \max(\langle \nabla L_{val}, \nabla \ell_j \rangle, 0) + 10^{-6}}

    which is the negative gradient of :math:`L_{val}(\theta - \eta \sum_i e_i \nabla \ell_i)` by :math:`e` at 0; the
    rate :math:`\eta` drops out but for the constant. All 0 where no example helps. Costs three backward passes,
    one of them through another; attention takes torch's plain kernel, which has a second derivative.

    Args:
        parameters: those that the look-ahead step would move.
        example_losses: gives the losses `[n]` of the examples, with a graph.
        validation_loss: gives a scalar.

    Raises:
        ValueError: losses that are no vector, or none of the parameters has a part in one of them.
    """
    held = [p for p in parameters if p.requires_grad]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        towards = torch.autograd.grad(validation_loss(), held, allow_unused=True)
        losses = example_losses()
        if losses.dim() != 1:
            raise ValueError(f"example_losses gave {tuple(losses.shape)}: it is to give one loss an example, [n].")
        shares = torch.zeros_like(losses, requires_grad=True)
        found = torch.autograd.grad((shares * losses).sum(), held, create_graph=True, allow_unused=True)
        terms = [(a.detach() * b).sum() for a, b in zip(towards, found, strict=True) if a is not None and b is not None]
        if not terms:
            raise ValueError("No parameter has a part in both losses: pass those that train, and losses with a graph.")
        (products,) = torch.autograd.grad(sum(terms), shares)
    products = products.clamp(min=0)
    return products / (products.sum() + 1e-6)
