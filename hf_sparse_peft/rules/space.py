"""Unit spaces: what a rule sees of an adapted layer: living units, the tensors that follow them, a way to write."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Follower:
    """A tensor with one slice a unit along `axis`, in the order of the living units; slices of new units become
    `fill`. The optimizer's state of a parameter follows with it."""

    tensor: Tensor
    axis: int = 0
    fill: float = 0.0


class AdaptedLayer(Protocol):
    """What a space asks of the layer that it belongs to (`tuners.shared.layer.AdapterLayer`)."""

    module_name: str
    adapter_configs: dict[str, Any]

    def rule_state(self, adapter_name: str) -> dict[str, Tensor]: ...

    def rule_followers(self, adapter_name: str, kind: str) -> list[Follower]: ...

    def allocate_rule_state(self, adapter_name: str, rules: Iterable[Any], passing: Collection[str] = ()) -> None: ...

    def free_rule_state(self, adapter_name: str, names: Iterable[str]) -> None: ...


@dataclass(frozen=True)
class UnitSpace:
    """Units of one kind of one adapter in one layer.

    `size` units exist, `capacity` of them have tensors allocated, `alive()` are in use, and each that is costs
    `unit_numel` trained numbers, which is all that a budget over several kinds of spaces needs to know.
    """

    layer: Any
    adapter: str
    kind: ClassVar[str] = ""
    """"support", "rank", "kernel", "module", ..."""
    packed: ClassVar[bool] = True
    """Whether tensors hold the living units alone, in order; False where every unit that may live has its own slice."""
    counted: ClassVar[bool] = False
    """Whether the layer itself chooses its units in every pass, so that a rule only says how many live (`resize`)."""

    @property
    def name(self) -> str:
        """Name of the adapted module."""
        return self.layer.module_name

    @property
    def config(self) -> Any:
        """The adapter's config, one object for all of its layers."""
        return self.layer.adapter_configs[self.adapter]

    @property
    def seed(self) -> int:
        """Seed of the adapter's random draws."""
        return getattr(self.config, "seed", 0)

    @property
    def size(self) -> int:
        """Units that the weight has."""
        raise NotImplementedError

    @property
    def capacity(self) -> int:
        """Units that there is room for."""
        raise NotImplementedError

    @property
    def unit_numel(self) -> int:
        """Trained numbers of one unit."""
        raise NotImplementedError

    @property
    def unit(self) -> str:
        """What one unit is called: "entry", "row", "component"."""
        return self.kind

    @property
    def unit_entries(self) -> int:
        """Entries of the weight that belong to one unit alone; 0 where units are no parts of it, as components."""
        return 0

    @property
    def alive_entries(self) -> int:
        """Entries of the weight that the living units are."""
        return self.count * self.unit_entries

    @property
    def pattern(self) -> Any:
        """The shape in which the units lie (`sparsity.Pattern`); None: anywhere."""
        return None

    @property
    def weight_shape(self) -> tuple[int, int]:
        """`(out, in)` of the adapted weight."""
        return self.layer.out_features, self.layer.in_features

    def alive(self) -> Tensor:
        """Living units, sorted, `[a]`."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """Living units."""
        return self.alive().numel()

    def version(self) -> Hashable | None:
        """Equal as long as the living units are surely the same; None where only `alive` can tell."""
        return None

    def gather(self, dense: Tensor) -> Tensor:
        """A copy of what a dense `[out, in]` tensor holds at the living units, if these are parts of the weight."""
        raise ValueError(f"Units of '{self.kind}' are no parts of the weight of '{self.name}'.")

    @property
    def initial(self) -> int:
        """Units that live when the adapter is injected."""
        return self.capacity

    def candidates(self) -> Tensor:
        """Units that may live, sorted: those that do and, where every unit has its own slice, those that may return."""
        return self.alive() if self.packed else torch.arange(self.capacity)

    def resize(self, count: int) -> None:
        """Let `count` units live; for `counted` spaces."""
        raise ValueError(f"The {self.kind} units of '{self.name}' are chosen one by one; use move_units.")

    def check_needs(self, needs: frozenset[str]) -> None:
        """Refuse a rule that needs what these units do not have (`Rule.needs`).

        Raises:
            ValueError: says what and how to get it.
        """

    def largest_entries(self) -> Tensor:
        """`[a]` fp32: the largest |entry| of what each living unit adds to the weight."""
        raise ValueError(f"Nothing tells how much units of kind '{self.kind}' of '{self.name}' add to the weight.")

    def without(self, units: Tensor) -> AbstractContextManager[None]:
        """Inside, the living units at the places `units` of `alive()` (bool `[a]`) add nothing; all of them do again on
        leaving, to the bit."""
        raise ValueError(f"Units of kind '{self.kind}' of '{self.name}' cannot be left out for a while.")

    def apply_mask(self) -> None:
        """Zero what makes dead units add nothing, where an optimizer may have moved it; nothing where they are gone."""

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """Parameters that tell how much a unit matters, by name, with the axis that units lie along (None: every number
        belongs to all of them). First the one that switches units on."""
        return {str(number): pair for number, pair in enumerate(self.parameter_axes())}

    def parameters(self) -> list[nn.Parameter]:
        """Parameters of the space's units."""
        raise NotImplementedError

    def followers(self) -> list[Follower]:
        """Everything that has one slice a unit: parameters, and the state of rules."""
        own = [Follower(parameter, axis) for parameter, axis in self.parameter_axes()]
        return own + self.layer.rule_followers(self.adapter, self.kind)

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """Each parameter with the axis that its units lie along."""
        return [(parameter, 0) for parameter in self.parameters()]

    def write(self, units: Tensor) -> None:
        """Make `units` (sorted, distinct, at most `capacity`) the living ones, in place; their tensors are the
        caller's (`move_units`)."""
        raise NotImplementedError

    def state(self) -> dict[str, Tensor]:
        """State that rules keep for this adapter in this layer, by name."""
        return self.layer.rule_state(self.adapter)

    def allocate_state(self, rule: Any, names: Collection[str]) -> None:
        """Allocate state of `rule` that is there for some steps only (`TensorSpec.passing`), as zeros; what is there
        stays."""
        self.layer.allocate_rule_state(self.adapter, [rule], passing=names)

    def free_state(self, names: Iterable[str]) -> None:
        """Free it."""
        self.layer.free_rule_state(self.adapter, names)

    @property
    def trains(self) -> bool:
        """Whether the space takes part in the current step: some parameter of it is updated."""
        return any(parameter.requires_grad for parameter in self.parameters())


