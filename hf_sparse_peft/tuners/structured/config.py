"""`StructuredConfig`: adapters of a structure other than a plain low rank."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from ...rules import check_schedule
from ...utils.parts import UnknownPart
from ..shared.config import AdapterConfig
from ..shared.form_config import FormConfig
from ..shared.sharing import Sharing, check_sharings
from .form import Form, Site
from .kronecker import Kronecker


@dataclass
class StructuredConfig(FormConfig, AdapterConfig):
    r"""Configuration of a structured adapter: `form` says what it computes in each targeted layer, an update of the
    weight, maps of input and output, or a module behind the layer.

    Raises:
        ValueError: an option is out of range; the message names the option and the mend.
    """

    tuner: ClassVar[str] = "structured"

    form: Form | UnknownPart = field(
        default_factory=Kronecker,
        metadata={"help": "What the adapter computes: Kronecker(), ScaleShift(), Bottleneck(), ..."},
    )
    sizes: dict[str, list[str | int]] = field(
        default_factory=dict,
        metadata={
            "help": "Module name -> [owner, users, position]: the first of the modules that share tensors with it, how "
            "many they are, and which of them it is. Written at injection, by forms that share."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of what forms draw and no file holds."})
    bias: Literal["none", "all", "structured_only"] = field(
        default="none", metadata={"help": "Which biases train: none, all of the model's, or the adapted layers'."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sharings(self.sizes)
        check_schedule(self.schedule, self)

    def _make_nested(self) -> None:
        self._make_form(Form)

    def group(self, module_name: str, rows: int, cols: int) -> Hashable:
        """Modules of one group share tensors."""
        return self.form.group(Site(module_name, rows, cols, self.seed))

    def site(self, module_name: str, rows: int, cols: int) -> Site:
        """What the form is told of a module.

        Raises:
            ValueError: `sizes` does not say with which modules it shares tensors.
        """
        site = Site(module_name, rows, cols, self.seed)
        if not self.form.shared:
            return site
        if module_name not in self.sizes:
            raise ValueError(
                f"sizes has no entry for '{module_name}', whose tensors are shared: the config is incomplete."
            )
        site = site._replace(sharing=Sharing(*self.sizes[module_name]))
        if not self.form.lists_members:
            return site
        owner = site.sharing.owner
        return site._replace(members=tuple(name for name, (other, *_) in self.sizes.items() if other == owner))
