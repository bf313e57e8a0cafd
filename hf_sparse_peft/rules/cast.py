"""`Cast`: weights that `AdamS` has driven to 0 are removed when training ends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..optim import AdamS, innermost
from ..sparsity import n_of_m_mask, pack_bits
from ..utils.parts import register_part
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("cast")
@dataclass(frozen=True)
class Cast(Rule):
    """Dense training whose optimizer makes its weights N:M sparse (CAST; Huang et al., 2025): it tells `optim.AdamS`
    how many steps there are, and after the last one the N:M mask is written; until then nothing is masked, in
    evaluation and files neither.

    The mask is that of the unscaled weights, and scales (`ScaledDenseUpdate`) go on multiplying what is left: merging
    folds them in, and revives no zero. N and M are the optimizer's.

    Raises:
        ValueError: an optimizer other than AdamS, or one that has no matrix of the rule in scope.
    """

    acts_on: ClassVar[frozenset[str]] = frozenset({"mask"})
    writes: ClassVar[frozenset[str]] = frozenset({"units"})

    def begin(self, run: Run) -> None:
        """Tell the optimizer the number of steps, and let everything live."""
        if not isinstance(innermost(run.optimizer), AdamS):
            raise ValueError(
                f"Cast needs the optimizer AdamS, and this run has {type(innermost(run.optimizer)).__name__}. Set "
                "optimizer=AdamSSpec() in the config and pass trainer_options(model, args), or make_optimizer(model)."
            )
        for space in run.spaces(training=False):
            group = self._group(run, space)
            if not group["cast_scope"]:
                raise ValueError(
                    f"Cast: AdamS does not have the weights of '{space.name}' in scope, which would be pruned at the "
                    "end as they are. Build it with make_optimizer(model), or set cast_scope=True in their group."
                )
            group["total_steps"] = run.total_steps
            if run.step < run.total_steps:
                space.write_bits(torch.full_like(space.bits, 255))

    @torch.no_grad()
    def finish(self, run: Run) -> None:
        """Write the final masks."""
        lost = kept = 0.0
        for space in run.spaces(training=False):
            group, change = self._group(run, space), space.dense_change()
            weight = space.base_weight().to(change.dtype) + change
            mask = n_of_m_mask(weight.abs(), group["keep"], group["of"])
            squares = weight.double().square()
            lost, kept = lost + float(squares[~mask].sum()), kept + float(squares[mask].sum())
            space.write_bits(pack_bits(mask))
        run.record(removed_norm=lost**0.5, kept_norm=kept**0.5)

    def _group(self, run: Run, space: UnitSpace) -> dict:
        return run.group(space.dense_change())
