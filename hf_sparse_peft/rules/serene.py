"""`SeReNe`: weight decay on the incoming weights of neurons that the outputs do not depend on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..utils.option_types import PositiveFloat, PositiveInt
from ..utils.parts import register_part
from .evidence import with_gradient
from .groups import places
from .neuron_sensitivity import NeuronSensitivity
from .rule import Rule
from .run import Run
from .space import UnitSpace


@register_part("serene")
@dataclass(frozen=True)
class SeReNe(Rule):
    r"""After every update the incoming weights of neuron i decay by how little the outputs depend on its
    pre-activation, :math:`w \leftarrow w - \lambda\,w\,\max(0, 1 - S_i)` (SeReNe; Tartaglione et al., 2021), with
    :math:`S_i = \frac1C \sum_c \mathrm{mean}\,|\partial y_c / \partial p_i|` of the step's passes, before the update
    (`NeuronSensitivity`). :math:`\lambda` is not multiplied by the learning rate; all weights of a neuron lose the same
    fraction.

    A neuron is a component of low rank, whose incoming weights are a row of `A`, or an output of the layer, whose
    incoming weights are a row of `B` and the support's values in that row. `PlateauThreshold` beside it is the method's
    pruning. What another rule holds still, layers without a gradient, layers that no output depends on, and skipped
    steps keep their values. The released code's full form is `1/batch` of this S, and it fails beyond one layer.

    Costs C backward passes of each batch for "full", one for "lower_bound", none for "local".
    """

    weight: PositiveFloat = 1e-4
    r""":math:`\lambda`."""
    kind: Literal["full", "lower_bound", "local"] = "lower_bound"
    r"""S itself; its lower bound :math:`|\sum_c \partial y_c / \partial p_i| / C`; or decay where the mean
    pre-activation is not above 0, which is meant for layers before a ReLU."""
    projections: PositiveInt = 4
    """C of token logits with `kind="full"`; classes are read one by one."""

    acts_on: ClassVar[frozenset[str]] = frozenset({"support", "rank"})
    writes: ClassVar[frozenset[str]] = frozenset({"values"})

    def before_step(self, run: Run) -> None:
        """Read the step's passes."""
        run.memory.read = NeuronSensitivity(
            run.spaces(), self.kind, self.projections, run.seed, 1.0 if self.kind == "local" else run.loss_scale
        )
        run.for_this_step([run.memory.read.reading(run.model)])

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        """Decay.

        Raises:
            ValueError: no pass had the layers in its graph.
        """
        read, spaces = run.memory.read, run.spaces()
        run.memory.read = None
        if read.passes and not read.saw_layers and spaces:
            raise ValueError(
                "SeReNe saw no adapted layer in the graph of a training pass. Set gradient_checkpointing_kwargs="
                "{'use_reentrant': False}, or kind='local'."
            )
        found = [(space, self._decay_of(space, read)) for space in spaces]  # reduced over ranks, whatever each saw
        evident = [] if run.step_skipped else with_gradient(spaces)
        for space, decays in found:
            for parameter, decay in decays if space in evident else ():
                held = run.updates.held_numbers(parameter)
                if held is not None:
                    decay = decay.expand_as(parameter).masked_fill(held, 0)
                parameter.sub_((self.weight * decay).to(parameter.dtype) * parameter)

    def _decay_of(self, space: UnitSpace, read: NeuronSensitivity) -> list[tuple[nn.Parameter, Tensor]]:
        """Each parameter with what broadcasts to its shape, 1 for full decay."""
        output = read.insensitivity(space, "output")
        if space.kind == "rank":
            component = read.insensitivity(space, "component")
            found = [(space.A, component), (space.B, output)]
            return [(parameter, decay[:, None].to(parameter.device)) for parameter, decay in found if decay is not None]
        if output is None:
            return []
        rows = space.gather(output[:, None].expand(space.weight_shape)).to(space.values.device)
        decay = torch.zeros_like(space.values, dtype=torch.float32)
        decay[places(space)] = rows
        return [(space.values, decay)]
