"""`MuonSpec`: Muon for what is a matrix of a linear map in a model, AdamW for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..optim import Muon, OptimizerSettings, OptimizerSpec, embeddings_and_heads, parameter_groups
from ..utils.option_types import Decay, PositiveFloat
from ..utils.parts import register_part
from .optimizers import active_spaces

_NO_MATRIX = ("entry", "diagonal")
_SCORES = frozenset({"scores", "score_factors"})


@register_part("muon")
@dataclass(frozen=True)
class MuonSpec(OptimizerSpec):
    """`optim.Muon` for low-rank factors, cores, blocks, rows, columns and subnets of supports, and whole matrices
    (Jordan et al., 2024); `AgedAdamW` for gates, magnitudes, biases, norms, embeddings, heads, trained scores and
    kernels. Entries of a support make no matrix, scattered back neither: the orthogonalised update is dense, and its
    part on the support is no step of known size.

    In LoRA both factors get steps of equal singular values: `B` `[out, r]` moves sqrt(out / r) times as far as `A`.
    """

    momentum: Decay = 0.95
    """Decay rate of the momentum."""
    nesterov: bool = True
    """Whether the update looks ahead."""
    adjust: Literal["original", "match_rms_adamw"] = "original"
    """Factor on a matrix' step: sqrt(max(1, rows / columns)), for learning rates of about 0.02; or
    0.2 sqrt(max(rows, columns)), for those of AdamW."""
    adamw_ratio: PositiveFloat = 1.0
    """Learning rate of what AdamW updates over the run's."""
    entries: Literal["refuse", "adamw"] = "refuse"
    """What to do where entries of supports train: refuse the config, or update them by AdamW."""
    iteration_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the orthogonalisation."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of AdamW's moments; None: the run's."""

    builds: ClassVar[type[torch.optim.Optimizer]] = Muon

    def build(self, model: nn.Module, settings: OptimizerSettings) -> Muon:
        """Groups as Trainer makes them, times matrices, transposed ones and everything else.

        Raises:
            ValueError: nothing trains, no matrix does, or entries of a support do and `entries` is not "adamw".
        """
        roles = self._roles(model)
        if not any(role for role in roles.values()) and roles:
            raise ValueError(
                "MuonSpec found no matrix of a linear map among what trains. Train factors, blocks, a subnet or whole "
                "weights, or take AgedAdamWSpec()."
            )

        def options_of(name: str, parameter: nn.Parameter) -> dict[str, Any]:
            role = roles[id(parameter)]
            lr = settings.lr * (1.0 if role else self.adamw_ratio)
            return {"lr": lr, "orthogonal": bool(role), "transposed": role == "transposed"}

        return Muon(
            parameter_groups(model, settings.weight_decay, options_of),
            settings.lr,
            self.betas or settings.betas,
            settings.eps,
            momentum=self.momentum,
            nesterov=self.nesterov,
            adjust=self.adjust,
            iteration_dtype=self.iteration_dtype,
        )

    def _roles(self, model: nn.Module) -> dict[int, str]:
        """Parameter's id -> "matrix", "transposed" or "", which is AdamW's."""
        apart = embeddings_and_heads(model)
        trained = {id(p): p for p in model.parameters() if p.requires_grad}
        roles = {
            key: "matrix" if p.dim() == 2 and min(p.shape) > 1 and key not in apart else ""
            for key, p in trained.items()
        }
        entries = []
        for _, space in active_spaces(model):
            for name, (parameter, _) in space.scored_parameters().items():
                if id(parameter) not in trained:
                    continue
                if space.kind == "support" and space.unit in _NO_MATRIX:
                    entries.append(f"'{space.name}' ({space.unit})")
                    roles[id(parameter)] = ""
                elif space.kind == "support":
                    roles[id(parameter)] = "transposed" if space.unit == "column" else "matrix"
                elif space.kind == "rank" and name in ("A", "B"):
                    roles[id(parameter)] = "matrix"  # of rank 1 too
                elif space.kind == "kernel" or name in _SCORES:
                    roles[id(parameter)] = ""
        if entries and self.entries == "refuse":
            raise ValueError(
                f"Muon orthogonalises matrices, and units of the support of {', '.join(entries[:3])} make none "
                f"({len(entries)} modules). Take granularity='block', 'row', 'column' or 'subnet', or "
                "MuonSpec(entries='adamw') to update them by AdamW."
            )
        return roles
