r"""`Hypernetwork`: bottleneck adapters that one trained network makes of embeddings of task, layer and position.

The modules that share it are those of one number of outputs, in all stacks. A module's name says where it stands: what
comes before its first number is its stack ("encoder.block", "model.layers"), the number its layer, the rest its
position ("self_attn.o_proj", "mlp.down_proj").
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...utils.option_types import PositiveFloat, PositiveInt
from ...utils.parts import register_part, require
from ...utils.tensors import TensorSpec
from .bottleneck import ACTIVATIONS
from .form import Behind, Call, Site, Tensors, enter_names, times

GENERATED = ("down", "down_bias", "up", "up_bias", "norm_scale", "norm_shift")
"""What a generator makes, each by a linear map of the module's embedding."""
MIXER = ("mixer_in", "mixer_in_bias", "mixer_out", "mixer_out_bias", "layernorm_scale", "layernorm_shift")
EMBEDDINGS = ("layer_embeddings", "position_embeddings")


class Place(NamedTuple):
    """Where a module stands among those that share a hypernetwork."""

    stack: int
    layer: int
    """Of all layers of all stacks."""
    position: int
    """Of all positions of all stacks."""


class Places(NamedTuple):
    """All of them, and how many stacks, layers and positions they have."""

    of: dict[str, Place]
    stacks: int
    layers: int
    positions: int


@lru_cache(64)
def places(members: tuple[str, ...]) -> Places:
    """The places of modules, by name."""
    stacks: dict[str, int] = {}
    layers: dict[tuple[str, str], int] = {}
    positions: dict[tuple[str, str], int] = {}
    found = {}
    for name in members:
        parts = name.split(".")
        at = next((at for at, part in enumerate(parts) if part.isdigit()), None)
        stack, layer, position = ("", "", name) if at is None else (
            ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])
        )  # fmt: skip
        found[name] = Place(
            stacks.setdefault(stack, len(stacks)),
            layers.setdefault((stack, layer), len(layers)),
            positions.setdefault((stack, position), len(positions)),
        )
    return Places(found, len(stacks), len(layers), len(positions))