def unit_sums(values: Tensor) -> Tensor:
    """`[k]` fp32 sums of |value| over the entries of each unit."""
    return values.detach().float().abs().unsqueeze(1).flatten(1).sum(1)


@contextmanager
def zeroed(parameter: nn.Parameter, slices: Tensor) -> Iterator[None]:
    """Inside, these slices along the first axis are 0; they are put back to the bit."""
    before = parameter.detach()[slices].clone()
    parameter.data[slices] = 0
    try:
        yield
    finally:
        parameter.data[slices] = before


@dataclass(frozen=True)
class ComponentSpace(UnitSpace):
    """Rank-one components of factors `A` `[r, in]` and `B` `[out, r]`, with a gate or without: component i is row i of
    `A`, column i of `B` and number i of the gate. A layer says where the three are."""

    kind: ClassVar[str] = "rank"
    unit: ClassVar[str] = "component"
    packed: ClassVar[bool] = False

    @property
    def A(self) -> nn.Parameter:
        """`[r, in]`."""
        raise NotImplementedError

    @property
    def B(self) -> nn.Parameter:
        """`[out, r]`."""
        raise NotImplementedError

    @property
    def gate(self) -> nn.Parameter | None:
        """r numbers along the first axis, or None without one."""
        raise NotImplementedError

    def parameters(self) -> list[nn.Parameter]:
        """Gate (if any), A, B."""
        return [parameter for parameter in (self.gate, self.A, self.B) if parameter is not None]

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """Components lie along the rows of A, the columns of B, and the gate."""
        return [(parameter, 1 if parameter is self.B else 0) for parameter in self.parameters()]

    @property
    def scale(self) -> float:
        r"""What :math:`B\,\mathrm{diag}(g)\,A` is multiplied by in the update."""
        return 1.0

    @torch.no_grad()
    def largest_entries(self) -> Tensor:
        r"""`[a]` fp32: the largest entry of :math:`|s g_i B_i A_i|`."""
        alive = self.alive().long().to(self.A.device)
        gate = 1.0 if self.gate is None else self.gate.flatten()[alive].float()
        largest = self.B[:, alive].float().abs().amax(0) * self.A[alive].float().abs().amax(1)
        return (largest * gate * self.scale).abs()

    @contextmanager
    def without(self, units: Tensor) -> Iterator[None]:
        """Their gates are 0 inside."""
        with zeroed(self.gate, self.alive().long().to(self.gate.device)[units]):
            yield

    def scored_parameters(self) -> dict[str, tuple[nn.Parameter, int | None]]:
        """Gate (if any), A, B."""
        held = {"gate": (self.gate, 0), "A": (self.A, 0), "B": (self.B, 1)}
        return {name: pair for name, pair in held.items() if pair[0] is not None}


