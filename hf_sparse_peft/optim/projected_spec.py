"""`ProjectedAdamWSpec`: the optimizer of projected gradients as a part of a config, or of a run without an adapter."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from ..utils.option_types import Decay, PositiveFloat, PositiveInt
from ..utils.parts import register_part
from .groups import embeddings_and_heads, parameter_groups
from .projected_adamw import ProjectedAdamW
from .projections import Projection, SVDProjection
from .residuals import Residual
from .spec import OptimizerSettings, OptimizerSpec


@register_part("projected_adamw")
@dataclass(frozen=True)
class ProjectedAdamWSpec(OptimizerSpec):
    """`optim.ProjectedAdamW`: moments in a subspace of the gradient (GaLore, Fira, FRUGAL). For models whose own
    weights train, by `trainer_options(model, args, optimizer=ProjectedAdamWSpec())`, and for factors of adapters.

    Projected are matrices that the projection makes smaller, embeddings and output heads excepted; everything else is
    updated as by `AgedAdamW`, entries of supports without ages.
    """

    projection: Projection = field(default_factory=SVDProjection)
    """The subspace that has moments."""
    residual: Residual | None = None
    """What becomes of the rest of the gradient; None: it is dropped."""
    every: PositiveInt = 200
    """Steps between two choices of the subspace (papers: 200)."""
    scale: PositiveFloat = 1.0
    """Factor on the update of projected matrices (GaLore: 0.25 to pre-train, 4 to fine-tune)."""
    reset_moments: bool = False
    """Whether moments begin anew at each choice (FRUGAL)."""
    weight_norm: bool = False
    """Whether a projected matrix is trained as magnitudes and directions of its rows (GradNormLoRP)."""
    bits: Literal[8, 32] = 32
    """Bits of the moments of projected matrices; 8 by bitsandbytes' blockwise quantisation, from 4,096 numbers on."""
    layerwise: bool = False
    """Whether each parameter is updated in the backward pass, as soon as its gradient is complete, so that one gradient
    is alive at a time. Without accumulation, clipping, fp16 and DDP."""
    released: bool = False
    """Whether to follow the arithmetic of GaLore's and Fira's released classes where it is not their papers'."""
    target_modules: list[str] | None = None
    """Parts of the names of modules, such as "q_proj" or "mlp", to whose matrices the projection is confined."""
    betas: tuple[Decay, Decay] | None = None
    """Decay rates of the moments; None: the run's."""
    eps: PositiveFloat | None = None
    """Epsilon (GaLore's class: 1e-6); None: the run's."""

    builds: ClassVar[type[torch.optim.Optimizer]] = ProjectedAdamW

    def build(self, model: nn.Module, settings: OptimizerSettings) -> ProjectedAdamW:
        """Groups as Trainer makes them, times what is projected and what is not.

        Raises:
            ValueError: nothing trains; nothing that trains is a matrix, or none is made smaller, or is named.
        """
        chosen = {id(parameter) for parameter in self._projected(model)}

        def options_of(name: str, parameter: nn.Parameter) -> dict[str, Any]:
            return {"projected": id(parameter) in chosen}

        groups = parameter_groups(model, settings.weight_decay, options_of)
        for group in groups:
            whole = {} if group.pop("projected") else {"projection": None, "residual": None}
            group.update(whole)
        optimizer = ProjectedAdamW(
            groups,
            settings.lr,
            self.betas or settings.betas,
            self.eps or settings.eps,
            projection=self.projection,
            residual=self.residual,
            every=self.every,
            scale=self.scale,
            reset_moments=self.reset_moments,
            weight_norm=self.weight_norm,
            bits=self.bits,
            released=self.released,
            seed=settings.seed,
        )
        if self.layerwise:
            optimizer.step_in_backward()
        return optimizer

    def check_run(self, *, accumulation: int, clips: bool, fp16: bool) -> None:
        """Raises `ValueError` where the loop does to gradients what updates in the backward pass do not wait for."""
        wrong = [
            (accumulation > 1, f"gradient_accumulation_steps={accumulation}", "gradient_accumulation_steps=1"),
            (clips, "clipping", "max_grad_norm=0"),
            (fp16, "fp16", "bf16=True"),
        ]
        for found, what, mend in wrong if self.layerwise else ():
            if found:
                raise ValueError(
                    f"ProjectedAdamWSpec.layerwise=True updates in the backward pass, before {what} acts on the "
                    f"gradients. Set {mend}, or layerwise=False."
                )

    def _projected(self, model: nn.Module) -> list[nn.Parameter]:
        apart = embeddings_and_heads(model)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        matrices = {n: p for n, p in trained.items() if p.dim() == 2 and min(p.shape) > 1 and id(p) not in apart}
        owner = f"ProjectedAdamWSpec(projection={self.projection})"
        if trained and not matrices:
            raise ValueError(
                f"{owner} is for matrices, and none trains here, embeddings and heads left aside: "
                f"{_examples(trained)}. The entries of a support are no matrix: train factors (r >= 1) or whole "
                "weights, or take another optimizer, such as AgedAdamWSpec()."
            )
        named = {n: p for n, p in matrices.items() if self._is_target(n)}
        if trained and not named:
            raise ValueError(
                f"ProjectedAdamWSpec.target_modules={list(self.target_modules)} names no matrix that trains: "
                f"{_examples(matrices)}. Give parts of these names, or None for all."
            )
        found = [p for p in named.values() if self._saves(tuple(p.shape))]
        if trained and not found:
            raise ValueError(
                f"{owner} makes no matrix that trains smaller: {_examples(named)}. Lower its rank below their smaller "
                "side."
            )
        return found

    def _is_target(self, name: str) -> bool:
        return self.target_modules is None or any(f".{part}." in f".{name}." for part in self.target_modules)

    def _saves(self, shape: tuple[int, int]) -> bool:
        rank = getattr(self.projection, "rank", None)
        return min(shape) > rank if rank is not None else torch.Size(self.projection.reduced(shape)).numel() > 0


def _examples(parameters: dict[str, nn.Parameter]) -> str:
    return ", ".join(f"'{name}' {tuple(p.shape)}" for name, p in list(parameters.items())[:3])
