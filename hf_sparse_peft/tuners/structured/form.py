r"""Forms: what a structured adapter computes in a layer, of whichever structure.

| kind | output of the layer | merges |
|---|---|---|
| `Additive` | :math:`Y + X\,\Delta W(\theta)^\top` | yes; exactly as LoRA where it has factors |
| `Mapped` | :math:`\mathcal H(\,W\,\mathcal Q(x)) + b + c`, linear maps of input and output | yes, bias included |
| `Beside` | :math:`Y + g_\theta(X)`, nonlinear: routed mixtures | no |
| `Behind` | :math:`Y + g_\theta(Y)`, nonlinear: bottleneck adapters | no |
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...rules import UnitSpace
from ...sparsity import stream_seed
from ...utils.parts import Part
from ...utils.tensors import TensorSpec
from ..shared.pieces import InputMap, LowRank, Nonlinear, OutputMap, Piece, Tiles
from ..shared.sharing import Sharing

Tensors = dict[str, Tensor]
"""A layer's tensors by the names of the form's specs; what other layers own and this one shares included."""
Product = Callable[[Tensor], Tensor]
"""The base layer: its output, bias included, for an input."""
Weight = Callable[[], Tensor]
"""The base weight `[rows, cols]`, made when it is called; not to be written to."""


class Site(NamedTuple):
    """The module that a form is for."""

    name: str
    rows: int
    """Outputs of the layer."""
    cols: int
    """Inputs of the layer."""
    seed: int = 0
    """Seed of the adapter's draws that no file holds."""
    sharing: Sharing | None = None
    """With whom it shares tensors, for forms that have shared ones."""
    members: tuple[str, ...] = ()
    """Names of all modules that share them, in model order, for forms that ask (`Form.lists_members`)."""

    @property
    def owns(self) -> bool:
        """Whether what is shared belongs to this module."""
        return self.sharing is None or self.sharing.owner == self.name

    def stream(self, *purpose: str) -> int:
        """Seed of a draw for this module."""
        return stream_seed(self.seed, self.name, "structured", *purpose)


def _nowhere(name: str, tensor: Tensor) -> None:
    pass


class Call(NamedTuple):
    """The pass that a form computes in."""

    site: Site
    dtype: torch.dtype
    """Of the products."""
    training: bool = False
    bias: Tensor | None = None
    """The base layer's."""
    note: Callable[[str, Tensor], None] = _nowhere
    """Shows a tensor by name to whoever reads the layer's passes (`StructuredLayer.read_passes`): gates of a router."""
    task: str | None = None
    """The task that was named last, for forms that have several (`StructuredModel.set_task`)."""
    memory: dict[str, Tensor] = MappingProxyType({})
    """What layers that share tensors leave for each other within a pass; who takes something takes it out."""
    mask: Tensor | None = None
    """The `attention_mask` `[batch, tokens]` that the model was given last, for forms that ask (`Form.reads_mask`)."""


NAMES: dict[str, None] = {"shape": None}
"""Tensors of all forms that there are, in the order of their classes; `shape` is every layer's."""


def enter_names(names: Iterable[str]) -> None:
    """Enter names of tensors among those that files may hold."""
    NAMES.update(dict.fromkeys(names))