@dataclass(frozen=True)
class TensorSpace(UnitSpace):
    """Units that are slices of an adapter's tensors and all live: what a tuner declares by `TensorSpec.space` alone."""

    kind: str = ""
    axes: tuple[tuple[str, int], ...] = ()
    """Names of the parameters, each with the axis that the units lie along."""

    def parameters(self) -> list[nn.Parameter]:
        """The tensors."""
        return [parameter for parameter, _ in self.parameter_axes()]

    def parameter_axes(self) -> list[tuple[nn.Parameter, int]]:
        """The tensors, each with the axis that the units lie along."""
        return [(getattr(self.layer, name)[self.adapter], axis) for name, axis in self.axes]

    @property
    def size(self) -> int:
        """Units."""
        parameter, axis = self.parameter_axes()[0]
        return parameter.shape[axis]

    capacity = size

    @property
    def unit_numel(self) -> int:
        """Numbers of a unit."""
        return sum(parameter.numel() // parameter.shape[axis] for parameter, axis in self.parameter_axes())

    def alive(self) -> Tensor:
        """All units."""
        return torch.arange(self.size)

    def write(self, units: Tensor) -> None:
        """Refused, unless it is all of them: nothing records that a unit died.

        Raises:
            ValueError: `units` are not all units.
        """
        if units.numel() != self.size:
            raise ValueError(
                f"Units of kind '{self.kind}' of '{self.name}' cannot leave: its tuner records no deaths. "
                "Give it a UnitSpace of its own."
            )

    def check_needs(self, needs: frozenset[str]) -> None:
        """Raises `ValueError` where a rule lets units die, or counts them."""
        for need in sorted(needs & {"gate", "counts"}):
            raise ValueError(
                f"Units of kind '{self.kind}' of '{self.name}' have no {need}, so that none can leave. Leave the rule "
                "out of schedule, or choose a form that has one."
            )


@dataclass(frozen=True)
class ModuleSpace(UnitSpace):
    """A whole adapted module as one unit: all parameters of one adapter there, of whichever peft tuner."""

    module_name: str | None = None
    """Name of the module, for layers of upstream tuners, which do not know theirs."""
    shared: frozenset[int] = frozenset()
    """Ids of parameters that other modules have as well (a bank of vectors): they belong to none of them."""

    kind: ClassVar[str] = "module"

    size = capacity = 1

    @property
    def name(self) -> str:
        """Name of the module."""
        return self.layer.module_name if self.module_name is None else self.module_name

    @property
    def unit_numel(self) -> int:
        """Numbers of the adapter in the module."""
        return sum(parameter.numel() for parameter in self.parameters())

    def alive(self) -> Tensor:
        """The one unit."""
        return torch.zeros(1, dtype=torch.int32)

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of the adapter in this module alone."""
        # peft's DoRA lists its magnitudes twice.
        return list({id(p): p for p in self._parameters() if id(p) not in self.shared}.values())

    def scalings(self) -> list[dict[str, float]]:
        """The layer's dictionaries, adapter -> what its update is multiplied by; empty where the tuner has none."""
        held = [getattr(self.layer, name) for name in self.layer.other_param_names if name.endswith("scaling")]
        return [one for one in held if isinstance(one, dict) and self.adapter in one]

    def _parameters(self) -> Iterator[nn.Parameter]:
        for attribute in self.layer.adapter_layer_names:
            held = getattr(self.layer, attribute)
            if self.adapter in held:
                one = held[self.adapter]
                yield from [one] if isinstance(one, nn.Parameter) else one.parameters()

    def write(self, units: Tensor) -> None:
        """Refused: a module neither dies nor grows."""
        raise ValueError(f"'{self.name}' is a whole module; rules may hold it still, not move it.")