@register_part("hypernetwork")
@dataclass(frozen=True)
class Hypernetwork(Behind):
    r""":math:`y' = y + \mathrm{LN}_{\gamma,\beta}(M_2\,\phi(M_1 y + c_1) + c_2)` behind the layer, with :math:`M_1`
    `[m, out]` and all other numbers made by linear maps of :math:`e = \mathrm{LN}(B\,\mathrm{relu}(A\,[z; l; p] + a) +
    b)`, of the trained embeddings z of the task, l of the layer and p of the position (HyperFormer; Karimi Mahabadi et
    al., 2021).

    One network serves all tasks and modules; each stack (encoder, decoder) has one of its own, and embeddings of tasks
    are common to them. All linear maps start from N(0, std^2) with biases 0, those of :math:`\gamma` too, so that an
    adapter starts near the identity and not at it; embeddings start from N(0, 1).

    A pass is of one task: `model(..., task="rte")` or `model.base_model.set_task("rte")`, which holds until another is
    named. With one task, none need be named. What is made for a task is a bottleneck adapter:
    `tuners.structured.add_task_adapter` makes it one.
    """

    tasks: tuple[str, ...] = ("default",)
    """Names of the tasks. An embedding has a gradient only in passes of its task."""
    reduction: PositiveInt = 32
    """m = out / reduction, rounded down."""
    generators: Literal["shared", "position"] = "shared"
    """`shared`: one for all positions, which have embeddings (HyperFormer++); `position`: one for each position of a
    stack, and no embeddings of them (HyperFormer)."""
    embedding: PositiveInt = 64
    """Size of z, l and p."""
    hidden: PositiveInt = 128
    """Rows of A."""
    projected: PositiveInt = 64
    """Size of e."""
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu_new"
    r""":math:`\phi`; `gelu_new` is the tanh approximation."""
    std: PositiveFloat = 0.01
    """Of the linear maps at the start."""
    tensor_names: ClassVar[tuple[str, ...]] = (
        *EMBEDDINGS,
        *MIXER,
        *(f"{name}_{part}" for name in GENERATED for part in ("generator", "offset")),
    )
    lists_members: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        names = bool(self.tasks) and len(set(self.tasks)) == len(self.tasks) and all(self.tasks)
        require(names, self, "tasks", "one or more different names")
        enter_names(self._task_names)

    @property
    def _task_names(self) -> tuple[str, ...]:
        return tuple(f"task_embedding_{number}" for number in range(len(self.tasks)))

    @property
    def shared(self) -> tuple[str, ...]:
        """All tensors."""
        absent = {"position_embeddings"} if self.generators == "position" else set()
        return (*self._task_names, *(name for name in self.tensor_names if name not in absent))

    def group(self, site: Site) -> Hashable:
        """Modules of as many outputs."""
        return site.rows

    def width(self, site: Site) -> int:
        """m.

        Raises:
            ValueError: it would be 0.
        """
        if self.reduction > site.rows:
            raise ValueError(
                f"Hypernetwork.reduction={self.reduction} leaves no width for the {site.rows} outputs of "
                f"'{site.name}'. Lower it."
            )
        return site.rows // self.reduction

    def specs(self, site: Site) -> list[TensorSpec]:
        """All of it, at the first of the modules that share it."""
        m = self.width(site)
        if not site.owns:
            return []
        found, drawn, size = places(site.members), self._normal, self.embedding
        shared = self.generators == "shared"
        specs = [TensorSpec(name, (size,), start=drawn((size,), 1.0)) for name in self._task_names]
        counts = {"layer_embeddings": found.layers, "position_embeddings": found.positions}
        for name, count in list(counts.items())[: 1 + shared]:
            specs.append(TensorSpec(name, (count, size), start=drawn((count, size), 1.0)))
        S, inner = found.stacks, (2 + shared) * size
        for name, rows, cols in (("mixer_in", self.hidden, inner), ("mixer_out", self.projected, self.hidden)):
            specs.append(TensorSpec(name, (S, rows, cols), start=drawn((S, rows, cols), self.std)))
            specs.append(TensorSpec(f"{name}_bias", (S, rows)))
        specs.append(TensorSpec("layernorm_scale", (S, self.projected), start=lambda _: torch.ones(S, self.projected)))
        specs.append(TensorSpec("layernorm_shift", (S, self.projected)))
        G, n = S if shared else found.positions, site.rows
        for name, numbers in zip(GENERATED, (m * n, m, n * m, n, n, n), strict=True):
            shape = (G, numbers, self.projected)
            specs.append(TensorSpec(f"{name}_generator", shape, start=drawn(shape, self.std)))
            specs.append(TensorSpec(f"{name}_offset", (G, numbers)))
        return specs

    @staticmethod
    def _normal(shape: tuple[int, ...], std: float) -> Callable[[torch.Generator | None], Tensor]:
        return lambda generator: std * torch.randn(shape, generator=generator)

    def generate(self, tensors: Tensors, site: Site, task: str | None) -> Tensors:
        """The module's adapter for a task, fp32: `down` `[m, out]`, `down_bias` `[m]`, `up` `[out, m]`, and `up_bias`,
        `norm_scale` and `norm_shift` `[out]`."""
        place, m, n = places(site.members).of[site.name], self.width(site), site.rows
        stack = place.stack
        parts = [tensors[self._task_names[self.task_number(task)]], tensors["layer_embeddings"][place.layer]]
        if self.generators == "shared":
            parts.append(tensors["position_embeddings"][place.position])
        inner = F.linear(torch.cat(parts), tensors["mixer_in"][stack], tensors["mixer_in_bias"][stack]).relu()
        mixed = F.linear(inner, tensors["mixer_out"][stack], tensors["mixer_out_bias"][stack])
        scale, shift = tensors["layernorm_scale"][stack], tensors["layernorm_shift"][stack]
        e = F.layer_norm(mixed, (self.projected,), scale, shift, 1e-6)
        at = stack if self.generators == "shared" else place.position
        shapes = ((m, n), (m,), (n, m), (n,), (n,), (n,))
        return {
            name: F.linear(e, tensors[f"{name}_generator"][at], tensors[f"{name}_offset"][at]).view(shape)
            for name, shape in zip(GENERATED, shapes, strict=True)
        }

    def branch(self, y: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """The two products around the activation, and the norm."""
        made = {name: tensor.to(call.dtype) for name, tensor in self.generate(tensors, call.site, call.task).items()}
        inner = ACTIVATIONS[self.activation](times(y, made["down"]) + made["down_bias"])
        found = times(inner, made["up"]) + made["up_bias"]
        return F.layer_norm(found, (call.site.rows,), made["norm_scale"], made["norm_shift"])