@dataclass(frozen=True)
class Form(Part):
    r"""What an adapter computes in a layer. A form declares its tensors (`specs`) and says the layer's output; it holds
    no tensor itself.

    To add one, here or in a package of your own: derive from the kind that fits (`Additive`, `Mapped`, `Beside`,
    `Behind`), name all tensors that it may have (`tensor_names`), declare them with their first content, and say what
    the kind asks for. Saving, loading, checks, 4-bit bases, merging, export, cards and resuming follow:

        @register_part("sum_of_sides")
        @dataclass(frozen=True)
        class SumOfSides(Additive):
            tensor_names: ClassVar[tuple[str, ...]] = ("row", "column")

            def specs(self, site):
                return [TensorSpec("row", (site.rows,)), TensorSpec("column", (site.cols,))]

            def update(self, x, tensors, call):
                column = tensors["column"].to(call.dtype)
                return tensors["row"].to(call.dtype) * x.sum(-1, keepdim=True) + (x @ column).unsqueeze(-1)

            def weight(self, tensors, site):
                return tensors["row"][:, None] + tensors["column"]

        StructuredConfig(form=SumOfSides())

    Tensors of role "trained" are parameters, fp32 masters; those of role "saved" are buffers in every file. A spec with
    a `space` makes its slices along `axis` units that rules act on. What `group` puts together shares the tensors in
    `shared`: the first of the modules has them (`site.owns`), all get them.
    """

    part_kind: ClassVar[str] = "structured_form"
    tensor_names: ClassVar[tuple[str, ...]] = ()
    """Names of all tensors that `specs` may have, under any options."""
    reads_weight: ClassVar[bool] = False
    """Whether `start` asks for the base weight."""
    shifts_bias: ClassVar[bool] = False
    """Whether `bias_change` may be something."""
    reads_mask: ClassVar[bool] = False
    """Whether passes are to know which tokens the batch's mask hides."""
    lists_members: ClassVar[bool] = False
    """Whether sites are to name the modules that share tensors."""
    tasks: ClassVar[tuple[str, ...]] = ()
    """Names of the tasks that passes are of, for forms that compute otherwise for each; an option of such forms."""
    alone: ClassVar[bool] = False
    """Whether it takes the place of the layer and adds to no other adapter."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        enter_names(cls.tensor_names)

    # Tensors

    @property
    def shared(self) -> tuple[str, ...]:
        """Names of the tensors that the owner has for all modules of a group."""
        return ()

    def group(self, site: Site) -> Hashable:
        """Modules of one group share the tensors in `shared`; `site` has no sharing yet."""
        return None

    def check_sharing(self, sizes: Mapping[str, list[str | int]]) -> None:
        """Do the targets fit together? `sizes` has owner, users and position of each, in model order.

        Raises:
            ValueError: they do not; names the first that does not.
        """

    @property
    def unit_kinds(self) -> frozenset[str]:
        """Kinds of the units that rules may act on, modules aside."""
        return frozenset()

    def specs(self, site: Site) -> list[TensorSpec]:
        """The tensors that the module has; those in `shared` only where `site.owns`.

        Raises:
            ValueError: the weight's sides do not fit the form; names the module, its sides and the mend.
        """
        raise NotImplementedError

    def start(self, weight: Tensor, site: Site) -> Tensors:
        """Tensors that start from the weight `[rows, cols]`, fp32, only read; asked where `reads_weight`."""
        return {}

    @property
    def made_by(self) -> str | None:
        """The model's method that makes such forms of trained ones; None: they are made at injection."""
        return None

    def packed(self, tensors: Tensors, site: Site) -> tuple[Form, Tensors]:
        """The form to ship, of the same output to the bit, and its saved tensors; trained ones that it has too stay.

        Raises:
            ValueError: there is none.
        """
        raise ValueError(f"{type(self).__name__} has no form to be packed into.")

    def spaces(self, layer: Any, adapter: str) -> list[UnitSpace] | None:
        """Unit spaces in a layer, modules aside; None: those that follow from the specs."""
        return None

    # Passes

    def task_number(self, task: str | None) -> int:
        """Which of `tasks` that is; None: the only one.

        Raises:
            ValueError: there is no such task, or several and none is named.
        """
        if task is None and len(self.tasks) == 1:
            return 0
        if task not in self.tasks:
            raise ValueError(
                f"task={task!r}, and the adapter of form {type(self).__name__} has the tasks {list(self.tasks)}. Name "
                "one of them: model(..., task=...), or model.base_model.set_task(...) for all passes that follow."
            )
        return self.tasks.index(task)

    def output(self, x: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The layer's output with this adapter alone, `[..., rows]`, for `x` `[..., cols]`."""
        y = base(x)
        return y + self.change(x, y, base, tensors, call).to(y.dtype)

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """What the adapter adds to the output `y` of the base layer, `[..., rows]`."""
        raise NotImplementedError

    # Leaving

    def pieces(self, tensors: Tensors, site: Site, weight: Weight) -> list[Piece]:
        """What it adds to the weight."""
        return [Nonlinear(f"The form {type(self).__name__} in '{site.name}'")]

    def bias_change(self, tensors: Tensors, site: Site, bias: Tensor | None) -> Tensor | None:
        """What it adds to the layer's `bias` `[rows]` (None: there is none), fp32; None: nothing."""
        return None


@dataclass(frozen=True)
class Additive(Form):
    r""":math:`Y + X\,\Delta W(\theta)^\top`."""

    def update(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        r""":math:`X\,\Delta W^\top` `[..., rows]` in `call.dtype`, for `x` in it; here by the dense update."""
        return times(x, self.weight(tensors, call.site).to(call.dtype))

    def weight(self, tensors: Tensors, site: Site) -> Tensor:
        r""":math:`\Delta W`, dense `[rows, cols]`, in the tensors' dtype."""
        raise NotImplementedError

    def factors(self, tensors: Tensors, site: Site) -> tuple[Tensor, Tensor] | None:
        """B `[rows, k]` and A `[k, cols]` whose product is the update; None: they would be no smaller than it."""
        return None

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The update."""
        return self.update(x.to(call.dtype), tensors, call)

    def pieces(self, tensors: Tensors, site: Site, weight: Weight) -> list[Piece]:
        """One product of factors, or else one dense tile."""
        tensors = _detached(tensors)
        with torch.no_grad():
            found = self.factors(tensors, site)
        if found is not None:
            return [LowRank(*found)]

        def tiles() -> Iterator[tuple[slice, slice, Tensor]]:
            with torch.no_grad():
                yield slice(None), slice(None), self.weight(tensors, site)

        return [Tiles((site.rows, site.cols), tiles, dense=True)]


@dataclass(frozen=True)
class Mapped(Form):
    r""":math:`H(W\,Q x) + D b + c`: a linear map of the layer's input and one of its output, the bias mapped or left,
    and a shift. What is left out is the identity."""

    maps_input: ClassVar[bool] = False
    """Whether there is a `map_input`."""
    maps_output: ClassVar[bool] = False
    """Whether there is a `map_output`."""
    maps_bias: ClassVar[bool] = False
    """Whether the output is mapped with the bias in it (D = H), or the bias is added afterwards (D = 1)."""

    def map_input(self, x: Tensor, tensors: Tensors, site: Site) -> Tensor:
        r""":math:`X Q^\top` `[..., cols]`, in the dtype of `x`."""
        return x

    def map_output(self, y: Tensor, tensors: Tensors, site: Site) -> Tensor:
        r""":math:`Y H^\top` `[..., rows]`, in the dtype of `y`."""
        return y

    def shift(self, tensors: Tensors, site: Site) -> Tensor | None:
        """c `[rows]`; None: there is none."""
        return None

    def output(self, x: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The mapped output."""
        y = base(self.map_input(x, tensors, call.site) if self.maps_input else x)
        return self._finish(y, tensors, call)

    def _finish(self, y: Tensor, tensors: Tensors, call: Call) -> Tensor:
        if self.maps_output and (self.maps_bias or call.bias is None):
            y = self.map_output(y, tensors, call.site)
        elif self.maps_output:
            bias = call.bias.to(y.dtype)
            y = self.map_output(y - bias, tensors, call.site) + bias
        shift = self.shift(tensors, call.site)
        return y if shift is None else y + shift.to(y.dtype)

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The mapped output less the base's."""
        return (self.output(x, base, tensors, call) if self.maps_input else self._finish(y, tensors, call)) - y

    def pieces(self, tensors: Tensors, site: Site, weight: Weight) -> list[Piece]:
        """The maps, that of the output over what that of the input leaves."""
        tensors, found = _detached(tensors), []
        inner = weight
        if self.maps_input:
            found.append(InputMap(lambda x: self.map_input(x, tensors, site), weight))
            inner = found[0].mapped
        if self.maps_output:
            found.append(OutputMap(lambda y: self.map_output(y, tensors, site), inner))
        return found

    def bias_change(self, tensors: Tensors, site: Site, bias: Tensor | None) -> Tensor | None:
        """The mapped bias less the bias, and the shift."""
        tensors, found = _detached(tensors), self.shift(_detached(tensors), site)
        if self.maps_output and self.maps_bias and bias is not None:
            mapped = self.map_output(bias.float(), tensors, site) - bias.float()
            found = mapped if found is None else found + mapped
        return None if found is None else found.float()


@dataclass(frozen=True)
class Beside(Form):
    r""":math:`Y + g_\theta(X)` with a nonlinear g, as a routed mixture is. It is no change of a weight: it is saved and
    loaded, and neither merged nor exported."""

    def branch(self, x: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """g(x) `[..., rows]` in `call.dtype`, for `x` `[..., cols]` in it."""
        raise NotImplementedError

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The branch at the layer's input."""
        return self.branch(x.to(call.dtype), tensors, call)


@dataclass(frozen=True)
class Behind(Form):
    r""":math:`Y + g_\theta(Y)` with a nonlinear g: a module with a skip connection behind the layer. It is no change of
    a weight: it is saved and loaded, and neither merged nor exported."""

    def branch(self, y: Tensor, tensors: Tensors, call: Call) -> Tensor:
        """g(y) `[..., rows]` in `call.dtype`, for `y` `[..., rows]` in it."""
        raise NotImplementedError

    def change(self, x: Tensor, y: Tensor, base: Product, tensors: Tensors, call: Call) -> Tensor:
        """The branch at the layer's output."""
        return self.branch(y.to(call.dtype), tensors, call)


def times(x: Tensor, matrix: Tensor) -> Tensor:
    r""":math:`X M^\top`, of `x` `[..., k]` and `matrix` `[n, k]`, always as one product of two matrices: torch chooses
    between that and a batch of products by strides and by whether gradients are asked for, with other last bits."""
    return (x.reshape(-1, x.shape[-1]) @ matrix.t()).view(*x.shape[:-1], matrix.shape[0])


def _detached(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}
